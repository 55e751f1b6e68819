"""What goes wrong, by whose fault. The command line prints one line and exits with 2 (or 1 for `WorkFailed`)."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal


class SalsaError(Exception):
    """Base of every error that salsa raises on purpose; its message says what, where, got and do this.

    It is one line without control characters, whatever name or value out of a strange file it quotes.
    """

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class ConfigError(SalsaError, ValueError):
    """A recipe, an option or an argument that cannot be meant."""


class InUse(ConfigError):
    """A directory that another salsa process works in."""


class CheckpointError(SalsaError, ValueError):
    """A model directory that is missing, broken or does not fit the others."""


class DataError(SalsaError, ValueError):
    """Data that are missing, empty or of the wrong shape."""


class WorkFailed(SalsaError, RuntimeError):
    """The input was sound and the work failed all the same: a reward raised, a loss became NaN."""


class WorkerLost(WorkFailed):
    """The process or machine that did the work is gone; what the work had written is still there."""


_PERMISSION_DENIED = {
    "read": "read (permission denied). Give yourself the right to read it, or name another.",
    "write": "written (permission denied). Give yourself the right to write there, or choose another place.",
}


@contextmanager
def accessing(
    path: Path, action: Literal["read", "write"], error: type[SalsaError] = ConfigError
) -> Iterator[None]:
    """Turn the system's refusal to read or write what a user named into an `error`, a line that says what to do."""
    try:
        yield
    except OSError as refused:
        if isinstance(refused, PermissionError):
            reason = f"cannot be {_PERMISSION_DENIED[action]}"
        elif isinstance(refused, FileExistsError | NotADirectoryError):
            reason = "cannot be used as a directory, a file is in the way. Choose another place."
        elif refused.errno in (errno.EROFS, errno.ENOSPC):
            reason = (
                f"cannot be written ({refused.strerror}). Free some space or choose another place."
            )
        else:
            raise
        raise error(f"{refused.filename or path}: {reason}") from refused
