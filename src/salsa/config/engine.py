"""The recipe's `engine:` section: how much runs at once. It decides no result."""

from salsa.config.schema import Count, Execution, Positive, Strict


class EngineConfig(Strict):
    """Where and how much at once."""

    threads: Execution[Count | None] = None
    """CPU threads; PyTorch's choice if not given."""
    jobs: Execution[Count] = 1
    """Independent stages that run at once, each in a process of its own with its share of the threads."""
    processes: Execution[Count] = 1
    """Processes that share one RL job, and its models, on this machine; torchrun's number where it started salsa."""
    timeout: Execution[Positive] = 1800.0
    """Seconds that these wait for each other before one counts as lost: longer than the slowest reward takes."""
