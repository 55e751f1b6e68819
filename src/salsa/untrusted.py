"""What strangers wrote: checkpoints, data, recipes. Read within bounds, refused in one line, never executed.

Weights are safetensors; pickles are not opened, and code that lies beside a model is not run (SECURITY.md).
"""

import json
import math
import re
import signal
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from salsa.errors import CheckpointError, ConfigError, DataError, SalsaError, accessing

MAX_TEXT_BYTES = 500_000_000
"""Of a JSON or text file of a checkpoint; the largest tokenizers take some 35 MB."""

MAX_RECIPE_BYTES = 1_000_000
MAX_RECIPE_VALUES = 100_000
"""Values of a YAML file, counted as if every alias were written out."""

MAX_DEPTH = 100
"""Brackets of a YAML file within each other; the parser's time grows with the square of it."""

MAX_HEADER_BYTES = 100_000_000
MAX_PARTS = 10_000
"""Heads, experts, … that a config.json may speak of."""

MAX_TEMPLATE_SECONDS = 10.0
MAX_TEMPLATE_BYTES = 2 * 1024**3
"""What rendering one conversation may take: processor time, and memory on top of what the process has (Linux)."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@contextmanager
def reading(path: Path, trouble: str, error: type[SalsaError] = CheckpointError) -> Iterator[None]:
    """Turn whatever a strange file raises into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, RecursionError, struct.error, SafetensorError) as wrong:
        if isinstance(wrong, SalsaError):
            raise
        reason = str(wrong).splitlines()[0][:200] if str(wrong) else type(wrong).__name__
        raise error(f"{path}: {trouble} ({reason}). Copy or save it again.") from wrong


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is no regular file, or holds no JSON object."""
    text = read_text(path)
    with reading(path, "cannot be read as JSON"):
        return json_object(text)


def read_text(path: Path) -> str:
    """A text file that may be anything: a directory, a pipe, a film; CheckpointError if it is no text."""
    with reading(path, "cannot be read"):
        check_size(path)
        return path.read_text(encoding="utf-8")


def check_size(path: Path, most: int = MAX_TEXT_BYTES) -> None:
    """ValueError unless it is a regular file of at most so many bytes."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise ValueError("no regular file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"far too large: {size} bytes, {most} are the most")


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text holds; ValueError for anything else, and for a key that comes twice."""
    value = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} twice")
        values[key] = value
    return values


def read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A safetensors file's first bytes up to its tensors, and its header; ValueError if it lies about its length."""
    check_size(path, 2**63)
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes")
        text = stream.read(length)
    header = json_object(text)
    header.pop("__metadata__", None)
    return start + text, header


def parameter_count(directory: Path) -> int | None:
    """Parameters of a checkpoint, from its safetensors headers; None if it has none."""
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        with reading(file, "not a sound safetensors file"):
            for name, tensor in read_header(file)[1].items():
                shape = tensor.get("shape") if isinstance(tensor, dict) else None
                if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
                    raise ValueError(f"{name} has no shape")
                total += math.prod(shape)
    return total or None


def refuse_pickles(directory: Path) -> None:
    """CheckpointError if a directory without safetensors has pickles."""
    if any(file for kind in _PICKLES for file in directory.glob(kind)):
        raise CheckpointError(
            f"{directory}: has pickled weights only, and a pickle can run any code when it is opened. "
            "Load it where you trust it and save_pretrained(..., safe_serialization=True)."
        )


def check_model(directory: Path) -> None:
    """Refuse a model directory before a library builds what it describes.

    Raises:
        CheckpointError: its weights are pickles, a header lies, config.json speaks of more layers than there are
            tensors, or an adapter beside the model names a base, which would be loaded instead.
    """
    config = directory / "config.json"
    if not config.is_file():
        return  # GGUF, or nothing: the loader says so
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory}: has an adapter_config.json beside config.json, so it is unclear which model is meant. "
            "Merge the adapter (salsa soup … --base …) or remove that file."
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        refuse_pickles(directory)
    tensors = 0
    for file in weights:
        with reading(file, "not a sound safetensors file"):
            tensors += len(read_header(file)[1])
    for key, value in _numbers(read_json(config)):
        layers = "layer" in key
        most = tensors if layers and weights else MAX_PARTS
        if key.startswith(("num_", "n_")) and key != "num_labels" and value > most:
            there = (
                f"its weights are {tensors} tensors" if layers and weights else f"{most} at most"
            )
            raise CheckpointError(f"{config}: {key} is {value}; {there}. Copy or save it again.")


def _numbers(value: Any) -> Iterator[tuple[str, int]]:
    """Every (key, whole number) of nested JSON objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, int):
                yield key, inner
            yield from _numbers(inner)


def read_yaml(path: Path, broken: str, wanted: str) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError says `broken` if it cannot be read, `wanted` if it is no mapping.

    Tags make no objects (`!!python/…` is refused), and aliases are counted as what they would write out to.
    """
    try:
        with accessing(path, "read"):
            check_size(path, MAX_RECIPE_BYTES)
            text = path.read_text(encoding="utf-8")
        values = yaml_value(text)
    except (OSError, ValueError) as error:
        if isinstance(error, SalsaError):
            raise
        raise ConfigError(f"{path}: {broken}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {wanted}, got {type(values).__name__}.")
    return values


def yaml_value(text: str) -> Any:
    """The value that a YAML text stands for, in plain types; ValueError says why there is none."""
    depth = 0
    for bracket in re.findall(r"[][{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    try:
        value = yaml.safe_load(text)
        _written_out(value, {}, set())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _written_out(value: Any, sizes: dict[int, int], above: set[int]) -> int:
    """How many values this would be without aliases; ValueError if too many, or if one contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in above:
        raise ValueError("an alias contains itself")
    if id(value) not in sizes:
        inner = value.values() if isinstance(value, dict) else value
        size = 1 + sum(_written_out(one, sizes, above | {id(value)}) for one in inner)
        if size > MAX_RECIPE_VALUES:
            raise ValueError(f"its aliases write out to more than {MAX_RECIPE_VALUES} values")
        sizes[id(value)] = size
    return sizes[id(value)]


@contextmanager
def template_limits(where: str) -> Iterator[None]:
    """Bounds on processor time and memory while a checkpoint's chat template renders one conversation.

    The sandbox keeps a template from everything but text; loops in loops are the rest. Time is bounded in the main
    thread of a POSIX system, memory on Linux.

    Raises:
        DataError: the template takes too long, or wants too much memory.
    """
    try:
        with _seconds(MAX_TEMPLATE_SECONDS), _memory(MAX_TEMPLATE_BYTES):
            yield
    except TimeoutError as error:
        raise DataError(
            f"{where}: the model's chat template takes longer than {MAX_TEMPLATE_SECONDS:g} s for one conversation. "
            "Set model.chat_template to another."
        ) from error
    except (MemoryError, OverflowError) as error:
        raise DataError(
            f"{where}: the model's chat template wants more than {MAX_TEMPLATE_BYTES >> 30} GB for one conversation. "
            "Set model.chat_template to another."
        ) from error


@contextmanager
def _seconds(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds of this process's processor time; it leaves other timers alone."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "SIGVTALRM"
    ):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory(more: int) -> Iterator[None]:
    """MemoryError for what would make this process larger by more than so many bytes."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
