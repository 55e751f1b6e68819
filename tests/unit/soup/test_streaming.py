"""The streaming loop's threads and buffers: whoever is slow, the bytes are the same."""

import math
import time

import ml_dtypes
import numpy as np
import pytest

from salsa import make_soup
from salsa.soup import blend
from salsa.soup.average import Source, _Average
from salsa.soup.diagnostics import Tally
from salsa.soup.files import FLOATS, Weights, WeightsWriter
from salsa.soup.methods import Mix, Room, rounded

from . import checkpoints

PIECES = 7


@pytest.fixture
def three(tmp_path):
    """Models with a tensor of several pieces in each dtype."""
    return [checkpoints.write(tmp_path / f"m{seed}", values_of(seed)) for seed in range(3)]


def values_of(seed):
    size = PIECES * 4096 - 100
    draws = np.random.default_rng(seed)
    large = {
        f"model.layers.{n}.w.weight": draws.standard_normal(size).astype(kind)
        for n, kind in enumerate(FLOATS.values())
    }
    counts = {"model.counts": np.arange(size)}
    return checkpoints.tensors(seed) | large | counts


@pytest.mark.parametrize("slow", ["writer", "reader", "arithmetic", "disk"])
def test_whoever_is_slow_the_result_is_the_rounded_mean(three, tmp_path, monkeypatch, slow):
    monkeypatch.setattr(blend, "ELEMENTS_IN_FLIGHT", 3 * 4096)
    monkeypatch.setattr("salsa.soup.files._SYNC_BYTES", 4096)
    place = {
        "writer": (WeightsWriter, "write"), "reader": (Weights, "read"),
        "arithmetic": (blend.Blend, "_mix"), "disk": (__import__("os"), "fsync"),
    }[slow]  # fmt: skip
    work = getattr(*place)

    def late(*args):
        time.sleep(0.002)
        return work(*args)

    monkeypatch.setattr(*place, late)
    make_soup(three, out=tmp_path / "soup")
    models = [values_of(seed) for seed in range(3)]
    soup = checkpoints.read(tmp_path / "soup")
    for key, first in models[0].items():
        expected = first
        if key != "model.counts":
            total = sum(model[key].astype(np.float64) for model in models)
            expected = rounded(total / 3, next(n for n, k in FLOATS.items() if k == first.dtype))
        assert (checkpoints.bits(soup[key]) == checkpoints.bits(expected)).all(), key


def test_a_piece_that_fails_stops_all_threads(three, tmp_path):
    broken = values_of(1)
    broken["model.layers.1.w.weight"][20_000] = np.nan
    path = checkpoints.write(tmp_path / "broken", broken)
    with pytest.raises(ValueError, match=r"broken: model.layers.1.w.weight holds NaN or Inf"):
        make_soup([three[0], path], out=tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(("dtype", "large"), [("float16", 60_000.0), ("bfloat16", 3.3e38)])
def test_overflow_is_noticed_in_any_piece(tmp_path, dtype, large):
    sources = []
    for n in range(2):
        values = checkpoints.tensors(n, "float64") | {checkpoints.NORM: np.full(8, large)}
        sources.append(checkpoints.write(tmp_path / f"m{n}", values))
    with pytest.raises(ValueError, match=rf"soup: {checkpoints.NORM} overflows"):
        make_soup(sources, weights=[1.0, 0.5], extrapolate=True, out=tmp_path / "soup", dtype=dtype)
    make_soup(sources, out=tmp_path / "finite", dtype=dtype)


def test_numbers_whose_rounding_error_overflows_are_no_overflow(tmp_path):
    """1e25 in bf16 is off by 1e22, whose square float32 does not hold: the sum says nothing, the number is sound."""
    large = lambda n: {checkpoints.NORM: np.full(8, 1.001e25 * (n + 1))}
    sources = [
        checkpoints.write(tmp_path / f"m{n}", checkpoints.tensors(n, "float64") | large(n))
        for n in range(2)
    ]
    soup = make_soup(sources, out=tmp_path / "soup", dtype="bfloat16")
    norm = checkpoints.read(soup.path)[checkpoints.NORM].astype(float)
    assert norm == pytest.approx(np.full(8, 1.5015e25), rel=2**-8)


def test_what_rounding_leaves_behind():
    """The float32 beside the bf16, ties and all, and whether both are finite."""
    tie = 1 + 2.0**-8
    values = np.array([1.0, tie, tie + 2.0**-39, tie - 2.0**-39, 1e-3, -tie - 2.0**-39] * 5)
    room = Room.of(len(values))
    half = rounded(values, "BF16", room=room)
    assert (room.single == values.astype(np.float32)).all()
    assert half[:6].astype(float).tolist() == pytest.approx(
        [1.0, 1.0, 1 + 2.0**-7, 1.0, 1e-3, -1 - 2.0**-7], rel=2**-9
    )
    tally = Tally.empty(1)
    assert tally.measure_rounding(room.single, half, room.spare)
    lost = (room.single.astype(float) - half.astype(float)) ** 2
    assert tally.lost == pytest.approx(lost.sum(), rel=1e-6)
    assert not tally.measure_rounding(room.single, half * ml_dtypes.bfloat16(math.inf), room.spare)


def test_sources_are_read_side_by_side_but_for_adapters(three):
    sources = [Source(path, path.name) for path in three]
    opened = _Average(sources[:2], sources[2], Mix())
    alone = blend.Blend(opened.ingredients, opened.base, {}, Mix(), {})
    assert alone._lanes() == [[0], [1], [2]]
    shared = opened.ingredients[0]
    shared.__class__ = type("Shared", (type(shared),), {"reads": opened.base.reads})
    assert alone._lanes() == [[0, 1, 2]]
    opened.close()
