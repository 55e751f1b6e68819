"""A recipe's words for models become nodes of the stage graph. Torch-free.

Soups and shrunk models are made once per run, as stages of their own, and shared by whatever names them.
"""

from collections.abc import Sequence
from typing import Any, cast

from salsa.artifacts import Checkpoint, FileHashes, resolve
from salsa.config import Recipe
from salsa.config.expressions import (
    SFT,
    Base,
    Given,
    Model,
    RecipeSoup,
    Shrunk,
    Soup,
    parse_model,
    text_of,
)
from salsa.stages.graph import Node
from salsa.stages.jobs import SoupJob


class Models:
    """The node of every model expression of one recipe."""

    def __init__(self, recipe: Recipe, base: Node, sft: Sequence[Node], hashes: FileHashes) -> None:
        self._soup, self._base, self._sft, self._hashes = recipe.soup, base, sft, hashes
        self._nodes: dict[str, Node] = {}

    def __getitem__(self, model: Model | str) -> Node:
        """The node that makes the model; the same one each time it is named."""
        if isinstance(model, str):
            model = parse_model(model)
        text = text_of(model)
        if text not in self._nodes:
            self._nodes[text] = self._node(model, text)
        return self._nodes[text]

    def average(
        self, label: str, parts: Sequence[Node], like: Node | None = None, **options: Any
    ) -> Node:
        """A soup as a stage, options as of `salsa.soup.write_soup`; or one part, shrunk as near the base as `like`."""
        base = None if "heads" in options else self._base  # reward models are no kin of the base
        return Node.of(SoupJob, label, tuple(parts), base, like, options)

    def _node(self, model: Model, text: str) -> Node:
        match model:
            case Base():
                return self._base
            case SFT(index):
                return self._sft[index]
            case Given(path):
                return Node(text, (), lambda: Checkpoint.of(resolve(path), self._hashes))
            case RecipeSoup():
                options = self._soup.model_dump(exclude={"ingredients"}, exclude_none=True)
                if (weights := options.pop("weights")) != "uniform":
                    options["weights"] = list(map(float, weights))
                return self.average(text, [self._sft[i] for i in self._soup.ingredients], **options)
            case Soup(parts, weights):
                options = {} if weights is None else {"weights": list(weights)}
                return self.average(text, [self[part] for part in parts], **options)
            case Shrunk(of, float(share)):
                return self.average(text, [self[of]], method="wise", alpha=share)
            case Shrunk(of, like):
                return self.average(text, [self[of]], self[cast(Model, like)])
