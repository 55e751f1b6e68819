"""15, 19: kill -9 at any moment, and memory that depends neither on the model's size nor on N."""

import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time

import pytest

from salsa import make_soup
from salsa.artifacts import Checkpoint

from . import checkpoints

pytestmark = pytest.mark.slow
LIMIT = 400 * 2**20
"""Bytes of private memory, Python and numpy included; one tensor of the model base_source alone is as large."""


def sparse(path, seed, elements):
    """A model of one large tensor, almost all of it a hole in the file, and its small siblings."""
    checkpoints.write(path, checkpoints.tensors(seed))
    values = checkpoints.tensors(seed)
    header, offset = {}, 0
    for key, value in values.items():
        header[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    header["model.large.weight"] = {
        "dtype": "F32",
        "shape": [elements // 1024, 1024],
        "data_offsets": [offset, offset + 4 * elements],
    }
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values.values():
            file.write(value.tobytes())
        file.truncate(file.tell() + 4 * elements)
    return path


def limited():
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def python(code, *arguments, **options):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, **options
    )


SOUP = "import sys; from salsa import make_soup; make_soup(sys.argv[2:], out=sys.argv[1])"
WHOLE = "import sys; from safetensors.numpy import load_file; load_file(sys.argv[1])"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux")
def test_19_memory_is_bounded_for_any_size_and_number(tmp_path):
    paths = [sparse(tmp_path / str(seed), seed, 100 * 2**20) for seed in range(8)]
    whole = python(WHOLE, paths[0] / "model.safetensors", preexec_fn=limited)
    assert whole.returncode != 0 and "Memory" in whole.stderr  # the limit bites
    for count in (2, 8):
        out = tmp_path / f"soup-{count}"
        done = python(SOUP, out, *paths[:count], preexec_fn=limited)
        assert done.returncode == 0, done.stderr
        assert (out / "soup.json").exists()
        (out / "model.safetensors").unlink()


def test_15_kill_9_at_twenty_moments_leaves_nothing_that_looks_whole(tmp_path):
    paths = [sparse(tmp_path / f"model-{seed}", seed, 16 * 2**20) for seed in range(2)]
    out = tmp_path / "out" / "soup"
    expected = make_soup(paths, out=tmp_path / "expected").digest
    command = [sys.executable, "-c", SOUP, str(out), *map(str, paths)]
    started = time.monotonic()
    subprocess.run(command, check=True)
    whole_run = time.monotonic() - started
    moments = random.Random(0)
    killed = 0
    for _ in range(20):
        if out.exists():
            assert Checkpoint.of(out).digest == expected
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.1, 1) * whole_run)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if out.exists():
            assert Checkpoint.of(out).digest == expected
    assert killed >= 10
    if not out.exists():
        subprocess.run(command, check=True)
    assert [p.name for p in out.parent.iterdir() if p.name != ".soup.partial"] == ["soup"]
    soup = make_soup(paths, out=out, force=True)
    assert soup.digest == expected
    assert [p.name for p in out.parent.iterdir()] == ["soup"]


def test_15_kill_between_the_two_renames_loses_neither(tmp_path):
    paths = [checkpoints.write(tmp_path / str(s), checkpoints.tensors(s)) for s in range(3)]
    out = tmp_path / "soup"
    first = make_soup(paths[:2], out=out)
    out.rename(tmp_path / ".soup.old")  # as a kill would leave it
    with pytest.raises(ValueError, match="exists"):
        make_soup(paths, out=out)
    assert Checkpoint.of(out) == first and not (tmp_path / ".soup.old").exists()
