"""The recipe's `eval:` section."""

from typing import Annotated, Self

from pydantic import Field, model_validator

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
    reward_models: Input[dict[str, str]] = Field(default={})
    """The same by finished reward models: name → directory (with a /) or hub name, e.g. one trained on other data."""
    max_new_tokens: Count | None = None
    """Length limit of a response; RL's if not given."""
    batch_size: Execution[Count] = 64
    """Responses sampled per call."""
    seed: int = 1000
    """Seed of the sampling."""

    @model_validator(mode="after")
    def _each_score_has_its_name(self) -> Self:
        if both := sorted({"proxy", *self.scores} & {*self.reward_models}):
            raise ValueError(f"reward_models.{both[0]} is a score already. Give it another name")
        return self

    @property
    def score_names(self) -> tuple[str, ...]:
        """The further scores by name, functions first."""
        return (*self.scores, *self.reward_models)

    @property
    def shown(self) -> str:
        """The model that is shown as the arm `sft`."""
        return self.kl_to[0]
