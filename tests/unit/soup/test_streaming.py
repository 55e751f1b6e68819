"""The streaming loop's threads and buffers: whoever is slow, the bytes are the same."""

import json
import math
import time

import ml_dtypes
import numpy as np
import pytest

from salsa import make_soup
from salsa.artifacts import Checkpoint
from salsa.soup import blend, files, measure_soup
from salsa.soup.average import Source, _Average
from salsa.soup.diagnostics import Tally
from salsa.soup.files import FLOATS, Weights, WeightsWriter
from salsa.soup.methods import Factors, Mix, linear, uniform, wise
from salsa.soup.rounding import Room, rounded

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


def test_a_head_that_all_take_from_one_is_hashed_once(tmp_path, monkeypatch):
    """Each ingredient's thread reads it from the keeper's file; two that hash the same bytes give a wrong digest."""
    head = {"score.weight": np.random.default_rng(9).standard_normal((16, 4096))}
    models = [
        checkpoints.write(tmp_path / f"m{n}", checkpoints.tensors(n, "float64") | head)
        for n in range(3)
    ]
    monkeypatch.setattr(blend, "ELEMENTS_IN_FLIGHT", 3 * 4096)
    read_header = files._read_header

    class Slow:
        def __init__(self, hasher):
            self.hasher, self.hexdigest = hasher, hasher.hexdigest

        def update(self, view):
            time.sleep(0.01)
            self.hasher.update(view)

    def slowly(path):
        shard, tensors = read_header(path)
        shard.hasher = Slow(shard.hasher)
        return shard, tensors

    monkeypatch.setattr(files, "_read_header", slowly)
    record = measure_soup(models, heads="keep-from-0")
    found = [one["sha256"] for one in record["ingredients"]]
    assert found == [Checkpoint.of(path).digest for path in models]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_in_float32_a_mean_of_two_has_the_bits_of_one_that_is_rounded_once(dtype):
    """Numbers of every exponent whose square is finite, in pairs of any distance, subnormal ones too."""
    kind = FLOATS[dtype]
    bits = np.random.default_rng(0).integers(0, 2 ** (8 * kind.itemsize), (2, 1 << 19))
    exponent = bits >> (8 * kind.itemsize - 9) & 255
    bits = bits[:, (exponent < 127 + 63).all(axis=0)].astype(f"u{kind.itemsize}")
    values = bits.view(kind).astype(np.float64)
    near = values[0] * (1 + 2.0 ** np.random.default_rng(1).integers(-20, 4, values.shape[1]))
    pairs = np.concatenate(
        [values, np.stack([values[0], -near.astype(kind).astype(float)])], axis=1
    )
    assert pairs.shape[1] > 1 << 18
    single = pairs.astype(np.float32)
    assert (single == pairs).all()
    soup, spare = np.empty((2, pairs.shape[1]), np.float32)
    blend.weighted_sum(single, uniform(2), soup, spare)
    expected = rounded(pairs.mean(axis=0), dtype)
    assert soup.astype(kind).tobytes() == expected.tobytes()


def test_factors_that_are_all_zero_make_zeros():
    soup, spare = np.full((2, 4), np.nan)
    blend.weighted_sum(np.array([[-1.0, 2.0, np.nan, -0.0]] * 2), linear([0.0, 0.0]), soup, spare)
    assert soup.tobytes() == np.zeros(4).tobytes()


def test_float32_is_used_for_a_mean_of_two_and_for_nothing_else():
    bf16, f32, f16 = (FLOATS[name] for name in ("BF16", "F32", "F16"))
    assert blend.exact_in_single(uniform(2), [bf16, bf16], bf16)
    assert blend.exact_in_single(Factors((1.0, 0.0, 1.0), divisor=2.0), [f32] * 3, f32)
    for factors, dtypes, stored in (
        (uniform(3), [bf16] * 3, bf16),
        (linear([0.5, 0.5]), [bf16] * 2, bf16),
        (wise(uniform(2), 0.5), [bf16] * 3, bf16),
        (uniform(2), [bf16, f32], f32),
        (uniform(2), [f32] * 2, bf16),
        (uniform(2), [f16] * 2, f16),
        (None, [bf16] * 2, bf16),
    ):
        assert not blend.exact_in_single(factors, dtypes, stored)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float32])
def test_numbers_whose_squares_float32_cannot_hold_are_averaged_all_the_same(kind, tmp_path):
    huge = np.array([3e38, -3e38, 1e30, 1.0] * 4096, kind)
    tensors = [checkpoints.tensors(0) | {"w.weight": w} for w in (huge, huge[::-1].copy())]
    models = [checkpoints.write(tmp_path / f"m{n}", each) for n, each in enumerate(tensors)]
    soup = make_soup(models, out=tmp_path / "soup")
    mean = sum(each["w.weight"].astype(np.float64) for each in tensors) / 2
    found = checkpoints.read(soup.path)["w.weight"]
    assert found.tobytes() == rounded(mean, "F32" if kind is np.float32 else "BF16").tobytes()
    record = json.loads((soup.path / "soup.json").read_text())
    assert record["diagnostics"]["norms"][0] == pytest.approx(
        np.linalg.norm(huge.astype(float)), rel=1e-5
    )
