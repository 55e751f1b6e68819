"""What a stage says while it works: `metrics.jsonl` always; a progress bar on a terminal, plain lines elsewhere."""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from salsa.artifacts import read_jsonl, write_atomic, write_jsonl

PLAIN_SECONDS = 5.0
"""Least time between two plain lines of one stage."""

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Tracker:
    """Logs one stage: a row a step into `metrics.jsonl`, a few of its metrics onto the screen.

    Of several processes that do one job, one writes; the trackers of the others do nothing.
    """

    def __init__(
        self,
        directory: Path,
        label: str,
        total: int,
        show: tuple[str, ...],
        progress: Progress,
        *,
        writes: bool = True,
    ) -> None:
        self.directory, self.writes = directory, writes
        self.file = directory / "metrics.jsonl"
        self.label, self.total, self.show = label, total, show
        self.progress, self.task = progress, progress.add_task(label, total=total, shown="")
        self.started = self._last_line = time.monotonic()
        self.first_step = self.step = 0

    def resume_at(self, step: int) -> None:
        """Drop the rows after `step`: they belong to work that a kill undid."""
        if not self.writes:
            return
        write_jsonl(self.file, [row for row in read_jsonl(self.file) if row["step"] <= step])
        self.first_step = self.step = step
        if step:
            say(f"{self.label}: going on from step {step} of {self.total}")
        self.progress.update(self.task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (counted from 1)."""
        if not self.writes:
            return
        row = {"step": step} | {name: round_metric(value) for name, value in metrics.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.advance(step, metrics)

    def rows(self) -> list[dict[str, float]]:
        """What was recorded so far."""
        return read_jsonl(self.file) if self.writes else []

    def write(self, name: str, text: str) -> None:
        """Write a file beside the metrics."""
        if self.writes:
            write_atomic(self.directory / name, text)

    def advance(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Move the bar to `step`, with the metrics that are worth showing."""
        self.step = step
        known = metrics or {}
        text = "  ".join(f"{name} {known[name]:.4g}" for name in self.show if name in known)
        self.progress.update(self.task, completed=step)
        if not text:
            return
        self.progress.update(self.task, shown=text)
        due = (now := time.monotonic()) - self._last_line >= PLAIN_SECONDS
        if self.progress.disable and (due or step == self.total):
            left = (now - self.started) / max(step - self.first_step, 1) * (self.total - step)
            say(f"{self.label}: {step}/{self.total}  {text}  {left:.0f} s left")
            self._last_line = now


@contextmanager
def tracker(
    directory: Path, label: str, total: int, show: tuple[str, ...], *, writes: bool = True
) -> Iterator[Tracker]:
    """A tracker whose progress bar, on a terminal, lives as long as the block; without `writes` it does nothing."""
    columns = (
        TextColumn("{task.description:<14}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, disable=not (console.is_terminal and writes)
    ) as progress:
        yield Tracker(directory, label, total, show, progress, writes=writes)


def plain_lines() -> None:
    """No progress bars from here on: several processes share one terminal."""
    global console
    console = Console(stderr=True, highlight=False, soft_wrap=True, force_terminal=False)


def mute() -> None:
    """Say nothing from here on: another process speaks for this one."""
    global console
    console = Console(quiet=True)


def say(text: str) -> None:
    """One plain line for the person who watches."""
    console.print(text, markup=False)
    sys.stderr.flush()


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and load reports off the screen; errors still show."""
    import transformers

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when, and if, datasets is imported
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # TRL still sets the name that transformers is leaving behind
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)


def round_metric(value: float) -> float:
    """Seven significant digits: enough to compare runs, short enough to read."""
    return float(f"{value:.7g}")
