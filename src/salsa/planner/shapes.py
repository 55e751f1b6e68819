"""The shape of a model, from its config.json: what it weighs and what a pass through it makes. No torch.

Known are the families whose layers are Llama's: Llama (SmolLM2 is one), Mistral and Gemma (the first). The models of
the paper are known by name, so that a plan needs no download; `tests/unit/test_planner.py` compares every count with
transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salsa.artifacts import EMBEDDED, EMBEDDED_PATH
from salsa.errors import ConfigError
from salsa.untrusted import read_json

FAMILIES = ("llama", "mistral", "gemma")


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` equal layers: attention with grouped heads, and a gated MLP."""

    family: str
    hidden: int
    """d, the width of the residual stream."""
    layers: int
    intermediate: int
    """f, the width of the MLP."""
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    biases: int = 0
    """Elements of the biases of one layer."""

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> "Shape":
        """The shape that a config.json describes.

        Raises:
            ConfigError: a family that is not known here, or a size that is missing or no positive whole number.
        """
        family = values.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(
                f"{where}: model_type={family!r} cannot be planned. Known: {', '.join(FAMILIES)}."
            )

        def size(key: str, otherwise: int | None = None) -> int:
            number = otherwise if values.get(key) is None else values[key]
            if number is None:
                raise ConfigError(f"{where}: has no {key}, which a plan needs.")
            if type(number) is not int or number < 1:
                raise ConfigError(
                    f"{where}: {key}={number!r} is no positive whole number. Copy or save it again."
                )
            return number

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        head_size = size("head_dim", hidden // heads)
        intermediate = size("intermediate_size")
        biases = 0
        if values.get("attention_bias"):
            biases += (heads + 2 * kv_heads) * head_size + hidden
        if values.get("mlp_bias"):
            biases += 2 * intermediate + hidden
        return cls(
            family, hidden, size("num_hidden_layers"), intermediate, heads, kv_heads, head_size,
            size("vocab_size"), values.get("tie_word_embeddings", family == "gemma"), biases,
        )  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → (inputs, outputs) of the linear maps of a layer."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, query), "k_proj": (self.hidden, key), "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip

    @property
    def matrices(self) -> int:
        """Elements of the weight matrices of all layers: each is used once a token."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def layer(self) -> int:
        """Parameters of one layer: matrices, biases, two norms."""
        return self.matrices // self.layers + self.biases + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; the output head has as many."""
        return self.vocabulary * self.hidden

    @property
    def trunk(self) -> int:
        """Parameters without the output head."""
        return self.layers * self.layer + self.hidden + self.embedding

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return self.trunk + (0 if self.tied else self.embedding)

    def adapters(self, rank: int, modules: tuple[str, ...] = ()) -> int:
        """Parameters of LoRA's adapters on the linear maps of these names; on all of the layers' if none is given."""
        own = [io for name, io in self.linears.items() if not modules or name in modules]
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in own)


LLAMA_2_7B = Shape("llama", 4096, 32, 11008, 32, 32, 128, 32_000, tied=False)
MISTRAL_7B = Shape("mistral", 4096, 32, 14336, 32, 8, 128, 32_000, tied=False)
GEMMA_2B = Shape("gemma", 2048, 18, 16384, 8, 1, 256, 256_000, tied=True)
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_2_7B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL_7B,
    "weqweasdas/RM-Mistral-7B": replace(MISTRAL_7B, vocabulary=32_001),
    "google/gemma-2b": GEMMA_2B,
    "google/gemma-2b-it": GEMMA_2B,
}
"""Hub name → the shape in its published config.json."""


def shape_of(path: str) -> Shape:
    """The shape of a model: `embedded`, a directory with a config.json, or a hub name of `PUBLISHED`.

    Raises:
        ConfigError: it is none of them, or a family that is not known here.
        CheckpointError: its config.json is not JSON.
    """
    directory = EMBEDDED_PATH if path == EMBEDDED else Path(path)
    file = directory / "config.json"
    if file.is_file():
        return Shape.from_config(read_json(file), str(file))
    if (known := PUBLISHED.get(path.partition("@")[0])) is not None:
        return known
    raise ConfigError(
        f"{path}: its shape is not known without its config.json. Download that file into a directory and plan "
        f"with model.path=DIRECTORY, or use one of {', '.join(PUBLISHED)}."
    )


def shape_or(path: str, other: Shape) -> Shape:
    """The shape of a model that may not be here yet; then it counts as `other`."""
    return shape_of(path) if is_known(path) else other


def is_known(path: str) -> bool:
    """Whether a model is here or its shape is published, so that `shape_of` need not guess."""
    return path == EMBEDDED or Path(path).is_dir() or path.partition("@")[0] in PUBLISHED
