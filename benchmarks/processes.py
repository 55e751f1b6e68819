"""What a second process brings to an RL job: 2 processes × 1 thread against 1 × 1 thread, alternately.

    python benchmarks/processes.py [--width 384] [--rounds 2] [--no-wrapped]

A PPO update (rollout, experience, update) on a random Llama, in fp32. Efficiency is t₁ / (2·t₂) of the median update;
it needs two cores that nothing else uses. It grows with the tokens of a pass, for weights are gathered once a pass.
`efficiency_cpu`, of rank 0's CPU seconds, is what a busy machine can say. A third arm, one process whose models are
wrapped by FSDP2 all the same, says what one code path for all would cost, and whether its digits are those of one
process. Prints one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import say
from scaling import PROMPT, VOCABULARY, write_model

from salsa import rl
from salsa.artifacts import Checkpoint, read_jsonl, write_jsonl
from salsa.config import RLConfig
from salsa.data import Prompt
from salsa.runtime.engine import Engine
from salsa.runtime.launch import Member, joined, run_in_processes

PHASES = ("rollout", "experience", "update")
ARMS = {"1 process": 1, "2 processes": 2, "1 process, wrapped": 1}


def ends_anywhere(prompts: list[Prompt], responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(response) % 7) for response in responses]


def train(directory: Path, job: dict[str, Any], engine: Engine) -> None:
    """The updates of one arm, in this process or this process's part of them."""
    if not job["wrapped"]:
        return _train(directory, job, engine)
    store = torch.distributed.TCPStore("localhost", 0, 1, is_master=True)
    with joined(engine, Member(0, 1, 0, 1, store), 60.0) as alone:
        _train(directory, job, alone)


def _train(directory: Path, job: dict[str, Any], engine: Engine) -> None:
    rng = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(tuple(torch.randint(9, VOCABULARY, (PROMPT,), generator=rng).tolist()), None, "")
        for _ in range(job["episodes"])
    ]
    model, cpu = Checkpoint.of(Path(job["model"])), [time.process_time()]
    config = RLConfig(
        kl_coef=0.05,
        num_updates=job["updates"] + 1,
        rollout_size=job["episodes"],
        max_new_tokens=job["new_tokens"],
        microbatch_tokens=job["microbatch_tokens"],
        checkpoint_every=10**6,
    )
    advance = rl.advance

    def timed(*args: Any) -> Any:
        """What an update does last, and this process's CPU seconds so far."""
        cpu.append(time.process_time())
        return advance(*args)

    rl.advance = timed
    setup = rl.RLSetup("processes", model, model, model, config, prompts, ends_anywhere, 0)
    try:
        rl.train_rl(setup, directory, engine)
    finally:
        rl.advance = advance
    seconds = [b - a for a, b in pairwise(cpu[1:])]
    write_jsonl(directory / f"cpu-{engine.rank}.jsonl", [{"seconds": s} for s in seconds])


def measured(directory: Path) -> dict[str, list[float]]:
    """Seconds of the updates after the first, of their phases, and CPU seconds of rank 0."""
    rows = read_jsonl(directory / "metrics.jsonl")[1:]
    found = {phase: [row[f"seconds_{phase}"] for row in rows] for phase in PHASES}
    found["all"] = [sum(values) for values in zip(*found.values(), strict=True)]
    found["cpu"] = [row["seconds"] for row in read_jsonl(directory / "cpu-0.jsonl")]
    return found


def digits(directory: Path) -> list[Any]:
    """What a run logged, without what may differ between equal runs."""
    times = ("seconds_", "tokens_per_second_", "mfu_", "peak_memory_gb_")
    rows = read_jsonl(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-wrapped", action="store_true")
    args = parser.parse_args()
    engine = Engine.create("fp32", threads=1)
    arms = {name: n for name, n in ARMS.items() if not (args.no_wrapped and "wrapped" in name)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        job = vars(args) | {"model": f"{folder}/model"}
        parameters = write_model(args.width, Path(job["model"]))
        for number in range(args.rounds):
            for name, processes in arms.items():
                place = Path(folder) / f"{name} {number}"
                place.mkdir()
                # each process gets one thread
                mine, wrapped = Engine.create("fp32", threads=processes), "wrapped" in name
                call = train, place, job | {"wrapped": wrapped}, mine
                run_in_processes(*call, processes=processes)
                for what, values in measured(place).items():
                    found[name].setdefault(what, []).extend(values)
                say(f"round {number}, {name}: {statistics.median(found[name]['all']):.2f} s")
        torch.set_num_threads(engine.threads)
        first, wrapped_place = (
            Path(folder) / f"{n} 0" for n in ("1 process", "1 process, wrapped")
        )
        same = digits(first) == digits(wrapped_place) if len(arms) > 2 else None
    median = {n: {k: statistics.median(v) for k, v in of.items()} for n, of in found.items()}
    one, two = median["1 process"], median["2 processes"]
    result: dict[str, Any] = {
        "benchmark": "processes",
        "parameters": parameters,
        "updates": args.updates * args.rounds,
        "efficiency": round(one["all"] / (2 * two["all"]), 3),
        "efficiency_cpu": round(one["cpu"] / (2 * two["cpu"]), 3),
        "efficiency_of": {p: round(one[p] / (2 * two[p]), 3) for p in PHASES},
        "seconds": {name: {k: round(v, 3) for k, v in of.items()} for name, of in median.items()},
    }
    if same is not None:
        wrapped = median["1 process, wrapped"]
        result["wrapped_alone_takes"] = round(wrapped["all"] / one["all"], 3)
        result["wrapped_alone_takes_cpu"] = round(wrapped["cpu"] / one["cpu"], 3)
        result["wrapped_alone_has_the_same_digits"] = same
    print(json.dumps(result))


if __name__ == "__main__":
    main()
