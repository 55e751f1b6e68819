"""What a stage says while it works: `metrics.jsonl` always; a bar or a table on a terminal, plain lines elsewhere.

A stage that another process computes publishes both in its directory: `resume/progress.json` is where it stands,
`said.log` what it said. The process that started it shows them.
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from salsa.artifacts import drop_half_line, read_jsonl, write_atomic, write_jsonl

PLAIN_SECONDS = 5.0
"""Least time between two plain lines of one stage."""
PUBLISH_SECONDS = 0.5
"""Least time between two writes of one stage's progress."""
FOLLOW_SECONDS = 1.0
"""Between two looks at what another process publishes."""

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Status:
    """Where a stage stands."""

    label: str
    state: str
    """`waiting`, `queued`, `running`, `done`, `reused` or `failed`."""
    step: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last of those that are worth showing."""
    left: float | None = None
    """Seconds until it is done, judged by its steps so far."""
    machine: str = ""


class View(Protocol):
    """Something that shows where stages stand."""

    def show(self, status: Status) -> None:
        """Take note of the newest status of a stage."""


class Lines:
    """A plain line of a running stage, at most one in `PLAIN_SECONDS`, and one at its end."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._steps: dict[str, int] = {}

    def show(self, status: Status) -> None:
        """Print it if it is due or the last one."""
        if status.state != "running" or not status.metrics:
            self._last.setdefault(status.label, time.monotonic())
            return
        now = time.monotonic()
        due = now - self._last.setdefault(status.label, now) >= PLAIN_SECONDS
        at_end = status.step == status.total and self._steps.get(status.label) != status.step
        if due or at_end:
            left = "" if status.left is None else f"  {status.left:.0f} s left"
            shown = "  ".join(f"{name} {value:.4g}" for name, value in status.metrics.items())
            say(f"{status.label}: {status.step}/{status.total}  {shown}{left}")
            self._last[status.label], self._steps[status.label] = now, status.step


class Bar:
    """A progress bar of one stage, for a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks = progress, {}  # type: ignore[var-annotated]

    def show(self, status: Status) -> None:
        """Move the bar."""
        label = status.label
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=status.total, shown="")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in status.metrics.items())
        self._progress.update(self._tasks[label], completed=status.step, shown=shown)


class Jobs:
    """A table of all stages, for a terminal: what runs first, then what failed, waits and is done."""

    COLUMNS = (
        ("score", "score"), ("loss", "loss"), ("KL", "kl"), ("length", "length"),
        ("tokens/s", "tokens_per_second_rollout"),
    )  # fmt: skip
    _ORDER = ("running", "failed", "queued", "waiting", "done", "reused")

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}

    def show(self, status: Status) -> None:
        """Take note; the live display asks for the table when it draws."""
        known = self._statuses.get(status.label)
        if known is not None and not status.metrics:  # what was reached stays on the screen
            status = replace(status, metrics=known.metrics, step=status.step or known.step)
            status = replace(status, total=status.total or known.total)
        self._statuses[status.label] = status

    def __rich__(self) -> Table:
        """The table, as many rows as the terminal has lines for."""
        statuses = sorted(self._statuses.values(), key=lambda s: self._ORDER.index(s.state))
        count = {state: sum(s.state == state for s in statuses) for state in self._ORDER}
        said = ", ".join(f"{number} {state}" for state, number in count.items() if number)
        table = Table(caption=said, box=None, pad_edge=False)
        for name in ("stage", "state", "step", *(n for n, _ in self.COLUMNS), "left", "machine"):
            table.add_column(name, justify="left" if name in ("stage", "state") else "right")
        for status in statuses[: max(3, console.height - 4)]:
            values = (status.metrics.get(key) for _, key in self.COLUMNS)
            table.add_row(
                status.label,
                status.state,
                f"{status.step}/{status.total}" if status.total else "",
                *("" if value is None else f"{value:.4g}" for value in values),
                "" if status.left is None or status.state != "running" else _clock(status.left),
                status.machine,
            )
        return table


class Published:
    """For the process that started this one: `resume/progress.json` in the stage's directory."""

    def __init__(self, directory: Path, machine: str) -> None:
        self.directory, self._machine, self._last = directory, machine, 0.0

    def show(self, status: Status) -> None:
        """Write it if it is due or the last one."""
        if (now := time.monotonic()) - self._last < PUBLISH_SECONDS and status.step != status.total:
            return
        file = progress_file(self.directory)
        file.parent.mkdir(parents=True, exist_ok=True)
        values = asdict(status) | {"machine": self._machine, "pid": os.getpid()}
        file.write_text(json.dumps(values), encoding="utf-8")
        self._last = now


_view: View | None = None


class Tracker:
    """Logs one stage: a row a step into `metrics.jsonl`, a few of its metrics for whom it concerns.

    Of several processes that do one job, one writes; the trackers of the others do nothing.
    """

    def __init__(
        self,
        directory: Path,
        label: str,
        total: int,
        show: tuple[str, ...],
        view: View,
        *,
        writes: bool = True,
    ) -> None:
        self.directory, self.writes = directory, writes
        self.file = directory / "metrics.jsonl"
        self.label, self.total, self.show, self.view = label, total, show, view
        self.started = time.monotonic()
        self.first_step = self.step = 0
        self._metrics: Mapping[str, float] = {}
        self._tell()

    def resume_at(self, step: int) -> None:
        """Drop the rows after `step`: they belong to work that a kill undid."""
        if not self.writes:
            return
        drop_half_line(self.file)  # a full disk leaves one
        write_jsonl(self.file, [row for row in read_jsonl(self.file) if row["step"] <= step])
        self.first_step = self.step = step
        if step:
            say(f"{self.label}: going on from step {step} of {self.total}")
        self._tell()

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
        """Move to `step`, with the metrics that are worth showing."""
        self.step, known = step, metrics or {}
        self._metrics = {name: known[name] for name in self.show if name in known} or self._metrics
        self._tell()

    def _tell(self) -> None:
        if not self.writes:
            return
        spent, done = time.monotonic() - self.started, self.step - self.first_step
        left = spent / done * (self.total - self.step) if done else None
        status = Status(self.label, "running", self.step, self.total, self._metrics, left)
        self.view.show(status)


@contextmanager
def tracker(
    directory: Path, label: str, total: int, show: tuple[str, ...], *, writes: bool = True
) -> Iterator[Tracker]:
    """A tracker; where nothing else shows the stage it has, on a terminal, a bar as long as the block lasts.

    Without `writes` it does nothing.
    """
    if _view is not None or not writes or not console.is_terminal:
        yield Tracker(directory, label, total, show, _view or Lines(), writes=writes)
        return
    columns = (
        TextColumn("{task.description:<14}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield Tracker(directory, label, total, show, Bar(progress))


@contextmanager
def showing_jobs() -> Iterator[View]:
    """Show every stage as long as the block lasts: a live table on a terminal, plain lines elsewhere."""
    global _view
    _view = Jobs() if console.is_terminal else Lines()
    try:
        if isinstance(_view, Jobs):
            with Live(get_renderable=_view.__rich__, console=console, refresh_per_second=2):
                yield _view
        else:
            yield _view
    finally:
        _view = None


def publish(directory: Path, machine: str) -> None:
    """From here on what this process says and reaches goes into the stage's `directory`, not onto a screen."""
    global _view
    _view = Published(directory, machine)


class Followed:
    """A stage that another process computes: what it publishes, shown here."""

    def __init__(self, directory: Path, label: str, view: View) -> None:
        self.directory, self.label, self.view = directory, label, view
        self._read = self._size()
        progress_file(directory).unlink(missing_ok=True)  # of an attempt before
        view.show(Status(label, "queued"))

    def look(self, directory: Path | None = None) -> None:
        """Show what is new; at the end of the stage in the `directory` that it was renamed to."""
        directory = directory or self.directory
        if (status := published(directory)) is not None:
            self.view.show(status)
        try:
            with (directory / "said.log").open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            say(line)

    def _size(self) -> int:
        file = self.directory / "said.log"
        return file.stat().st_size if file.exists() else 0


@contextmanager
def following(directory: Path, label: str) -> Iterator[None]:
    """Show, as long as the block lasts, what another process publishes of a stage; a worker's driver does so anyway."""
    if isinstance(_view, Published):
        yield
        return
    stage = Followed(directory, label, _view or Lines())
    try:
        with repeated(stage.look, FOLLOW_SECONDS):
            yield
    finally:
        stage.look()


@contextmanager
def repeated(work: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call `work` in a thread every `seconds`, as long as the block lasts."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            work()

    thread = threading.Thread(target=repeat, name="repeated", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def progress_file(directory: Path) -> Path:
    """Where a stage that another process computes says how far it is."""
    return directory / "resume" / "progress.json"


def published(directory: Path) -> Status | None:
    """What a stage that another process computes last said of itself; None if nothing yet."""
    try:
        values = json.loads(progress_file(directory).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or being written
        return None
    del values["pid"]
    return Status(**values)


def mute() -> None:
    """Say nothing from here on: another process speaks for this one."""
    global console
    console = Console(quiet=True)


def say(text: str) -> None:
    """One plain line for the person who watches."""
    if isinstance(_view, Published):
        with (_view.directory / "said.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        return
    console.print(text, markup=False)
    sys.stderr.flush()


def _clock(seconds: float) -> str:
    """Hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and load reports off the screen; errors still show."""
    import transformers

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when, and if, datasets is imported
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # TRL and peft still use names that transformers is leaving behind
    message = "`(is_)?gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message, FutureWarning)


def round_metric(value: float) -> float:
    """Seven significant digits: enough to compare runs, short enough to read."""
    return float(f"{value:.7g}")
