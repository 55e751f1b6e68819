"""N checkpoints in, their weighted average out: an ordinary Hugging Face checkpoint. numpy only, no torch.

    θ_soup = Σ_i w_i θ_i        (SALSA: two SFT models, w = ½ each)

Sums run in float64 over a few rows at a time and are rounded once, so memory depends neither on the model's size nor on
N; ingredients are summed in the order of their digests, so the result does not depend on the order they are given in.
Nothing is guessed: what is not the same in all ingredients (keys, shapes, configuration, vocabulary) is an error.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from salsa.artifacts import Checkpoint, digest_of, finish_directory, resolve, versions, write_atomic
from salsa.errors import CheckpointError, ConfigError

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHUNK_ELEMENTS = 1 << 20
_SHARD_BYTES = 5 * 10**9
_HEADER_LIMIT = 100_000_000
_IGNORED_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements start to stop, flat."""
        kind = FLOATS.get(self.dtype) or np.dtype(_INTEGERS[self.dtype])
        with self.file.open("rb") as file:
            file.seek(self.offset + start * kind.itemsize)
            data = np.fromfile(file, dtype=kind, count=stop - start)
        if len(data) != stop - start:
            raise CheckpointError(f"{self.file}: ends in the middle of a tensor. Copy it again.")
        return data

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def make_soup(
    ingredients: Sequence[Path | str],
    *,
    weights: Sequence[float] | None = None,
    out: Path,
    dtype: str = "auto",
    force: bool = False,
) -> Checkpoint:
    """Average checkpoints into a new directory, all or nothing.

    Args:
        ingredients: model directories or hub names; SFT models that share a base.
        weights: one each, summing to 1; uniform if not given.
        out: the directory to make.
        dtype: `auto` (the widest ingredient's), float64, float32, float16 or bfloat16.
        force: replace `out` if it exists.

    Raises:
        ConfigError: the weights do not fit, or `out` exists.
        CheckpointError: the ingredients are broken or do not go together; the message names the tensor or file.
    """
    out = Path(out)
    if out.exists() and not force:
        raise ConfigError(f"{out}: exists. Give another directory, or --force to replace it.")
    found = [Checkpoint.of(resolve(str(path))) for path in ingredients]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_soup(found, partial, weights=weights, dtype=dtype)
        if out.exists():
            shutil.rmtree(out)
        finish_directory(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint.of(out)


def write_soup(
    ingredients: Sequence[Checkpoint],
    directory: Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
) -> None:
    """Fill `directory` with the soup, its tokenizer and `soup.json` (see `make_soup`)."""
    if not ingredients:
        raise ConfigError("soup: no ingredients. Give at least one checkpoint.")
    if weights is None:
        weights = [1 / len(ingredients)] * len(ingredients)
    if len(weights) != len(ingredients):
        raise ConfigError(
            f"soup: {len(weights)} weights for {len(ingredients)} ingredients. Give one each."
        )
    if not all(math.isfinite(w) for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(f"soup: weights sum to {sum(weights):g}, not to 1. Scale them.")
    if len({c.digest for c in ingredients}) < len(ingredients):
        raise CheckpointError(
            "soup: the same checkpoint is given twice. Give different ones, or change its weight."
        )
    tensors = [tensors_of(checkpoint.path) for checkpoint in ingredients]
    _check_alike(ingredients, tensors)
    stored = _output_dtypes(tensors, dtype)
    order = sorted(range(len(ingredients)), key=lambda i: ingredients[i].digest)
    _write_weights(directory, [tensors[i] for i in order], [weights[i] for i in order], stored)
    _copy_companions(ingredients[0].path, directory, None if dtype == "auto" else dtype)
    provenance = {
        "method": "linear",
        "ingredients": [
            {"path": str(c.path), "digest": c.digest, "weight": w}
            for c, w in zip(ingredients, weights, strict=True)
        ],
        "dtype": dtype,
        "versions": versions(),
    }
    write_atomic(directory / "soup.json", json.dumps(provenance, indent=1) + "\n")


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, from its single file or its index.

    Raises:
        CheckpointError: no safetensors, a stale index beside a single file, or a broken header.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{path}: has both {single.name} and {index.name}. Delete the one that is stale."
        )
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: names {name!r}, which is no plain .safetensors file beside it."
                )
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(weight_map.values())):
            for key, tensor in _read_header(path / name).items():
                if weight_map.get(key) != name or key in tensors:
                    raise CheckpointError(
                        f"{path / name}: holds {key}, which the index places elsewhere."
                    )
                tensors[key] = tensor
        if missing := sorted(weight_map.keys() - tensors.keys()):
            raise CheckpointError(f"{index}: names {missing[0]}, which no shard holds.")
        return tensors
    if single.exists():
        return _read_header(single)
    if any(path.glob("*.bin")):
        raise CheckpointError(
            f"{path}: has pickled weights only (.bin). Save it with safe_serialization=True first."
        )
    raise CheckpointError(
        f"{path}: has no model.safetensors. Give a directory that save_pretrained wrote."
    )


def _read_header(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start, size = 8 + length, file.stat().st_size
        tensors = {
            key: Tensor(
                file,
                v["dtype"],
                tuple(v["shape"]),
                start + v["data_offsets"][0],
                v["data_offsets"][1] - v["data_offsets"][0],
            )
            for key, v in header.items()
        }
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"{file}: not a sound safetensors file ({error}). Copy or save it again."
        ) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS and tensor.dtype not in _INTEGERS:
            raise CheckpointError(
                f"{file}: {key} is {tensor.dtype}; a soup takes {', '.join(FLOATS)}. De-quantize it first."
            )
        kind = FLOATS.get(tensor.dtype) or np.dtype(_INTEGERS[tensor.dtype])
        if (
            tensor.size * kind.itemsize != tensor.num_bytes
            or tensor.offset < start
            or tensor.offset + tensor.num_bytes > size
        ):
            raise CheckpointError(
                f"{file}: {key} does not lie inside the file. Copy or save it again."
            )
    return tensors


def _check_alike(ingredients: Sequence[Checkpoint], tensors: Sequence[dict[str, Tensor]]) -> None:
    first = ingredients[0].path
    first_config, first_vocabulary = _config(first), _vocabulary(first)
    for checkpoint, own in zip(ingredients[1:], tensors[1:], strict=True):
        here = checkpoint.path
        missing, extra = (
            sorted(tensors[0].keys() - own.keys()),
            sorted(own.keys() - tensors[0].keys()),
        )
        if missing or extra:
            raise CheckpointError(
                f"{here}: not the tensors of {first} "
                f"(lacks {missing[:3] or 'none'}, has besides {extra[:3] or 'none'})."
            )
        for key, tensor in own.items():
            if tensor.shape != tensors[0][key].shape:
                raise CheckpointError(
                    f"{here}: {key} is {tensor.shape}, in {first} it is {tensors[0][key].shape}."
                )
        config = _config(here)
        for key in sorted(first_config.keys() | config.keys()):
            if first_config.get(key) != config.get(key):
                raise CheckpointError(
                    f"{here}: config {key} is {config.get(key)!r}, in {first} it is {first_config.get(key)!r}."
                )
        if _vocabulary(here) != first_vocabulary:
            raise CheckpointError(
                f"{here}: another tokenizer than {first}. The same row must mean the same token."
            )


def _config(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: is quantized. De-quantize it first.")
    return {key: value for key, value in config.items() if key not in _IGNORED_CONFIG}


def _vocabulary(path: Path) -> str:
    """Digest of what maps text to rows: vocabulary, merges, added tokens; empty if there is no fast tokenizer."""
    file = path / "tokenizer.json"
    if not file.exists():
        return ""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    return digest_of({"model": tokenizer.get("model"), "added": tokenizer.get("added_tokens")})


def _output_dtypes(tensors: Sequence[dict[str, Tensor]], dtype: str) -> dict[str, str]:
    if dtype != "auto" and dtype not in _NAMES:
        raise ConfigError(f"soup: dtype={dtype!r}. Use auto, {', '.join(_NAMES)}.")
    order = list(FLOATS)
    stored = {}
    for key in tensors[0]:
        kinds = {own[key].dtype for own in tensors}
        if not kinds <= FLOATS.keys():
            if len(kinds) > 1:
                raise CheckpointError(
                    f"soup: {key} is {' and '.join(sorted(kinds))} in different ingredients."
                )
            stored[key] = kinds.pop()
        elif dtype != "auto":
            stored[key] = _NAMES[dtype]
        else:
            widest = min(kinds, key=order.index)
            stored[key] = "F32" if kinds == {"F16", "BF16"} else widest
    return stored


def _write_weights(
    directory: Path,
    tensors: Sequence[dict[str, Tensor]],
    weights: Sequence[float],
    stored: dict[str, str],
) -> None:
    """Stream every tensor, sorted by name, into shards of at most 5 GB."""
    shards: list[list[str]] = [[]]
    filled = 0
    sizes = {key: tensors[0][key].size * _itemsize(kind) for key, kind in stored.items()}
    for key in sorted(stored):
        if shards[-1] and filled + sizes[key] > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += sizes[key]
    weight_map = {}
    for number, keys in enumerate(shards, start=1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key in keys:
            header[key] = {
                "dtype": stored[key],
                "shape": list(tensors[0][key].shape),
                "data_offsets": [offset, offset + sizes[key]],
            }
            offset += sizes[key]
            weight_map[key] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for key in keys:
                for chunk in _average(key, [own[key] for own in tensors], weights, stored[key]):
                    chunk.tofile(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_atomic(directory / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _average(
    key: str, tensors: Sequence[Tensor], weights: Sequence[float], stored: str
) -> Iterator[np.ndarray]:
    """The weighted sum of one tensor, a chunk at a time; integers must be equal and are copied."""
    size = tensors[0].size
    for start in range(0, size, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, size)
        if stored not in FLOATS:
            chunks = [tensor.read(start, stop) for tensor in tensors]
            if any(not np.array_equal(chunks[0], chunk) for chunk in chunks[1:]):
                raise CheckpointError(
                    f"soup: {key} holds integers that differ between ingredients; they have no average."
                )
            yield chunks[0]
            continue
        # -0.0 is the neutral element of addition: a soup of one keeps its zeros' signs
        total: Any = -0.0
        for tensor, weight in zip(tensors, weights, strict=True):
            chunk = tensor.read(start, stop).astype(np.float64)
            if not np.isfinite(chunk).all():
                raise CheckpointError(
                    f"{tensor.file}: {key} holds NaN or Inf. A soup needs sound ingredients."
                )
            total = total + weight * chunk
        with np.errstate(over="ignore"):
            result = total.astype(FLOATS[stored])
        if not np.isfinite(result.astype(np.float64)).all():
            raise CheckpointError(f"soup: {key} overflows {stored}. Choose a wider --dtype.")
        yield result


def _itemsize(kind: str) -> int:
    return (FLOATS.get(kind) or np.dtype(_INTEGERS[kind])).itemsize


def _copy_companions(source: Path, directory: Path, dtype: str | None) -> None:
    """Everything of the first ingredient that is not weights or provenance."""
    for file in sorted(source.iterdir()):
        companion = (
            file.suffix in {".json", ".jinja", ".model", ".txt"}
            and "safetensors.index" not in file.name
        )
        if (
            file.is_file()
            and companion
            and file.name not in {"stage.json", "soup.json", "metrics.jsonl", "accuracy.txt"}
        ):
            shutil.copyfile(file, directory / file.name)
    if dtype is not None:
        config = json.loads((directory / "config.json").read_text())
        config.pop("torch_dtype", None)
        write_atomic(
            directory / "config.json", json.dumps(config | {"dtype": dtype}, indent=2) + "\n"
        )
