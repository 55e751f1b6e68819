"""What `salsa eval` of checkpoints is asked to do, and its words → an `EvalSpec`: strict, frozen, like a recipe.

Torch-free: a slip of the pen is told before anything loads.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from salsa.config import DataSource, RewardFunction, Strict
from salsa.config.recipe import apply_override
from salsa.config.schema import Count, NonNegative, Positive, explain
from salsa.errors import ConfigError
from salsa.untrusted import read_yaml

MT_BENCH_SOURCE = "github.com/lm-sys/FastChat, fastchat/llm_judge/data"
ARENA_HARD_SOURCE = "github.com/lmarena/arena-hard-auto"

_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.+ -]*")


class JudgeConfig(Strict):
    """Who compares answers: an OpenAI-compatible endpoint, a model in this process, or a file of judgments."""

    url: str | None = None
    """Base URL of an endpoint, e.g. http://localhost:8000/v1 (vLLM, llama.cpp, Ollama, vendors)."""
    path: str | None = None
    """Model directory or hub name, judged with in this process."""
    replay: str | None = None
    """A judgments file in FastChat's or Arena-Hard's format: nothing is asked, its texts are read again."""
    model: str | None = None
    """The endpoint's name of the model; names the judge in files and tables."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; local servers need none."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0 is greedy."""
    max_tokens: Count = 2048
    """Length limit of a judgment."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Further parameters of the request; null takes one away, e.g. {temperature: null} for models that refuse it."""
    concurrency: Count = 16
    """Requests under way at once, or judgments per batch in this process."""
    timeout: Positive = 120.0
    """Seconds until a request is given up and tried again."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Further tries after 408, 409, 429, 5xx, time-outs, broken connections and unusable replies."""
    price: tuple[NonNegative, NonNegative] | None = None
    """Price of a million prompt tokens and of a million completion tokens, for the total."""

    @model_validator(mode="after")
    def _one_backend(self) -> Self:
        if sum(value is not None for value in (self.url, self.path, self.replay)) != 1:
            raise ValueError("give exactly one of url, path and replay")
        if self.url is not None and self.model is None:
            raise ValueError("an endpoint needs the name of its model; give model")
        if self.parameters and self.url is None:
            raise ValueError(
                "parameters are those of an endpoint's request. Give url, or leave them out"
            )
        return self

    @property
    def request(self) -> dict[str, Any]:
        """Parameters of every request: they decide a judgment, so they are part of its key."""
        values = {"temperature": self.temperature, "max_tokens": self.max_tokens} | self.parameters
        return {name: value for name, value in values.items() if value is not None}


class MTBenchConfig(Strict):
    """MT-Bench; the files are upstream's (`MT_BENCH_SOURCE`)."""

    questions: str
    """`question.jsonl`."""
    judge_prompts: str
    """`judge_prompts.jsonl`."""
    references: str
    """`reference_answer/gpt-4.jsonl`."""
    corrections: str | None = None
    """Answers that replace wrong references, in the same format."""
    max_new_tokens: Count = 1024
    """Length limit of an answer."""


class ArenaHardConfig(Strict):
    """Arena-Hard; the files are upstream's (`ARENA_HARD_SOURCE`)."""

    questions: str
    """`question.jsonl`."""
    judge_prompt: str
    """YAML with `system_prompt` and `prompt_template`, such as v0.1's `config/judge_config.yaml`."""
    baseline: str | None = None
    """Upstream's `model_answer/<baseline>.jsonl`; the evaluation's own baseline arm if not given."""
    max_new_tokens: Count = 4096
    """Length limit of an answer."""
    temperature: NonNegative = 0.0
    """Sampling temperature of the answers."""


class PromptsConfig(Strict):
    """Held-out prompts of any kind, e.g. UltraFeedback's; every arm answers, pairs are played by each reward."""

    source: DataSource
    """Rows with `prompt`, or `messages` whose last turn is the user's."""
    judge_prompts: str | None = None
    """MT-Bench's `judge_prompts.jsonl`, to let the judge compare answers with its `pair-v2`."""
    max_new_tokens: Count = 256
    """Length limit of a response."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are dropped (and counted)."""
    temperature: Positive = 1.0
    """Sampling temperature; KL is measured under it."""


class RewardModel(Strict):
    """A reward to score with: a sequence classifier with one label, or a callable."""

    path: str | None = None
    """Directory or hub name of a reward model."""
    call: str | None = None
    """`module:function`, as in a recipe."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.path is None) == (self.call is None):
            raise ValueError("give exactly one of path and call")
        if self.call is not None:
            RewardFunction(call=self.call)
        return self


class EvalSpec(Strict):
    """Checkpoints, what they answer, and who compares."""

    name: str = "evaluation"
    """Title of the report."""
    models: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    """Arm → its checkpoints, one a training seed; directories or hub names."""
    baseline: str | None = None
    """The arm that the others are compared with; the first if not given."""
    prompts: PromptsConfig | None = None
    mt_bench: MTBenchConfig | None = None
    arena_hard: ArenaHardConfig | None = None
    judge: JudgeConfig | None = None
    rewards: dict[str, RewardModel] = Field(default_factory=dict)
    """Name → reward. Call the one that training raised `proxy`, and give one that it did not see."""
    kl_to: str | None = None
    """The one model to which every arm's KL is measured on `prompts`."""
    batch_size: Count = 16
    """Responses per forward pass."""
    seed: int = 1000
    """Seed of the sampling; the k-th seed of an arm uses seed + k."""
    precision: str = Field(default="auto", pattern="^(auto|fp32|bf16)$")
    """Compute type of forward passes."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        arena, benchmark = self.arena_hard, self.mt_bench or self.arena_hard
        judged_prompts = self.prompts and self.prompts.judge_prompts
        pairwise = {
            "mt_bench": self.mt_bench,
            "arena_hard": arena and arena.baseline is None,
            "prompts.judge_prompts": judged_prompts and self.judge,
        }
        alone = len(self.models) == 1 and next((name for name in pairwise if pairwise[name]), None)
        another = "model, or arena_hard.baseline" if alone == "arena_hard" else "model"
        odd = next((m for m in self.models if not _FILE_NAME.fullmatch(m)), None)
        mistakes = {
            f"models: {odd!r} would name files; use letters, digits, spaces, . _ + -":
                odd is not None,
            f"baseline={self.baseline!r} is none of the models ({', '.join(self.models)})":
                self.baseline is not None and self.baseline not in self.models,
            "nothing to answer; give prompts, mt_bench or arena_hard":
                not (self.prompts or benchmark),
            "MT-Bench and Arena-Hard need a judge": benchmark and not self.judge,
            "every arm needs equally many checkpoints (the k-th seed of one meets the k-th of another)":
                len({len(paths) for paths in self.models.values()}) > 1,
            "prompts need a reward, or a judge with prompts.judge_prompts":
                self.prompts and not (self.rewards or (self.judge and judged_prompts)),
            "the judge has nothing to judge; give prompts.judge_prompts":
                self.judge and not (benchmark or judged_prompts),
            "kl_to is measured on prompts; give prompts":
                self.kl_to is not None and self.prompts is None,
            f"{alone} compares models in pairs, and there is only {self.against!r}; give a second {another}":
                alone,
        }  # fmt: skip
        for mistake, made in mistakes.items():
            if made:
                raise ValueError(mistake)
        return self

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> "EvalSpec":
        """The evaluation that `values` describe; ConfigError, in one line, if a value is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {explain(error, cls)}") from error

    def to_yaml(self) -> str:
        """What was asked for, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)

    @property
    def against(self) -> str:
        """The baseline arm."""
        return self.baseline or next(iter(self.models))


def spec_of(
    models: Sequence[str],
    *,
    spec: Path | None = None,
    prompts: str | None = None,
    mt_bench: Path | None = None,
    arena_hard: Path | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    rewards: Sequence[str] = (),
    kl_to: str | None = None,
    baseline: str | None = None,
    settings: Sequence[str] = (),
) -> EvalSpec:
    """What the options of `salsa eval` ask for, as typed; ConfigError if something is missing or cannot be meant."""
    values = read_yaml(spec, "cannot be read", "an evaluation is a mapping") if spec else {}
    if models:
        values["models"] = _models(models)
    kind = "replay" if judge and judge.endswith(".jsonl") else "path"
    if judge and judge.startswith(("http://", "https://")):
        kind = "url"
    sections: dict[str, dict[str, Any]] = {
        "prompts": {"source": prompts},
        "mt_bench": {} if mt_bench is None else _files(
            mt_bench, "mt_bench", MT_BENCH_SOURCE, questions="question.jsonl",
            references="reference_answer/gpt-4.jsonl", judge_prompts="judge_prompts.jsonl",
        ),
        "arena_hard": {} if arena_hard is None else _files(
            arena_hard, "arena_hard", ARENA_HARD_SOURCE, questions="question.jsonl",
            judge_prompt="judge_config.yaml",
        ),
        "judge": {kind: judge, "model": judge_model},
        "rewards": dict(map(_reward, rewards)),
    }  # fmt: skip
    for name, section in sections.items():
        if given := {key: value for key, value in section.items() if value}:
            known = values.setdefault(name, {})
            if not isinstance(known, dict):
                raise ConfigError(f"{name} is a value, not a section.")
            known.update(given)
    values |= {k: v for k, v in (("kl_to", kl_to), ("baseline", baseline)) if v}
    for setting in settings:
        apply_override(values, setting)
    return EvalSpec.read(values, str(spec or "salsa eval"))


def _models(words: Sequence[str]) -> dict[str, list[str]]:
    """NAME=DIRECTORY, a bare directory (named after itself), or a run directory (its arms)."""
    arms: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            name, path = Path(word).name, word
        if not name or not path:
            raise ConfigError(f"{word!r}: write NAME=DIRECTORY, a directory, or a run directory.")
        is_run = not equals and (Path(word) / "stages").is_dir()
        for arm, paths in (run_arms(Path(word)) if is_run else {name: [path]}).items():
            arms.setdefault(arm, []).extend(paths)
    return arms


def run_arms(run: Path) -> dict[str, list[str]]:
    """Arm → its policies' directories, a training seed each; `sft` is where the run measures KL to.

    ConfigError: the run has no report yet, or a policy is no longer there.
    """
    file = run / "report.json"
    if not file.is_file():
        raise ConfigError(
            f"{run}: no report.json, so the run is not finished. Finish it: salsa run."
        )
    report = json.loads(file.read_text(encoding="utf-8"))
    by_output = {
        json.loads(stage.read_text(encoding="utf-8"))["output"]: str(stage.parent)
        for stage in (run / "stages").glob("*/stage.json")
    }
    policies = {}
    for arm, record in report["arms"].items():
        wanted = [seed["policy"] for seed in record["seeds"]]
        missing = [output for output in wanted if output not in by_output]
        if missing and record["trained"]:
            raise ConfigError(
                f"{run}: the policy of {arm} ({missing[0][:12]}) is gone. Run its recipe again, or name directories."
            )
        if found := [by_output[output] for output in wanted if output in by_output]:
            policies[arm] = found
    return policies


def _files(folder: Path, benchmark: str, source: str, **names: str) -> dict[str, str]:
    """A benchmark's files in upstream's layout; judge_prompts.jsonl may lie beside FastChat's `folder`."""
    files = {}
    for name, file in names.items():
        path = folder / file
        if name == "judge_prompts" and not path.exists():
            path = folder.parent / file
        if not path.is_file():
            raise ConfigError(
                f"{path}: not there. Take it from {source}, or name the files one by one: --set {benchmark}.{name}=PATH"
            )
        files[name] = str(path)
    return files


def _reward(word: str) -> tuple[str, dict[str, str]]:
    name, equals, target = word.partition("=")
    if not equals:
        raise ConfigError(f"--reward {word!r}: write NAME=DIRECTORY or NAME=module:function.")
    return name, {"path" if Path(target).is_dir() or ":" not in target else "call": target}
