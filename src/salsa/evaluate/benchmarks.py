"""Judged benchmarks: what each asks, who meets whom, and how answers become judged rows in upstream's formats.

Every pair of arms meets on every question and turn, in two games with the answers' places swapped; the k-th training
seed of one arm meets the k-th of the other. Against Arena-Hard's common baseline every arm meets the baseline only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from salsa.artifacts import write_jsonl
from salsa.errors import DataError
from salsa.evaluate.judge import Message, Refusal, Reply, Totals

Answers = Mapping[str, Mapping[Any, Sequence[str]]]
"""Model → question → its answers, a turn each."""


@dataclass(frozen=True)
class Question:
    """A question of one or two turns."""

    id: Any
    category: str
    turns: tuple[str, ...]
    temperature: float = 0.0
    """What it is answered at."""
    reference: tuple[str, ...] | None = None
    """Reference answers, a turn each."""


@dataclass(frozen=True)
class JudgePrompt:
    """One of upstream's judge prompts."""

    name: str
    system: str | None
    template: str

    def messages(self, question: Question, values: Mapping[str, str]) -> list[Message]:
        """What the judge is shown; DataError if the template asks for none of `values`."""
        try:
            for _, name, width, conversion in Formatter().parse(self.template):
                if name is not None and (not name.isidentifier() or width or conversion):
                    raise KeyError(f"{{{name}}}, no plain name")  # format() would read attributes
            text = self.template.format(**values)  # once: answers may hold braces
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"judge prompt {self.name!r} asks for {error}, which question {question.id} does not have."
            ) from error
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]


@dataclass(frozen=True)
class Bench:
    """One judged benchmark: its questions, the answers and the judgments."""

    name: str
    questions: Sequence[Question]
    answers: Answers
    pairs: Sequence[Mapping[str, Any]]
    """Judgments of pairs in upstream's format."""
    singles: Sequence[Mapping[str, Any]]


@dataclass
class Match:
    """Who plays, who judges, and where the rows go."""

    baseline: Sequence[str]
    """The models of the arm that others are compared with."""
    pairs: Sequence[tuple[str, str]]
    """(candidate, baseline) of all pairs of arms."""
    judge: str
    ask: Callable[[Sequence[Sequence[Message]]], tuple[Sequence[Reply | Refusal], Totals]]
    """Ask the judge about many conversations."""
    directory: Path
    totals: Totals = field(default_factory=Totals)
    """What judging took so far."""

    @property
    def judge_slug(self) -> str:
        """The judge's name as a file name: endpoints call models `org/name` or by their path."""
        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.judge)
        return slug.strip("-.") or "judge"

    def judged(
        self, conversations: Iterable[list[Message]]
    ) -> Iterator[tuple[list[Message], str, dict[str, str]]]:
        """Each conversation, the judge's text, and why there is none: `{"error": …}` and an empty text."""
        asked = list(conversations)
        replies, totals = self.ask(asked)
        self.totals = self.totals + totals
        for conversation, reply in zip(asked, replies, strict=True):
            if isinstance(reply, Refusal):
                yield conversation, "", {"error": reply.reason}
            else:
                yield conversation, reply.text, {}

    def write(self, folder: str, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write rows to `<directory>/<folder>/<name>.jsonl`, its folder made."""
        path = self.directory / folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
        return path


class Benchmark(Protocol):
    """A benchmark that asks questions of its own. Making one reads its files, so that a typo surfaces at once."""

    folder: str
    """Where its rows go, and the format of its answers (`salsa.evaluate.answers.ROWS`)."""
    questions: Sequence[Question]
    max_new_tokens: int

    def load_answers(self, path: Path) -> dict[Any, tuple[str, ...]]:
        """Question → answers, from upstream's format."""

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Have the answers judged and write the rows in upstream's format."""


def pairings(models: Mapping[str, Sequence[str]], baseline: str) -> list[tuple[str, str]]:
    """(candidate, baseline) of all pairs of arms, the k-th model of one with the k-th of the other."""
    arms = [baseline, *(arm for arm in models if arm != baseline)]
    return [
        pair
        for earlier, later in combinations(arms, 2)
        for pair in zip(models[later], models[earlier], strict=True)
    ]
