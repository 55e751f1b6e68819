"""Send what stages log to TensorBoard, W&B or trackio, while they run and wherever they run.

Stages write `metrics.jsonl` and know no tracker. One thread of the command follows these files and sends each row once,
under its own step and the names of docs/metrics.md; how far it came is kept in `tracked.json`. So a run that is
resumed continues its curves: rows that a kill made a stage compute again were sent before, and are not sent twice.
A tracker that fails is reported once and never stops the work; the next run sends what is missing.
"""

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from salsa.artifacts import write_atomic
from salsa.errors import ConfigError
from salsa.runtime.tracking import repeated, say

SECONDS = 5.0
"""Between two looks at the files."""
STATE = "tracked.json"

Rows = Sequence[Mapping[str, Any]]


class Backend(Protocol):
    """One tracker. A stage of the run directory is a run of the tracker; the same name is the same run again."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None: ...

    def send(self, stage: str, rows: Rows) -> None:
        """Send new rows, ascending steps; whole when it returns, or kept by the tracker's own machinery."""

    def end(self, stage: str) -> None:
        """Nothing more will come for now."""


class TensorBoard:
    """Event files in `<run>/tensorboard/<stage>`: `tensorboard --logdir runs`."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        self._folder, self._open = run / "tensorboard", dict[str, Any]()

    def send(self, stage: str, rows: Rows) -> None:
        """Append to this process's event file; TensorBoard reads all files of a directory as one curve."""
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self._open:
            self._open[stage] = SummaryWriter(str(self._folder / stage))
        for row in rows:
            for name, value in _numbers(row).items():
                self._open[stage].add_scalar(name, value, row["step"])
        self._open[stage].flush()

    def end(self, stage: str) -> None:
        """Close the file."""
        if (writer := self._open.pop(stage, None)) is not None:
            writer.close()


class WandB:
    """A run of W&B for each stage, its id the stage's directory; all of a run directory are one group.

    Online or offline is W&B's own setting (`WANDB_MODE`); its files lie in `<run>/wandb`.
    """

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._mode: Any = (
            os.environ.get("WANDB_MODE") or "online"
        )  # as it is now, not as W&B remembers it
        if self._mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            raise ConfigError(
                "track: wandb has no API key. Run wandb login, or set WANDB_MODE=offline and wandb sync later."
            )
        self._run, self._project, self._config = run, project, dict(config)
        self._open: dict[str, Any] = {}

    def send(self, stage: str, rows: Rows) -> None:
        """Log to the stage's run, which stays open until `end`."""
        import wandb

        if stage not in self._open:
            self._open[stage] = wandb.init(
                project=self._project, id=stage, name=_name(stage), group=self._run.name,
                config=self._config, dir=str(self._run), mode=self._mode, resume="allow", reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )  # fmt: skip
        for row in rows:
            self._open[stage].log(_numbers(row), step=row["step"])

    def end(self, stage: str) -> None:
        """Finish the stage's run."""
        if (run := self._open.pop(stage, None)) is not None:
            run.finish()


class Trackio:
    """A run of trackio for each stage, in trackio's own data base (`TRACKIO_DIR`); `trackio show` opens it."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        self._run, self._project, self._config = run, project, dict(config)

    def send(self, stage: str, rows: Rows) -> None:
        """Open the stage's run again, log, finish: trackio has one run at a time."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            run = trackio.init(
                self._project, name=stage, group=self._run.name, config=self._config,
                resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
            for row in rows:
                run.log(_numbers(row), step=row["step"])
            trackio.finish()

    def end(self, stage: str) -> None:
        """Runs are finished already."""


BACKENDS: dict[str, type[Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Mirror:
    """Follows the stages of one run directory."""

    def __init__(self, run: Path, backends: Mapping[str, Backend]) -> None:
        self._run, self._backends = run, backends
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}
        self._failed: set[str] = set()
        file = run / STATE
        self._sent: dict[str, dict[str, int]] = (
            json.loads(file.read_text()) if file.exists() else {}
        )

    def look(self, *, last: bool = False) -> None:
        """Send every row that was not sent; with `last`, end all runs of the trackers."""
        for name, backend in self._backends.items():
            if name in self._failed:
                continue
            try:
                for folder in sorted((self._run / "stages").iterdir()):
                    self._follow(name, backend, folder, last)
            except Exception as error:  # of somebody else's code: the work must go on
                self._failed.add(name)
                why = " ".join(str(error).split()) or type(error).__name__
                say(f"track: {name} failed ({why}). The work goes on; run again to send the rest.")

    def _follow(self, name: str, backend: Backend, folder: Path, last: bool) -> None:
        stage, file = folder.name.removesuffix(".partial"), folder / "metrics.jsonl"
        try:
            stat = file.stat()
            found = stat.st_size, stat.st_mtime_ns
            text = (
                file.read_text(encoding="utf-8") if self._seen.get((name, stage)) != found else ""
            )
        except FileNotFoundError:  # logs nothing, or was renamed just now
            return
        sent = self._sent.setdefault(name, {})
        lines = text.rpartition("\n")[0].splitlines()
        rows = [row for row in map(json.loads, lines) if row["step"] > sent.get(stage, 0)]
        if rows:
            backend.send(stage, rows)
            sent[stage] = rows[-1]["step"]
            write_atomic(self._run / STATE, json.dumps(self._sent, indent=1) + "\n")
        self._seen[name, stage] = found
        if last or not folder.name.endswith(".partial"):
            backend.end(stage)


@contextlib.contextmanager
def tracked(
    run: Path, names: Sequence[str], project: str, config: Mapping[str, Any]
) -> Iterator[None]:
    """Follow the stages of a run directory by the trackers `names` while the block lasts.

    Raises:
        ConfigError: a tracker is not installed, or has nowhere to send to; before the block.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"track: {name} is not installed. Install it: pip install 'salsa-rlhf[{name}]'"
            )
    if not names:
        yield
        return
    mirror = Mirror(run, {name: BACKENDS[name](run, project, config) for name in names})
    try:
        with repeated(mirror.look, SECONDS):
            yield
    finally:
        mirror.look(last=True)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)
    }


def _name(stage: str) -> str:
    """A stage's directory without its digest."""
    return stage.rpartition("-")[0]
