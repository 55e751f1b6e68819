"""Arena-Hard (Li et al. 2024, arXiv 2406.11939), v0.1 and v2.0: judge prompt, labels, and upstream's files.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salsa.artifacts import digest_of
from salsa.errors import DataError
from salsa.evaluate.inputs import Message, Question
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

UPSTREAM = "github.com/lmarena/arena-hard-auto"

_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]", re.IGNORECASE)
_MEANINGS = {
    "A>>B": "A>>B", "A>B": "A>B", "A=B": "A=B", "B>A": "B>A", "B>>A": "B>>A",
    "B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A",
}  # fmt: skip
_SCORES = {
    "A>>B": (1.0, WEIGHT), "A>B": (1.0, 1.0), "A=B": (0.5, 1.0), "B>A": (0.0, 1.0), "B>>A": (0.0, WEIGHT),
}  # fmt: skip
_PLACE = {1.0: "first", 0.5: "tie", 0.0: "second"}


@dataclass(frozen=True)
class ArenaPrompt:
    """Upstream's judge prompt."""

    system: str
    template: str


def parse_arena_verdict(text: str) -> str | None:
    """One of `A>>B`, `A>B`, `A=B`, `B>A`, `B>>A` by the last label in double brackets; None if there is none.

    As upstream's v2.0: case does not count, the last label does.
    """
    labels = [m for label in _LABEL.findall(text) if (m := _MEANINGS.get(label.upper()))]
    return labels[-1] if labels else None


def load_questions(path: Path | str) -> list[Question]:
    """Upstream's `question.jsonl`: `uid` and `prompt` (v2.0, and v0.1 since then), or `question_id` and `turns`."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no questions there. Take question.jsonl from {UPSTREAM}.")
    questions: dict[Any, Question] = {}
    for row in read_rows(path):
        values = row.values
        if "prompt" in values:
            need(row, "Arena-Hard question", "uid", "category")
            question = Question(values["uid"], str(values["category"]), (values["prompt"],))
        else:
            need(row, "Arena-Hard question", "question_id", "category", "turns")
            question = Question(
                values["question_id"], str(values["category"]), (values["turns"][0]["content"],)
            )
        if question.id in questions:
            raise DataError(f"{row.where}: question {question.id} is there twice. Remove one.")
        questions[question.id] = question
    return list(questions.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → answer, from upstream's `model_answer/<model>.jsonl` of either version."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no answers there. Take model_answer/*.jsonl from {UPSTREAM}.")
    answers: dict[Any, tuple[str, ...]] = {}
    for row in read_rows(path):
        values = row.values
        try:
            if "uid" in values:
                answer = values["messages"][-1]["content"]
                answer = answer["answer"] if isinstance(answer, dict) else answer
                key = values["uid"]
            else:
                answer = values["choices"][0]["turns"][0]["content"]
                key = values["question_id"]
        except (LookupError, TypeError) as error:
            raise DataError(
                f"{row.where} is no Arena-Hard answer (no {error}). Give v0.1's or v2.0's format."
            ) from error
        if answers.setdefault(key, (answer,)) != (answer,):
            raise DataError(f"{row.where}: a second, different answer to question {key}.")
    return answers


def answer_row(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    """A row of v2.0's `model_answer/<model>.jsonl`, without a time stamp."""
    return {
        "uid": question.id,
        "ans_id": digest_of([question.id, model, *answers])[:22],
        "model": model,
        "messages": [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": answers[0]}},
        ],
    }


def load_judge_prompt(path: Path | str) -> ArenaPrompt:
    """`system_prompt` and `prompt_template` of upstream's YAML (`config/judge_config.yaml`).

    v2.0 keeps the system prompt in `utils/judge_utils.py`; copy it into the YAML.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        template = values["prompt_template"]
        return ArenaPrompt(
            values["system_prompt"], template[0] if isinstance(template, list) else template
        )
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: no Arena-Hard judge prompt ({' '.join(str(error).split())}). Give a YAML file with system_prompt "
            f"and prompt_template, such as config/judge_config.yaml of {UPSTREAM}; v2.0 keeps its system prompt in "
            "utils/judge_utils.py."
        ) from error


def pair_messages(
    prompt: ArenaPrompt, question: Question, first: str, second: str
) -> list[Message]:
    """What the judge is shown; `first` is assistant A. Templates of either version fit."""
    names = {"question_1": question.turns[0], "answer_1": first, "answer_2": second}
    names |= {"QUESTION": question.turns[0], "ANSWER_A": first, "ANSWER_B": second}
    try:
        text = prompt.template.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"the Arena-Hard prompt template asks for {error}.") from error
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]


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
    rows = without_duplicates(
        rows,
        lambda row: (row.values[key], row.values["model"], row.values.get("baseline")),
        lambda row: [_stored(game) for game in _games(row)],
        counts,
    )
    comparisons = []
    for row in rows:
        values = row.values
        games = _games(row)
        labels = [_label(games[n], reparse, counts) if n < len(games) else None for n in (0, 1)]
        counts["rows without two games"] += len(games) != 2
        scores = _scores(labels, both=version == 2)
        comparisons.append(
            Comparison(
                values[key],
                1,
                str(values.get("category") or ""),
                values["model"],
                values.get("baseline") or baseline or BASELINE_V01,
                _places(labels),
                scores,
                missing=2 - len(scores),
            )
        )
        counts["games without a verdict"] += labels.count(None)
    counts["comparisons without a verdict"] = sum(not c.scores for c in comparisons)
    return summarise(comparisons, judge, counts, lengths, arms)


def _version(rows: Sequence[Row]) -> int:
    versions = {2 if "uid" in row.values else 1: row.where for row in rows}
    if len(versions) > 1:
        raise DataError(
            f"rows of Arena-Hard v0.1 ({versions[1]}) and v2.0 ({versions[2]}) together. Their prompts and "
            "baselines differ: summarise them apart."
        )
    return next(iter(versions))


def _games(row: Row) -> list[Any]:
    games = row.values["games"]
    if not isinstance(games, list):
        raise DataError(f"{row.where}: games is {type(games).__name__}, not a list of two games.")
    return games


def _stored(game: Any) -> Any:
    return game.get("score") if isinstance(game, Mapping) else None


def _label(game: Any, reparse: bool, counts: Counter[str]) -> str | None:
    """The verdict of one game; None if there is none."""
    if not isinstance(game, Mapping):
        return None
    text = game.get("judgment")
    text = text.get("answer") if isinstance(text, Mapping) else text
    parsed = None
    if isinstance(text, str):
        parsed = parse_arena_verdict(text)
        verdicts = {_MEANINGS.get(label.upper()) for label in _LABEL.findall(text)} - {None}
        counts["texts with several different labels"] += len(verdicts) > 1
    if reparse or "score" not in game:
        return parsed
    stored = game["score"]
    if stored is None:
        return None
    meaning = _MEANINGS.get(stored) if isinstance(stored, str) else None
    counts["unknown verdicts"] += meaning is None
    counts["verdicts that differ from their text"] += isinstance(text, str) and parsed != meaning
    return meaning


def _places(labels: Sequence[str | None]) -> tuple[str | None, str | None]:
    """Which place won, games ordered as `Comparison` has them: the candidate is first in upstream's second game."""
    baseline_first, model_first = (_PLACE[_SCORES[x][0]] if x else None for x in labels)
    return model_first, baseline_first


def _scores(labels: Sequence[str | None], *, both: bool) -> tuple[tuple[float, float], ...]:
    """(the model's score, weight) of each game that counts; `both`: none unless both games have a verdict."""
    if both and None in labels:
        return ()
    rows = []
    for number, label in enumerate(labels):
        if label is not None:
            score, weight = _SCORES[label]
            rows.append((score if number == 1 else 1 - score, weight))
    return tuple(rows)
