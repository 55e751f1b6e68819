"""13, 14: thousands of spoilt directories. Each is refused with a message or averaged rightly, and never half."""

import json
import shutil
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from salsa import make_soup
from salsa.errors import SalsaError

from . import checkpoints
from .checkpoints import EMBEDDING, MATRIX, NORM

KEYS = [EMBEDDING, MATRIX, NORM, "model.layers.1.mlp.up_proj.weight", "__metadata__", "x", ""]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 8, 24, 32, 512, 768, 2**31, 2**63]),
    st.floats(),
    st.sampled_from(["F32", "F8_E4M3", "BF16", "I64", "", "../x", "/etc/passwd", "\x00", "\ud800"]),
    st.text(max_size=8),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
PLACES = st.lists(
    st.one_of(
        st.sampled_from([*KEYS, "dtype", "shape", "data_offsets", "weight_map", "metadata"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=3,
)
CHANGES = st.lists(st.tuples(PLACES, st.one_of(JSON, st.just("delete"))), min_size=1, max_size=3)
BYTES = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=8)
NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
MANY = settings(
    max_examples=520,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.slow


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """Copy a sound directory, let `change` at it, make a soup of it and a sound one, look at what is left."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    sound = checkpoints.write(tmp_path / "sound", checkpoints.tensors(0))
    whole = checkpoints.write(tmp_path / "whole", checkpoints.tensors(1))
    sharded = checkpoints.write(tmp_path / "sharded", checkpoints.tensors(1))
    checkpoints.shard(sharded, [EMBEDDING, MATRIX], [NORM, "model.layers.1.mlp.up_proj.weight"])
    expected = checkpoints.read(make_soup([sound, whole], out=tmp_path / "expected").path)
    spoilt, out = tmp_path / "spoilt", tmp_path / "soup"

    def run(change, source=whole, *, data_may_change=False):
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(source, spoilt)
        change(spoilt)
        started = time.monotonic()
        try:
            soup = make_soup([sound, spoilt], out=out)
        except SalsaError as error:
            assert not out.exists() and len(str(error).splitlines()) == 1
        else:
            found = load_file(soup.path / "model.safetensors")
            assert found.keys() == expected.keys()
            if not data_may_change:
                assert all(np.array_equal(found[k], expected[k]) for k in expected)
            shutil.rmtree(out)
        assert time.monotonic() - started < 5
        assert not list(tmp_path.glob(".*"))

    run.sources = {"whole": whole, "sharded": sharded}
    return run


def put(value, place, new):
    """Change a JSON value at a place, as far as the place exists."""
    *way, last = place
    try:
        for step in way:
            value = value[step]
        if new == "delete":
            del value[last]
        else:
            value[last] = new
    except (KeyError, IndexError, TypeError):
        pass


def dumps(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


@MANY
@given(CHANGES)
@example([([NORM, "data_offsets", 1], 2**63)])
@example([([NORM, "shape"], [2**62, 4, 0])])
@example([(["x"], {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})])
def test_headers(spoil, changes):
    def change(path):
        file = path / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        for place, new in changes:
            put(header, place, new)
        text = dumps(header)
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    spoil(change, data_may_change=True)  # swapped offsets of equal size are another sound file


@MANY
@given(BYTES, st.integers(0, 1200))
def test_bytes(spoil, places, cut):
    def change(path):
        file = path / "model.safetensors"
        data = bytearray(file.read_bytes())
        for position, byte in places:
            data[position] = byte
        file.write_bytes(data[: len(data) - cut] if cut < 40 else data)

    spoil(change, data_may_change=True)


@MANY
@given(CHANGES)
@example([(["weight_map", NORM], "../whole/model.safetensors")])
@example([(["weight_map", NORM], "part-0.safetensors")])
def test_indexes(spoil, changes):
    def change(path):
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        for place, new in changes:
            put(index, place, new)
        file.write_bytes(dumps(index))

    spoil(change, spoil.sources["sharded"])


@MANY
@given(
    st.sampled_from(NAMES),
    st.one_of(JSON.map(dumps), st.binary(max_size=60), st.just(b"[" * 100_000)),
)
def test_companions(spoil, name, content):
    spoil(lambda path: (path / name).write_bytes(content))


@pytest.mark.parametrize("name", [*NAMES, "model.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling", "loop"])
def test_odd_files(spoil, name, kind):
    import os

    def change(path):
        (path / name).unlink()
        if kind == "fifo":
            os.mkfifo(path / name)
        elif kind == "directory":
            (path / name).mkdir()
        else:
            (path / name).symlink_to("nowhere" if kind == "dangling" else name)

    spoil(change)
