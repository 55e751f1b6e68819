"""MT-Bench as `salsa eval` plays it: FastChat's files, ratings of every answer and all pairs of arms, two turns.

Nothing of upstream comes with salsa: the files are FastChat's (`fastchat/llm_judge/data`). Departs from FastChat:
reference answers come from a file, not from whoever judges, and single ones can be replaced by corrections.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa.artifacts import digest_of
from salsa.config.schema import DataSource
from salsa.errors import DataError
from salsa.evaluate.benchmarks import Answers, Bench, JudgePrompt, Match, Question
from salsa.evaluate.judge import Message
from salsa.evaluate.judgments import Row, need, read_rows
from salsa.evaluate.mtbench import parse_pair_verdict, parse_rating
from salsa.evaluate.spec import MT_BENCH_SOURCE, MTBenchConfig

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Their judge prompts show a reference answer."""

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Sampling temperature of the answers by category; 0 for all others."""


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
    known: dict[Any, Question] = {}
    for row in _rows(questions, "questions"):
        question = _question(row, given, references)
        if known.setdefault(question.id, question) is not question:
            raise DataError(f"{row.where}: question {question.id} is there twice. Remove one.")
    return list(known.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → a model's answers, a turn each, from upstream's `model_answer/<model>.jsonl`.

    Raises:
        DataError: a row of another shape, or two different answers to one question.
    """
    answers: dict[Any, tuple[str, ...]] = {}
    for row in _rows(path, "answers"):
        need(row, "MT-Bench answer", "question_id", "choices")
        question = row.values["question_id"]
        try:
            turns = tuple(row.values["choices"][0]["turns"])
        except (LookupError, TypeError):
            turns = (None,)
        if not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{row.where}: choices[0].turns is no list of strings.")
        if answers.setdefault(question, turns) != turns:
            raise DataError(f"{row.where}: a second, different answer to question {question}.")
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
        name, system, template = (
            row.values[k] for k in ("name", "system_prompt", "prompt_template")
        )
        prompts[name] = JudgePrompt(name, system or None, template)
    return prompts


def judge_prompt(
    prompts: Mapping[str, JudgePrompt], kind: str, question: Question, turn: int
) -> JudgePrompt:
    """The prompt of `kind` (`single` or `pair`) for a question, whose category may need the reference, and a turn."""
    needs_reference = question.category in REFERENCE_CATEGORIES
    base = "math-v1" if needs_reference else "v1" if kind == "single" else "v2"
    name = f"{kind}-{base}" + ("-multi-turn" if turn == 2 else "")
    if name not in prompts:
        raise DataError(
            f"the judge prompts have no {name!r} (they have {', '.join(prompts)}). Take judge_prompts.jsonl "
            f"from {MT_BENCH_SOURCE}."
        )
    return prompts[name]


def messages(
    prompt: JudgePrompt, question: Question, turn: int, **answers: Sequence[str]
) -> list[Message]:
    """What the judge is shown; `answers` by the template's names: `answer`, or `answer_a` and `answer_b`."""
    shown = {"question": question.turns, **answers}
    values = {name: texts[0] for name, texts in shown.items()}
    shown = {name: texts[:turn] for name, texts in shown.items()}
    for name, texts in {**shown, "ref_answer": question.reference or ()}.items():
        values |= {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}
    return prompt.messages(question, values)


def single_rows(
    questions: Sequence[Question],
    prompts: Mapping[str, JudgePrompt],
    answers: Answers,
    match: Match,
) -> list[dict[str, Any]]:
    """Rows of FastChat's `<judge>_single.jsonl`."""
    asked = [
        (model, question, turn, judge_prompt(prompts, "single", question, turn))
        for model in answers
        for question, turn in _turns(questions)
    ]
    games = match.judged(
        messages(prompt, question, turn, answer=answers[model][question.id])
        for model, question, turn, prompt in asked
    )
    return [
        {
            "question_id": question.id,
            "model": model,
            "judge": [match.judge, prompt.name],
            "user_prompt": talk[-1]["content"],
            "judgment": text,
            "score": parse_rating(text) or -1,
            "turn": turn,
        }
        | error
        for (model, question, turn, prompt), (talk, text, error) in zip(asked, games, strict=True)
    ]


def pair_rows(
    questions: Sequence[Question],
    prompts: Mapping[str, JudgePrompt],
    answers: Answers,
    match: Match,
) -> list[dict[str, Any]]:
    """Rows of FastChat's `<judge>_pair.jsonl`; `model_1` is the candidate."""
    asked = [
        (pair, question, turn, judge_prompt(prompts, "pair", question, turn))
        for pair in match.pairs
        for question, turn in _turns(questions)
    ]
    games = match.judged(
        messages(prompt, q, turn, answer_a=answers[a][q.id], answer_b=answers[b][q.id])
        for pair, q, turn, prompt in asked
        for a, b in (pair, pair[::-1])
    )
    rows = []
    for (one, two), question, turn, prompt in asked:
        row: dict[str, Any] = {"question_id": question.id, "model_1": one, "model_2": two}
        for game, first, second in (("g1", "model_1", "model_2"), ("g2", "model_2", "model_1")):
            talk, text, error = next(games)
            winner = {"A": first, "B": second, "tie": "tie", None: "error"}[
                parse_pair_verdict(text)
            ]
            own = {"winner": winner, "user_prompt": talk[-1]["content"], "judgment": text} | error
            row |= {f"{game}_{name}": value for name, value in own.items()}
        rows.append(row | {"judge": [match.judge, prompt.name], "turn": turn})
    return rows


class MTBench:
    """FastChat's questions and judge prompts (`salsa.evaluate.benchmarks.Benchmark`)."""

    folder = "mt_bench"
    load_answers = staticmethod(load_answers)

    def __init__(self, config: MTBenchConfig) -> None:
        """Read questions and prompts.

        Raises:
            DataError: a file is missing or malformed, or a prompt that will be needed is not there.
        """
        self.questions = load_questions(config.questions, config.references, config.corrections)
        self.max_new_tokens = config.max_new_tokens
        self._prompts = load_judge_prompts(config.judge_prompts)
        for question, turn in _turns(self.questions):
            for kind in ("single", "pair"):
                judge_prompt(self._prompts, kind, question, turn)

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Rows of `<judge>_single.jsonl` and `<judge>_pair.jsonl`."""
        folder = f"{self.folder}/model_judgment"
        singles = single_rows(self.questions, self._prompts, answers, match)
        match.write(folder, f"{match.judge_slug}_single", singles)
        pairs = pair_rows(self.questions, self._prompts, answers, match)
        match.write(folder, f"{match.judge_slug}_pair", pairs)
        return Bench("MT-Bench", self.questions, answers, pairs, singles)


def _turns(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(q, turn) for q in questions for turn in range(1, len(q.turns) + 1)]


def _rows(source: Path | str, what: str) -> list[Row]:
    """Rows of a file, or of a hub data set."""
    name = str(source)
    if Path(name).is_file():
        return read_rows(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".jsonl"):
        raise DataError(f"{name}: no {what} there. Give a file in the format of {MT_BENCH_SOURCE}.")
    from salsa.data import load_rows

    rows = load_rows(DataSource(path=name), [()])
    return [Row(f"{name}: row {number}", row) for number, row in enumerate(rows, start=1)]


def _question(
    row: Row, given: Mapping[Any, tuple[str, ...]], references: Path | str | None
) -> Question:
    """A question in FastChat's format, or in that of the hub's `mt_bench_prompts`."""
    values = row.values
    if "prompt_id" in values:
        own = {"question_id": values["prompt_id"], "turns": values.get("prompt")}
        values = {**values, **own}
    need(Row(row.where, values), "MT-Bench question", "question_id", "category", "turns")
    key, category, turns = values["question_id"], str(values["category"]), values["turns"]
    texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if not texts or not 1 <= len(turns) <= 2:
        raise DataError(f"{row.where}: turns is a list of one or two strings, got {turns!r}.")
    reference = given.get(key, tuple(values.get("reference") or ()))
    needed = category in REFERENCE_CATEGORIES and references is not None
    if needed and len(reference) < len(turns):
        raise DataError(
            f"{row.where}: question {key} ({category}) needs a reference answer to every turn and {references} has "
            f"none. Take reference_answer/gpt-4.jsonl from {MT_BENCH_SOURCE}."
        )
    temperature = values.get("required_temperature")
    if temperature is None:
        temperature = TEMPERATURES.get(category, 0.0)
    return Question(key, category, tuple(turns), temperature, reference or None)
