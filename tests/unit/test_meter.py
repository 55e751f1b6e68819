"""FLOPs against a hand count, metrics against a known clock."""

import time

import pytest
import torch

from salsa.runtime.engine import Engine
from salsa.runtime.meter import Meter, Work, forward_flops, gemm_peak, peak_memory_gb
from tests.conftest import tiny_model, wrap

FP32 = Engine.create("fp32")


def test_forward_flops_by_hand():
    """Two layers of q 16x16, k and v 16x8, o 16x16, three of 16x32; a head of 261x16."""
    layers = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    assert forward_flops(wrap(tiny_model()), 10, 4) == 2 * (10 * layers + 4 * 261 * 16)


def test_metrics_of_phases(monkeypatch):
    from salsa.runtime import meter

    times = iter([0.0, 2.0, 6.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(meter, "gemm_peak", lambda device, dtype: 100.0)
    clock = Meter(FP32)
    clock.phase_done("rollout")
    clock.phase_done("update")
    found = clock.metrics({"rollout": Work(10, 40.0), "update": Work(8, 200.0)})
    assert (found["seconds_rollout"], found["seconds_update"]) == (2.0, 4.0)
    assert (found["tokens_per_second_rollout"], found["tokens_per_second_update"]) == (5.0, 2.0)
    assert (found["mfu_rollout"], found["mfu_update"]) == pytest.approx((0.2, 0.5))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_measured_in_a_second_on_any_machine(precision):
    """It took 7 minutes where bf16 is emulated: more than the run."""
    gemm_peak.cache_clear()
    start = time.perf_counter()
    gemm_peak(FP32.device, Engine.create(precision).dtype)
    assert time.perf_counter() - start < 5.0  # 0.2 s on an idle machine


def test_the_peak_is_the_best_of_products_that_grow_while_they_are_fast(monkeypatch):
    from salsa.runtime import meter

    sides, clock = [], iter(())
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: sides.append(shape[0]) or torch.eye(2))
    for seconds, tried, peak in ((0.02, [256, 512, 1024, 2048, 4096], 4096), (0.03, [256], 256)):
        clock = iter(seconds * n for n in range(100))
        sides.clear()
        assert meter.gemm_peak.__wrapped__("cpu", None) == pytest.approx(2 * peak**3 / seconds)
        assert sides == tried


def test_a_slow_first_product_is_not_the_peak(monkeypatch):
    """A GPU's first one loads its libraries."""
    from salsa.runtime import meter

    clock = iter([0.0, 5.0] + [5.0 + n / 1000 for n in range(100)])
    sides = []
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: sides.append(shape[0]) or torch.eye(2))
    assert meter.gemm_peak.__wrapped__("cpu", None) == pytest.approx(2 * 4096**3 / 0.001)
    assert sides == [256, 512, 1024, 2048, 4096]


def test_the_machine_has_a_peak_and_memory():
    assert gemm_peak(FP32.device, FP32.dtype) > 1e8
    assert 0.05 < peak_memory_gb(FP32) < 1000
