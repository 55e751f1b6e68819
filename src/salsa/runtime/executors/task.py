"""A job as it travels to a worker, and what a worker does with it: the same for every executor."""

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa.artifacts import write_atomic
from salsa.errors import ConfigError, WorkFailed, accessing

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

PATIENCE = 5.0
"""Seconds that a worker waits for the directory that was made for it: a network file system may be late."""


@dataclass(frozen=True)
class Request:
    """What one job asks of the machine that it runs on."""

    cpus: int = 1
    """Of each process; also its CPU threads."""
    gpus: int = 0
    """Of each process."""
    memory_gib: float | None = None
    """Of each process; None where it is not known, and nothing is asked for."""
    processes: int = 1
    """Of one job, all on one machine: the task that is sent there starts the others."""

    def __str__(self) -> str:
        """In words, for a person."""
        parts = [f"{self.cpus * self.processes} CPUs"]
        if self.gpus:
            parts.append(f"{self.gpus * self.processes} GPUs")
        if self.memory_gib is not None:
            parts.append(f"{self.memory_gib * self.processes:.1f} GiB of memory")
        return ", ".join(parts)


@dataclass(frozen=True)
class Task:
    """The work of one job as plain data, and where it is known to be done."""

    label: str
    request: Request
    work: Callable[..., Any]
    """Called as `work(*args, engine)`."""
    args: tuple[Any, ...] = ()
    engine: "Engine | None" = None
    """The precision to compute in; the worker makes its own engine like this one."""
    home: Path | None = None
    """The stage's unfinished directory; the work publishes there what it says and reaches."""
    working_directory: str | None = None
    """Where relative paths and the recipe's callables are; None leaves it to the executor."""
    ticket: str | None = None
    """What a worker must find in `home`, so that it is the directory that this process sees."""

    def issued(self) -> "Task":
        """The task with the ticket of its `home`; one that is there stays: a job with it may be waiting in a queue."""
        assert self.home is not None
        file = _ticket_file(self.home)
        with accessing(file, "write"):
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_atomic(file, secrets.token_hex(8))
        return replace(self, ticket=_ticket(self.home))


@dataclass(frozen=True)
class Outcome:
    """What a task returned, or what it raised: not every scheduler carries exceptions."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


def run_task(task: Task) -> Outcome:
    """Do the work in this process."""
    from salsa.runtime.tracking import publish

    try:
        _enter(task)
        if task.home is not None:
            task.home.mkdir(parents=True, exist_ok=True)
            publish(task.home, socket.gethostname())
        engine = task.engine
        if engine is not None:
            from salsa.runtime.engine import Engine
            from salsa.runtime.tracking import quiet_libraries

            quiet_libraries()
            made = Engine.create(
                engine.precision, threads=task.request.cpus * task.request.processes
            )
            engine = replace(made, reason=engine.reason)
        return Outcome(task.work(*task.args, engine))
    except Exception as error:
        return Outcome(error=_portable(error))


def _enter(task: Task) -> None:
    """Go to the driver's working directory, and see that the stage's directory is the driver's."""
    here = socket.gethostname()
    if task.working_directory is not None:
        try:
            os.chdir(task.working_directory)
        except OSError as error:
            raise ConfigError(
                f"{task.working_directory}: is not there on {here}. Start the run in a directory that all machines "
                "share under one path."
            ) from error
        if task.working_directory not in sys.path:
            sys.path.insert(0, task.working_directory)
    if task.ticket is None:
        return
    assert task.home is not None
    deadline = time.monotonic() + PATIENCE
    while _ticket(task.home) != task.ticket:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{task.home}: {here} does not see what this machine wrote there. Put the run directory on a path "
                "that all machines share, or set engine.artifacts to a URL such as s3://bucket/runs."
            )
        time.sleep(0.1)


def _ticket_file(home: Path) -> Path:
    return home / "resume" / "ticket"


def _ticket(home: Path) -> str | None:
    try:
        return _ticket_file(home).read_text(encoding="utf-8")
    except OSError:
        return None


def _portable(error: Exception) -> Exception:
    """The error if it can be sent as it is; else its text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkFailed(f"{type(error).__name__}: {error}")
    return error
