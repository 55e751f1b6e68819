"""The recipe's `soup:` section."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from salsa.config.schema import Fraction, Strict, check_call


class SoupConfig(Strict):
    """The weight average that `soup` stands for; `soup[0,1,2]` is the uniform soup of those SFT models."""

    ingredients: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    """Indices of SFT models."""
    weights: Literal["uniform"] | tuple[float, ...] = "uniform"
    """`uniform`, or one weight an ingredient; they sum to 1."""
    method: Literal["linear", "greedy", "wise", "slerp", "model_stock"] = "linear"
    """How to mix (`salsa.make_soup`)."""
    alpha: Fraction | None = None
    """Of `wise`: the share of the way from the base to the linear soup."""
    score: str | None = None
    """Of `greedy`: `module:function`, the held-out score of a model directory."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        for key, method in (("alpha", "wise"), ("score", "greedy")):
            if (getattr(self, key) is not None) != (self.method == method):
                raise ValueError(f"{key} belongs to method={method}, which needs it")
        if self.weights != "uniform" and self.method in ("greedy", "model_stock"):
            raise ValueError(f"method={self.method} finds the weights itself. Leave weights out")
        if self.score is not None:
            check_call(self.score)
        if len(set(self.ingredients)) < len(self.ingredients):
            raise ValueError(
                f"ingredients={list(self.ingredients)} has a model twice. Name each once"
            )
        if self.method == "model_stock" and len(self.ingredients) < 2:
            raise ValueError("method=model_stock compares ingredients. Give two or more")
        if self.weights == "uniform":
            return self
        if len(self.weights) != len(self.ingredients):
            raise ValueError(
                f"has {len(self.weights)} weights for {len(self.ingredients)} ingredients; give one each"
            )
        if min(self.weights) < 0:
            raise ValueError(f"weights={list(self.weights)}: one is negative; give 0 or more")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights sum to {sum(self.weights):g}, not to 1; scale them")
        return self
