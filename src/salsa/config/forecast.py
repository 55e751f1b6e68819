"""The recipe's `forecast:` section: candidate references, and how well to know them."""

from typing import Annotated

from pydantic import Field

from salsa.config.schema import Count, DataSource, Models, Positive, Strict


class ForecastConfig(Strict):
    """What candidate references are worth at the optimum, from samples of each (docs/method.md, "Forecast")."""

    references: Annotated[tuple[str, ...], Field(min_length=1), Models] | None = None
    """Candidates, the first is the baseline; if not given, the models that the arms' references start from."""
    prompts: DataSource | None = None
    """Held-out prompts; eval's if not given."""
    num_samples: Annotated[int, Field(ge=32)] = 256
    """Replies per prompt and candidate: what β can be known for grows with it."""
    betas: Annotated[tuple[Positive, ...], Field(min_length=2)] | None = None
    """KL coefficients; if not given, 25 from a fifth of `rl.kl_coef` to fifty times it."""
    seed: int = 2000
    """Seed of the sampling."""
    batch_prompts: Count = 8
    """Prompts sampled together, `num_samples` replies each; they share their random numbers."""
