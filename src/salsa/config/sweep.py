"""What `salsa sweep` is asked to do: one recipe and the axes along which it is varied. Torch-free."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from salsa.config.recipe import Recipe, key_and_value
from salsa.config.schema import Positive, Strict, validated
from salsa.errors import ConfigError
from salsa.untrusted import read_yaml

Setting = dict[str, Any]
"""Dotted key of the recipe → value."""


class SweepConfig(Strict):
    """A recipe × a grid."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    """It lands in runs/<name>."""
    recipe: str
    """The recipe's file, relative to this one."""
    until: Literal["forecast", "landscape", "report"] = "report"
    """What every point finishes: forecasts and landscapes need no RL."""
    stages: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = None
    """`study`: the stages are kept in runs/study/stages, so that sweeps of the same models make them once."""
    settings: Setting = Field(default={})
    """What every point sets, e.g. {rl.num_updates: 20}."""
    grid: Annotated[dict[str, list[Any] | dict[str, Setting]], Field(min_length=1)]
    """Axis → its values. A list varies the recipe's key of that name; a mapping names values that set several keys."""
    cluster: str | None = None
    """The axis whose values are independent repetitions (SFT pairs): verdicts are made over them."""
    margins: dict[str, Positive] = Field(default={})
    """Measure → the largest effect that does not matter, e.g. {proxy win rate: 3}; those measures get verdicts."""

    @model_validator(mode="after")
    def _axes(self) -> Self:
        for axis, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{axis} has no values. Give at least one")
            if len(_values(axis, values)) < len(values):
                raise ValueError(f"grid.{axis} has a value twice. Remove the repeated value")
        if (self.cluster is None) != (not self.margins):
            raise ValueError("verdicts need both cluster and margins. Give both or neither")
        if self.cluster is not None and self.cluster not in self.grid:
            raise ValueError(
                f"cluster={self.cluster!r} is no axis of the grid ({', '.join(self.grid)})"
            )
        return self

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "SweepConfig":
        """Read a sweep's file; `key=value` overrides (dotted keys of the recipe, YAML values) join its settings.

        Raises:
            ConfigError: it is missing, is not YAML, or a value is wrong; one line that says which.
        """
        config = validated(cls, read_yaml(path, "cannot be read", "a sweep is a mapping"), path)
        settings = dict(config.settings)
        for override in overrides:
            key, value = key_and_value(override)
            if axis := config._varies(key):
                raise ConfigError(
                    f"override {override!r}: the axis {axis} of {path} sets it, point by point. Change it there."
                )
            settings.pop(key, None)  # what is set last holds
            settings[key] = value
        return config.model_copy(
            update={"recipe": str(path.parent / config.recipe), "settings": settings}
        )

    def _varies(self, key: str) -> str | None:
        """The axis whose values set `key`, what it is part of or a part of it."""
        for axis, values in self.grid.items():
            for setting in _values(axis, values).values():
                if any(
                    f"{a}.".startswith(f"{b}.") for k in setting for a, b in ((k, key), (key, k))
                ):
                    return axis
        return None

    @property
    def beta_axes(self) -> list[str]:
        """The axes that vary nothing but β, of `rl:` or of single arms: a frontier runs along them."""
        return [
            axis
            for axis, values in self.grid.items()
            if axis != self.cluster
            and all(
                key == "rl.kl_coef" or (key.startswith("rl.arms.") and key.endswith(".kl_coef"))
                for setting in _values(axis, values).values()
                for key in setting
            )
        ]

    def points(self) -> dict[str, tuple[dict[str, str], Recipe]]:
        """Name → (axis → value as text, the point's recipe).

        Raises:
            ConfigError: a value is wrong, or two points are the same: an axis changes nothing.
        """
        axes = [_values(axis, values) for axis, values in self.grid.items()]
        points: dict[str, tuple[dict[str, str], Recipe]] = {}
        seen: dict[str, str] = {}
        for chosen in itertools.product(*(axis.items() for axis in axes)):
            words = dict(zip(self.grid, (text for text, _ in chosen), strict=True))
            name = "_".join(_slug(text) for text in words.values())
            settings = [self.settings, *(own for _, own in chosen)]
            overrides = [
                f"{k}={json.dumps(v, default=str)}" for own in settings for k, v in own.items()
            ]  # JSON is YAML, which also has dates
            recipe = Recipe.load(self.recipe, overrides).model_copy(update={"name": name})
            looks = {"forecast": str(recipe.forecast), "landscape": str(recipe.landscape)}
            text = str(recipe.decisive() | {"name": ""} | looks)
            if name in points:
                raise ConfigError(
                    f"{self.name}: two points would both be called {name}, as letters, digits, . _ and - are what a "
                    "directory's name has of a value. Name the values: grid.AXIS={NAME: {KEY: VALUE}, …}."
                )
            if (other := seen.setdefault(text, name)) != name:
                raise ConfigError(
                    f"{self.name}: the points {other} and {name} are the same recipe, so an axis changes nothing. "
                    "Remove the axis, or the repeated value."
                )
            points[name] = words, recipe
        return points


def _values(axis: str, values: list[Any] | Mapping[str, Setting]) -> dict[str, Setting]:
    """Text of each value → the settings it makes."""
    if isinstance(values, Mapping):
        return dict(values)
    texts = (",".join(map(str, v)) if isinstance(v, list) else str(v) for v in values)
    own = axis.rpartition(".")[2]
    return {f"{own}={text}": {axis: v} for text, v in zip(texts, values, strict=True)}


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-")
