"""`salsa init`: five answers in, a commented recipe out that passes `salsa check`. Torch-free."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from salsa.artifacts import EMBEDDED, write_atomic
from salsa.config import Recipe
from salsa.config.schema import check_call, validated
from salsa.errors import ConfigError, accessing

_TEMPLATES = Path(__file__).parent / "assets"
_RATES = {
    True: {"sft": "5.0e-4", "reward": "5.0e-4", "policy": "1.5e-4", "critic": "3.0e-4"},
    False: {"sft": "2.0e-5", "reward": "2.0e-5", "policy": "1.0e-6", "critic": "1.0e-5"},
}
"""Learning rates for the embedded model (3 M parameters), and for models of 100 M and more."""


_COLUMN = 34
"""Where comments start."""


@dataclass(frozen=True)
class Question:
    """One thing that a recipe needs to know."""

    option: str
    text: str
    default: str
    """Of the quickstart's task: five times Enter gives a recipe that runs as it is."""


QUESTIONS = (
    Question("model", "Model: a hub name, a directory, or 'embedded'", EMBEDDED),
    Question(
        "sft",
        "SFT data (rows with messages, or prompt and completion), or finished SFT checkpoints A,B",
        "salsa.demo:sft_replies",
    ),
    Question(
        "reward",
        "Reward: preference pairs (rows with prompt, chosen, rejected), or a function module:score",
        "salsa.demo:gold",
    ),
    Question("prompts", "Prompts for RL (rows with prompt)", "salsa.demo:rl_prompts"),
    Question(
        "heldout",
        "Held-out prompts for the evaluation (rows with prompt)",
        "salsa.demo:eval_prompts",
    ),
)


def answers(given: Mapping[str, str | None], ask: Callable[[str, str], str]) -> dict[str, str]:
    """Option → answer: what is `given`, and for the rest what `ask(question, default)` returns."""
    return {q.option: given.get(q.option) or ask(q.text, q.default).strip() for q in QUESTIONS}


def write_recipe(file: Path, answered: Mapping[str, str], *, force: bool = False) -> list[str]:
    """Write the recipe for the answers; lines that say what is still missing.

    Raises:
        ConfigError: the file exists and `force` is off, or the answers make no sound recipe.
    """
    if file.exists() and not force:
        raise ConfigError(f"{file}: exists. Choose another name, or --force to replace it.")
    text = recipe_text(file, answered)
    validated(Recipe, yaml.safe_load(text), file)
    with accessing(file, "write"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
    return [
        f"{option}: {name} is not here yet"
        for option in ("sft", "reward", "prompts", "heldout")
        for name in answered[option].split(",")
        if name.endswith((".jsonl", ".json", ".parquet", ".gz")) and not Path(name).is_file()
    ]


def recipe_text(file: Path, answered: Mapping[str, str]) -> str:
    """The commented recipe; its name is that of the file."""
    small = answered["model"] == EMBEDDED
    checkpoints = [part.strip() for part in answered["sft"].split(",")]
    values: dict[str, Any] = {
        "file": str(file),
        "name": _quoted(file.stem),
        "small": small,
        "rates": _RATES[small],
        "model": _quoted(answered["model"]),
        "sft_checkpoints": json.dumps(checkpoints) if len(checkpoints) > 1 else None,
        "sft": _source(answered["sft"], limit=1200 if small else None),
        "reward_function": _quoted(answered["reward"]) if _is_call(answered["reward"]) else None,
        "preferences": _source(answered["reward"]),
        "prompts": _source(answered["prompts"]),
        "heldout": _source(answered["heldout"], limit=200),
    }
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("starter.yaml.jinja").render(values)
    return "".join(_aligned(line) + "\n" for line in text.splitlines())


def _aligned(line: str) -> str:
    """The comment behind a line's value in the same column everywhere."""
    code, mark, comment = line.partition(" # ")
    return f"{code.rstrip():<{_COLUMN}}  # {comment}" if mark and code.strip() else line


def _is_call(answer: str) -> bool:
    try:
        check_call(answer)
    except ValueError:
        return False
    return True


def _source(answer: str, limit: int | None = None) -> str:
    """A data source as YAML on one line: a file, a hub data set or `module:function`."""
    kind = "call" if _is_call(answer) else "path"
    short = f", limit: {limit}" if limit else ""
    return f"{{{kind}: {_quoted(answer)}{short}}}"


def _quoted(text: str) -> str:
    """As YAML reads it back: bare where that is the same text."""
    try:
        bare = yaml.safe_load(text) == text and not set(text) & set(":#{}[],&*!|>'\"%@`")
    except yaml.YAMLError:
        bare = False
    return text if bare else json.dumps(text, ensure_ascii=False)
