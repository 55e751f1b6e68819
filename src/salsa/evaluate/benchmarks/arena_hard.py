"""Arena-Hard as `salsa eval` plays it: every arm against one baseline, a file's answers or an arm's."""

from pathlib import Path
from typing import Any

from salsa.artifacts import write_jsonl
from salsa.errors import DataError
from salsa.evaluate import arena_hard, games
from salsa.evaluate.benchmarks import Bench, Match
from salsa.evaluate.games import Answers
from salsa.evaluate.inputs import TEMPERATURES, Question
from salsa.evaluate.spec import ArenaHardConfig


class ArenaHard:
    """arena-hard-auto's questions and judge prompt (`salsa.evaluate.benchmarks.Benchmark`)."""

    folder = "arena_hard"

    def __init__(self, config: ArenaHardConfig) -> None:
        """Read questions, prompt and the baseline's answers.

        Raises:
            DataError: a file is missing or malformed, or the baseline did not answer a question.
        """
        self.questions = arena_hard.load_questions(config.questions)
        self.max_new_tokens = config.max_new_tokens
        self._prompt = arena_hard.load_judge_prompt(config.judge_prompt)
        self._temperature = config.temperature
        self._baseline: tuple[str, dict[Any, tuple[str, ...]]] | None = None
        if config.baseline is not None:
            answers = arena_hard.load_answers(config.baseline)
            if missing := [q.id for q in self.questions if q.id not in answers]:
                raise DataError(
                    f"{config.baseline}: no answer to {len(missing)} of {len(self.questions)} questions, e.g. "
                    f"{missing[0]}. Give the baseline's answers to these questions."
                )
            self._baseline = Path(str(config.baseline)).stem, answers

    def temperature(self, question: Question) -> float:
        """The question's own, or the benchmark's."""
        if question.temperature is not None:
            return question.temperature
        if self._temperature is not None:
            return self._temperature
        return TEMPERATURES.get(question.category, 0.0)

    def load_answers(self, file: Path) -> dict[Any, tuple[str, ...]]:
        """arena-hard-auto's format."""
        return arena_hard.load_answers(file)

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Rows of `model_judgment/<judge>/<model>.jsonl`."""
        pairs = [pair for pair in match.pairs if pair[1] in match.baseline]
        if self._baseline is not None:
            name, own = self._baseline
            pairs = [(model, name) for model in answers]
            answers = {**answers, name: own}
        rows = games.arena_rows(
            self.questions, self._prompt, answers, pairs, match.judge, match.ask
        )
        for label in {model for model, _ in pairs}:
            file = match.file(f"{self.folder}/model_judgment/{match.judge_slug}", label)
            write_jsonl(file, [row for row in rows if row["model"] == label])
        return Bench("Arena-Hard", self.questions, answers, rows, [])
