"""Tests of comparisons that are paired by prompt, and the correction for making several of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class SignTest:
    """Exact two-sided binomial test on prompts that have a winner."""

    wins: int
    losses: int
    ties: int
    p_value: float


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of two binary vectors over the same prompts."""

    only_a: int
    """Prompts where a holds and b does not."""
    only_b: int
    p_value: float


def sign_test(outcome: Sequence[float], clusters: Sequence[Hashable] | None = None) -> SignTest:
    """Whether wins and losses are equally likely, a prompt counting once: its mean outcome above or below ½.

    Args:
        outcome: 1 = the candidate won, 0 = it lost, ½ = tie.
        clusters: the prompt of each comparison; each its own if not given.
    """
    names = list(clusters) if clusters is not None else list(range(len(outcome)))
    totals: dict[Hashable, float] = dict.fromkeys(names, 0.0)
    for name, value in zip(names, outcome, strict=True):
        totals[name] += value - 0.5
    wins = sum(total > 0 for total in totals.values())
    losses = sum(total < 0 for total in totals.values())
    return SignTest(wins, losses, len(totals) - wins - losses, _binomial(wins, losses))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Whether two models do a thing (end by themselves, pass a test) on equally many of the same prompts.

    Raises:
        ValueError: the vectors differ in length.
    """
    if len(a) != len(b):
        raise ValueError(
            f"mcnemar: {len(a)} and {len(b)} values. Give one of each for every prompt."
        )
    only_a = sum(bool(x) > bool(y) for x, y in zip(a, b, strict=True))
    only_b = sum(bool(x) < bool(y) for x, y in zip(a, b, strict=True))
    return McNemar(only_a, only_b, _binomial(only_a, only_b))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: max over smaller ones of (m − rank)·p, at most 1."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def _binomial(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
