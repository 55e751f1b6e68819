"""What must be the same in all ingredients before an average means anything: tensors, configuration, vocabulary.

Compared are parsed values, never bytes: two releases of one library write one model's files differently.
"""

import filecmp
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, sha256_tree
from salsa.errors import CheckpointError
from salsa.soup.files import Tensor, Weights
from salsa.untrusted import read_json, read_text

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files that go with the weights; nothing else of a directory is copied, least of all code."""

HEADS = ("score.", "classifier.", "v_head.", "value_head.")
"""Beginnings of the names of heads that a trainer put on top."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUTS = ("lm_head.weight", "embed_out.weight")
_NO_MEANING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "unsloth_version"}
_NOT_ARCHITECTURE = {"use_cache", "id2label", "label2id", "problem_type", "output_attentions"}
"""Configuration that weights do not depend on; so are token ids and dropout rates."""


@dataclass(eq=False)
class Ingredient:
    """One model directory: its name for people, its weights, its configuration.

    Raises:
        CheckpointError: it is broken or quantized.
    """

    path: Path
    name: str
    expected: str | None = None
    """The digest that it must turn out to have."""
    weights: Weights = field(init=False)
    tensors: dict[str, Tensor] = field(init=False)
    """Key → tensor."""
    config: dict[str, Any] = field(init=False)
    """The parsed `config.json`."""
    homes: list[Path] = field(init=False)
    """Directories of its files, the later before the earlier."""

    def __post_init__(self) -> None:
        if not (self.path / "config.json").exists():
            raise CheckpointError(
                f"{self.path}: no model here (no config.json). Give a directory that save_pretrained wrote."
            )
        self.config = read_json(self.path / "config.json")
        if self.config.get("quantization_config"):
            raise CheckpointError(f"{self.path}: is quantized. De-quantize it first.")
        self.open("model")

    def open(self, stem: str) -> None:
        """Read the headers of the weights; `stem` as of `Weights`."""
        self.weights, self.homes = Weights(self.path, stem), [self.path]
        self.tensors = self.weights.tensors

    def file(self, name: str) -> Path:
        """Where a companion file is, or would be."""
        places = (home / name for home in reversed(self.homes))
        return next((place for place in places if place.exists()), self.path / name)

    @property
    def reads(self) -> list[Weights]:
        """The files that `load` reads: two threads may not read the same."""
        return [self.weights]

    def load(self, key: str, start: int, stop: int) -> np.ndarray:
        """Elements of a tensor, flat, not to be written to."""
        return self.weights.read(self.tensors[key], start, stop)

    def check_finite(self, key: str, values: np.ndarray) -> None:
        """Raise CheckpointError if NaN or Inf is among the values of a tensor."""
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: {key} holds NaN or Inf. A soup needs sound ingredients."
            )

    def digest(self) -> str:
        """sha256 of the directory's content; CheckpointError if it is not the `expected` one."""
        hashes = self.weights.sha256()
        if self.expected is None:
            return sha256_tree(self.path, known=hashes)
        Checkpoint(self.path, self.expected).verify(known=hashes)
        return self.expected


def check_alike(ingredients: Sequence[Ingredient], take_from: int | None) -> None:
    """Raise CheckpointError unless all have the first one's tensors, architecture and vocabulary.

    Settings that weights do not depend on (generation, chat template, special tokens) must be equal too, or `take_from`
    names the ingredient that gives them.
    """
    first = ingredients[0]
    tie_outputs(ingredients)
    for other in ingredients[1:]:
        refuse(_model_differences(first, other))
        refuse(_vocabulary_differences(first, other, take_from))
        if take_from is None:
            refuse(_unequal(first, other, _settings, "Choose one with take_from= (--take-from)."))


def check_base(base: Ingredient, first: Ingredient, heads: Iterable[str]) -> None:
    """Raise CheckpointError unless the base has the ingredients' tensors and architecture; heads it may lack."""
    for key in heads:
        base.tensors[key] = first.tensors[key]
    tie_outputs([first, base])
    refuse(_model_differences(first, base))


def refuse(problems: Iterable[str]) -> None:
    """Raise CheckpointError with the first of the problems, if there is any."""
    for problem in problems:
        raise CheckpointError(problem)


def tie_outputs(ingredients: Sequence[Ingredient]) -> None:
    """Give every ingredient the first one's key set where only a tied output layer differs.

    A tied model may or may not store `lm_head` beside the embedding that it is. Stored, it must be equal to it.
    """
    outputs = {k for i in ingredients for k in i.tensors if k.endswith(_OUTPUTS)}
    for key in outputs:
        if all(key in i.tensors for i in ingredients):
            continue
        for ingredient in ingredients:
            embedding = _embedding(ingredient)
            if embedding is None or ingredient.config.get("tie_word_embeddings") is False:
                continue
            if key not in ingredient.tensors:
                ingredient.tensors[key] = embedding
            elif not _same(ingredient.weights, ingredient.tensors[key], embedding):
                raise CheckpointError(
                    f"{ingredient.path}: {key} is stored, differs from the embedding, and other ingredients have none. "
                    "Save all of them tied or all of them untied."
                )
        first = ingredients[0]
        if all(key in i.tensors for i in ingredients) and first.tensors[key] is _embedding(first):
            for ingredient in ingredients:
                ingredient.tensors.pop(key, None)  # adapters share their base's


def _model_differences(first: Ingredient, other: Ingredient) -> Iterator[str]:
    missing = sorted(first.tensors.keys() - other.tensors.keys())
    extra = sorted(other.tensors.keys() - first.tensors.keys())
    if missing or extra:
        yield (
            f"{other.path}: not the tensors of {first.path} (lacks {_some(missing)}; has besides {_some(extra)}). "
            "Average models of one architecture."
        )
    for key, tensor in first.tensors.items():
        if (shape := other.tensors[key].shape) != tensor.shape:
            yield (
                f"{other.path}: {key} is {shape}, in {first.path} it is {tensor.shape}. "
                "Nothing is padded or cut: give models of one size and vocabulary."
            )
    yield from _unequal(first, other, _model_settings, "Average models of one architecture.")


def _unequal(
    first: Ingredient, other: Ingredient, read: Callable[[Ingredient], dict[str, Any]], advice: str
) -> Iterator[str]:
    there, here = read(first), read(other)
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if old != new:
            yield f"{other.path}: {key} is {_short(new)}, in {first.path} it is {_short(old)}. {advice}"


def _model_settings(ingredient: Ingredient) -> dict[str, Any]:
    return {f"config {key}": value for key, value in _architecture(ingredient.config).items()}


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration that weights depend on, in one spelling for all versions of transformers; null is absent."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if value is None or key in _NO_MEANING or _is_setting(key):
            continue
        values[key] = _architecture(value) if isinstance(value, dict) else value
    if "rope_type" in values:
        return values
    theta, scaling = values.pop("rope_theta", None), values.pop("rope_scaling", None)
    if theta is not None or scaling is not None:  # transformers 4
        rope = {"rope_type": "default"} | (scaling if isinstance(scaling, dict) else {})
        rope["rope_type"] = rope.pop("type", rope["rope_type"])
        values.setdefault(
            "rope_parameters", rope | ({} if theta is None else {"rope_theta": theta})
        )
    return values


def _is_setting(key: str) -> bool:
    return key in _NOT_ARCHITECTURE or key.endswith(("_token_id", "_dropout", "_pdrop", "dropout"))


def _settings(ingredient: Ingredient) -> dict[str, Any]:
    """What is written beside the weights and must come from somewhere."""
    generation, tokenizer, tokens = (
        read_json(file) if (file := ingredient.file(name)).exists() else {}
        for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    )
    generated = {"transformers_version", "_from_model_config"}
    settings = {f"config {k}": v for k, v in ingredient.config.items() if _is_setting(k)}
    settings |= {f"generation_config {k}": generation[k] for k in generation.keys() - generated}
    roles = tokenizer | tokens
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = roles.get(name)
        settings[name] = token.get("content") if isinstance(token, dict) else token
    template = ingredient.file("chat_template.jinja")
    text = read_text(template) if template.exists() else None
    settings["chat template"] = text or tokenizer.get("chat_template")
    return {key: value for key, value in settings.items() if value is not None}


def _vocabulary_differences(
    first: Ingredient, other: Ingredient, take_from: int | None
) -> Iterator[str]:
    one, two = (i.file("tokenizer.json") for i in (first, other))
    if one.is_file() and two.is_file() and filecmp.cmp(one, two, shallow=False):
        return
    there, here = _vocabulary(first), _vocabulary(other)
    if bool(there) != bool(here):
        if take_from is None:
            bare = other.path if there else first.path
            yield (
                f"{bare}: has no tokenizer to compare. Put one there, or say whose to use with take_from= "
                "(--take-from)."
            )
        return
    for part in sorted(there.keys() | here.keys()):
        old, new = there.get(part), here.get(part)
        if old != new:
            yield (
                f"{other.path}: another tokenizer than {first.path} ({part}{_example(old, new)}). "
                "The same row must mean the same token: average models of one vocabulary."
            )


def _vocabulary(ingredient: Ingredient) -> dict[str, Any]:
    """What maps text to rows, by part: vocabulary, merges, added tokens. Empty if there is no tokenizer."""
    file = ingredient.file("tokenizer.json")
    if file.exists():
        tokenizer = read_json(file)
        model = tokenizer.get("model")
        if not isinstance(model, dict):
            raise CheckpointError(f"{file}: has no model. Copy or save it again.")
        merges = model.get("merges") or []
        added = [t for t in tokenizer.get("added_tokens") or [] if isinstance(t, dict)]
        return {
            "vocabulary": model.get("vocab"),
            "merges": [m if isinstance(m, str) else " ".join(map(str, m)) for m in merges],
            "added tokens": {str(t.get("id")): (t.get("content"), t.get("special")) for t in added},
        }
    parsed = [ingredient.file(name) for name in ("vocab.json", "added_tokens.json")]
    names = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
    whole = [ingredient.file(name) for name in names]
    values: dict[str, Any] = {file.name: read_json(file) for file in parsed if file.exists()}
    return values | {file.name: file.read_bytes() for file in whole if file.is_file()}


def _example(old: Any, new: Any) -> str:
    """Where two vocabularies differ first."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return f": {key!r} is {new.get(key)!r}, there {old.get(key)!r}"
    return ""


def _embedding(ingredient: Ingredient) -> Tensor | None:
    matrices = [t for key, t in ingredient.tensors.items() if key.endswith(_EMBEDDINGS)]
    return matrices[0] if len(matrices) == 1 else None


def _same(weights: Weights, one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 18
    for start in range(0, one.size, step):
        place = (start, min(start + step, one.size))
        a, b = weights.read(one, *place), weights.read(other, *place)
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return False
    return True


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    return ", ".join(keys[:6]) + more if keys else "none"


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
