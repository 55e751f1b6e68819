"""Pairs of arms as tables show them: either way round, as a matrix, against the baseline, in a sentence."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Pair = Mapping[str, Any]


def swapped(pair: Pair) -> dict[str, Any]:
    """The same comparison with candidate and baseline exchanged."""
    verdict = {"better": "worse", "worse": "better"}.get(pair["verdict"], pair["verdict"])
    turned = _turned(pair) | {
        "candidate": pair["baseline"],
        "baseline": pair["candidate"],
        "wins": pair["losses"],
        "losses": pair["wins"],
        "verdict": verdict,
    }
    if "by_seed" in pair:
        turned["by_seed"] = [_turned(one) for one in pair["by_seed"]]
    return turned


def _turned(effect: Mapping[str, Any]) -> dict[str, Any]:
    """Win rate and difference the other way round."""
    turned = dict(effect) | {
        "rate": 1 - effect["rate"],
        "low": 1 - effect["high"],
        "high": 1 - effect["low"],
    }
    if "difference" in effect:
        own = effect["difference"]
        turned["difference"] = dict(own) | {
            "mean": -own["mean"],
            "low": -own["high"],
            "high": -own["low"],
        }
    return turned


def matrix(pairs: Iterable[Pair]) -> dict[tuple[str, str], Pair]:
    """(row, column) → the row's comparison with the column, both ways round."""
    cells: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        cells[pair["candidate"], pair["baseline"]] = pair
        cells[pair["baseline"], pair["candidate"]] = swapped(pair)
    return cells


def matrices(pairs: Sequence[Pair]) -> dict[str, dict[tuple[str, str], Pair]]:
    """Score → its matrix."""
    scores = dict.fromkeys(pair["score"] for pair in pairs)
    return {score: matrix(p for p in pairs if p["score"] == score) for score in scores}


def sentence(pair: Pair, where: str) -> str:
    """One comparison in words, interval and verdict included."""
    words = {
        "better": f"beats {pair['baseline']}",
        "worse": f"loses to {pair['baseline']}",
        "not resolved": f"against {pair['baseline']} is not resolved",
    }
    return (
        f"{pair['candidate']} {words[pair['verdict']]} on {where}: win rate {pair['rate']:.1%} "
        f"[{pair['low']:.1%}, {pair['high']:.1%}]."
    )


def seed_tables(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Score → the pairs whose effect is known in every seed; none where there is one seed."""
    known = [pair for pair in pairs if pair.get("by_seed")]
    scores = dict.fromkeys(pair["score"] for pair in known)
    return {score: [pair for pair in known if pair["score"] == score] for score in scores}


def agreement(pair: Pair) -> str:
    """In how many seeds the candidate is ahead."""
    ahead = sum(one["difference"]["mean"] > 0 for one in pair["by_seed"])
    return f"{ahead} of {len(pair['by_seed'])}"


def of_verdict(
    rows: Iterable[Mapping[str, Any]], verdict: Mapping[str, Any], axes: Iterable[str]
) -> list[Mapping[str, Any]]:
    """The effects of a sweep, one a cluster, that a verdict was made from."""
    keys = ["subject", "baseline", "at", "measure", *(axis for axis in axes if axis in verdict)]
    return [row for row in rows if all(row[key] == verdict[key] for key in keys)]
