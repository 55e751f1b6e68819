"""How to mix: the options of a soup, checked, and the rule that they stand for."""

import math
from collections.abc import Callable, Iterator, Sequence
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
        for problem in self._problems(count, has_base):
            raise ConfigError(f"soup: {problem}")

    def _problems(self, count: int, has_base: bool) -> Iterator[str]:
        methods = get_args(Method)
        if count == 0:
            yield "no ingredients. Give at least one checkpoint."
        if self.method not in methods:
            yield f"method={self.method!r}. Use {', '.join(methods)} (or interpolate)."
        if self.dtype not in ("auto", *DTYPES):
            yield f"dtype={self.dtype!r}. Use auto, {', '.join(DTYPES)}."
        if self.method in NEED_BASE and not has_base:
            yield f"{self.method} needs the base. Give it with --base."
        if (self.method == "wise") != (self.alpha is not None):
            yield "--alpha belongs to --method wise, which needs it."
        if self.alpha is not None and not (0 <= self.alpha <= 1 or self.extrapolate):
            yield f"alpha={self.alpha:g} lies outside 0 to 1. Add --extrapolate."
        if (self.method == "greedy") != (self.score is not None):
            yield "--score belongs to --method greedy, which needs it."
        if self.take_from not in (None, *range(count)):
            yield f"take_from={self.take_from}, but ingredients are 0 to {count - 1}."
        if self.weights is None:
            return
        if self.method in ("greedy", "model_stock"):
            yield f"{self.method} finds the weights itself. Leave --weights out."
        if len(self.weights) != count:
            yield f"{len(self.weights)} weights for {count} ingredients. Give one each."
        total, least = math.fsum(self.weights), min(self.weights)
        if not all(map(math.isfinite, self.weights)) or (self.normalize and total == 0):
            yield f"weights {list(self.weights)} cannot be used. Give numbers."
        if abs(total - 1) > 1e-6 and not (self.normalize or self.extrapolate):
            yield f"weights sum to {total:g}, not to 1. Scale them, or add --normalize or --extrapolate."
        if least < 0 and not self.extrapolate:
            yield f"weight {least:g} is negative. Add --extrapolate if it is meant."

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
