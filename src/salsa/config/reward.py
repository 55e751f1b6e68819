"""The recipe's `reward:` section."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from salsa.config.lora import LoRAConfig
from salsa.config.schema import (
    Added,
    Count,
    Execution,
    Input,
    ModelText,
    Positive,
    RewardFunction,
    Seeds,
    Strict,
)


class RewardConfig(Strict):
    """What RL maximises: a reward model trained on `preferences`, or one trained before, or callables."""

    paths: Input[tuple[str, ...]] = ()
    """Finished reward models, sequence classifiers with one label; of several the weight average (WARM)."""
    functions: Input[tuple[RewardFunction, ...]] = ()
    """Callables; their weighted scores are summed, and each is logged."""
    init: Input[ModelText] = "sft[0]"
    """Model whose trunk the reward model starts from."""
    epochs: Positive = 1.0
    """Passes over the pairs."""
    learning_rate: Positive = 2.0e-5
    """Peak of the cosine schedule (3 % warm-up)."""
    batch_size: Count = 16
    """Pairs per optimizer step."""
    microbatch_size: Execution[Count | None] = None
    """Pairs per forward pass; batch_size if not given."""
    max_length: Count = 512
    """Tokens of prompt and reply; longer pairs are dropped."""
    seeds: Input[Seeds] = (0,)
    """One reward model per seed (head and data order); of several the weight average (WARM)."""
    split_seed: int = 0
    """Which pairs are kept back: the same ones for every seed."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the pairs kept back to measure the accuracy on."""
    holdout_prompts: Added[bool] = False
    """Keep whole prompts back: no pair of theirs is trained on, and the accuracy is that on new prompts."""
    lora: Added[LoRAConfig | None] = None
    """Train adapters and the head instead of all weights; the checkpoint has them merged."""
    checkpoint_every: Execution[Count] = 50
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.paths and self.functions:
            raise ValueError("give paths or functions, or neither to train on preferences")
        self.check_divides("microbatch_size", "batch_size")
        return self

    @property
    def can_be_divided(self) -> bool:
        """Whether several processes may train one model: adapters are merged in one."""
        return self.lora is None

    @property
    def stage(self) -> str | None:
        """Label of the stage that makes the reward model; None for functions, and for one finished model."""
        if self.functions or len(self.paths) == 1:
            return None
        return "reward soup" if len(self.paths or self.seeds) > 1 else "reward"

    @property
    def trains(self) -> bool:
        """Whether a reward model is trained here."""
        return not (self.paths or self.functions)
