"""Bytes between the processes of a PPO job, and a rank's share of the weights, as planned and as counted.

    python benchmarks/traffic.py [--width 192] [--processes 2 4]

A PPO job on a random Llama in fp32, its processes on this machine. Counted are the bytes that cross the loopback
interface in the updates after the first, all ranks together: everything that gloo sends, so nothing else may use it
meanwhile. Planned is `salsa.planner.work.rl_work`, and a gather of the policy a rollout. Prints one JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import say
from processes import ends_anywhere
from scaling import PROMPT, VOCABULARY, write_model

from salsa import rl
from salsa.artifacts import Checkpoint, read_jsonl, write_jsonl
from salsa.config import RLConfig
from salsa.data import Prompt
from salsa.planner.memory import Rank
from salsa.planner.shapes import shape_of
from salsa.planner.work import rl_work, traffic
from salsa.runtime.engine import Engine
from salsa.runtime.launch import run_in_processes

NEW_TOKENS, UPDATES = 8, 3


def config_of(job: dict[str, Any], updates: int = UPDATES) -> RLConfig:
    """The job's settings."""
    return RLConfig(
        kl_coef=0.05, num_updates=updates, rollout_size=job["episodes"], max_new_tokens=NEW_TOKENS,
        microbatch_tokens=job["microbatch_tokens"], checkpoint_every=10**6, monitor_kl_every=10**6,
    )  # fmt: skip


def loopback() -> int:
    """Bytes that the loopback interface has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("no loopback interface is in /proc/net/dev")


def train(directory: Path, job: dict[str, Any], engine: Engine) -> None:
    """The updates; rank 0 notes the bytes after each, and what its share of policy and critic weighs."""
    rng = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(tuple(torch.randint(9, VOCABULARY, (PROMPT,), generator=rng).tolist()), None, "")
        for _ in range(job["episodes"])
    ]
    model, carried, shares = Checkpoint.of(Path(job["model"])), [], []
    advance = rl.advance

    def noted(models: Any, *args: Any) -> Any:
        done = advance(models, *args)
        engine.max(0.0)
        carried.append(loopback())
        local = lambda p: p.to_local() if hasattr(p, "to_local") else p
        learns = [p for learner in models.learners.values() for p in learner.model.parameters()]
        shares.append(sum(local(p).nbytes for p in learns))
        return done

    rl.advance = noted
    setup = rl.RLSetup("traffic", model, model, model, config_of(job), prompts, ends_anywhere, 0)
    try:
        rl.train_rl(setup, directory, engine)
    finally:
        rl.advance = advance
    if engine.is_main:
        rows = [{"bytes": b, "share": s} for b, s in zip(carried, shares, strict=True)]
        write_jsonl(directory / "carried.jsonl", rows)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--microbatch-tokens", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        job = vars(args) | {"model": f"{folder}/model"}
        parameters = write_model(args.width, Path(job["model"]))
        shape = shape_of(job["model"])
        for count in (1, *args.processes):
            place = Path(folder) / str(count)
            place.mkdir()
            run_in_processes(
                train, place, job, Engine.create("fp32", threads=count), processes=count
            )
            rows = read_jsonl(place / "carried.jsonl")
            counted = (rows[-1]["bytes"] - rows[0]["bytes"]) / (UPDATES - 1)
            on = Rank("fp32", count, on_cpu=True)
            one = rl_work(shape, config_of(job, 1), PROMPT, NEW_TOKENS, 1, None, on).traffic
            one += traffic(shape, on, 1, gathers=1, scatters=False)
            found.append({
                "processes": count, "counted_mb": round(counted / 1e6, 2), "planned_mb": round(count * one / 1e6, 2),
                "ratio": round(count * one / counted, 3) if count > 1 else None,
                "share_of_weights": round(rows[0]["share"] / found[0]["bytes_of_weights"], 4) if found else 1.0,
                "bytes_of_weights": rows[0]["share"],
            })  # fmt: skip
            say(json.dumps(found[-1]))
    print(json.dumps({"benchmark": "traffic", "parameters": parameters, "found": found}))


if __name__ == "__main__":
    main()
