"""Judged benchmarks: what each asks, how its answers become judged rows, and where upstream's formats go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from salsa.evaluate.games import Answers, Asked
from salsa.evaluate.inputs import Question


@dataclass(frozen=True)
class Bench:
    """One judged benchmark: its questions, the answers and the judgments."""

    name: str
    questions: Sequence[Question]
    answers: Answers
    pairs: Sequence[Mapping[str, Any]]
    """Judgments of pairs in upstream's format."""
    singles: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Match:
    """Who plays, who judges, and where the rows go."""

    baseline: Sequence[str]
    """The models of the arm that others are compared with."""
    pairs: Sequence[tuple[str, str]]
    """(candidate, baseline) of all pairs of arms."""
    judge: str
    ask: Asked
    directory: Path

    @property
    def judge_slug(self) -> str:
        """The judge's name as a file name: endpoints call models `org/name` or by their path."""
        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.judge)
        return slug.strip("-.") or "judge"

    def file(self, folder: str, name: str) -> Path:
        """`<directory>/<folder>/<name>.jsonl`, its folder made."""
        path = self.directory / folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Benchmark(Protocol):
    """A benchmark that asks questions of its own. Making one reads its files, so that a typo surfaces at once."""

    folder: str
    """Where its rows go, and the format of its answers (`salsa.evaluate.answers.ROWS`)."""
    questions: list[Question]
    max_new_tokens: int

    def temperature(self, question: Question) -> float:
        """What a question is answered at."""

    def load_answers(self, file: Path) -> dict[Any, tuple[str, ...]]:
        """Question → answers, from upstream's format."""

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Have the answers judged and write the rows in upstream's format."""
