"""Pairs of arms as tables show them: either way round, as a matrix, against the baseline, in a sentence."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Pair = Mapping[str, Any]


def swapped(pair: Pair) -> dict[str, Any]:
    """The same comparison with candidate and baseline exchanged."""
    verdict = {"better": "worse", "worse": "better"}.get(pair["verdict"], pair["verdict"])
    turned = dict(pair) | {
        "candidate": pair["baseline"],
        "baseline": pair["candidate"],
        "rate": 1 - pair["rate"],
        "low": 1 - pair["high"],
        "high": 1 - pair["low"],
        "wins": pair["losses"],
        "losses": pair["wins"],
        "verdict": verdict,
    }
    if "difference" in pair:
        own = pair["difference"]
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
