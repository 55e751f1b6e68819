"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): questions, judge prompts, verdicts and FastChat's files.

Nothing of upstream comes with salsa: questions, reference answers and judge prompts are read from FastChat's files
(`fastchat/llm_judge/data`). Departs from FastChat on purpose: a rating is the first `[[n]]` in 1..10 and never a bare
`[n]`, which is often code; of several pairwise labels the last counts; a game without a verdict drops its comparison
and is counted; repeated rows count once; reference answers come from a file, not from whoever judges.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from salsa.errors import DataError
from salsa.evaluate.judgments import (
    PLACES,
    Comparison,
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
from salsa.evaluate.winrate import Difference, Estimate, clustered_mean, paired_difference

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Their judge prompts show a reference answer."""

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Sampling temperature of the answers by category; 0 for all others."""

UPSTREAM = "github.com/lm-sys/FastChat, fastchat/llm_judge/data"

_RATING = re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]")
_LABEL = re.compile(r"\[\[([ABC])\]\]")

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question of one or two turns."""

    id: Any
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    """Reference answers, a turn each."""
    temperature: float | None = None
    """Overrides `TEMPERATURES`."""

    @property
    def needs_reference(self) -> bool:
        """Whether the judge is shown a reference answer."""
        return self.category in REFERENCE_CATEGORIES


@dataclass(frozen=True)
class JudgePrompt:
    """One of upstream's judge prompts."""

    name: str
    system: str
    template: str


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


def load_questions(
    questions: Path | str,
    references: Path | str | None = None,
    corrections: Path | str | None = None,
) -> list[Question]:
    """Questions, with the reference answers of those whose category needs one.

    Args:
        questions: upstream's `question.jsonl`.
        references: upstream's `reference_answer/gpt-4.jsonl`, or any file of answers.
        corrections: a file of answers that replace wrong references (13 of upstream's 30 are).

    Raises:
        DataError: a file that is missing or malformed, a repeated question, or a reference that is missing.
    """
    given = load_answers(references) if references is not None else {}
    if corrections is not None:
        given |= load_answers(corrections)
    found: dict[Any, Question] = {}
    for row in _file_rows(questions, "questions"):
        need(row, "MT-Bench question", "question_id", "category", "turns")
        values = row.values
        turns = values["turns"]
        if (
            not isinstance(turns, list)
            or not 1 <= len(turns) <= 2
            or not all(isinstance(t, str) for t in turns)
        ):
            raise DataError(f"{row.where}: turns is a list of one or two strings, got {turns!r}.")
        question = Question(
            values["question_id"],
            str(values["category"]),
            tuple(turns),
            given.get(values["question_id"]),
            values.get("required_temperature"),
        )
        if question.id in found:
            raise DataError(f"{row.where}: question {question.id} is there twice. Remove one.")
        _check_reference(row, question, references)
        found[question.id] = question
    return list(found.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → a model's answers, a turn each, from upstream's `model_answer/<model>.jsonl`.

    Raises:
        DataError: a row of another shape, or two different answers to one question.
    """
    found: dict[Any, tuple[str, ...]] = {}
    for row in _file_rows(path, "answers"):
        need(row, "MT-Bench answer", "question_id", "choices")
        try:
            turns = tuple(row.values["choices"][0]["turns"])
        except (LookupError, TypeError):
            turns = (None,)
        if not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{row.where}: choices[0].turns is no list of strings.")
        if found.setdefault(row.values["question_id"], turns) != turns:
            raise DataError(
                f"{row.where}: a second, different answer to question {row.values['question_id']}."
            )
    return found


def load_judge_prompts(path: Path | str) -> dict[str, JudgePrompt]:
    """Name → judge prompt, from upstream's `judge_prompts.jsonl`."""
    found = {}
    for row in _file_rows(path, "judge prompts"):
        need(row, "judge prompt", "name", "system_prompt", "prompt_template")
        values = row.values
        found[values["name"]] = JudgePrompt(
            values["name"], values["system_prompt"], values["prompt_template"]
        )
    return found


def judge_prompt(
    prompts: Mapping[str, JudgePrompt], kind: str, question: Question, turn: int
) -> JudgePrompt:
    """The prompt for a question and turn.

    Args:
        prompts: `load_judge_prompts`.
        kind: `single` or `pair`.
        question: decides whether the reference is shown.
        turn: 1 or 2.
    """
    base = "math-v1" if question.needs_reference else "v1" if kind == "single" else "v2"
    name = f"{kind}-{base}" + ("-multi-turn" if turn == 2 else "")
    if name not in prompts:
        raise DataError(
            f"the judge prompts have no {name!r} (they have {', '.join(prompts)}). Take judge_prompts.jsonl "
            f"from {UPSTREAM}."
        )
    return prompts[name]


def single_messages(
    prompt: JudgePrompt, question: Question, answer: Sequence[str], turn: int
) -> list[Message]:
    """What the judge is shown to rate one answer."""
    values = {"question": question.turns[0], "answer": answer[0]}
    for number in range(turn):
        values[f"question_{number + 1}"] = question.turns[number]
        values[f"answer_{number + 1}"] = answer[number]
    return _messages(prompt, question, values)


def pair_messages(
    prompt: JudgePrompt, question: Question, first: Sequence[str], second: Sequence[str], turn: int
) -> list[Message]:
    """What the judge is shown to compare two answers; `first` is assistant A."""
    values = {"question": question.turns[0], "answer_a": first[0], "answer_b": second[0]}
    for number in range(turn):
        values[f"question_{number + 1}"] = question.turns[number]
        values[f"answer_a_{number + 1}"] = first[number]
        values[f"answer_b_{number + 1}"] = second[number]
    return _messages(prompt, question, values)


def summarise_pairs(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    categories: Mapping[Any, str] | None = None,
    reparse: bool = False,
    lengths: Mapping[str, Mapping[Any, Sequence[int]]] | None = None,
) -> PairsSummary:
    """Win rates from a file in the format of FastChat's `<judge>_pair.jsonl`.

    Args:
        path_or_rows: the file, a directory of such files, or its rows.
        judge: whose rows, if there are several judges'.
        categories: question → category, for rates by category (judgments do not say).
        reparse: read the verdicts from the judge's texts instead of `g1_winner` and `g2_winner`.
        lengths: model → question → characters of each turn's answer, for the length statistics.

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
    counts["comparisons without a verdict"] = sum(not c.scores for c in comparisons)
    return summarise(comparisons, judge, counts, lengths)


def summarise_singles(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    categories: Mapping[Any, str] | None = None,
    reparse: bool = False,
) -> SinglesSummary:
    """Mean ratings from a file in the format of FastChat's `<judge>_single.jsonl`; arguments as `summarise_pairs`.

    Raises:
        DataError: rows of another format, of several judges, or a model without a single rating.
    """
    counts: Counter[str] = Counter()
    rows, judge = of_one_judge([_single_row(row) for row in read_rows(path_or_rows)], judge)
    rows = without_duplicates(rows, _single_key, lambda row: row.values.get("score"), counts)
    ratings: dict[str, dict[tuple[Any, int], float | None]] = {}
    for row in rows:
        question, turn, model = _single_key(row)
        ratings.setdefault(model, {})[question, turn] = _rating(row, reparse, counts)
    counts["ratings that not every model has"] = num_unshared([set(r) for r in ratings.values()])
    models = {m: _single_summary(m, own, categories or {}) for m, own in ratings.items()}
    return SinglesSummary(
        judge=judge,
        models=models,
        differences={
            pair: found
            for pair in combinations(models, 2)
            if (found := _difference(ratings[pair[0]], ratings[pair[1]])) is not None
        },
        counts={name: count for name, count in counts.items() if count},
    )


def _file_rows(path: Path | str, what: str) -> list[Row]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no {what} there. Give a file in the format of {UPSTREAM}.")
    return read_rows(path)


def _check_reference(row: Row, question: Question, references: Path | str | None) -> None:
    if not question.needs_reference or references is None:
        return
    if question.reference is None or len(question.reference) < len(question.turns):
        raise DataError(
            f"{row.where}: question {question.id} ({question.category}) needs a reference answer to every turn and "
            f"{references} has none. Take reference_answer/gpt-4.jsonl from {UPSTREAM}."
        )


def _messages(prompt: JudgePrompt, question: Question, values: dict[str, str]) -> list[Message]:
    for number, reference in enumerate(question.reference or ()):
        values[f"ref_answer_{number + 1}"] = reference
    try:
        text = prompt.template.format(**values)  # once: answers may hold braces
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"judge prompt {prompt.name!r} asks for {error}, which question {question.id} does not have."
        ) from error
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": text}]


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


def _winners(row: Row) -> dict[str, Any]:
    """Game → the winning model's name, whichever way round the row has the models."""
    values = row.values
    stored = {game: str(values.get(f"{game}_winner")) for game in ("g1", "g2")}
    names = {"model_1": values["model_1"], "model_2": values["model_2"]}
    return {game: names.get(winner, winner) for game, winner in stored.items()}


def _turn(row: Row) -> int:
    turn = row.values.get("turn", 1)  # FastChat's first files had one turn and did not say so
    if isinstance(turn, bool) or turn not in (1, 2):
        raise DataError(f"{row.where}: turn is {turn!r}; MT-Bench has turns 1 and 2.")
    return int(turn)


def _comparison(
    row: Row, categories: Mapping[Any, str], reparse: bool, counts: Counter[str]
) -> Comparison:
    values = row.values
    first = _place(row, "g1", {"model_1": "A", "model_2": "B"}, reparse, counts)
    second = _place(row, "g2", {"model_1": "B", "model_2": "A"}, reparse, counts)
    scores: tuple[tuple[float, float], ...] = ()
    if first is not None and second is not None:
        agreed = PLACES[first] == {"A": "second", "B": "first", "tie": "tie"}[second]
        scores = (({"A": 1.0, "B": 0.0, "tie": 0.5}[first] if agreed else 0.5, 1.0),)
    return Comparison(
        values["question_id"],
        _turn(row),
        categories.get(values["question_id"], ""),
        values["model_1"],
        values["model_2"],
        (PLACES[first], PLACES[second]),
        scores,
        missing=0 if scores else 1,
    )


def _place(
    row: Row, game: str, labels: Mapping[str, str], reparse: bool, counts: Counter[str]
) -> str | None:
    """`A`, `B`, `tie` or None: the verdict of one game by place."""
    stored: Any = row.values.get(f"{game}_winner")
    text = row.values.get(f"{game}_judgment")
    parsed = parse_pair_verdict(text) if isinstance(text, str) else None
    if isinstance(text, str):
        counts["texts with several different labels"] += len(set(_LABEL.findall(text))) > 1
    if reparse or stored is None:
        return parsed
    known = {**labels, "tie": "tie", "error": None}
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
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        counts["ratings that are no number"] += 1
        return None
    if not 1 <= score <= 10:
        counts["ratings outside 1 to 10"] += 1
        return None
    if isinstance(text, str) and parsed != score:
        counts["ratings that differ from their text"] += 1
    return float(score)


def _single_summary(
    model: str, ratings: Mapping[tuple[Any, int], float | None], categories: Mapping[Any, str]
) -> SingleSummary:
    given = {key: value for key, value in ratings.items() if value is not None}
    if not given:
        raise DataError(f"{model}: none of {len(ratings)} judgments holds a rating in 1 to 10.")

    def mean(chosen: Sequence[tuple[Any, int]]) -> Estimate:
        values = np.array([given[key] for key in chosen])
        return clustered_mean(values, [question for question, _ in chosen])

    groups = sorted({categories[q] for q, _ in given if q in categories})
    return SingleSummary(
        score=mean(list(given)),
        by_category={g: mean([k for k in given if categories.get(k[0]) == g]) for g in groups},
        by_turn={t: mean([k for k in given if k[1] == t]) for t in sorted({k[1] for k in given})},
        n=len(given),
        dropped=len(ratings) - len(given),
    )


def _difference(
    a: Mapping[tuple[Any, int], float | None], b: Mapping[tuple[Any, int], float | None]
) -> Difference | None:
    shared = [key for key in a if a[key] is not None and b.get(key) is not None]
    if not shared:
        return None
    return paired_difference(
        [a[key] for key in shared],  # type: ignore[misc]
        [b[key] for key in shared],  # type: ignore[misc]
        clusters=[question for question, _ in shared],
    )
