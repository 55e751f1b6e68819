"""Weights on disk: safetensors headers and shards, read piece by piece and hashed on the way, written front to back.

The format is https://github.com/huggingface/safetensors#format: eight bytes of header length, a JSON header, tensors.
Nothing is trusted: a header must describe its file exactly, an index its shards; no name leads out of its directory.
"""

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import safe_open

from salsa.artifacts import write_atomic
from salsa.errors import CheckpointError
from salsa.untrusted import read_header, read_json, reading, refuse_pickles

FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What can be averaged, widest first. FP8 is not in it: it claims to be floating point, but has lost its scales."""

INTEGERS: dict[str, np.dtype[Any]] = {
    f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)
} | {"BOOL": np.dtype(np.bool_)}
"""What must be equal in all ingredients, and is copied."""

NUMPY_DTYPES = FLOATS | INTEGERS
"""The numpy dtype of each safetensors dtype name."""

QUANTIZED = ("qweight", "qzeros", "weight_scale", "weight_packed", "absmax", "quant_state", "SCB")
"""Last parts of the names of a quantized layer's tensors."""

_PLAIN = re.compile(r"[^./\\:][^/\\:]*\.safetensors")
"""A file name without a path; hub snapshots are symlinks, so names count and real paths do not."""

MAX_SHARD_BYTES = 5 * 10**9
_PIECE_BYTES = 1 << 20
_KEPT_BYTES = 1 << 26
"""Of a mapped file, before the place that is read; what lies further back no longer counts as this process's memory."""
_PREFETCH_BYTES = 1 << 23
"""The system is told to read as much ahead of us from the disk."""
_SYNC_BYTES = 1 << 28
"""Written bytes after which the disk is set to work, so that little is left to wait for at the end."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes lie; `offset` counts from the start of the file."""

    shard: "Shard"
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(eq=False)
class Shard:
    """One safetensors file; what is read in order is hashed while it is read."""

    path: Path
    size: int
    hasher: Any
    hashed: int
    """The first `hashed` bytes have gone into `hasher`."""


class Weights:
    """The tensors of one directory, single file or shards; one file is open at a time.

    Raises:
        CheckpointError: no safetensors, a stale index beside a single file, a broken header or index.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self.directory = directory
        self.shards: list[Shard] = []
        self.tensors: dict[str, Tensor] = {}
        self._open: tuple[Shard, FileIO, mmap.mmap] | None = None
        self._asked = 0  # the open file is prefetched up to here
        self._dropped = 0  # and its pages are let go up to here
        for name, expected in _shard_names(directory, stem).items():
            shard, header = _read_header(directory / name)
            if expected is not None and expected != header.keys():
                stray = sorted(expected ^ header.keys())[0]
                raise CheckpointError(
                    f"{directory / name}: the index and this shard disagree about {stray!r}. Copy or save it again."
                )
            self.shards.append(shard)
            self.tensors |= header
        if not self.tensors:
            raise CheckpointError(f"{directory}: its weight files hold no tensor.")
        if quantized := [k for k in self.tensors if k.rsplit(".", 1)[-1] in QUANTIZED]:
            raise CheckpointError(
                f"{directory}: {quantized[0]} belongs to a quantized layer. De-quantize it first."
            )

    def read(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Elements start to stop, flat: the file's own pages, not to be written to."""
        kind = NUMPY_DTYPES[tensor.dtype]
        first, last = (tensor.offset + n * kind.itemsize for n in (start, stop))
        return self._bytes(tensor.shard, first, last).view(kind)

    def sha256(self) -> dict[str, str]:
        """File name → hex sha256; bytes that were not read in order are read now."""
        for shard in self.shards:
            while shard.hashed < shard.size:
                self._bytes(shard, shard.hashed, min(shard.hashed + _PIECE_BYTES, shard.size))
        return {shard.path.name: shard.hasher.hexdigest() for shard in self.shards}

    def close(self) -> None:
        """Close the open file, if any; what was read of it stays readable."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _bytes(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """Bytes of a file, mapped: a copy would cost as much as all sums. They are hashed if they come next.

        Only bytes of an own file: a head that all ingredients take from one of them is read by several threads at once.
        """
        if self._open is None or self._open[0] is not shard:
            self.close()
            file = shard.path.open("rb", buffering=0)
            self._open = shard, file, mmap.mmap(file.fileno(), shard.size, access=mmap.ACCESS_READ)
            self._asked = self._dropped = 0
        _, file, pages = self._open
        if (
            os.fstat(file.fileno()).st_size < stop
        ):  # a mapped page beyond the end would kill the process
            raise CheckpointError(f"{shard.path}: became shorter while it was read.")
        if stop > self._asked - _PREFETCH_BYTES // 2 and hasattr(os, "posix_fadvise"):
            self._asked = stop + _PREFETCH_BYTES
            os.posix_fadvise(file.fileno(), start, self._asked - start, os.POSIX_FADV_WILLNEED)
        if start - self._dropped > 2 * _KEPT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            length = start - _KEPT_BYTES - self._dropped & -mmap.PAGESIZE
            pages.madvise(mmap.MADV_DONTNEED, self._dropped, length)
            self._dropped += length
        view = np.frombuffer(pages, np.uint8, stop - start, start)
        if start == shard.hashed and shard in self.shards:
            shard.hasher.update(view)
            shard.hashed = stop
        return view


class WeightsWriter:
    """Writes tensors front to back in safetensors' layout, with an index if they need several shards.

    `plan` is key → (dtype name, shape), in the order of writing; `stem` is `model` or `adapter_model`.
    """

    def __init__(
        self, directory: Path, plan: Mapping[str, tuple[str, tuple[int, ...]]], stem: str = "model"
    ) -> None:
        self._index = directory / f"{stem}.safetensors.index.json"
        self._directory, self._plan = directory, plan
        self._sizes = {k: math.prod(s) * NUMPY_DTYPES[d].itemsize for k, (d, s) in plan.items()}
        shards = _split(self._sizes)
        names = [f"{stem}.safetensors"]
        if (count := len(shards)) > 1:
            names = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        self._shards = list(zip(names, shards, strict=True))
        self._digests: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._left = 0
        self._hasher = hashlib.sha256()
        self._unsynced = 0
        self._disk = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def write(self, chunk: np.ndarray) -> None:
        """The next elements of the plan; a chunk never spans two tensors."""
        while self._file is None or self._left == 0:
            self._next_shard()
        data = chunk.view(np.uint8).reshape(-1).data
        self._file.write(data)
        self._hasher.update(data)
        self._left -= len(data)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._unsynced = 0
            self._syncing = self._disk.submit(os.fsync, self._file.fileno())

    def finish(self) -> dict[str, str]:
        """Flush everything to disk, write the index; file name → hex sha256."""
        while len(self._digests) < len(self._shards):
            self._next_shard()
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": {key: name for name, keys in self._shards for key in keys},
            }
            write_atomic(self._index, json.dumps(index, indent=1) + "\n")
        return self._digests

    def close(self) -> None:
        """Give up the open file."""
        if self._syncing is not None:  # not of a file that is closed meanwhile
            self._syncing.exception()
            self._syncing = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            if self._syncing is not None:
                self._syncing.result()
            os.fsync(self._file.fileno())
            self._digests[self._shards[len(self._digests)][0]] = self._hasher.hexdigest()
            self.close()
        if len(self._digests) == len(self._shards):
            return
        name, keys = self._shards[len(self._digests)]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._left = 0
        for key in keys:
            dtype, shape = self._plan[key]
            offsets = [self._left, self._left + self._sizes[key]]
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            self._left = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = struct.pack("<Q", len(text)) + text
        self._file = (self._directory / name).open("wb")
        self._file.write(head)
        self._hasher = hashlib.sha256(head)


def widest(dtypes: Iterable[str]) -> str:
    """The narrowest float dtype that holds all numbers of these: float32 for float16 and bfloat16."""
    kinds = set(dtypes)
    return "F32" if kinds == {"F16", "BF16"} else min(kinds, key=list(FLOATS).index)


def _shard_names(directory: Path, stem: str) -> Mapping[str, set[str] | None]:
    """File name → the keys that the index places there (None: there is no index)."""
    single = directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(
            f"{directory}: has both {single.name} and {index.name}. Delete the one that is stale."
        )
    if single.exists():
        return {single.name: None}
    if not os.path.lexists(index):
        refuse_pickles(directory)
        raise CheckpointError(
            f"{directory}: has no {single.name}. Give a directory that save_pretrained wrote."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map. Copy or save it again.")
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not (isinstance(name, str) and name.isprintable() and _PLAIN.fullmatch(name)):
            raise CheckpointError(
                f"{index}: places {key!r} in {name!r}, which is no plain .safetensors file beside it."
            )
        shards.setdefault(name, set()).add(key)
    return dict(sorted(shards.items()))


def _read_header(path: Path) -> tuple[Shard, dict[str, Tensor]]:
    with reading(path, "not a sound safetensors file"):
        start, header = read_header(path)
        for key, entry in header.items():
            dtype = entry.get("dtype") if isinstance(entry, dict) else entry
            if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
                raise CheckpointError(
                    f"{path}: {key} is {dtype!r}; a soup takes {', '.join(FLOATS)}. De-quantize it first."
                )
        with safe_open(path, "numpy"):  # refuses a header that does not describe its file exactly
            pass
    shard = Shard(path, path.stat().st_size, hashlib.sha256(start), len(start))
    return shard, {
        key: Tensor(shard, e["dtype"], tuple(e["shape"]), shard.hashed + e["data_offsets"][0])
        for key, e in header.items()
    }


def _split(sizes: Mapping[str, int]) -> list[list[str]]:
    """Keys of each shard, in order, at most MAX_SHARD_BYTES each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards
