"""The recipe's `eval:` section."""

from typing import Annotated

from pydantic import Field

from salsa.config.schema import Count, DataSource, Execution, Input, Models, RewardFunction, Strict


class EvalConfig(Strict):
    """Every arm on the same held-out prompts."""

    prompts: Input[DataSource]
    """Rows with `prompt`."""
    baseline: Input[str]
    """The arm that the others are compared with."""
    kl_to: Input[Annotated[tuple[str, ...], Field(min_length=1), Models]] = ("sft[0]",)
    """The models to which every arm's KL is measured, so that arms compare; the first is shown as the arm `sft`."""
    scores: Input[dict[str, RewardFunction]] = Field(default={})
    """Further scores besides the training reward (the proxy), e.g. `gold`."""
    max_new_tokens: Count | None = None
    """Length limit of a response; RL's if not given."""
    batch_size: Execution[Count] = 64
    """Responses sampled per call."""
    seed: int = 1000
    """Seed of the sampling."""

    @property
    def shown(self) -> str:
        """The model that is shown as the arm `sft`."""
        return self.kl_to[0]
