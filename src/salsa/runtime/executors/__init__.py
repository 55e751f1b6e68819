"""Where jobs run when they do not run in this process. An executor knows no stage and no algorithm."""

from collections.abc import Sequence
from typing import Any, Protocol

from salsa.runtime.executors.task import Outcome, Request, Task

__all__ = ["Executor", "Outcome", "Request", "Task"]


class Executor(Protocol):
    """Something that runs tasks elsewhere. A handle is whatever it knows a submitted task by."""

    slots: int | None
    """Tasks at once; None leaves that to a scheduler with a queue."""
    remote: bool
    """Whether tasks may run on other machines, with other processors than this one's."""

    def submit(self, task: Task) -> Any:
        """Start the task, or queue it; returns its handle.

        Raises:
            ConfigError: what the task asks for cannot be had.
        """

    def wait(self, handles: Sequence[Any], seconds: float) -> Any | None:
        """The handle of a task that has ended; None if none has within `seconds`."""

    def outcome(self, handle: Any) -> Outcome:
        """What an ended task returned or raised.

        Raises:
            WorkerLost: the process or machine is gone, and with it the outcome.
        """

    def close(self) -> None:
        """Stop what still runs; the checkpoints that it has written stay."""
