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


class CheckpointError(SalsaError, ValueError):
    """A model directory that is missing, broken or does not fit the others."""


class DataError(SalsaError, ValueError):
    """Data that are missing, empty or of the wrong shape."""


class WorkFailed(SalsaError, RuntimeError):
    """The input was sound and the work failed all the same: a reward raised, a loss became NaN."""


@contextmanager
def accessing(
    path: Path, action: Literal["read", "write"], error: type[SalsaError] = ConfigError
) -> Iterator[None]:
    """Turn the system's refusal to read or write what a user named into one line that says what to do.

    Raises:
        SalsaError: of the kind `error`, if the system refuses.
    """
    try:
        yield
    except PermissionError as refused:
        what = refused.filename or path
        todo = {
            "read": "Give yourself the right to read it, or name another.",
            "write": "Give yourself the right to write there, or choose another place.",
        }
        verb = "read" if action == "read" else "written"
        raise error(f"{what}: cannot be {verb} (permission denied). {todo[action]}") from refused
    except (FileExistsError, NotADirectoryError) as refused:
        what = refused.filename or path
        raise error(
            f"{what}: cannot be used as a directory, a file is in the way. Choose another place."
        ) from refused
    except OSError as refused:
        if refused.errno not in (errno.EROFS, errno.ENOSPC):
            raise
        where = refused.filename or path
        raise error(
            f"{where}: cannot be written ({refused.strerror}). Free some space or choose another place."
        ) from refused
