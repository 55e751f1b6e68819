"""How far the ingredients lie from each other and from their soup: sums taken while averaging, and what they mean.

δ_i = θ_i − origin, where the origin is the base if it is given and the first ingredient if not; float64 throughout.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from salsa.soup.methods import Factors

_ROW = 4096
_STRANGERS = 0.8
"""Fine-tunings of one base have weights with cosines near 1; below this they do not look like siblings."""
_OUTLIER = 2.0
"""An ingredient is an outlier if it is this many times as far from the others as is usual among them."""
_COARSE = 0.05
"""Share of the delta that storing bf16 may lose before it is worth a warning."""


@dataclass
class Tally:
    """Sums over the elements of one tensor (or several: tallies add)."""

    gram: np.ndarray
    """⟨δ_i, δ_j⟩, (N, N)."""
    squares: np.ndarray
    """‖θ_i‖², (N,)."""
    size: int = 0
    """Number of elements."""
    lost: float = 0.0
    """‖bf16(θ_soup) − θ_soup‖²."""
    soup: float = 0.0
    """‖δ_soup‖² with a base, ‖θ_soup‖² without; set once the factors are known."""
    spread: float = 0.0
    """mean_i ‖θ_soup − θ_i‖²; likewise."""
    adrift: int = 0
    """Number of tensors whose shares do not sum to 1: their sums of deltas do not say where the soup lies."""

    @property
    def soup_norm(self) -> float:
        """‖δ_soup‖ or ‖θ_soup‖, NaN if the sums do not say it."""
        return float("nan") if self.adrift else max(self.soup, 0.0) ** 0.5

    @classmethod
    def empty(cls, count: int) -> "Tally":
        """Nothing yet, for `count` ingredients."""
        return cls(np.zeros((count, count)), np.zeros(count))

    def measure(self, values: np.ndarray, base: np.ndarray | None, deltas: np.ndarray) -> bool:
        """Add a chunk: values (N, n), base (n,) if there is one; `deltas` (N, n) is room to work in.

        Sums of float32 that are not finite are not added, so that they can be taken in float64; False says that they
        are not, in either.
        """
        own = Tally.empty(len(values))
        first = 0 if base is not None else 1  # without a base the first delta is zero
        np.subtract(values[first:], values[0] if base is None else base, out=deltas[first:])
        for i in range(len(values)):
            own.squares[i] = dot(values[i], values[i])
            for j in range(first, i + 1):
                own.gram[i, j] = own.gram[j, i] = dot(deltas[i], deltas[j])
        finite = bool(np.isfinite(own.squares).all() and np.isfinite(own.gram).all())
        if finite or values.dtype == np.float64:
            self.squares += own.squares
            self.gram += own.gram
            self.size += values.shape[1]
        return finite

    def measure_rounding(self, single: np.ndarray, half: np.ndarray, room: np.ndarray) -> bool:
        """Add what bf16 loses of a chunk of the soup, (n,), given in float32 and in bf16; whether both are finite.

        At a tie it does not matter which neighbour was taken. `room`, float32 (n,), is to work in. False may also be
        said of finite numbers of more than 1e19.
        """
        np.copyto(room, half)
        np.subtract(single, room, out=room)
        lost = dot(room, room)
        self.lost += lost
        return math.isfinite(lost)

    def settle(self, factors: Factors, *, with_base: bool) -> None:
        """Derive the soup's place from the factors of this tensor; shares that sum to 1 are taken for granted."""
        shares = factors.shares
        apart = shares - np.eye(len(shares))
        self.soup = float(shares @ self.gram @ shares)
        if not with_base:  # Σ c_i ‖θ_i − θ_soup‖² = Σ c_i ‖θ_i‖² − ‖θ_soup‖²
            self.soup += float(shares @ (self.squares - np.diag(self.gram)))
        self.spread = float(np.einsum("ni,ij,nj->n", apart, self.gram, apart).mean())
        self.adrift = int(not factors.affine)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """⟨x, y⟩ by rows: short rows keep BLAS from starting threads, which costs more than it saves, and sum exactly."""
    cut = len(x) // _ROW * _ROW
    rows = np.vecdot(x[:cut].reshape(-1, _ROW), y[:cut].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64) + np.vecdot(x[cut:], y[cut:]))


@np.errstate(over="ignore", invalid="ignore")
def describe(tallies: Mapping[str, Tally], *, with_base: bool) -> dict[str, Any]:
    """The numbers of `soup.json`: all weights together, then each layer.

    `of` says what norms, cosines and distances are of: "deltas" (θ_i − θ_base) with a base, else "weights".
    """
    count = len(next(iter(tallies.values())).squares) if tallies else 1
    layers: defaultdict[str, Tally] = defaultdict(lambda: Tally.empty(count))
    for key, tally in tallies.items():
        layers[_layer(key)] += tally
    total = sum(layers.values(), Tally.empty(count))
    lengths, cosines, distances = _geometry(total, with_base)
    lost, delta = total.lost**0.5, (total.soup if with_base else total.spread) ** 0.5
    return {
        "of": "deltas" if with_base else "weights",
        "norms": _figure(lengths),
        "soup_norm": _figure(total.soup_norm),
        "soup_norm_ratio": _ratio(total.soup_norm, lengths.mean()),
        "cosines": _figure(cosines),
        "relative_distances": _figure(distances),
        "bf16_rounding": {
            "norm": _figure(lost),
            "share_of_delta": None if total.adrift else _ratio(lost, delta),
            "delta": "soup - base" if with_base else "soup - ingredients, root mean square",
        },
        "layers": [
            {"layer": name} | _layer_row(layers[name], with_base)
            for name in sorted(layers, key=_by_number)
        ],
    }


def warnings_of(diagnostics: Mapping[str, Any], names: Sequence[str], stored: str) -> list[str]:
    """What a person should know before using the soup."""
    messages = []
    cosines = np.array(diagnostics["cosines"], dtype=float)
    distances = np.array(diagnostics["relative_distances"], dtype=float)
    pairs = ~np.eye(len(names), dtype=bool)
    if diagnostics["of"] == "weights" and pairs.any() and cosines[pairs].min() < _STRANGERS:
        messages.append(
            f"the weights of the ingredients point apart (cosine {cosines[pairs].min():.2f}): they do not look like "
            "fine-tunings of one base, and an average of strangers is no model"
        )
    if len(names) > 2:
        mean = np.array([row[others].mean() for row, others in zip(distances, pairs, strict=True)])
        for i in map(int, np.flatnonzero(mean > _OUTLIER * np.median(mean))):
            messages.append(
                f"{names[i]} lies {mean[i] / np.median(mean):.1f} times as far from the others as they from each other"
            )
    share = diagnostics["bf16_rounding"]["share_of_delta"]
    if stored == "BF16" and share is not None and share > _COARSE:
        messages.append(
            f"storing bf16 loses {share:.0%} of the delta ({diagnostics['bf16_rounding']['delta']}): "
            "use --dtype float32"
        )
    return messages


def _geometry(tally: Tally, with_base: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norms (N,), cosines (N, N) and distances relative to the pair's mean norm (N, N)."""
    own = np.diag(tally.gram)
    squared = np.maximum(own[:, None] + own[None, :] - 2 * tally.gram, 0.0)
    lengths = np.sqrt(own if with_base else tally.squares)
    inner = (lengths[:, None] ** 2 + lengths[None, :] ** 2 - squared) / 2
    product, mean = np.outer(lengths, lengths), (lengths[:, None] + lengths[None, :]) / 2
    cosines = np.divide(inner, product, out=np.full_like(inner, np.nan), where=product > 0)
    distances = np.divide(np.sqrt(squared), mean, out=np.zeros_like(mean), where=mean > 0)
    return lengths, np.clip(cosines, -1, 1), distances


def _layer_row(tally: Tally, with_base: bool) -> dict[str, Any]:
    lengths, cosines, distances = _geometry(tally, with_base)
    pairs = ~np.eye(len(lengths), dtype=bool)
    return {
        "elements": tally.size,
        "norm": _figure(lengths.mean()),
        "cosine": _figure(cosines[pairs].mean()) if pairs.any() else None,
        "relative_distance": _figure(distances[pairs].mean()) if pairs.any() else None,
        "soup_norm_ratio": _ratio(tally.soup_norm, lengths.mean()),
    }


def _layer(key: str) -> str:
    """`model.layers.7` of all that lies in block 7, else the tensor's name without its last part."""
    block = re.match(r"(.*?\.\d+)\.", key)
    return block[1] if block else key.rpartition(".")[0] or key


def _by_number(layer: str) -> tuple[str, int]:
    stem, _, number = layer.rpartition(".")
    return (stem, int(number)) if number.isdecimal() else (layer, -1)


def _figure(value: Any) -> Any:
    """Six digits of a number, or of each in an array; None for what is not finite."""
    if np.ndim(value):
        return [_figure(each) for each in value]
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _ratio(value: float, whole: float) -> Any:
    return _figure(value / whole) if whole > 0 else None
