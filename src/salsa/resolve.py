"""A recipe's words for models become nodes of the stage graph. Torch-free.

Soups and shrunk models are made once per run, as stages of their own, and shared by whatever names them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from salsa.artifacts import Checkpoint, FileHashes, resolve
from salsa.config import Recipe, SoupConfig
from salsa.config.expressions import (
    SFT,
    Base,
    Given,
    Model,
    RecipeSoup,
    ReferenceRule,
    Shrunk,
    Soup,
    text_of,
)
from salsa.stages.graph import Node
from salsa.stages.jobs import SoupJob

T = TypeVar("T")


class Models:
    """The node of every model expression of one recipe."""

    def __init__(self, recipe: Recipe, base: Node, sft: Sequence[Node], hashes: FileHashes) -> None:
        self._soup, self._base, self._sft, self._hashes = recipe.soup, base, sft, hashes
        self._nodes: dict[str, Node] = {}

    def __getitem__(self, model: Model) -> Node:
        """The node that makes the model; the same one each time it is named."""
        text = text_of(model)
        if text not in self._nodes:
            self._nodes[text] = self._node(model, text)
        return self._nodes[text]

    def average(self, label: str, parts: Sequence[Node], **options: Any) -> Node:
        """A soup of checkpoints as a stage; options as of `salsa.soup.write_soup`."""
        if "heads" in options:  # reward models have another architecture than the base
            return Node(
                label, tuple(parts), lambda *made: SoupJob(label, made, None, options=options)
            )
        return Node(
            label,
            (self._base, *parts),
            lambda base, *made: SoupJob(label, made, base, options=options),
        )

    def _node(self, model: Model, text: str) -> Node:
        match model:
            case Base():
                return self._base
            case SFT(index):
                return self._sft[index]
            case Given(path):
                return Node(text, (), lambda: Checkpoint.of(resolve(path), self._hashes))
            case RecipeSoup():
                parts = [self._sft[index] for index in self._soup.ingredients]
                return self.average(text, parts, **_options(self._soup))
            case Soup(parts, weights):
                options = {} if weights is None else {"weights": list(weights)}
                return self.average(text, [self[part] for part in parts], **options)
            case Shrunk(of, float(share)):
                return self.average(text, [self[of]], method="wise", alpha=share)
            case Shrunk(of, like):
                return self._shrunk_like(text, self[of], self[cast(Model, like)])

    def _shrunk_like(self, label: str, model: Node, like: Node) -> Node:
        return Node(
            label,
            (self._base, model, like),
            lambda base, made, other: SoupJob(label, (made,), base, as_near_as=other),
        )


def checkpoints_of(rule: ReferenceRule[Model], made: Sequence[T]) -> ReferenceRule[T]:
    """The rule with what was made of its models in place of their names."""
    return cast("ReferenceRule[T]", replace(cast(Any, rule), models=tuple(made)))


def _options(soup: SoupConfig) -> dict[str, Any]:
    """What the recipe's `soup:` says, as options of `write_soup`."""
    options: dict[str, Any] = {"method": soup.method, "alpha": soup.alpha, "score": soup.score}
    if soup.weights != "uniform":
        options["weights"] = [float(weight) for weight in soup.weights]
    return {name: value for name, value in options.items() if value is not None}
