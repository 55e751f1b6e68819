"""Arena-Hard as `salsa eval` plays it: upstream's files, and every arm against one baseline, a file's or an arm's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from salsa.artifacts import digest_of
from salsa.errors import DataError
from salsa.evaluate.arena_hard import parse_arena_verdict
from salsa.evaluate.benchmarks import Answers, Bench, JudgePrompt, Match, Question
from salsa.evaluate.judgments import Row, need, read_rows
from salsa.evaluate.spec import ARENA_HARD_SOURCE, ArenaHardConfig


def load_questions(path: Path | str, temperature: float = 0.0) -> list[Question]:
    """Upstream's `question.jsonl`: `uid` and `prompt` (v2.0, and v0.1 since then), or `question_id` and `turns`."""
    known: dict[Any, Question] = {}
    for row in _rows(path, "questions", "question.jsonl"):
        values = row.values
        if "prompt" in values:
            need(row, "Arena-Hard question", "uid", "category")
            key, text = values["uid"], values["prompt"]
        else:
            need(row, "Arena-Hard question", "question_id", "category", "turns")
            key, text = values["question_id"], values["turns"][0]["content"]
        if key in known:
            raise DataError(f"{row.where}: question {key} is there twice. Remove one.")
        known[key] = Question(key, str(values["category"]), (text,), temperature)
    return list(known.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → answer, from upstream's `model_answer/<model>.jsonl` of either version."""
    answers: dict[Any, tuple[str, ...]] = {}
    for row in _rows(path, "answers", "model_answer/*.jsonl"):
        values = row.values
        try:
            if "uid" in values:
                key, answer = values["uid"], values["messages"][-1]["content"]
                answer = answer["answer"] if isinstance(answer, dict) else answer
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


def load_judge_prompt(path: Path | str) -> JudgePrompt:
    """`system_prompt` and `prompt_template` of upstream's YAML (`config/judge_config.yaml`).

    v2.0 keeps the system prompt in `utils/judge_utils.py`; copy it into the YAML.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        template = values["prompt_template"]
        template = template[0] if isinstance(template, list) else template
        return JudgePrompt("Arena-Hard", values["system_prompt"], template)
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: no Arena-Hard judge prompt ({' '.join(str(error).split())}). Give a YAML file with system_prompt "
            f"and prompt_template, such as config/judge_config.yaml of {ARENA_HARD_SOURCE}; v2.0 keeps its system "
            "prompt in utils/judge_utils.py."
        ) from error


class ArenaHard:
    """arena-hard-auto's questions and judge prompt (`salsa.evaluate.benchmarks.Benchmark`)."""

    folder = "arena_hard"
    load_answers = staticmethod(load_answers)

    def __init__(self, config: ArenaHardConfig) -> None:
        """Read questions, prompt and the baseline's answers.

        Raises:
            DataError: a file is missing or malformed, or the baseline did not answer a question.
        """
        self.questions = load_questions(config.questions, config.temperature)
        self.max_new_tokens = config.max_new_tokens
        self._prompt = load_judge_prompt(config.judge_prompt)
        self._baseline: dict[str, dict[Any, tuple[str, ...]]] = {}
        if config.baseline is not None:
            answers = load_answers(config.baseline)
            if missing := [q.id for q in self.questions if q.id not in answers]:
                raise DataError(
                    f"{config.baseline}: no answer to {len(missing)} of {len(self.questions)} questions, e.g. "
                    f"{missing[0]}. Give the baseline's answers to these questions."
                )
            self._baseline = {Path(config.baseline).stem: answers}

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Rows of v2.0's `model_judgment/<judge>/<model>.jsonl`; in the first game the baseline is assistant A."""
        pairs = [pair for pair in match.pairs if pair[1] in match.baseline]
        if self._baseline:
            pairs = [(model, name) for model in answers for name in self._baseline]
            answers = {**answers, **self._baseline}
        asked = [(pair, question) for pair in pairs for question in self.questions]
        games = match.judged(
            self._messages(
                question, answers[first][question.id][0], answers[second][question.id][0]
            )
            for pair, question in asked
            for first, second in (pair[::-1], pair)
        )
        rows: list[dict[str, Any]] = [
            {
                "uid": question.id,
                "category": question.category,
                "judge": match.judge,
                "model": model,
                "baseline": baseline,
                "games": [
                    {
                        "score": parse_arena_verdict(text),
                        "judgment": {"answer": text},
                        "prompt": talk,
                    }
                    | error
                    for talk, text, error in (next(games), next(games))
                ],
            }
            for (model, baseline), question in asked
        ]
        for label in {model for model, _ in pairs}:
            own = [row for row in rows if row["model"] == label]
            match.write(f"{self.folder}/model_judgment/{match.judge_slug}", label, own)
        return Bench("Arena-Hard", self.questions, answers, rows, [])

    def _messages(self, question: Question, first: str, second: str) -> list[dict[str, str]]:
        """What the judge is shown; `first` is assistant A. Templates of either version fit."""
        names = {"question_1": question.turns[0], "answer_1": first, "answer_2": second}
        names |= {"QUESTION": question.turns[0], "ANSWER_A": first, "ANSWER_B": second}
        return self._prompt.messages(question, names)


def _rows(path: Path | str, what: str, file: str) -> list[Row]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no {what} there. Take {file} from {ARENA_HARD_SOURCE}.")
    return read_rows(path)
