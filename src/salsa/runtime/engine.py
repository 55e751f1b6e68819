"""Where and how tensors are computed: device, arithmetic, ranks. One object, made once, passed on explicitly.

One job may run in several processes, which all run the same program. A batch is small and is known to all of them; what
is divided are the models (`shard`) and the passes over a batch (`share`, `own_rows`), whose results are put together
again by `gather`. So everything that is computed from a batch (whitening, moments, KL, metrics, alarms) is the same
number everywhere without further ado, and on one process every reduction is the identity.
"""

import ctypes
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from salsa.runtime import sharding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]

CLEARLY_FASTER = 1.3
"""bf16 is chosen if its matrix products take this many times less time: casts and lost digits have to be paid for."""
_SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (512, 576, 4096))
"""(m, k, n) of the products that decide: those of a small model's layers and head."""


@dataclass(frozen=True)
class Engine:
    """Device, resolved precision and rank of this process. On one process the reductions are the identity."""

    device: torch.device
    precision: Precision
    """Of forward and backward passes; master weights are fp32."""
    reason: str
    """Why this precision: asked for, or what was measured."""
    rank: int = 0
    world_size: int = 1
    mesh: "DeviceMesh | None" = field(default=None, repr=False, compare=False)
    """The processes that share this job; None where it is one."""

    @classmethod
    def create(cls, precision: str = "auto", *, threads: int | None = None) -> "Engine":
        """Prepare this process and resolve `precision`: `fp32`, `bf16`, or `auto` for what is faster here.

        `auto` times a few matrix products of each kind, once per process. CPU `threads` are else PyTorch's choice.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        device = _device()
        if device.type == "cuda":  # the CPU's kernels are deterministic as they are
            torch.use_deterministic_algorithms(True, warn_only=True)
        reuse_freed_memory()
        if precision == "auto":
            return cls(device, *_faster_precision(device))
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r} is unknown. Use auto, fp32 or bf16.")
        return cls(device, precision, "as asked for")  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations while they are computed with."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def emulation_warning(self) -> str | None:
        """A warning if bf16 was asked of a CPU that only emulates it, judged by measured speed; else None."""
        if self.device.type != "cpu" or self.precision != "bf16":
            return None
        fp32, bf16 = _speeds()
        if fp32 <= CLEARLY_FASTER * bf16:
            return None
        return (
            f"warning: bf16 takes {fp32 / bf16:.2g} times as long as fp32 on this CPU ({_in_words(fp32, bf16)}). "
            "For a new run set model.precision=auto."
        )

    @property
    def threads(self) -> int:
        """CPU threads of this process."""
        return torch.get_num_threads()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def spread_over(self, mesh: "DeviceMesh") -> "Engine":
        """The same engine as one of the processes of `mesh`."""
        return replace(self, rank=mesh.get_rank(), world_size=mesh.size(), mesh=mesh)

    @property
    def alone(self) -> "Engine":
        """The same engine for what this process does by itself."""
        return replace(self, rank=0, world_size=1, mesh=None)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes."""
        if self.mesh is None:
            return x
        total = x.clone()
        torch.distributed.all_reduce(total, group=self.mesh.get_group())
        return total

    def max(self, x: float) -> float:
        """The largest `x` of all processes."""
        if self.mesh is None:
            return x
        largest = torch.tensor(x, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(
            largest, torch.distributed.ReduceOp.MAX, group=self.mesh.get_group()
        )
        return largest.item()

    def own_rows(self, count: int) -> Tensor:
        """Which of `count` rows this process works on: a run of them, so that rows of one group stay together."""
        return torch.arange(count, device=self.device).tensor_split(self.world_size)[self.rank]

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x` with each process's own `rows` of the first axis, everywhere; each row is somebody's."""
        if self.mesh is None:
            return x
        own = torch.zeros_like(x)
        own[rows] = x[rows]
        return self.sum(own)

    def share(self, packs: Sequence[T]) -> list[tuple[T, bool]]:
        """What this process computes of `packs`, and whether it counts.

        Every pass through a divided model is a meeting of all processes, so all make the same number of passes: one
        that is left without a pack repeats the first, and that does not count.
        """
        rounds = -(-len(packs) // self.world_size)
        places = [turn * self.world_size + self.rank for turn in range(rounds)]
        return [(packs[p], True) if p < len(packs) else (packs[0], False) for p in places]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises in the main process, which alone does it, everywhere."""
        if self.mesh is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0, group=self.mesh.get_group())
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def shard(self, model: nn.Module) -> None:
        """Divide the parameters of a model, and so gradients and optimizer states, among the processes (FSDP2).

        Parameters in fp32 are computed with in the engine's arithmetic, and their gradients are summed in fp32.
        """
        if self.mesh is not None:
            sharding.shard(model, self.mesh, self.dtype)

    @contextmanager
    def resident(self, model: nn.Module) -> Iterator[None]:
        """While the block lasts, passes through `model` without gradients need no other process.

        So each may make as many as it needs. All of the model is in memory meanwhile.
        """
        if self.mesh is None:
            yield
            return
        with sharding.resident(model):
            yield

    def generator(self, seed: int, step: int = 0) -> torch.Generator:
        """Seed python, numpy and torch from (seed, step), and return a generator seeded likewise.

        Called at every update: what an update draws depends on its number only, so a resumed run draws the same.
        """
        mixed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
        random.seed(mixed)
        np.random.seed(mixed)
        torch.manual_seed(mixed)
        return torch.Generator(self.device).manual_seed(mixed)


@lru_cache(maxsize=1)
def _device() -> torch.device:
    if torch.cuda.is_available():
        warnings.warn("salsa on a GPU is experimental: not run on one yet.", stacklevel=3)
        return torch.device("cuda")
    return torch.device("cpu")


def _faster_precision(device: torch.device) -> tuple[Precision, str]:
    """What is faster here, measured, and the measurement in words."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported()
        return ("bf16", "a GPU with bf16") if supported else ("fp32", "a GPU without bf16")
    fp32, bf16 = _speeds()
    return ("bf16" if bf16 > CLEARLY_FASTER * fp32 else "fp32"), _in_words(fp32, bf16)


@lru_cache(maxsize=1)
def _speeds() -> tuple[float, float]:
    """GFLOP/s of matrix products on this CPU, in fp32 and in bf16."""
    return _flops_per_second(torch.float32) / 1e9, _flops_per_second(torch.bfloat16) / 1e9


def _in_words(fp32: float, bf16: float) -> str:
    return f"measured here: matrix products at {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16"


def _flops_per_second(dtype: torch.dtype) -> float:
    """The products of `_SHAPES`, forward only: the best of a few rounds within a tenth of a second."""
    sides = [[torch.ones(size, k, dtype=dtype) for size in (m, n)] for m, k, n in _SHAPES]
    times: list[float] = []
    deadline = time.perf_counter() + 0.1
    while not times or (len(times) < 20 and time.perf_counter() < deadline):
        start = time.perf_counter()
        for a, b in sides:
            torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    best = min(times[1:] or times)  # the first round warms up, unless it is all there was time for
    return sum(2.0 * m * k * n for m, k, n in _SHAPES) / best


def reuse_freed_memory() -> None:
    """Tell glibc to keep freed memory: PyTorch on a CPU else maps and faults in its activations at every step.

    Seen on 2 cores: 1.1 to 1.6 x faster training steps of a 3 M-parameter model (docs/log.md). No effect
    on other C libraries.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mmap_threshold, trim_threshold = -3, -1  # names of mallopt(3)
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
