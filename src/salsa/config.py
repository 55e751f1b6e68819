"""The schema of a recipe: strict, frozen, torch-free. An unknown key is an error that names the nearest valid one.

Core fields come first, every field says what it does, derived numbers are properties. Hyperparameters are ours: the
paper states neither learning rates nor KL coefficients nor batch sizes (docs/method.md).
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from salsa.errors import ConfigError
from salsa.expressions import check_model, ingredients_of
from salsa.rl_config import AdaptiveKL, ArmConfig, LoRAConfig, RLConfig, RLSection
from salsa.schema import (
    Count,
    DataSource,
    Fraction,
    Positive,
    RewardFunction,
    Seeds,
    Strict,
    check_call,
    check_divides,
)

__all__ = [
    "AdaptiveKL", "ArmConfig", "DataSource", "EngineConfig", "EvalConfig", "LoRAConfig", "ModelConfig",
    "PreferencesConfig", "RLConfig", "RLSection", "Recipe", "RewardConfig", "RewardFunction", "SFTConfig",
    "SoupConfig",
]  # fmt: skip


class ModelConfig(Strict):
    """The base that SFT starts from."""

    path: str
    """`embedded`, a directory that save_pretrained wrote, or a hub name such as `HuggingFaceTB/SmolLM2-135M`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    gguf_file: str | None = None
    """Name of a GGUF file in `path`; it is de-quantized to fp32."""
    chat_template: str | None = None
    """Path of a Jinja chat template, for a model that has none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of forward and backward passes; master weights stay fp32. auto: bf16 where the device has it."""

    @field_validator("chat_template")
    @classmethod
    def _template_exists(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_file():
            raise ValueError(f"{value}: no such file. Give the path of a Jinja template")
        return value


class SFTConfig(Strict):
    """Supervised fine-tuning, once per seed, loss on the reply only."""

    dataset: DataSource | None = None
    """Rows with `messages`, or with `prompt` and `completion`."""
    checkpoints: tuple[str, ...] = ()
    """Finished SFT models instead of training: directories or hub names, LoRA adapters too; sft[i] is the i-th."""
    seeds: Seeds = (0, 1)
    """One model per seed (data order); sft[i] is the model of seeds[i]."""
    epochs: Positive = 1.0
    """Passes over the data."""
    learning_rate: Positive = 2.0e-5
    """Peak of the cosine schedule (3 % warm-up)."""
    batch_size: Count = 16
    """Sequences per optimizer step."""
    microbatch_size: Count | None = None
    """Sequences per forward pass; batch_size if not given."""
    max_length: Count = 512
    """Tokens of prompt and reply; longer rows are cut at the end."""
    checkpoint_every: Count = 50
    """Steps between checkpoints; a kill loses at most this many."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (not self.checkpoints):
            raise ValueError(
                "give exactly one of dataset (to train) and checkpoints (trained before)"
            )
        check_divides(self.batch_size, self.microbatch_size, "microbatch_size", "batch_size")
        return self

    @property
    def count(self) -> int:
        """Number of SFT models."""
        return len(self.checkpoints) or len(self.seeds)


class SoupConfig(Strict):
    """The weight average that `soup` stands for; `soup[0,1,2]` is the uniform soup of those SFT models."""

    ingredients: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    """Indices of SFT models."""
    weights: Literal["uniform"] | tuple[float, ...] = "uniform"
    """`uniform`, or one weight an ingredient; they sum to 1."""
    method: Literal["linear", "greedy", "wise", "slerp", "model_stock"] = "linear"
    """How to mix (`salsa.make_soup`)."""
    alpha: Fraction | None = None
    """Of `wise`: the share of the way from the base to the linear soup."""
    score: str | None = None
    """Of `greedy`: `module:function`, the held-out score of a model directory."""

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        for key, method in (("alpha", "wise"), ("score", "greedy")):
            if (getattr(self, key) is not None) != (self.method == method):
                raise ValueError(f"{key} belongs to method={method}, which needs it")
        if self.weights != "uniform" and self.method in ("greedy", "model_stock"):
            raise ValueError(f"method={self.method} finds the weights itself. Leave weights out")
        if self.score is not None:
            check_call(self.score)
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weights == "uniform":
            return self
        if len(self.weights) != len(self.ingredients):
            raise ValueError(
                f"has {len(self.weights)} weights for {len(self.ingredients)} ingredients; give one each"
            )
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights sum to {sum(self.weights):g}, not to 1; scale them")
        return self


class PreferencesConfig(Strict):
    """Synthetic preferences: two replies of the SFT models per prompt, labelled by a noisy scorer."""

    prompts: DataSource
    """Prompts to reply to."""
    labeller: RewardFunction
    """The score that preferences follow (its weight counts)."""
    noise: Positive = 0.2
    """Reply a is preferred with probability sigmoid((score_a - score_b) / noise), in units of the score."""
    temperature: Positive = 1.0
    """Sampling temperature of the replies."""
    seed: int = 0
    """Seed of replies and labels."""
    max_new_tokens: Count = 32
    """Length limit of the replies."""


class RewardConfig(Strict):
    """What PPO maximises: a reward model trained here or before, or callables."""

    dataset: DataSource | None = None
    """Rows with `prompt`, `chosen`, `rejected`."""
    preferences: PreferencesConfig | None = None
    """Make the rows from the SFT models' replies."""
    paths: tuple[str, ...] = ()
    """Finished reward models, sequence classifiers with one label; of several the weight average (WARM)."""
    functions: tuple[RewardFunction, ...] = ()
    """Callables; their weighted scores are summed, and each is logged."""
    init: str = "sft[0]"
    """Model whose trunk the reward model starts from."""
    epochs: Positive = 1.0
    """Passes over the pairs."""
    learning_rate: Positive = 2.0e-5
    """Peak of the cosine schedule (3 % warm-up)."""
    batch_size: Count = 16
    """Pairs per optimizer step."""
    max_length: Count = 512
    """Tokens of prompt and reply; longer pairs are dropped."""
    seeds: Seeds = (0,)
    """One reward model per seed (head and data order); of several the weight average (WARM)."""
    split_seed: int = 0
    """Which pairs are kept back: the same ones for every seed."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the pairs kept back to measure the accuracy on."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.dataset, self.preferences, self.paths, self.functions]
        if sum(bool(source) for source in given) != 1:
            raise ValueError("give exactly one of dataset, preferences, paths and functions")
        return self

    @field_validator("init")
    @classmethod
    def _init(cls, value: str) -> str:
        return check_model(value)


class EvalConfig(Strict):
    """Every arm on the same held-out prompts."""

    prompts: DataSource
    """Rows with `prompt`."""
    baseline: str
    """The arm that the others are compared with."""
    anchor: str = "sft[0]"
    """The one model to which every arm's KL is measured, so that arms compare; also shown as the arm `sft`."""
    scores: dict[str, RewardFunction] = Field(default={})
    """Further scores besides the training reward (the proxy), e.g. `gold`."""
    max_new_tokens: Count | None = None
    """Length limit of a response; RL's if not given."""
    batch_size: Count = 64
    """Responses per forward pass."""
    seed: int = 1000
    """Seed of the sampling."""

    @field_validator("anchor")
    @classmethod
    def _anchor(cls, value: str) -> str:
        return check_model(value)


class EngineConfig(Strict):
    """Where it runs."""

    kind: Literal["local"] = "local"
    """`local`: one process."""
    threads: Count | None = None
    """CPU threads; PyTorch's choice if not given."""


class Recipe(Strict):
    """Everything that `salsa run` needs to know."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    """Name of the run; it lands in runs/<name>."""
    model: ModelConfig
    sft: SFTConfig
    soup: SoupConfig = SoupConfig()
    reward: RewardConfig
    rl: RLSection
    eval: EvalConfig
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _references_exist(self) -> Self:
        if self.eval.baseline not in self.rl.arms:
            raise ValueError(
                f"eval.baseline={self.eval.baseline!r} is not an arm. {_nearest(self.eval.baseline, self.rl.arms)}"
            )
        for where, expression in self.expressions():
            for index in ingredients_of(expression, self.soup.ingredients):
                if index >= self.sft.count:
                    raise ValueError(
                        f"{where}={expression!r} needs sft[{index}], but there are {self.sft.count} SFT models "
                        f"(sft[0] to sft[{self.sft.count - 1}]). Add a seed to sft.seeds or choose another."
                    )
        return self

    def expressions(self) -> Iterator[tuple[str, str]]:
        """Every (place, model expression) of the recipe."""
        for name, arm in self.rl.arms.items():
            yield f"rl.arms.{name}.init", arm.init
            for model in arm.anchor.models:
                yield f"rl.arms.{name}.reference", model
        yield "eval.anchor", self.eval.anchor
        if not (self.reward.paths or self.reward.functions):
            yield "reward.init", self.reward.init

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and apply `key=value` overrides (dotted keys, YAML values).

        Raises:
            ConfigError: the file is missing, is not YAML, or a value is wrong; one line that says which.
        """
        path = Path(path)
        if not path.is_file():
            near = (
                _nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
                if path.parent.is_dir()
                else ""
            )
            raise ConfigError(f"{path}: no such recipe. {near or 'Give the path of a YAML file.'}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: a recipe is a mapping of sections, got {type(values).__name__}."
            )
        for override in overrides:
            apply_override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{path}: {explain(error, cls)}") from error

    def to_yaml(self) -> str:
        """The resolved recipe: every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(words))}."


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a dotted key of nested dictionaries from `key=value`, the value in YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, e.g. rl.kl_coef=0.1")
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"] if part != "function-before[_from_string()")
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1], root)
        text = f"unknown key {where!r}. {_nearest(str(first['loc'][-1]), known)}"
    elif first["type"] == "missing":
        text = f"{where} is missing. Add it."
    elif first["type"] == "value_error":
        text = f"{where + ': ' if where else ''}{first['ctx']['error']}"
        text += "" if text.endswith((".", "?")) else "."
    else:
        text = f"{where}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
    return text + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _fields_at(location: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """Names of the keys that are valid at a place under `root`."""
    model: Any = root
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _model_in(model.model_fields[str(part)].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The pydantic model inside an annotation such as `dict[str, ArmConfig]` or `DataSource | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_in(argument)) is not None:
            return found
    return None
