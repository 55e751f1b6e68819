"""Where jobs run when they do not run in this process. An executor knows no stage and no algorithm."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine


class Executor(Protocol):
    """Runs calls `work(place, job, engine)`, at most `slots` at once."""

    slots: int
    threads: int
    """Of each job."""

    def submit(
        self, work: Callable[..., None], place: Any, job: Any, engine: "Engine | None"
    ) -> Any:
        """Start the call; what is returned identifies it."""

    def wait(self, handles: Sequence[Any]) -> Any:
        """The first of the handles whose call has ended; raises what the call raised."""

    def close(self) -> None:
        """Stop what is running."""
