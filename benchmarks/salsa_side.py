"""Our half of ppo_vs_trl.py, in a process of its own: `python salsa_side.py JOB.json`."""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from salsa import rl
from salsa.artifacts import Checkpoint, read_jsonl
from salsa.config import RLConfig
from salsa.data import Prompt
from salsa.models import RewardModel, load_tokenizer
from salsa.runtime.engine import Engine
from salsa.runtime.meter import peak_memory_gb
from salsa.runtime.tracking import quiet_libraries


def main() -> None:
    """One update to warm up, then `job.updates` that count; every update sees the same prompts."""
    job = json.loads(Path(sys.argv[1]).read_text())
    quiet_libraries()
    model, scorer = Path(job["model"]), Path(job["scorer"])
    tokenizer = load_tokenizer(model)
    engine = Engine.create("bf16" if job["bf16"] else "fp32")
    config = RLConfig(
        kl_coef=job["kl_coef"],
        num_updates=job["updates"] + 1,
        rollout_size=len(job["prompts"]),
        num_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        max_new_tokens=job["new_tokens"],
        temperature=job["temperature"],
        checkpoint_every=10**6,
        **job.get("config", {}),
    )
    checkpoint = Checkpoint.of(model)
    prompts = [Prompt(tuple(ids), None, tokenizer.decode(ids)) for ids in job["prompts"]]
    setup = rl.RLSetup(
        "ppo",
        checkpoint,
        checkpoint,
        Checkpoint.of(scorer),
        config,
        prompts,
        RewardModel.load(scorer, engine),
        job["seed"],
    )
    stops, cpu_stops, advance = [], [], rl.advance

    def timed_advance(*args):
        """What an update does last, and the time."""
        progress = advance(*args)
        stops.append(time.perf_counter())
        cpu_stops.append(time.process_time())
        return progress

    rl.advance = timed_advance
    with tempfile.TemporaryDirectory() as folder:
        rl.train_rl(setup, Path(folder), engine)
        rows = read_jsonl(Path(folder) / "metrics.jsonl")
    phases = [
        {
            key: row[key]
            for key in row
            if key.startswith(("seconds_", "mfu_", "tokens_per_second_", "peak_"))
        }
        for row in rows
    ]
    result = {
        "seconds": [b - a for a, b in pairwise(stops)],
        "cpu_seconds": [b - a for a, b in pairwise(cpu_stops)],
        "phases": phases[1:],
        "peak_gb": peak_memory_gb(engine),
        "kl": [row["kl"] for row in rows],
        "length": [row["length"] for row in rows],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
