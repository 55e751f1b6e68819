"""Arena-Hard (Li et al. 2024, arXiv 2406.11939), v0.1 and v2.0: labels, and what upstream's judgment files add up to.

Every model meets one common baseline in two games: in the first the baseline is assistant A, in the second the model
is. A label's `>>` weighs 3. With one common baseline the Bradley–Terry win rate that upstream fits equals the weighted
mean score computed here. Departs from upstream: intervals are clustered by prompt (upstream resamples battles, which
halves them), and a label written the other way round, `[[B<A]]`, is the label it means.

A game without a verdict: v0.1 drops that game and keeps the other one, v2.0 drops both; so does this module, by the
file's own version, and counts them.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from salsa.errors import DataError
from salsa.evaluate.judgments import (
    Arms,
    Comparison,
    Lengths,
    PairsSummary,
    PathOrRows,
    Row,
    need,
    need_names,
    of_one_judge,
    read_rows,
    summarise,
    without_duplicates,
)

WEIGHT = 3.0
"""Of `>>` against `>`."""

BASELINE_V01 = "gpt-4-0314"
"""v0.1's files do not name their baseline."""

_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]", re.IGNORECASE)
_SCORES = {
    "A>>B": (1.0, WEIGHT), "A>B": (1.0, 1.0), "A=B": (0.5, 1.0), "B>A": (0.0, 1.0), "B>>A": (0.0, WEIGHT),
}  # fmt: skip
"""Label → assistant A's score and its weight."""
_MIRROR = str.maketrans("AB<>", "BA><")
_MEANINGS = {text: label for label in _SCORES for text in (label, label.translate(_MIRROR))}
_PLACE = {1.0: "first", 0.5: "tie", 0.0: "second"}


def parse_arena_verdict(text: str) -> str | None:
    """One of `A>>B`, `A>B`, `A=B`, `B>A`, `B>>A` by the last label in double brackets; None if there is none.

    As upstream's v2.0: case does not count, the last label does.
    """
    return [None, *_labels(text)][-1]


def summarise_pairs(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    baseline: str | None = None,
    reparse: bool = False,
    lengths: Lengths | None = None,
    arms: Arms | None = None,
) -> PairsSummary:
    """Weighted win rates of every model against the baseline, from upstream's `model_judgment/<judge>/*.jsonl`.

    Args:
        path_or_rows: a file, the directory of one judge, or the rows.
        judge: whose rows, if there are several judges'.
        baseline: whom the models met, where the rows do not say (v0.1); `gpt-4-0314` if not given.
        reparse: read the labels from the judge's texts instead of `score`.
        lengths: model → question → characters of its answer, for the length statistics.
        arms: model → (arm, training seed), to summarise arms of several checkpoints.

    Raises:
        DataError: rows of another format, of both versions, of several judges, or without a single verdict.
    """
    counts: Counter[str] = Counter()
    rows, judge = of_one_judge(read_rows(path_or_rows), judge)
    version = _version(rows)
    key = "uid" if version == 2 else "question_id"
    for row in rows:
        need(row, f"Arena-Hard v{version} judgment", key, "model", "games")
        need_names(row, key, "model", *(["baseline"] if "baseline" in row.values else []))
        if not isinstance(games := row.values["games"], list):
            raise DataError(
                f"{row.where}: games is {type(games).__name__}, not a list of two games."
            )
    rows = without_duplicates(
        rows,
        lambda row: (row.values[key], row.values["model"], row.values.get("baseline")),
        lambda row: [_stored(game) for game in row.values["games"]],
        counts,
    )
    comparisons = []
    for row in rows:
        values, games = row.values, row.values["games"]
        labels = [_label(games[n], reparse, counts) if n < len(games) else None for n in (0, 1)]
        counts["rows without two games"] += len(games) != 2
        counts["games without a verdict"] += labels.count(None)
        scores = _scores(labels, both=version == 2)
        baseline_first, model_first = (_PLACE[_SCORES[x][0]] if x else None for x in labels)
        comparisons.append(
            Comparison(
                question=values[key],
                turn=1,
                category=str(values.get("category") or ""),
                candidate=values["model"],
                baseline=values.get("baseline") or baseline or BASELINE_V01,
                games=(model_first, baseline_first),
                scores=scores,
                missing=2 - len(scores),
            )
        )
    return summarise(comparisons, judge, counts, lengths, arms)


def _version(rows: Sequence[Row]) -> int:
    versions = {2 if "uid" in row.values else 1: row.where for row in rows}
    if len(versions) > 1:
        raise DataError(
            f"rows of Arena-Hard v0.1 ({versions[1]}) and v2.0 ({versions[2]}) together. Their prompts and "
            "baselines differ: summarise them apart."
        )
    return next(iter(versions))


def _stored(game: Any) -> Any:
    return game.get("score") if isinstance(game, Mapping) else None


def _labels(text: str) -> list[str]:
    """What every label of a text means."""
    return [m for label in _LABEL.findall(text) if (m := _MEANINGS.get(label.upper()))]


def _label(game: Any, reparse: bool, counts: Counter[str]) -> str | None:
    """The verdict of one game; None if there is none."""
    if not isinstance(game, Mapping):
        return None
    text = game.get("judgment")
    text = text.get("answer") if isinstance(text, Mapping) else text
    parsed = None
    if isinstance(text, str):
        parsed = parse_arena_verdict(text)
        counts["texts with several different labels"] += len(set(_labels(text))) > 1
    if reparse or "score" not in game:
        return parsed
    stored = game["score"]
    if stored is None:
        return None
    meaning = _MEANINGS.get(stored) if isinstance(stored, str) else None
    counts["unknown verdicts"] += meaning is None
    counts["verdicts that differ from their text"] += isinstance(text, str) and parsed != meaning
    return meaning


def _scores(labels: Sequence[str | None], *, both: bool) -> tuple[tuple[float, float], ...]:
    """(the model's score, weight) of each game that counts; `both`: none unless both games have a verdict."""
    if both and None in labels:
        return ()
    found = [(number, *_SCORES[label]) for number, label in enumerate(labels) if label]
    return tuple((score if number == 1 else 1 - score, weight) for number, score, weight in found)
