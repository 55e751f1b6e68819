"""The recipe's `preferences:` section: the pairs that reward models and DPO arms learn from."""

from typing import Self

from pydantic import model_validator

from salsa.config.schema import Count, DataSource, Input, Positive, RewardFunction, Strict


class PreferencesConfig(Strict):
    """Rows of a data set; or synthetic: two replies of the SFT models per prompt, labelled by a noisy scorer."""

    dataset: Input[DataSource | None] = None
    """Rows with `prompt`, `chosen`, `rejected`."""
    prompts: Input[DataSource | None] = None
    """Synthetic: prompts to reply to."""
    labeller: Input[RewardFunction | None] = None
    """Synthetic: the score that preferences follow (its weight counts)."""
    noise: Positive = 0.2
    """Reply a is preferred with probability sigmoid((score_a - score_b) / noise), in units of the score."""
    temperature: Positive = 1.0
    """Sampling temperature of the replies."""
    seed: int = 0
    """Seed of replies and labels."""
    max_new_tokens: Count = 32
    """Length limit of the replies."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [source is not None for source in (self.dataset, self.prompts, self.labeller)]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError("give either dataset, or prompts and labeller")
        if self.dataset is not None:
            synthetic_only = ("noise", "temperature", "seed", "max_new_tokens")
            self.check_unset(synthetic_only, "for the rows of a dataset")
        return self
