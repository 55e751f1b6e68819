"""The recipe's `landscape:` section: which models, and where between and beyond them to look."""

from typing import Annotated

from pydantic import Field

from salsa.config.schema import Count, DataSource, Models, Strict


class LandscapeConfig(Strict):
    """Rewards, KL and loss on the line through two models, or on the plane through three."""

    models: Annotated[tuple[str, ...], Field(min_length=2, max_length=3), Models] = (
        "sft[0]",
        "sft[1]",
    )
    """Two: the line. Three: the plane through them."""
    alphas: Annotated[tuple[float, ...], Field(min_length=2)] = (-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25)
    """Places on the line: 0 is the first model, 1 the second. The plane has them in both directions."""
    prompts: DataSource | None = None
    """Held-out prompts; eval's if not given."""
    num_samples: Count = 4
    """Replies per prompt and place, drawn with the same random numbers everywhere."""
    validation: DataSource | None = None
    """Rows as for SFT, whose loss is shown; none if not given."""
    seed: int = 3000
    """Seed of the sampling."""
