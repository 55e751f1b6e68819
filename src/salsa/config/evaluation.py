"""The recipe's `eval:` section."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from salsa.config.schema import Count, DataSource, Execution, Input, Models, RewardFunction, Strict

_TAKEN = frozenset((
    "proxy", "prompt", "response", "ended", "arm", "seed", "step", "score", "score_std", "reward", "kl", "entropy",
    "length", "eos_rate", "value", "explained_variance", "policy_loss", "value_loss", "entropy_loss", "clip_fraction",
    "value_clip_fraction", "approx_kl", "ratio", "importance_weight", "importance_capped", "grad_norm",
    "critic_grad_norm",
))  # fmt: skip
"""What RL logs and evaluation writes (docs/metrics.md): a score of that name would stand in its place."""
_TAKEN_PREFIXES = (
    "kl_", "score_", "sampler_", "seconds_", "tokens_per_second_", "mfu_", "peak_memory_gb_",
)  # fmt: skip


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
        for key in ("scores", "reward_models"):
            for name in getattr(self, key):
                if name in _TAKEN or name.startswith(_TAKEN_PREFIXES):
                    raise ValueError(
                        f"{key}.{name} is the name of a metric. Call it something else, e.g. gold"
                    )
        if both := sorted({*self.scores} & {*self.reward_models}):
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
