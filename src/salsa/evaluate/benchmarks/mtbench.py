"""MT-Bench as `salsa eval` plays it: ratings of every answer and all pairs of arms, two turns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa.artifacts import write_jsonl
from salsa.evaluate import games, inputs
from salsa.evaluate.benchmarks import Bench, Match
from salsa.evaluate.games import Answers
from salsa.evaluate.inputs import TEMPERATURES, JudgePrompt, Question
from salsa.evaluate.spec import MTBenchConfig


class MTBench:
    """FastChat's questions and judge prompts (`salsa.evaluate.benchmarks.Benchmark`)."""

    folder = "mt_bench"

    def __init__(self, config: MTBenchConfig) -> None:
        """Read questions and prompts.

        Raises:
            DataError: a file is missing or malformed, or a prompt that will be needed is not there.
        """
        self.questions = inputs.load_questions(
            config.questions, config.references, config.corrections
        )
        self.max_new_tokens = config.max_new_tokens
        self._prompts = inputs.load_judge_prompts(config.judge_prompts)
        for question in self.questions:
            for turn in range(1, len(question.turns) + 1):
                for kind in ("single", "pair"):
                    inputs.judge_prompt(self._prompts, kind, question, turn)

    def temperature(self, question: Question) -> float:
        """The question's own, or its category's."""
        if question.temperature is not None:
            return question.temperature
        return TEMPERATURES.get(question.category, 0.0)

    def load_answers(self, file: Path) -> dict[Any, tuple[str, ...]]:
        """FastChat's format."""
        return inputs.load_answers(file)

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Rows of `<judge>_single.jsonl` and `<judge>_pair.jsonl`."""
        folder = f"{self.folder}/model_judgment"
        singles = games.single_rows(self.questions, self._prompts, answers, match.judge, match.ask)
        write_jsonl(match.file(folder, f"{match.judge_slug}_single"), singles)
        pairs = pair_rows(self.folder, self.questions, self._prompts, answers, match)
        return Bench("MT-Bench", self.questions, answers, pairs, singles)


def pair_rows(
    folder: str,
    questions: list[Question],
    prompts: Mapping[str, JudgePrompt],
    answers: Answers,
    match: Match,
) -> list[dict[str, Any]]:
    """All pairs of arms, judged by MT-Bench's prompts and written in FastChat's format."""
    rows = games.pair_rows(questions, prompts, answers, match.pairs, match.judge, match.ask)
    write_jsonl(match.file(f"{folder}/model_judgment", f"{match.judge_slug}_pair"), rows)
    return rows
