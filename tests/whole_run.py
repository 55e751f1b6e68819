"""A whole recipe on a tiny random model: every stage real, every stage short."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.forked import python

RECIPE = """
name: tiny
model: {path: model, precision: fp32}  # auto may be measured otherwise by two runs that are compared
sft: {dataset: sft.jsonl, seeds: [0, 1, 2], epochs: 4, learning_rate: 1.0e-2, batch_size: 8,
      max_length: 64, checkpoint_every: 10}
preferences: {dataset: pairs.jsonl}
reward: {epochs: 6, learning_rate: 1.0e-2, batch_size: 8, max_length: 64, checkpoint_every: 10}
rl:
  arms:
    ppo: {init: "sft[0]", reference: "sft[0]"}
    salsa: {init: "sft[0]", reference: soup}
    salsa3: {init: "sft[0]", reference: "soup[0,1,2]"}
  prompts: prompts.jsonl
  seeds: [0, 1]
  kl_coef: 0.05
  num_updates: 12
  rollout_size: 16
  minibatch_size: 8
  learning_rate: 3.0e-3
  max_new_tokens: 8
  checkpoint_every: 3
eval: {prompts: heldout.jsonl, baseline: ppo, kl_to: ["sft[0]", base], scores: {gold: {call: "my_gold:score"}}}
"""
GOLD = "def score(prompts, responses):\n    return [float(r.count('a')) for r in responses]\n"


def write_inputs(folder: Path) -> None:
    """Model, data, callable and recipe of the tiny run."""
    from tests.conftest import tiny_model, tiny_tokenizer

    rng = random.Random(0)
    word = lambda: "".join(rng.choice("abc") for _ in range(rng.randint(1, 6)))
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = {
        "sft": [{"prompt": word(), "completion": word()} for _ in range(160)],
        "pairs": [
            {"prompt": word(), "chosen": "a" + word(), "rejected": "c" + word()} for _ in range(120)
        ],
        "prompts": [{"prompt": word()} for _ in range(60)],
        "heldout": [{"prompt": word()} for _ in range(40)],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    (folder / "my_gold.py").write_text(GOLD)
    (folder / "tiny.yaml").write_text(RECIPE)


def salsa(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command line in `folder`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    return python("-m", "salsa", *arguments, cwd=folder, env=environment)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with everything that the tiny recipe needs."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def finished(inputs: Path) -> Path:
    """The run directory of one uninterrupted run."""
    done = salsa(inputs, "run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    return inputs / "runs" / "tiny"
