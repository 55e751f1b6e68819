"""The recipe's `engine:` section: how much runs at once. It decides no result."""

from salsa.config.schema import Count, Execution, Positive, Strict


class EngineConfig(Strict):
    """Where and how much at once."""

    threads: Execution[Count | None] = None
    """CPU threads; PyTorch's choice if not given."""
    price_per_hour: Execution[Positive | None] = None
    """What this machine costs an hour, in your currency; the report then says what each arm cost."""
    jobs: Execution[Count] = 1
    """Independent stages that run at once, each in a process of its own with its share of the threads."""
