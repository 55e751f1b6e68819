"""What the hardware does: seconds, tokens and floating-point operations of an update's phases, and memory."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from salsa.runtime.engine import Engine


@dataclass(frozen=True)
class Work:
    """What a phase has to do: its tokens, padding not counted, and the FLOPs of their matrix products."""

    tokens: int
    flops: float


class Meter:
    """Times the phases of one update, one after another."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last = time.perf_counter()
        self._phases: dict[str, tuple[float, float]] = {}

    def phase_done(self, name: str) -> None:
        """What has passed since the last call belongs to the phase `name`."""
        now = time.perf_counter()
        self._phases[name] = now - self._last, self._engine.max(peak_memory_gb(self._engine))
        self._last = now

    def metrics(self, work: Mapping[str, Work]) -> dict[str, float]:
        """Each phase's seconds, tokens/s, share of the measured GEMM peak, and the memory peak at its end.

        Of several processes: their work together, and the memory of the one that takes most.
        """
        peak = gemm_peak(self._engine.device, self._engine.dtype) * self._engine.world_size
        metrics = {}
        for name, (seconds, memory) in self._phases.items():
            metrics[f"seconds_{name}"] = seconds
            metrics[f"tokens_per_second_{name}"] = work[name].tokens / seconds
            metrics[f"mfu_{name}"] = work[name].flops / seconds / peak
            metrics[f"peak_memory_gb_{name}"] = memory
        return metrics


def forward_flops(model: Any, tokens: int, logits: int) -> float:
    """2·(multiply-adds) of a forward pass: every weight matrix once a token, the output head once per logit vector.

    As Chowdhery et al. 2022, appendix B, but without attention scores, which are a few percent at these lengths.
    """
    trunk = model.trunk
    embedding = trunk.get_input_embeddings().weight
    matrices = sum(p.numel() for p in trunk.parameters() if p.ndim > 1) - embedding.numel()
    head = model.backbone.get_output_embeddings().weight.numel() if logits else 0
    return 2.0 * matrices * tokens + 2.0 * head * logits


@lru_cache(maxsize=2)
def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products here, measured once a process: the best of 256³, 512³, … up to 4096³.

    The sizes end with the first that takes a fortieth of a second: on a CPU that emulates bf16, 2048³ takes a minute.
    """
    best, side, fastest = 0.0, 256, 0.0
    while side <= 4096 and fastest < 0.025:
        a = torch.ones(side, side, dtype=dtype, device=device)
        seconds = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            seconds.append(time.perf_counter() - start)
        fastest = min(seconds[1:])
        best = max(best, 2.0 * side**3 / fastest)
        side *= 2
    return best


def peak_memory_gb(engine: Engine) -> float:
    """Most memory so far: the process's resident set on a CPU, what torch allocated on a GPU."""
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
