"""What the KL pulls towards, and where the policy starts: a model expression becomes a checkpoint.

    base             the model that SFT started from
    sft[i]           the SFT model of the i-th seed
    soup             the recipe's soup
    soup[i,j,…]      the uniform soup of those SFT models
    a/path/or/name   any other checkpoint

Soups are made once per run and shared by the arms that use them.
"""

from collections.abc import Sequence

from salsa.artifacts import Checkpoint, RunDirectory, resolve
from salsa.config import SoupConfig, ingredients_of
from salsa.soup import write_soup


class Anchors:
    """The checkpoints that a recipe's expressions stand for."""

    def __init__(
        self, run: RunDirectory, base: Checkpoint, sft: Sequence[Checkpoint], soup: SoupConfig
    ) -> None:
        self._run, self._base, self._sft, self._soup = run, base, sft, soup
        self._made: dict[str, Checkpoint] = {}

    def __getitem__(self, expression: str) -> Checkpoint:
        """The checkpoint of an expression; a soup is cooked the first time."""
        if expression not in self._made:
            self._made[expression] = self._make(expression)
        return self._made[expression]

    def _make(self, expression: str) -> Checkpoint:
        if expression == "base":
            return self._base
        indices = ingredients_of(expression, self._soup)
        if not indices:
            return Checkpoint.of(resolve(expression))
        if expression.startswith("sft"):
            return self._sft[indices[0]]
        uniform = expression != "soup" or self._soup.weights == "uniform"
        weights = None if uniform else [float(w) for w in self._soup.weights]
        return self._cook(expression, [self._sft[i] for i in indices], weights)

    def _cook(
        self, label: str, ingredients: Sequence[Checkpoint], weights: Sequence[float] | None
    ) -> Checkpoint:
        stage = self._run.stage(
            label,
            config={"weights": weights},
            inputs={f"ingredient {i}": c.digest for i, c in enumerate(ingredients)},
            work=lambda directory: write_soup(ingredients, directory, weights=weights),
        )
        return stage.checkpoint
