"""What MT-Bench asks: questions, reference answers and judge prompts from FastChat's files, and its conversations.

Nothing of upstream comes with salsa: the files are FastChat's (`fastchat/llm_judge/data`). Departs from FastChat:
reference answers come from a file, not from whoever judges, and single ones can be replaced by corrections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salsa.artifacts import digest_of
from salsa.config.schema import DataSource
from salsa.errors import DataError
from salsa.evaluate.judgments import Row, need, read_rows

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Their judge prompts show a reference answer."""

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Sampling temperature of the answers by category; 0 for all others."""

UPSTREAM = "github.com/lm-sys/FastChat, fastchat/llm_judge/data"

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


def load_questions(
    questions: Path | str,
    references: Path | str | None = None,
    corrections: Path | str | None = None,
) -> list[Question]:
    """Questions, with the reference answers of those whose category needs one.

    Args:
        questions: upstream's `question.jsonl`, or a hub data set such as `HuggingFaceH4/mt_bench_prompts` (columns
            `prompt_id`, `category`, `prompt`, `reference`).
        references: upstream's `reference_answer/gpt-4.jsonl`, or any file of answers.
        corrections: a file of answers that replace wrong references (13 of upstream's 30 are).

    Raises:
        DataError: a file that is missing or malformed, a repeated question, or a reference that is missing.
    """
    given = load_answers(references) if references is not None else {}
    if corrections is not None:
        given |= load_answers(corrections)
    by_id: dict[Any, Question] = {}
    for row in _rows(questions, "questions"):
        question = _question(row, given)
        if question.id in by_id:
            raise DataError(f"{row.where}: question {question.id} is there twice. Remove one.")
        _check_reference(row, question, references)
        by_id[question.id] = question
    return list(by_id.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → a model's answers, a turn each, from upstream's `model_answer/<model>.jsonl`.

    Raises:
        DataError: a row of another shape, or two different answers to one question.
    """
    answers: dict[Any, tuple[str, ...]] = {}
    for row in _rows(path, "answers"):
        need(row, "MT-Bench answer", "question_id", "choices")
        try:
            turns = tuple(row.values["choices"][0]["turns"])
        except (LookupError, TypeError):
            turns = (None,)
        if not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{row.where}: choices[0].turns is no list of strings.")
        if answers.setdefault(row.values["question_id"], turns) != turns:
            raise DataError(
                f"{row.where}: a second, different answer to question {row.values['question_id']}."
            )
    return answers


def answer_row(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    """A row of `model_answer/<model>.jsonl`, without a time stamp: equal runs write equal files."""
    return {
        "question_id": question.id,
        "answer_id": digest_of([question.id, model, *answers])[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": list(answers)}],
    }


def load_judge_prompts(path: Path | str) -> dict[str, JudgePrompt]:
    """Name → judge prompt, from upstream's `judge_prompts.jsonl`."""
    prompts = {}
    for row in _rows(path, "judge prompts"):
        need(row, "judge prompt", "name", "system_prompt", "prompt_template")
        values = row.values
        prompts[values["name"]] = JudgePrompt(
            values["name"], values["system_prompt"], values["prompt_template"]
        )
    return prompts


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


def _rows(source: Path | str, what: str) -> list[Row]:
    """Rows of a file, or of a hub data set."""
    name = str(source)
    if Path(name).is_file():
        return read_rows(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".jsonl"):
        raise DataError(f"{name}: no {what} there. Give a file in the format of {UPSTREAM}.")
    from salsa.data import load_rows

    rows = load_rows(DataSource(path=name), [()])
    return [Row(f"{name}: row {number}", row) for number, row in enumerate(rows, start=1)]


def _question(row: Row, references: Mapping[Any, tuple[str, ...]]) -> Question:
    """A question in FastChat's format, or in that of the hub's `mt_bench_prompts`."""
    values = row.values
    if "prompt_id" in values:
        own = {"question_id": values["prompt_id"], "turns": values.get("prompt")}
        values = {**values, **own}
    need(Row(row.where, values), "MT-Bench question", "question_id", "category", "turns")
    key, turns = values["question_id"], values["turns"]
    if (
        not isinstance(turns, list)
        or not 1 <= len(turns) <= 2
        or not all(isinstance(turn, str) for turn in turns)
    ):
        raise DataError(f"{row.where}: turns is a list of one or two strings, got {turns!r}.")
    reference = references.get(key, tuple(values.get("reference") or ()))
    return Question(
        key,
        str(values["category"]),
        tuple(turns),
        reference or None,
        values.get("required_temperature"),
    )


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
