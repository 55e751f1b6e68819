"""What goes wrong, by whose fault. The command line prints one line and exits with 2 (or 1 for `WorkFailed`)."""


class SalsaError(Exception):
    """Base of every error that salsa raises on purpose; its message says what, where, got and do this."""


class ConfigError(SalsaError, ValueError):
    """A recipe, an option or an argument that cannot be meant."""


class CheckpointError(SalsaError, ValueError):
    """A model directory that is missing, broken or does not fit the others."""


class DataError(SalsaError, ValueError):
    """Data that are missing, empty or of the wrong shape."""


class WorkFailed(SalsaError, RuntimeError):
    """The input was sound and the work failed all the same: a reward raised, a loss became NaN."""
