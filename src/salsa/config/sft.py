"""The recipe's `sft:` section."""

from typing import Self

from pydantic import model_validator

from salsa.config.lora import LoRAConfig
from salsa.config.schema import Added, Count, DataSource, Execution, Input, Positive, Seeds, Strict


class SFTConfig(Strict):
    """Supervised fine-tuning, once per seed, loss on the reply only."""

    dataset: Input[DataSource | None] = None
    """Rows with `messages`, or with `prompt` and `completion`."""
    checkpoints: Input[tuple[str, ...]] = ()
    """Finished SFT models instead of training: directories or hub names, LoRA adapters too; sft[i] is the i-th."""
    seeds: Input[Seeds] = (0, 1)
    """One model per seed (data order); sft[i] is the model of seeds[i]."""
    epochs: Positive | tuple[Positive, ...] = 1.0
    """Passes over the data; a list gives every seed its own."""
    learning_rate: Positive = 2.0e-5
    """Peak of the cosine schedule (3 % warm-up)."""
    batch_size: Count = 16
    """Sequences per optimizer step."""
    microbatch_size: Execution[Count | None] = None
    """Sequences per forward pass; batch_size if not given."""
    max_length: Count = 512
    """Tokens of prompt and reply; longer rows are cut at the end."""
    packing: Added[bool] = False
    """Fill sequences of max_length with whole rows, which do not see each other: fewer, fuller forward passes. Then
    batch_size counts filled sequences."""
    assistant_only_loss: Added[bool] = False
    """A conversation is one row with the loss on all its replies, instead of a row for each reply; the chat template
    must mark replies with {% generation %}."""
    lora: Added[LoRAConfig | None] = None
    """Train adapters instead of all weights; the checkpoint has them merged, so that soups are made as ever."""
    checkpoint_every: Execution[Count] = 50
    """Steps between checkpoints; a kill loses at most this many."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (not self.checkpoints):
            raise ValueError(
                "give exactly one of dataset (to train) and checkpoints (trained before)"
            )
        if isinstance(self.epochs, tuple) and len(self.epochs) != self.count:
            raise ValueError(
                f"epochs has {len(self.epochs)} values for {self.count} models. Give one for all, or one for each"
            )
        self.check_divides("microbatch_size", "batch_size")
        return self

    @property
    def count(self) -> int:
        """Number of SFT models."""
        return len(self.checkpoints) or len(self.seeds)

    @property
    def can_be_divided(self) -> bool:
        """Whether several processes may train one model: adapters are merged, and packed rows computed, in one."""
        return self.lora is None and not self.packing

    def of_model(self, index: int) -> "SFTConfig":
        """The settings of sft[index]."""
        if not isinstance(self.epochs, tuple):
            return self
        return self.model_copy(update={"epochs": self.epochs[index]})
