"""Where it runs when it runs here: one process, one device, its precision, its seeds."""

import ctypes
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


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


@contextmanager
def computing(precision: str, *models: nn.Module) -> Iterator[None]:
    """Inside, the models compute in bf16 if `precision` says so; outside they are fp32, their gradients too.

    The fp32 weights are the master copy (Micikevicius et al. 2018, section 3.1): inside, each parameter holds its
    bf16 rounding, and what each backward pass finds is added up in fp32. A model that was lowered for good computes
    the same bits as its fp32 self does in here, so a policy that starts at its reference has a KL of exactly 0.
    """
    if not computes_bf16(precision):
        yield
        return
    everyone = {id(p): p for model in models for p in model.parameters()}.values()
    masters = [(p, p.data, p.grad) for p in everyone if p.dtype == torch.float32]
    sums = {p: grad for p, _, grad in masters if grad is not None}

    def add_up(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs when it has just been written
        found, parameter.grad = parameter.grad, None
        if parameter in sums:
            sums[parameter] += found
        else:
            sums[parameter] = found.float()

    hooks = []
    for parameter, master, _ in masters:
        parameter.grad = None
        parameter.data = master.to(torch.bfloat16)
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(add_up))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, master, _ in masters:
            parameter.data = master
            parameter.grad = sums.get(parameter)


def freeze(model: Model, precision: str) -> Model:
    """Stop a model from learning; its weights become bf16 for good where they would be computed with as bf16."""
    model.requires_grad_(False)
    if computes_bf16(precision):
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


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
    if (libc := _glibc()) is not None:
        mmap_threshold, trim_threshold = -3, -1  # names of mallopt(3)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt else None
    except (OSError, AttributeError):  # another C library
        return None
