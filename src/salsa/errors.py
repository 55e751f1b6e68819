"""What goes wrong, by whose fault. The command line prints one line and exits with 2 (or 1 for `WorkFailed`)."""


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
