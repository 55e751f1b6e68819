"""The words of `salsa eval` → an `EvalSpec`. Torch-free: a slip of the pen is told before anything loads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salsa.config.recipe import apply_override
from salsa.errors import ConfigError
from salsa.evaluate.spec import EvalSpec


@dataclass(frozen=True)
class EvalWords:
    """Options of `salsa eval` as they were typed."""

    models: Sequence[str]
    spec: Path | None = None
    prompts: str | None = None
    mt_bench: Path | None = None
    arena_hard: Path | None = None
    judge: str | None = None
    judge_model: str | None = None
    rewards: Sequence[str] = ()
    kl_to: str | None = None
    baseline: str | None = None
    settings: Sequence[str] = ()


def spec_of(words: EvalWords) -> EvalSpec:
    """The evaluation that the words ask for.

    Raises:
        ConfigError: something is missing or cannot be meant.
    """
    values = _read_spec(words.spec) if words.spec else {}
    if words.models:
        values["models"] = _models(words.models)
    if words.prompts:
        _section(values, "prompts")["source"] = words.prompts
    if words.mt_bench:
        _section(values, "mt_bench").update(_mt_bench(words.mt_bench))
    if words.arena_hard:
        _section(values, "arena_hard").update(_arena_hard(words.arena_hard))
    if words.judge:
        _section(values, "judge")[_judge_kind(words.judge)] = words.judge
    if words.judge_model:
        _section(values, "judge")["model"] = words.judge_model
    for reward in words.rewards:
        name, equals, target = reward.partition("=")
        if not equals:
            raise ConfigError(f"--reward {reward!r}: write NAME=DIRECTORY or NAME=module:function.")
        kind = "path" if Path(target).is_dir() or ":" not in target else "call"
        _section(values, "rewards")[name] = {kind: target}
    for name, value in (("kl_to", words.kl_to), ("baseline", words.baseline)):
        if value:
            values[name] = value
    for setting in words.settings:
        apply_override(values, setting)
    return EvalSpec.read(values, str(words.spec or "salsa eval"))


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: an evaluation is a mapping, got {type(values).__name__}.")
    return values


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{name} is a value, not a section.")
    return section


def _models(words: Sequence[str]) -> dict[str, list[str]]:
    """NAME=DIRECTORY, a bare directory (named after itself), or a run directory (its arms)."""
    arms: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            name, path = Path(word).name, word
            if (Path(word) / "stages").is_dir():
                for arm, checkpoints in run_arms(Path(word)).items():
                    arms.setdefault(arm, []).extend(checkpoints)
                continue
        if not name or not path:
            raise ConfigError(f"{word!r}: write NAME=DIRECTORY, a directory, or a run directory.")
        arms.setdefault(name, []).append(path)
    return arms


def run_arms(run: Path) -> dict[str, list[str]]:
    """Arm → its policies' directories, a training seed each, of a finished run; `sft` is where it measures KL to.

    Raises:
        ConfigError: the run has no report yet, or a policy is no longer there.
    """
    file = run / "report.json"
    if not file.is_file():
        raise ConfigError(
            f"{run}: no report.json, so the run is not finished. Finish it: salsa run."
        )
    report = json.loads(file.read_text(encoding="utf-8"))
    by_output = {
        record["output"]: folder.parent
        for folder in (run / "stages").glob("*/stage.json")
        if (record := json.loads(folder.read_text(encoding="utf-8")))
    }
    policies = {}
    for arm, record in report["arms"].items():
        wanted = [seed["policy"] for seed in record["seeds"]]
        if not record["trained"]:
            wanted = [output for output in wanted if output in by_output]
        missing = [output for output in wanted if output not in by_output]
        if missing:
            raise ConfigError(
                f"{run}: the policy of {arm} ({missing[0][:12]}) is gone. Run its recipe again, or name directories."
            )
        if wanted:
            policies[arm] = [str(by_output[output]) for output in wanted]
    return policies


def _mt_bench(folder: Path) -> dict[str, str]:
    """FastChat's layout: question.jsonl, reference_answer/gpt-4.jsonl, judge_prompts.jsonl here or beside."""
    prompts = folder / "judge_prompts.jsonl"
    if not prompts.exists():
        prompts = folder.parent / "judge_prompts.jsonl"
    files = {
        "questions": folder / "question.jsonl",
        "references": folder / "reference_answer" / "gpt-4.jsonl",
        "judge_prompts": prompts,
    }
    return _existing(files, "mt_bench", "github.com/lm-sys/FastChat, fastchat/llm_judge/data")


def _arena_hard(folder: Path) -> dict[str, str]:
    files = {"questions": folder / "question.jsonl", "judge_prompt": folder / "judge_config.yaml"}
    return _existing(files, "arena_hard", "github.com/lmarena/arena-hard-auto")


def _existing(files: dict[str, Path], section: str, source: str) -> dict[str, str]:
    for name, path in files.items():
        if not path.is_file():
            raise ConfigError(
                f"{path}: not there. Take it from {source}, or name the files one by one: --set {section}.{name}=PATH"
            )
    return {name: str(path) for name, path in files.items()}


def _judge_kind(judge: str) -> str:
    if judge.startswith(("http://", "https://")):
        return "url"
    return "replay" if judge.endswith(".jsonl") else "path"
