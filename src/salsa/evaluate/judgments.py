"""Judgments of any benchmark as comparisons, and what they add up to: rates, bias, and everything that went wrong.

A comparison is one question and turn, answered by two models and judged in two games with the answers' places swapped.
Benchmarks differ in how two games make an outcome (`salsa.evaluate.mtbench`, `salsa.evaluate.arena_hard`); from there
on the arithmetic is the same. The unit is the question: all its turns and games are one cluster.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import parse_jsonl
from salsa.errors import DataError
from salsa.evaluate.bias import LengthBias, PositionBias, length_bias, position_bias
from salsa.evaluate.significance import SignTest, sign_test
from salsa.evaluate.winrate import WinRate, rate_of

PathOrRows = Path | str | Iterable[Mapping[str, Any]]

Lengths = Mapping[str, Mapping[Any, Sequence[int]]]
"""Model → question → characters of its answer to each turn."""

Arms = Mapping[str, tuple[str, int]]
"""Model → (arm, training seed)."""


class NoVerdict(DataError):
    """Judgments were read and none of them says anything."""


@dataclass(frozen=True)
class Row:
    """A row of a judgments file, and where it stands, for messages."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to one question and turn, judged twice."""

    question: Any
    turn: int
    category: str
    candidate: str
    baseline: str
    games: tuple[str | None, str | None]
    """Which place won each game: `first`, `second`, `tie` or None. The candidate is first in game 1."""
    scores: tuple[tuple[float, float], ...]
    """(outcome for the candidate: 1, ½ or 0; its weight) of what counts; empty where there is no verdict."""
    missing: int = 0
    """How many scores a lost verdict took away."""
    seed: int = 0
    """Training seed of both models, where an arm has several."""
    lengths: tuple[int, int] | None = None
    """Characters of the candidate's answer and of the baseline's."""

    @property
    def outcome(self) -> float | None:
        """Weighted mean of the candidate's outcomes; None where there is no verdict."""
        weight = sum(w for _, w in self.scores)
        return sum(s * w for s, w in self.scores) / weight if weight else None

    def turned(self) -> "Comparison":
        """The same comparison with candidate and baseline exchanged."""
        return replace(
            self,
            candidate=self.baseline,
            baseline=self.candidate,
            games=self.games[::-1],
            scores=tuple((1 - s, w) for s, w in self.scores),
            lengths=self.lengths[::-1] if self.lengths else None,
        )


@dataclass(frozen=True)
class PairSummary:
    """All comparisons of one pair of models."""

    candidate: str
    baseline: str
    win_rate: WinRate
    """The candidate's adjusted win rate, clustered by question."""
    position: PositionBias
    sign: SignTest
    by_category: Mapping[str, WinRate]
    by_turn: Mapping[int, WinRate]
    by_seed: Mapping[int, WinRate]
    """Empty where the arms have one training seed."""
    length: LengthBias | None


@dataclass(frozen=True)
class PairsSummary:
    """Every pair of models in a judgments file."""

    judge: str
    pairs: Mapping[tuple[str, str], PairSummary]
    """(candidate, baseline) → summary; the candidate is upstream's `model_1`, or Arena-Hard's `model`."""
    models: Mapping[str, WinRate]
    """Model → its rate over all its opponents, as upstream's `pairwise-all` table counts it."""
    counts: Mapping[str, int]
    """What was found wrong, and how often: duplicates, verdicts that are missing or unknown, …"""
    comparisons: Sequence[Comparison] = field(repr=False)


def read_rows(source: PathOrRows) -> list[Row]:
    """Rows of a jsonl file, of all in a directory, or as given; DataError for none, or one that is no JSON object."""
    where, rows = "rows", []
    if not isinstance(source, str | Path):
        rows = [Row(f"row {n}", values) for n, values in enumerate(source, start=1)]
    else:
        where, path = str(source), Path(source)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise DataError(f"{path}: no such file. Give a jsonl file, or a directory of them.")
        for file in files:
            with file.open(encoding="utf-8", errors="replace") as lines:
                rows += [Row(f"{file}: line {n}", v) for n, v in parse_jsonl(lines, str(file))]
    for row in rows:
        if not isinstance(row.values, Mapping):
            raise DataError(f"{row.where} is {type(row.values).__name__}, not an object.")
    if not rows:
        raise DataError(f"{where}: no judgments.")
    return rows


def need(row: Row, kind: str, *names: str) -> None:
    """Raise DataError unless the row has every one of `names`."""
    missing = [name for name in names if row.values.get(name) is None]
    if missing:
        raise DataError(
            f"{row.where} is no {kind}: it has no {', '.join(missing)} (it has "
            f"{', '.join(map(str, row.values)) or 'nothing'})."
        )


def need_names(row: Row, *names: str) -> None:
    """Raise DataError unless these fields are text (or whole numbers): they name a question or a model."""
    for name in names:
        value = row.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{row.where}: {name} is {value!r}. Give text or a number.")


def judge_of(row: Row) -> str:
    """The judge's model; upstream writes its name, or [name, prompt]. Rows that do not say are one judge's."""
    judge = row.values.get("judge", "judge not named")
    name = judge[0] if isinstance(judge, list | tuple) and judge else judge
    if not isinstance(name, str):
        raise DataError(
            f"{row.where}: judge is {judge!r}. Give the judge's name, or [name, prompt]."
        )
    return name


def of_one_judge(rows: Sequence[Row], judge: str | None) -> tuple[list[Row], str]:
    """Rows of `judge`, or of the only judge; DataError if there are several and none is chosen, or no row of it."""
    names = Counter(judge_of(row) for row in rows)
    if judge is None and len(names) > 1:
        judges = ", ".join(f"{name} ({count})" for name, count in names.items())
        raise DataError(
            f"{rows[0].where} and after: rows of {len(names)} judges: {judges}. Choose one with judge=…"
        )
    chosen = judge or next(iter(names))
    if chosen not in names:
        raise DataError(
            f"{rows[0].where} and after: no row of the judge {chosen!r}; there are {', '.join(names)}."
        )
    return [row for row in rows if judge_of(row) == chosen], chosen


def without_duplicates(
    rows: Sequence[Row],
    key: Callable[[Row], Hashable],
    verdict: Callable[[Row], Any],
    counts: Counter[str],
) -> list[Row]:
    """The first row of each key; `counts` receives repeats, and apart from them those with another verdict."""
    first: dict[Any, Row] = {}
    for row in rows:
        earlier = first.setdefault(key(row), row)
        if earlier is not row:
            counts["duplicate rows"] += 1
            counts["contradicting duplicates"] += verdict(earlier) != verdict(row)
    return list(first.values())


def num_unshared(sets: Sequence[set[tuple[Any, int, int]]]) -> int:
    """How many (question, turn, seed) are in some of the sets and not in all."""
    return len(set().union(*sets)) - len(sets[0].intersection(*sets[1:]))


def summarise(
    comparisons: Sequence[Comparison],
    judge: str,
    counts: Mapping[str, int],
    lengths: Lengths | None = None,
    arms: Arms | None = None,
) -> PairsSummary:
    """Rates of every pair and of every model, or arm; `counts` is what reading found wrong."""
    comparisons = [_placed(c, lengths or {}, arms or {}) for c in comparisons]
    if not any(comparison.scores for comparison in comparisons):
        raise NoVerdict(
            f"{judge}: none of {len(comparisons)} comparisons has a verdict. Look at the judge's texts."
        )
    pairs = grouped(((c.candidate, c.baseline), c) for c in comparisons)
    sets = [{(c.question, c.turn, c.seed) for c in own} for own in pairs.values()]
    totals = {**counts, "comparisons without a verdict": sum(not c.scores for c in comparisons)}
    totals["questions that not every pair was judged on"] = num_unshared(sets)
    judged = {pair: own for pair, own in pairs.items() if any(c.scores for c in own)}
    totals |= {
        f"no verdict at all for {a} and {b}": len(pairs[a, b]) for a, b in pairs.keys() - judged
    }
    return PairsSummary(
        judge=judge,
        pairs={pair: summarise_pair(own) for pair, own in judged.items()},
        models=_rates(
            entry for c in comparisons for entry in ((c.candidate, c), (c.baseline, c.turned()))
        ),
        counts={name: count for name, count in totals.items() if count},
        comparisons=comparisons,
    )


def summarise_pair(comparisons: Sequence[Comparison]) -> PairSummary:
    """Everything about one pair; the comparisons are all of the same two models, the same way round."""
    one, judged = comparisons[0], [c for c in comparisons if c.scores]
    outcome = [float(c.outcome or 0) for c in judged]
    length = None
    if all(c.lengths for c in judged):
        own, other = zip(*(c.lengths for c in judged if c.lengths), strict=True)
        length = length_bias(outcome, own, other, [c.question for c in judged])
    by_seed = _rates((c.seed, c) for c in sorted(comparisons, key=lambda c: c.seed))
    return PairSummary(
        candidate=one.candidate,
        baseline=one.baseline,
        win_rate=rate(comparisons),
        position=position_bias([c.games for c in comparisons]),
        sign=sign_test(outcome, [c.question for c in judged]),
        by_category=_rates(
            (c.category, c) for c in sorted(comparisons, key=lambda c: c.category) if c.category
        ),
        by_turn=_rates((c.turn, c) for c in sorted(comparisons, key=lambda c: c.turn)),
        by_seed=by_seed if len(by_seed) > 1 else {},
        length=length,
    )


def rate(comparisons: Sequence[Comparison]) -> WinRate:
    """The candidate's weighted rate, clustered by question.

    With MT-Bench's single outcome a comparison this is (wins + ties/2)/n; with Arena-Hard's two games it is the
    weighted mean score, and n, wins, losses and ties count games.
    """
    counted = [(c.question, c.seed, s, w) for c in comparisons for s, w in c.scores]
    questions, seeds, scores, weights = zip(*counted, strict=True)
    return rate_of(
        np.array(scores),
        questions,
        seeds=seeds,
        weights=None if set(weights) == {1} else np.array(weights),
        dropped=sum(c.missing for c in comparisons),
    )


def _placed(comparison: Comparison, lengths: Lengths, arms: Arms) -> Comparison:
    """The comparison with its answers' lengths, between arms instead of models."""
    one, other, turn = comparison.candidate, comparison.baseline, comparison.turn - 1
    both = None
    if one in lengths and other in lengths:
        question = comparison.question
        both = (lengths[one][question][turn], lengths[other][question][turn])
    candidate, seed = arms.get(one, (one, 0))
    baseline, _ = arms.get(other, (other, 0))
    return replace(comparison, candidate=candidate, baseline=baseline, seed=seed, lengths=both)


def grouped(keyed: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Key → its things, both in the order of their first."""
    groups: dict[Any, list[Any]] = {}
    for key, thing in keyed:
        groups.setdefault(key, []).append(thing)
    return groups


def _rates(keyed: Iterable[tuple[Any, Comparison]]) -> dict[Any, WinRate]:
    """The rate of every group in which there is a verdict."""
    return {key: rate(own) for key, own in grouped(keyed).items() if any(c.scores for c in own)}
