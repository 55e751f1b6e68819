"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): verdicts, and what FastChat's judgment files add up to.

Departs from FastChat on purpose: a rating is the first `[[n]]` in 1..10 and never a bare `[n]`, which is often code; of
several pairwise labels the last counts; a game without a verdict drops its comparison and is counted; repeated rows
count once.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from salsa.errors import DataError
from salsa.evaluate.bias import SWAPPED
from salsa.evaluate.judgments import (
    Arms,
    Comparison,
    Lengths,
    NoVerdict,
    PairsSummary,
    PathOrRows,
    Row,
    need,
    need_names,
    num_unshared,
    of_one_judge,
    read_rows,
    summarise,
    without_duplicates,
)
from salsa.evaluate.winrate import Difference, Estimate, difference_of, nested_mean

_RATING = re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]")
_LABEL = re.compile(r"\[\[([ABC])\]\]")

Ratings = dict[tuple[Any, int, int], float]
"""(question, turn, seed) → rating."""


@dataclass(frozen=True)
class SingleSummary:
    """One model's ratings."""

    score: Estimate
    """Mean over (question, turn), 1 to 10, clustered by question."""
    by_category: Mapping[str, Estimate]
    by_turn: Mapping[int, Estimate]
    n: int
    dropped: int
    """Judgments without a rating in 1..10."""


@dataclass(frozen=True)
class SinglesSummary:
    """Every model of a file of ratings."""

    judge: str
    models: Mapping[str, SingleSummary]
    differences: Mapping[tuple[str, str], Difference]
    """(a, b) → mean of a − b over the (question, turn) that both were rated on."""
    counts: Mapping[str, int]


def parse_rating(text: str) -> float | None:
    """The first `[[n]]` of a judgment, if it lies in 1..10; decimals are allowed."""
    match = _RATING.search(text)
    if match is None:
        return None
    value = float(match[1])
    return value if 1 <= value <= 10 else None


def parse_pair_verdict(text: str) -> str | None:
    """`A`, `B` or `tie` by the last `[[A]]`, `[[B]]` or `[[C]]` of a judgment; None if there is none.

    Case counts, as upstream: judges quote code, and `df[[a]]` is no verdict.
    """
    labels = _LABEL.findall(text)
    return {"A": "A", "B": "B", "C": "tie"}[labels[-1]] if labels else None


def summarise_pairs(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    categories: Mapping[Any, str] | None = None,
    reparse: bool = False,
    lengths: Lengths | None = None,
    arms: Arms | None = None,
) -> PairsSummary:
    """Win rates from a file in the format of FastChat's `<judge>_pair.jsonl`.

    Args:
        path_or_rows: the file, a directory of such files, or its rows.
        judge: whose rows, if there are several judges'.
        categories: question → category, for rates by category (judgments do not say).
        reparse: read the verdicts from the judge's texts instead of `g1_winner` and `g2_winner`.
        lengths: model → question → characters of each turn's answer, for the length statistics.
        arms: model → (arm, training seed), to summarise arms of several checkpoints.

    Raises:
        DataError: rows of another format, of several judges, or without a single verdict.
    """
    counts: Counter[str] = Counter()
    rows, judge = of_one_judge([_pair_row(row) for row in read_rows(path_or_rows)], judge)
    rows = without_duplicates(rows, _pair_key, _winners, counts)
    order: dict[frozenset[str], tuple[str, str]] = {}
    comparisons = []
    for row in rows:
        comparison = _comparison(row, categories or {}, reparse, counts)
        pair = (comparison.candidate, comparison.baseline)
        first = order.setdefault(frozenset(pair), pair)
        comparisons.append(comparison if first == pair else comparison.turned())
    return summarise(comparisons, judge, counts, lengths, arms)


def summarise_singles(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    categories: Mapping[Any, str] | None = None,
    reparse: bool = False,
    arms: Arms | None = None,
) -> SinglesSummary:
    """Mean ratings from a file in the format of FastChat's `<judge>_single.jsonl`; arguments as `summarise_pairs`.

    Raises:
        DataError: rows of another format, of several judges, or a model without a single rating.
    """
    counts: Counter[str] = Counter()
    rows, judge = of_one_judge([_single_row(row) for row in read_rows(path_or_rows)], judge)
    rows = without_duplicates(rows, _single_key, lambda row: row.values.get("score"), counts)
    judged: dict[str, dict[tuple[Any, int, int], float | None]] = {}
    for row in rows:
        question, turn, model = _single_key(row)
        arm, seed = (arms or {}).get(model, (model, 0))
        judged.setdefault(arm, {})[question, turn, seed] = _rating(row, reparse, counts)
    counts["ratings that not every model has"] = num_unshared([set(own) for own in judged.values()])
    ratings = {m: {k: v for k, v in own.items() if v is not None} for m, own in judged.items()}
    for model, own in ratings.items():
        if not own:
            raise NoVerdict(
                f"{model}: none of {len(judged[model])} judgments holds a rating in 1 to 10."
            )
    return SinglesSummary(
        judge=judge,
        models={
            model: SingleSummary(
                score=_mean(own),
                by_category=_means(own, lambda key: (categories or {}).get(key[0])),
                by_turn=_means(own, lambda key: key[1]),
                n=len(own),
                dropped=len(judged[model]) - len(own),
            )
            for model, own in ratings.items()
        },
        differences={
            (a, b): difference_of(_mean(shared), len(shared))
            for a, b in combinations(ratings, 2)
            if (shared := {k: x - ratings[b][k] for k, x in ratings[a].items() if k in ratings[b]})
        },
        counts={name: count for name, count in counts.items() if count},
    )


def _pair_row(row: Row) -> Row:
    if "model" in row.values and "score" in row.values:
        raise DataError(f"{row.where} rates a single answer. Use summarise_singles for such files.")
    need(row, "pairwise MT-Bench judgment", "question_id", "model_1", "model_2")
    need_names(row, "question_id", "model_1", "model_2")
    for name in ("g1", "g2"):
        if f"{name}_winner" not in row.values and f"{name}_judgment" not in row.values:
            raise DataError(f"{row.where}: has neither {name}_winner nor {name}_judgment.")
    if row.values["model_1"] == row.values["model_2"]:
        raise DataError(f"{row.where}: compares {row.values['model_1']} with itself.")
    return row


def _pair_key(row: Row) -> tuple[Any, int, frozenset[str]]:
    values = row.values
    return values["question_id"], _turn(row), frozenset((values["model_1"], values["model_2"]))


def _winners(row: Row) -> list[Any]:
    """The model that won each game by name, whichever way round the row has the models."""
    stored = [str(row.values.get(f"{game}_winner")) for game in ("g1", "g2")]
    return [row.values[w] if w in ("model_1", "model_2") else w for w in stored]


def _turn(row: Row) -> int:
    turn = row.values.get("turn", 1)  # FastChat's first files had one turn and did not say so
    if isinstance(turn, bool) or turn not in (1, 2):
        raise DataError(f"{row.where}: turn is {turn!r}; MT-Bench has turns 1 and 2.")
    return int(turn)


def _comparison(
    row: Row, categories: Mapping[Any, str], reparse: bool, counts: Counter[str]
) -> Comparison:
    values = row.values
    first = _place(row, "g1", ("model_1", "model_2"), reparse, counts)
    second = _place(row, "g2", ("model_2", "model_1"), reparse, counts)
    scores: tuple[tuple[float, float], ...] = ()
    if first is not None and second is not None:
        agreed = first == SWAPPED[second]
        scores = (({"first": 1.0, "second": 0.0, "tie": 0.5}[first] if agreed else 0.5, 1.0),)
    return Comparison(
        question=values["question_id"],
        turn=_turn(row),
        category=categories.get(values["question_id"], ""),
        candidate=values["model_1"],
        baseline=values["model_2"],
        games=(first, second),
        scores=scores,
        missing=0 if scores else 1,
    )


def _place(
    row: Row, game: str, shown: tuple[str, str], reparse: bool, counts: Counter[str]
) -> str | None:
    """Which place won one game, in which `shown` were the first and the second."""
    stored: Any = row.values.get(f"{game}_winner")
    text = row.values.get(f"{game}_judgment")
    parsed = None
    if isinstance(text, str):
        parsed = {"A": "first", "B": "second", "tie": "tie"}.get(parse_pair_verdict(text) or "")
        counts["texts with several different labels"] += len(set(_LABEL.findall(text))) > 1
    if reparse or stored is None:
        return parsed
    known = {shown[0]: "first", shown[1]: "second", "tie": "tie", "error": None}
    if not isinstance(stored, str) or stored not in known:
        counts["unknown verdicts"] += 1
        return None
    if isinstance(text, str) and parsed != known[stored]:
        counts["verdicts that differ from their text"] += 1
    return known[stored]


def _single_row(row: Row) -> Row:
    if "model_1" in row.values:
        raise DataError(f"{row.where} compares two answers. Use summarise_pairs for such files.")
    need(row, "MT-Bench rating", "question_id", "model")
    need_names(row, "question_id", "model")
    if "score" not in row.values and "judgment" not in row.values:
        raise DataError(f"{row.where}: has neither score nor judgment.")
    return row


def _single_key(row: Row) -> tuple[Any, int, str]:
    return row.values["question_id"], _turn(row), row.values["model"]


def _rating(row: Row, reparse: bool, counts: Counter[str]) -> float | None:
    score, text = row.values.get("score"), row.values.get("judgment")
    parsed = parse_rating(text) if isinstance(text, str) else None
    if reparse or "score" not in row.values:
        counts["judgments without a rating"] += parsed is None
        return parsed
    if score is None or score == -1:
        counts["judgments without a rating"] += 1
    elif isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        counts["ratings that are no number"] += 1
    elif not 1 <= score <= 10:
        counts["ratings outside 1 to 10"] += 1
    else:
        if isinstance(text, str) and parsed != score:
            counts["ratings that differ from their text"] += 1
        return float(score)
    return None


def _mean(ratings: Ratings) -> Estimate:
    """The mean over (question, turn) and training seeds, clustered by question."""
    questions, _, seeds = zip(*ratings, strict=True)
    return nested_mean(np.array(list(ratings.values())), questions, seeds=seeds)


def _means(ratings: Ratings, group: Callable[[tuple[Any, int, int]], Any]) -> dict[Any, Estimate]:
    """The mean of every group of ratings, in the groups' order; what is in group None is in no mean."""
    groups: dict[Any, Ratings] = {}
    for key, value in ratings.items():
        if (name := group(key)) is not None:
            groups.setdefault(name, {})[key] = value
    return {name: _mean(groups[name]) for name in sorted(groups)}
