"""Soups of LoRA adapters (arXiv 2106.09685): the mean of products is not the product of means, so A and B stay apart.

    W_i = W_base + s_i B_i A_i,   s = alpha / r   (alpha / √r with rslora, arXiv 2312.03732)

Two exact ways: side by side, [w_1 B_1 … w_N B_N] [A_1; …; A_N], an adapter of rank N·r; or, with the base at hand,
added to its weights, an ordinary model (and then every method of soup works).
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import write_atomic
from salsa.errors import CheckpointError
from salsa.soup.diagnostics import Tally
from salsa.soup.files import FLOATS, Weights, WeightsWriter, widest
from salsa.soup.ingredients import Ingredient, refuse
from salsa.soup.methods import DTYPES, Factors, Mix
from salsa.soup.rounding import rounded
from salsa.untrusted import read_json

CONFIG = "adapter_config.json"
_FREE = {"peft_version", "inference_mode", "init_lora_weights", "lora_dropout", "auto_mapping"}
"""Settings that say how an adapter was trained, not what it is."""
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias")
_MOVES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to start that change the base's own weights."""
_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


class Adapter(Ingredient):
    """One adapter directory.

    Raises:
        CheckpointError: it is broken, or of a kind whose sum this module does not know.
    """

    def __post_init__(self) -> None:
        self.config = read_json(self.path / CONFIG)
        refuse(self._problems())
        self.open("adapter_model")
        if magnitudes := [k for k in self.tensors if "lora_magnitude_vector" in k]:
            raise CheckpointError(f"{self.path}: {magnitudes[0]} belongs to DoRA. Merge it first.")

    def _problems(self) -> Iterator[str]:
        if (kind := self.config.get("peft_type")) != "LORA":
            yield f"{self.path}: is a {kind} adapter; only LoRA adapters add up. Give LoRA adapters, or whole models."
        for key in filter(self.config.get, _UNSUPPORTED):
            yield f"{self.path}: uses {key}, which a soup cannot add up. Merge it into its base first."
        start = str(self.config.get("init_lora_weights", "")).lower()
        if start.startswith(_MOVES_BASE):
            yield f"{self.path}: started with {start}, which changes the base too. Convert it to a plain LoRA first."
        for key in ("r", "lora_alpha"):
            value = self.config.get(key)
            if not isinstance(value, int | float) or value <= 0:
                yield f"{self.path / CONFIG}: {key} is {value!r:.40}, no positive number. Copy or save it again."

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        rank, alpha = self.config["r"], self.config["lora_alpha"]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def pairs(self) -> dict[str, str]:
        """Key of each A → key of its B."""
        pairs = {
            key: key.removesuffix(end) + other
            for key in self.tensors
            for end, other in _FACTORS.items()
            if key.endswith(end)
        }
        if lonely := [a for a, b in pairs.items() if b not in self.tensors]:
            raise CheckpointError(f"{self.path}: {lonely[0]} has no B. Copy or save it again.")
        for a, b in pairs.items():
            down, up, rank = self.tensors[a].shape, self.tensors[b].shape, self.config["r"]
            if down[0] != rank or up[1:2] != (rank,):
                raise CheckpointError(
                    f"{self.path}: {a} is {down} and its B {up}, which is not rank {rank}."
                )
        return pairs

    def turned(self, a: str) -> bool:
        """Whether the weight that this A belongs to is stored as (B A)ᵀ."""
        return "lora_embedding" in a or bool(self.config.get("fan_in_fan_out"))

    def values(self, key: str) -> np.ndarray:
        """A whole tensor of floats, as float64."""
        tensor = self.tensors[key]
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{self.path}: {key} is {tensor.dtype}; an adapter holds floats.")
        flat = self.weights.read(tensor, 0, tensor.size)
        values = flat.reshape(tensor.shape).astype(np.float64)
        self.check_finite(key, values)
        return values


def adapter_differences(first: Adapter, other: Adapter) -> Iterator[str]:
    """Why the two do not adapt one base in one way."""
    for key in sorted((first.config.keys() | other.config.keys()) - _FREE):
        there, here = (_plain(a.config.get(key)) for a in (first, other))
        if there != here:
            yield (
                f"{other.path / CONFIG}: {key} is {here!r}, in {first.path} it is {there!r}. "
                "Only adapters of one base, made in one way, add up."
            )
    for stray in sorted(first.tensors.keys() ^ other.tensors.keys()):
        yield f"{other.path}: differs from {first.path} about {stray}. Give adapters of the same layers."
    for key, tensor in first.tensors.items():
        if (shape := other.tensors[key].shape) != tensor.shape:
            yield (
                f"{other.path}: {key} is {shape}, in {first.path} it is {tensor.shape}. "
                "Give adapters of one base and one rank."
            )


def concatenate(
    adapters: Sequence[Adapter], mix: Mix, directory: Path | None
) -> tuple[dict[str, Tally], str, dict[str, str]]:
    """Write the adapter of rank N·r whose product is the weighted sum of the ingredients' products.

    alpha is set so that the new scale is s / N; B_i is multiplied with N·w_i, which is 1 in a uniform soup: no
    rounding. Without a directory nothing is written. Returns the sums over each product, the dtype, and file name →
    sha256.
    """
    first, count = adapters[0], len(adapters)
    factors = mix.mean(count)
    pairs = first.pairs()
    plan, made = {}, {}
    tallies: dict[str, Tally] = {}
    for key in sorted(first.tensors):
        parts = [a.values(key) for a in adapters]
        stored = DTYPES.get(mix.dtype) or widest(a.tensors[key].dtype for a in adapters)
        if key in pairs:
            whole = np.concatenate(parts)
            tallies[key] = _product_tally(adapters, key, pairs[key], factors)
        elif key in pairs.values():
            own = zip(factors.shares * count, parts, strict=True)
            whole = np.concatenate([w * part for w, part in own], axis=1)
        else:
            whole = np.zeros_like(parts[0])
            for share, part in zip(factors.shares, parts, strict=True):
                whole += share * part
        made[key] = rounded(np.ascontiguousarray(whole), stored)
        plan[key] = (stored, made[key].shape)
    main = max(plan.values(), key=lambda entry: math.prod(entry[1]))[0]
    if directory is None:
        return tallies, main, {}
    with closing(WeightsWriter(directory, plan, "adapter_model")) as writer:
        for value in made.values():
            writer.write(value)
        files = writer.finish()
    root = first.config.get("use_rslora")
    changed = {
        "r": first.config["r"] * count,
        "lora_alpha": first.config["lora_alpha"] / (math.sqrt(count) if root else 1),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_atomic(directory / CONFIG, json.dumps(first.config | changed, indent=2) + "\n")
    return tallies, main, files


class MergedAdapter(Ingredient):
    """An adapter as a whole model: its base's stored elements, and what the product adds to them."""

    def __init__(self, adapter: Adapter, base: Ingredient) -> None:
        self.path, self.name, self.expected = adapter.path, adapter.name, adapter.expected
        self.adapter, self.base, self.weights = adapter, base, adapter.weights
        self.tensors, self.config, self.homes = base.tensors, base.config, [base.path, self.path]
        self._products: dict[str, tuple[str, str]] = {}
        """Key in the base → keys of its A and B."""
        for a, b in adapter.pairs().items():
            module = a.removeprefix(_PREFIX).split(".lora_")[0]
            target = base.tensors.get(f"{module}.weight")
            if target is None:
                raise CheckpointError(
                    f"{self.path}: adapts {module}, which {base.path} does not have. Give the right base= (--base)."
                )
            shape = (adapter.tensors[b].shape[0], adapter.tensors[a].shape[-1])
            if target.shape != (shape[::-1] if adapter.turned(a) else shape):
                raise CheckpointError(
                    f"{self.path}: B A of {module} is {shape}, in {base.path} the weight is {target.shape}."
                )
            self._products[f"{module}.weight"] = (a, b)
        self._at = ""  # the product at hand is that of this key
        self._replaced = {
            key.removeprefix(_PREFIX): tensor
            for key, tensor in adapter.tensors.items()
            if ".lora_" not in key
        }
        if stray := sorted(self._replaced.keys() - base.tensors.keys()):
            raise CheckpointError(
                f"{self.path}: brings {stray[0]}, which the base does not have. "
                "Leave base= (--base) out to keep an adapter."
            )

    @property
    def reads(self) -> list[Weights]:
        """The adapter's own and the base's."""
        return [self.weights, *self.base.reads]

    def load(self, key: str, start: int, stop: int) -> np.ndarray:
        """Elements of a tensor that was saved whole; else the base's, W_base + s B A (float64) where it is adapted."""
        if (tensor := self._replaced.get(key)) is not None:
            return self.weights.read(tensor, start, stop)
        stored = self.base.load(key, start, stop)
        if key not in self._products or self.tensors[key].dtype not in FLOATS:
            return stored
        if key != self._at:  # (rows, r) and (r, columns) in the base's orientation
            down, up = (self.adapter.values(k) for k in self._products[key])
            turned = self.adapter.turned(self._products[key][0])
            self._at, self._left, self._right = (key, down.T, up.T) if turned else (key, up, down)
        width = self._right.shape[1]
        first, last = start // width, -(-stop // width)
        rows = (self._left[first:last] @ self._right).reshape(-1)
        product = rows[start - first * width : stop - first * width]
        return stored.astype(np.float64) + self.adapter.scale * product


def _product_tally(adapters: Sequence[Adapter], a: str, b: str, factors: Factors) -> Tally:
    """Sums over s_i B_i A_i without forming it: ⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀB_j) ∘ (A_i A_jᵀ)."""
    tally = Tally.empty(len(adapters))
    flat = []
    for adapter in adapters:
        up, down = adapter.values(b), adapter.values(a)
        flat.append((up.reshape(len(up), -1), down.reshape(len(down), -1)))
    for i, (up, down) in enumerate(flat):
        for j, (other_up, other_down) in enumerate(flat):
            inner = float(((up.T @ other_up) * (down @ other_down.T)).sum())
            tally.gram[i, j] = adapters[i].scale * adapters[j].scale * inner
    tally.squares = np.diag(tally.gram).copy()
    tally.size = len(flat[0][0]) * flat[0][1].shape[1]
    tally.settle(factors, with_base=True)
    return tally


def _plain(value: Any) -> Any:
    """Lists that are sets, empty that is absent."""
    return (sorted(map(str, value)) if isinstance(value, list) else value) or None
