"""How to mix: the options of a soup, checked, and the rule that they stand for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from salsa.errors import ConfigError
from salsa.soup.methods import Factors, Rule, linear, model_stock, slerp, uniform, wise

Method = Literal["linear", "greedy", "wise", "slerp", "model_stock"]
NEED_BASE = ("wise", "slerp", "model_stock")
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Score = Callable[[Path], float]
"""Held-out score of a model directory; more is better."""


@dataclass(frozen=True)
class Mix:
    """The options of `salsa.make_soup`, where each is explained."""

    weights: Sequence[float] | None = None
    method: Method = "linear"
    alpha: float | None = None
    score: Score | None = field(default=None, repr=False)
    kept: tuple[int, ...] | None = None
    """Ingredients that a greedy soup has kept."""
    dtype: str = "auto"
    heads: str | None = None
    take_from: int | None = None
    normalize: bool = False
    extrapolate: bool = False
    allow_identical: bool = False

    def check(self, count: int, *, has_base: bool) -> None:
        """Raise ConfigError unless the options fit each other and `count` ingredients."""
        if count == 0:
            raise ConfigError("soup: no ingredients. Give at least one checkpoint.")
        if self.method not in get_args(Method):
            raise ConfigError(
                f"soup: method={self.method!r}. Use {', '.join(get_args(Method))} (or interpolate)."
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"soup: dtype={self.dtype!r}. Use auto, {', '.join(DTYPES)}.")
        if self.method in NEED_BASE and not has_base:
            raise ConfigError(f"soup: {self.method} needs the base. Give it with --base.")
        if (self.method == "wise") != (self.alpha is not None):
            raise ConfigError("soup: --alpha belongs to --method wise, which needs it.")
        if self.alpha is not None and not (0 <= self.alpha <= 1 or self.extrapolate):
            raise ConfigError(f"soup: alpha={self.alpha:g} lies outside 0 to 1. Add --extrapolate.")
        if (self.method == "greedy") != (self.score is not None):
            raise ConfigError("soup: --score belongs to --method greedy, which needs it.")
        if self.take_from is not None and not 0 <= self.take_from < count:
            raise ConfigError(
                f"soup: take_from={self.take_from}, but ingredients are 0 to {count - 1}."
            )
        if self.weights is not None:
            self._check_weights(self.weights, count)

    def mean(self, count: int) -> Factors:
        """The weighted mean that every method starts from."""
        if self.kept is not None:
            return Factors(
                tuple(float(i in self.kept) for i in range(count)), divisor=float(len(self.kept))
            )
        if self.weights is None:
            return uniform(count)
        total = math.fsum(self.weights) if self.normalize else 1.0
        return linear([w / total for w in self.weights])

    def rule(self, count: int) -> Rule:
        """Factors of a tensor, given the Gram matrix of its deltas."""
        mean = self.mean(count)
        if self.method == "wise":
            assert self.alpha is not None
            mixed = wise(mean, self.alpha)
            return lambda gram: mixed
        if self.method == "slerp":
            return lambda gram: slerp(gram, mean.shares.tolist())
        if self.method == "model_stock":
            return model_stock
        return lambda gram: mean

    def _check_weights(self, weights: Sequence[float], count: int) -> None:
        if self.method in ("greedy", "model_stock"):
            raise ConfigError(f"soup: {self.method} finds the weights itself. Leave --weights out.")
        if len(weights) != count:
            raise ConfigError(
                f"soup: {len(weights)} weights for {count} ingredients. Give one each."
            )
        total = math.fsum(weights)
        if not all(math.isfinite(w) for w in weights) or (self.normalize and total == 0):
            raise ConfigError(f"soup: weights {list(weights)} cannot be used. Give numbers.")
        if self.extrapolate:
            return
        if abs(total - 1) > 1e-6 and not self.normalize:
            raise ConfigError(
                f"soup: weights sum to {total:g}, not to 1. Scale them, or add --normalize or --extrapolate."
            )
        if min(weights) < 0:
            raise ConfigError(
                f"soup: weight {min(weights):g} is negative. Add --extrapolate if it is meant."
            )
