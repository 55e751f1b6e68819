"""Ways to mix: the options of a soup, and the rules that they stand for: the factors of one tensor's weighted sum.

    θ_soup = (base · θ_base + Σ_i terms_i θ_i) / divisor

All that a rule may look at is the Gram matrix of the tensor's deltas, gram[i, j] = ⟨θ_i − θ_base, θ_j − θ_base⟩, so one
streaming loop serves them all. A "layer" of the papers is one tensor here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from salsa.errors import ConfigError

Method = Literal["linear", "greedy", "wise", "slerp", "model_stock"]
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Score = Callable[[Path], float]
"""Held-out score of a model directory; more is better."""


@dataclass(frozen=True)
class Factors:
    """What the base and each ingredient are multiplied with, before the sum is divided."""

    terms: tuple[float, ...]
    base: float = 0.0
    divisor: float = 1.0

    @property
    def shares(self) -> np.ndarray:
        """Each ingredient's share of the result, (N,)."""
        return np.array(self.terms) / self.divisor

    @property
    def affine(self) -> bool:
        """Whether all shares, the base's included, sum to 1, so that a sum of deltas says where the result lies."""
        return abs(sum(self.terms) + self.base - self.divisor) < 1e-6 * abs(self.divisor)


Rule = Callable[[np.ndarray], Factors]
"""Gram matrix of the deltas, (N, N) → factors."""


def linear(weights: Sequence[float]) -> Factors:
    """Σ w_i θ_i (SALSA; model soups, arXiv 2203.05482)."""
    return Factors(tuple(weights))


def uniform(count: int) -> Factors:
    """(Σ θ_i) / N: summed first, so that the mean of numbers on a coarse grid is exact before it is rounded."""
    return Factors((1.0,) * count, divisor=float(count))


def wise(mean: Factors, alpha: float) -> Factors:
    """(1 − α) θ_base + α Σ w_i θ_i (WiSE-FT, arXiv 2109.01903): the soup, shrunk towards the base."""
    return Factors(tuple(alpha * t for t in mean.terms), (1 - alpha) * mean.divisor, mean.divisor)


def slerp(gram: np.ndarray, weights: Sequence[float]) -> Factors:
    """θ_base + spherical interpolation of the deltas (WARP, arXiv 2406.16768, eq. 4), one ingredient after the other.

    slerp(δ_a, δ_b, t) = sin((1−t)Ω)/sin Ω · δ_a + sin(tΩ)/sin Ω · δ_b, Ω the angle between them. Of more than two, the
    k-th joins with t = w_k / (w_1 + … + w_k), which for equal weights is WARP's 1/k. Where a delta is zero, or the two
    point the same or the opposite way, there is no arc: linear interpolation.
    """
    shares = np.zeros(len(weights))
    shares[0], joined = 1.0, weights[0]
    for k in range(1, len(weights)):
        joined += weights[k]
        t = weights[k] / joined if joined else 0.0
        one = np.eye(len(weights))[k]
        lengths = math.sqrt(max(shares @ gram @ shares, 0.0) * gram[k, k])
        cosine = float(np.clip(shares @ gram[k] / lengths, -1, 1)) if lengths else 1.0
        angle = math.acos(cosine)
        if (sine := math.sin(angle)) < 1e-6:
            shares = (1 - t) * shares + t * one
        else:
            shares = (math.sin((1 - t) * angle) * shares + math.sin(t * angle) * one) / sine
    return Factors(tuple(shares.tolist()), 1 - float(shares.sum()))


def model_stock(gram: np.ndarray) -> Factors:
    """(1 − t) θ_base + t · mean θ_i with t = N cos / ((N − 1) cos + 1) (Model Stock, arXiv 2403.19522, eq. 2).

    cos is the mean cosine of the pairs of deltas. A negative one would mean t < 0, away from all that was trained: then
    t is 0, the base.
    """
    count = len(gram)
    lengths = np.sqrt(np.diag(gram))
    product = np.outer(lengths, lengths)
    cosines = np.divide(gram, product, out=np.zeros_like(gram), where=product > 0)
    cosine = (cosines.sum() - np.trace(cosines)) / (count * (count - 1))
    ratio = count * max(float(cosine), 0.0) / ((count - 1) * max(float(cosine), 0.0) + 1)
    return wise(uniform(count), min(ratio, 1.0))


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
        if self.method in ("wise", "slerp", "model_stock") and not has_base:
            yield f"{self.method} needs the base. Give it with base= (--base)."
        if (self.method == "wise") != (self.alpha is not None):
            yield "alpha= (--alpha) belongs to the method wise, which needs it."
        if self.alpha is not None and not (0 <= self.alpha <= 1 or self.extrapolate):
            yield f"alpha={self.alpha:g} lies outside 0 to 1. Add extrapolate=True (--extrapolate)."
        if (self.method == "greedy") != (self.score is not None):
            yield "score= (--score) belongs to the method greedy, which needs it."
        if self.method == "model_stock" and count < 2:
            yield "model_stock takes two ingredients or more. Add one, or use wise."
        if self.take_from not in (None, *range(count)):
            yield f"take_from={self.take_from}, but ingredients are 0 to {count - 1}."
        if self.weights is None:
            return
        if self.method in ("greedy", "model_stock"):
            yield f"{self.method} finds the weights itself. Leave weights= (--weights) out."
        if len(self.weights) != count:
            yield f"{len(self.weights)} weights for {count} ingredients. Give one each."
        total, least = math.fsum(self.weights), min(self.weights)
        if not all(map(math.isfinite, self.weights)) or (self.normalize and total == 0):
            yield f"weights {list(self.weights)} cannot be used. Give numbers."
        if abs(total - 1) > 1e-6 and not (self.normalize or self.extrapolate):
            yield (
                f"weights sum to {total:g}, not to 1. Scale them, or add normalize=True (--normalize) or "
                "extrapolate=True (--extrapolate)."
            )
        if least < 0 and not self.extrapolate:
            yield f"weight {least:g} is negative. Add extrapolate=True (--extrapolate) if it is meant."

    @property
    def needs_gram(self) -> bool:
        """Whether the rule looks at the Gram matrix, so that each tensor is measured before it is written."""
        return self.method in ("slerp", "model_stock")

    def mean(self, count: int) -> Factors:
        """The weighted mean that every method starts from."""
        if self.kept is not None:
            terms = tuple(float(i in self.kept) for i in range(count))
            return Factors(terms, divisor=float(len(self.kept)))
        if self.weights is None:
            return uniform(count)
        total = math.fsum(self.weights) if self.normalize else 1.0
        return linear([w / total for w in self.weights])

    def rule(self, count: int) -> Rule:
        """Factors of a tensor, given the Gram matrix of its deltas."""
        mean = self.mean(count)
        if self.method == "slerp":
            return lambda gram: slerp(gram, mean.shares.tolist())
        if self.method == "model_stock":
            return model_stock
        fixed = mean if self.alpha is None else wise(mean, self.alpha)
        return lambda gram: fixed
