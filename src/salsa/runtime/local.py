"""Where it runs when it runs here: one process, one device, its precision, its seeds."""

import contextlib
import ctypes
import random
import sys
import warnings
from contextlib import AbstractContextManager
from functools import lru_cache

import numpy as np
import torch


@lru_cache(maxsize=1)
def device() -> torch.device:
    """The GPU if there is one (experimental: not run on a GPU yet), else the CPU."""
    if torch.cuda.is_available():
        warnings.warn("salsa on a GPU is experimental: not run on one yet.", stacklevel=2)
        return torch.device("cuda")
    return torch.device("cpu")


def computes_bf16(precision: str) -> bool:
    """Whether forward and backward run in bf16; `auto` asks the device."""
    if precision != "auto":
        return precision == "bf16"
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(precision: str) -> AbstractContextManager:
    """Context of every forward pass: bf16 matrix products, everything else as the weights are (fp32)."""
    if not computes_bf16(precision):
        return contextlib.nullcontext()
    return torch.autocast(device().type, torch.bfloat16)


def seed_everything(seed: int, step: int = 0) -> torch.Generator:
    """Seed python, numpy and torch from (seed, step), and return a generator seeded likewise.

    Called at every update: what an update draws depends on its number only, so a resumed run draws the same.
    """
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    return torch.Generator(device()).manual_seed(mixed)


def prepare_process(threads: int | None) -> None:
    """Once per process, before the first stage."""
    if threads is not None:
        torch.set_num_threads(threads)
    if (
        device().type == "cuda"
    ):  # the CPU's kernels are deterministic as they are (the tests compare bits)
        torch.use_deterministic_algorithms(True, warn_only=True)
    reuse_freed_memory()


def reuse_freed_memory() -> None:
    """Tell glibc to keep freed memory: PyTorch on a CPU else maps and faults in its activations at every step.

    Seen on 2 cores: 1.1 to 1.6 x faster training steps of a 3 M-parameter model (docs/log.md). No effect
    on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mmap_threshold, trim_threshold = -3, -1  # names of mallopt(3)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
