"""The work of a stage, in whatever process it is done: one at a time, and told apart from a full disk."""

import errno
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from salsa.artifacts import locked
from salsa.errors import ConfigError, InUse, WorkFailed
from salsa.runtime.launch import TIMEOUT, led, spread
from salsa.runtime.store import Store
from salsa.stages.directory import Place, filling
from salsa.stages.jobs import Job, directories_of

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

_WRITING = ("write", "writing", "iostream")
"""Words of torch's errors for a file that it could not write."""
PATIENCE = 30.0
"""Seconds to wait for another process that still writes the stage: one whose driver is gone ends at once."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BYTES = 2**20
"""With less room than this, a failed write is put down to the disk, whatever the library called it."""


def perform(
    place: Place,
    job: Job,
    store: Store | None,
    engine: "Engine | None",
    *,
    processes: int = 1,
    timeout: float = TIMEOUT,
) -> None:
    """Do the job, unless another process just has; with a `store`, inputs come from there and the output goes there.

    A job that can be divided is done by so many `processes`, which wait `timeout` seconds for each other.

    Raises:
        ConfigError: another process is at it, or an input is not on this machine.
        WorkFailed: the disk is full, or the store does not take the output.
    """
    if store is not None:
        place.final.parent.mkdir(parents=True, exist_ok=True)
        _fetch_inputs(place, job, store)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with locked(place.lock, place.partial):
                if (place.final / "stage.json").exists():
                    shutil.rmtree(place.partial, ignore_errors=True)
                else:
                    _fill(place, job, engine, processes, timeout)
                if store is not None and not store.has(place.final.name):
                    store.upload(place.final)
                return
        except InUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _fill(place: Place, job: Job, engine: "Engine | None", processes: int, timeout: float) -> None:
    divided = job.can_be_divided
    execution = {"processes": led() if led() > 1 else processes} if divided else {}
    try:
        with filling(place, job, engine, execution) as directory:
            if divided:
                assert engine is not None  # what can be divided computes with torch
                spread(_run, directory, job, engine, processes=processes, timeout=timeout)
            else:
                job.run(directory, engine)
    except Exception as error:
        if is_disk_full(error, place.final.parent):
            raise WorkFailed(
                f"{job.label}: the disk of {place.final.parent} is full. Free some space and run the same command "
                "again: finished stages and the last checkpoint are kept."
            ) from error
        raise


def _run(directory: Path, job: Job, engine: "Engine") -> None:
    """What each process does for a job that is divided."""
    job.run(directory, engine)


def _fetch_inputs(place: Place, job: Job, store: Store) -> None:
    stages = place.final.parent
    for directory in directories_of(job):
        if not directory.exists() and stages in directory.parents:
            store.fetch(stages / directory.relative_to(stages).parts[0])
        if not directory.exists():
            raise ConfigError(
                f"{job.label}: {directory} is not on {socket.gethostname()}. Put it there under the same path."
            )


def is_disk_full(error: BaseException | None, directory: Path) -> bool:
    """Whether a failure is for want of disk space; torch and safetensors have errors of their own for it."""
    writing = False
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        text = str(error)
        if "No space left on device" in text:
            return True
        writing |= any(word in text for word in _WRITING)
        error = error.__cause__ or error.__context__
    return writing and shutil.disk_usage(directory).free < _FULL_BYTES


def measure(threads: int, engine: None) -> "Engine":
    """The engine of the machine that this runs on, its faster arithmetic measured."""
    from salsa.runtime.engine import Engine

    return Engine.create("auto", threads=threads)
