"""What a gate says, and what all of them together say. Torch-free.

A gate is a function from evidence to a `Finding`, or to None where there is nothing to judge. Every gate that is a test
has two false-alarm rates, FAULTY and SUSPICIOUS. Where so much data is there that a difference without consequence
would be significant, it asks for a difference beyond a margin, and says what the margin is derived from.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from salsa.artifacts import finite

Verdict = Literal["sound", "suspicious", "faulty"]

STAGES = (
    "data", "sft", "reward", "rollout", "kl", "critic", "advantages", "optimisation", "hacking", "evaluation",
)  # fmt: skip
"""In the order in which a run computes them: what goes wrong early shows in all that follows."""

FAULTY = 1e-4
"""False-alarm rate of one test that says faulty: a run has about 30 of them, so one healthy run in 300 would be called
faulty if they were independent."""
SUSPICIOUS = 1e-2
"""False-alarm rate of one test that says suspicious."""
POWER_Z = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
"""2.80: an effect of so many standard errors is seen with power 0.8 (95 %, two-sided)."""

_RANK: dict[str, int] = {"sound": 0, "suspicious": 1, "faulty": 2}


@dataclass(frozen=True)
class Finding:
    """What one gate says of one stage."""

    stage: str
    """One of STAGES."""
    gate: str
    verdict: Verdict
    says: str
    """What was measured, in one sentence."""
    todo: str = ""
    """What to do about it; empty where it is sound."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[str] = ()
    """A few texts that show it."""


@dataclass(frozen=True)
class Diagnosis:
    """All findings of a run, in the order of the pipeline, and the stage that they point at."""

    name: str
    findings: Sequence[Finding]
    not_measured: Sequence[str] = ()
    """What could not be looked at, and why."""

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return worst(finding.verdict for finding in self.findings)

    @property
    def culprit(self) -> str | None:
        """The first faulty stage; the first suspicious one where none is faulty; None where all are sound."""
        if self.verdict == "sound":
            return None
        return next(f.stage for f in self.findings if f.verdict == self.verdict)

    @property
    def headline(self) -> str:
        """The diagnosis in a sentence."""
        if self.verdict == "faulty":
            first = next(f for f in self.findings if f.verdict == "faulty")
            return f"{self.name}: FAULTY at {first.stage} ({first.gate}). What comes after it may only follow from it."
        if self.verdict == "suspicious":
            odd = sum(f.verdict == "suspicious" for f in self.findings)
            worth = "one finding is" if odd == 1 else f"{odd} findings are"
            return (
                f"{self.name}: no fault found by {len(self.findings)} gates; {worth} worth a look."
            )
        return f"{self.name}: sound, by {len(self.findings)} gates."

    def as_json(self) -> dict[str, Any]:
        """Plain values; a finding is a `consequence` if a stage before its own is faulty."""
        faulty = [STAGES.index(f.stage) for f in self.findings if f.verdict == "faulty"]
        first = min(faulty, default=len(STAGES))
        rows = [
            asdict(f) | {"consequence": f.verdict != "sound" and STAGES.index(f.stage) > first}
            for f in self.findings
        ]
        return {
            "name": self.name,
            "verdict": self.verdict,
            "culprit": self.culprit,
            "headline": self.headline,
            "findings": [
                r | {"numbers": finite({k: _short(v) for k, v in r["numbers"].items()})}
                for r in rows
            ],
            "not_measured": list(self.not_measured),
        }


def diagnosis(
    name: str, findings: Iterable[Finding | None], not_measured: Sequence[str] = ()
) -> Diagnosis:
    """The findings in the pipeline's order."""
    there = [finding for finding in findings if finding is not None]
    order = sorted(there, key=lambda finding: STAGES.index(finding.stage))
    return Diagnosis(name, order, not_measured)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several; `sound` of none."""
    return max(verdicts, key=_RANK.__getitem__, default="sound")


def graded(p_value: float) -> Verdict:
    """The verdict of a test."""
    return "faulty" if p_value < FAULTY else "suspicious" if p_value < SUSPICIOUS else "sound"


def p_above(count: int, total: int, rate: float) -> float:
    """P(≥ count of total) if each comes with probability `rate` (exact binomial)."""
    return float(stats.binom.sf(count - 1, total, rate)) if total else 1.0


def p_below(count: int, total: int, rate: float) -> float:
    """P(≤ count of total) if each comes with probability `rate` (exact binomial)."""
    return float(stats.binom.cdf(count, total, rate)) if total else 1.0


def p_mean_above(values: np.ndarray, level: float = 0.0) -> float:
    """One-sided t test: how likely so large a mean is if the true one is `level`; 1 for fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return 1.0
    mean, error = values.mean() - level, values.std(ddof=1) / math.sqrt(len(values))
    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stats.t.sf(mean / error, len(values) - 1))


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
