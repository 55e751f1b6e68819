"""An arm with `method: dpo`: direct preference optimisation (Rafailov et al. 2023) through TRL's DPOTrainer."""

from typing import Self

from pydantic import model_validator

from salsa.config.schema import Count, Execution, Positive, Strict


class DPOConfig(Strict):
    """Settings of a DPO arm. The paper reports none; these are ours."""

    beta: Positive = 0.1
    """β of the implicit reward β·log(π/π_reference)."""
    epochs: Positive = 1.0
    """Passes over the pairs."""
    learning_rate: Positive = 5.0e-7
    """Peak of the cosine schedule (3 % warm-up)."""
    batch_size: Count = 16
    """Pairs per optimizer step."""
    microbatch_size: Execution[Count | None] = None
    """Pairs per forward pass; batch_size if not given."""
    max_length: Count = 512
    """Tokens of prompt and reply; longer rows are cut."""
    checkpoint_every: Execution[Count] = 50
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        self.check_divides("microbatch_size", "batch_size")
        return self
