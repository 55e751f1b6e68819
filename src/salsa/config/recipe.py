"""A recipe: everything that `salsa run` needs to know. An unknown key is an error that names the nearest valid one.

Core fields come first, every field says what it does, derived numbers are properties. Hyperparameters are ours: the
paper states neither learning rates nor KL coefficients nor batch sizes (docs/method.md).
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from salsa.config.engine import EngineConfig
from salsa.config.evaluation import EvalConfig
from salsa.config.expressions import Model, parse_model, sft_indices, text_of
from salsa.config.forecast import ForecastConfig
from salsa.config.landscape import LandscapeConfig
from salsa.config.legacy import upgraded
from salsa.config.model import ModelConfig
from salsa.config.preferences import PreferencesConfig
from salsa.config.reward import RewardConfig
from salsa.config.rl import RLConfig, RLSection
from salsa.config.schema import Execution, Input, Strict, nearest, validated
from salsa.config.sft import SFTConfig
from salsa.config.soup import SoupConfig
from salsa.errors import ConfigError
from salsa.untrusted import read_yaml, yaml_value


class Recipe(Strict):
    """Everything that `salsa run` needs to know."""

    name: Input[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]]
    """Name of the run; it lands in `runs/<name>`."""
    model: ModelConfig
    """`base`: what SFT starts from."""
    sft: SFTConfig
    """`sft[0]`, `sft[1]`, …: fine-tuned models of several seeds, or finished ones."""
    soup: SoupConfig = SoupConfig()
    """`soup`: which SFT models are averaged, and how."""
    preferences: PreferencesConfig | None = None
    """Pairs of replies for the reward model and DPO arms; None where nothing learns from any."""
    reward: RewardConfig = RewardConfig()
    """What RL maximises."""
    rl: RLSection
    """The arms that are compared, and their training."""
    eval: EvalConfig
    """Held-out prompts, scores and the models that the KL is measured to."""
    forecast: Execution[ForecastConfig | None] = None
    """If given, `salsa run` forecasts before RL and the report shows it; it decides nothing of the other stages."""
    landscape: Execution[LandscapeConfig | None] = None
    """Where `salsa landscape` looks; it decides nothing of the other stages."""
    engine: EngineConfig = EngineConfig()
    """Where and how much at once; it decides nothing of a result."""
    track: Execution[tuple[Literal["tensorboard", "wandb", "trackio"], ...]] = ()
    """Where metrics are sent besides the run directory, each an extra of that name; see `runtime.trackers`."""

    @model_validator(mode="after")
    def _references_exist(self) -> Self:
        if self.eval.baseline not in self.rl.arms:
            raise ValueError(
                f"eval.baseline={self.eval.baseline!r} is not an arm. {nearest(self.eval.baseline, self.rl.arms)}"
            )
        for name in self.rl.arms:
            config = self.rl.config_of(name)
            known = ("reward", "score", *self.eval.score_names)
            if isinstance(config, RLConfig) and config.selection.metric not in known:
                wrong = config.selection.metric
                raise ValueError(
                    f"rl.select.metric={wrong!r} is neither reward, score nor a name under eval.scores or "
                    f"eval.reward_models. "
                    f"{nearest(wrong, known)}"
                )
            if isinstance(config, RLConfig) and config.vllm and self.engine.processes > 1:
                raise ValueError(
                    f"engine.processes={self.engine.processes}: weights are pushed to the server of rl.vllm by one "
                    "process. Set processes to 1, or remove rl.vllm"
                )
        for where, model in self.expressions():
            for index in sft_indices(model, self.soup.ingredients):
                if index >= self.sft.count:
                    raise ValueError(
                        f"{where} needs sft[{index}], but there are {self.sft.count} SFT models "
                        f"(sft[0] to sft[{self.sft.count - 1}]). Add a seed to sft.seeds or choose another."
                    )
        dpo = [name for name, arm in self.rl.arms.items() if arm.method == "dpo"]
        if self.preferences is None and (self.reward.trains or dpo):
            who = f"rl.arms.{dpo[0]} (dpo)" if dpo else "the reward model"
            raise ValueError(
                f"{who} learns from preferences, and there are none. Add preferences: {{dataset: …}}"
                + ("" if dpo else ", or give reward.paths or reward.functions")
            )
        if self.preferences is not None and not (self.reward.trains or dpo):
            raise ValueError("preferences: nothing learns from them. Remove the section")
        return self

    def expressions(self) -> Iterator[tuple[str, Model]]:
        """Every (place, model expression) of the recipe."""
        yield from self.decisive_expressions()
        for text in (self.forecast and self.forecast.references) or ():
            yield "forecast.references", parse_model(text)
        for text in self.landscape.models if self.landscape else ():
            yield "landscape.models", parse_model(text)

    def decisive_expressions(self) -> Iterator[tuple[str, Model]]:
        """Those of the stages up to the evaluation; a forecast or landscape of other models changes none of them."""
        for name, arm in self.rl.arms.items():
            yield f"rl.arms.{name}.init", parse_model(arm.init)
            for model in arm.rule.models:
                yield f"rl.arms.{name}.reference", model
        for text in self.eval.kl_to:
            yield "eval.kl_to", parse_model(text)
        if self.reward.trains:
            yield "reward.init", parse_model(self.reward.init)

    def candidates(self) -> list[str]:
        """The references that a forecast compares, the first is the baseline."""
        if self.forecast is not None and self.forecast.references is not None:
            return list(self.forecast.references)
        arms = self.rl.arms
        first = {self.eval.baseline: arms[self.eval.baseline]}
        rules = [arm.rule for arm in (first | arms).values()]
        return list(dict.fromkeys(text_of(model) for rule in rules for model in rule.models))

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and apply `key=value` overrides (dotted keys, YAML values).

        Raises:
            ConfigError: the file is missing, is not YAML, or a value is wrong; one line that says which.
        """
        path = Path(path)
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            near = nearest(path.name, others) if others else ""
            raise ConfigError(f"{path}: no such recipe. {near or 'Give the path of a YAML file.'}")
        values = read_yaml(path, "not YAML", "a recipe is a mapping of sections")
        for override in overrides:
            apply_override(values, override)
        values, renamed = upgraded(values)
        for message in renamed:
            warnings.warn(f"{path}: {message}", FutureWarning, stacklevel=2)
        return validated(cls, values, path)

    def to_yaml(self) -> str:
        """The resolved recipe: every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)

    @classmethod
    def decisive_text(cls, text: str) -> Any:
        """What of a resolved recipe's text decides results: all but execution settings."""
        try:
            return cls.model_validate(yaml_value(text)).decisive()
        except ValueError:
            return text  # of another version: compared as it stands


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a dotted key of nested dictionaries from `key=value`, the value in YAML."""
    key, value = key_and_value(override)
    node = values
    *parents, leaf = key.split(".")
    for number, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            above = ".".join(parents[: number + 1])
            raise ConfigError(
                f"override {override!r}: {above} is {node!r}, not a section. Set it whole: {above}={{{leaf}: …}}"
            )
    node[leaf] = value


def key_and_value(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `key=value`, the value in YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, e.g. rl.kl_coef=0.1")
    try:
        return key, yaml_value(text)
    except ValueError as error:
        raise ConfigError(f"override {override[:200]!r}: the value is not YAML") from error
