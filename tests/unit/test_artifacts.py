"""Checkpoints notice change; hashes are remembered; a new directory is whole or absent."""

import errno
import os
import subprocess
import sys
import time

import pytest

from salsa import artifacts
from salsa.artifacts import Checkpoint, FileHashes, new_directory, sha256_tree
from salsa.errors import CheckpointError, ConfigError, accessing


def test_checkpoints_notice_change(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("llama", 7)
    checkpoint.verify()
    (checkpoint.path / "README.md").write_text("a card does not count")
    checkpoint.verify()
    with (checkpoint.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(CheckpointError, match="changed since it was made"):
        checkpoint.verify()
    with pytest.raises(CheckpointError, match="no model here"):
        Checkpoint.of(tmp_path)


def test_hashes_are_remembered_by_size_and_time(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "config.json"
    file.write_text("{}")
    memory = tmp_path / "hashes.json"
    hashes = FileHashes(memory)
    first = hashes.tree(tmp_path / "m")
    assert first == sha256_tree(tmp_path / "m")
    hashes.save()
    reads = []
    real = artifacts.sha256_file
    monkeypatch.setattr(artifacts, "sha256_file", lambda path: reads.append(path) or real(path))
    assert FileHashes(memory).tree(tmp_path / "m") == first and reads == []
    assert FileHashes(memory, verify=True).tree(tmp_path / "m") == first and len(reads) == 1
    file.write_text("{ }")
    assert FileHashes(memory).tree(tmp_path / "m") != first and len(reads) == 2
    memory.write_text("{half")
    assert FileHashes(memory).tree(tmp_path / "m") != first and len(reads) == 3


SLOW = """
import sys, time
from pathlib import Path
from salsa import artifacts
from salsa.errors import ConfigError
flush = artifacts._flush
artifacts._flush = lambda path: (time.sleep(0.4), flush(path))
try:
    with artifacts.new_directory(Path(sys.argv[1])) as partial:
        (partial / "config.json").write_text(sys.argv[2])
        (partial / "model.safetensors").write_text("x")
except ConfigError as error:
    print(error); sys.exit(2)
"""


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6])
def test_of_two_processes_with_one_target_one_wins_and_nothing_is_lost(delay, tmp_path):
    """The lock is held until the rename is done, on a slow disk too."""
    target = tmp_path / "soup"
    run = lambda name: subprocess.Popen(
        [sys.executable, "-c", SLOW, str(target), name], stdout=subprocess.PIPE, text=True
    )
    first = run("one")
    time.sleep(delay)
    second = run("two")
    outputs = [process.communicate()[0] for process in (first, second)]
    codes = [process.returncode for process in (first, second)]
    assert sorted(codes) == [0, 2], outputs
    winner = ("one", "two")[codes.index(0)]
    assert (target / "config.json").read_text() == winner
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["soup"]
    refused = outputs[codes.index(2)]
    assert "in use by another salsa process" in refused or "exists" in refused


def test_a_new_directory_leaves_nothing_when_it_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "a") as partial:
        (partial / "x").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("renames", [0, 1], ids=["while flushing", "between the renames"])
def test_a_model_that_is_not_replaced_to_the_end_is_kept(renames, tmp_path, monkeypatch):
    final, replace, done = tmp_path / "a", os.replace, []

    def stopped(*paths):
        if len(done) == renames:
            done.append(paths)
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    with new_directory(final) as partial:
        (partial / "config.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_directory(final, force=True) as partial:
        (partial / "config.json").write_text("new")
        where = (artifacts, "_flush") if renames == 0 else (os, "replace")
        monkeypatch.setattr(*where, stopped)
    assert (final / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("refusal", "action", "message"),
    [
        (PermissionError(errno.EACCES, "denied", "/a/b"), "read", "/a/b: cannot be read (permission denied). Give"),
        (PermissionError(errno.EACCES, "denied", "/a/b"), "write", "/a/b: cannot be written (permission denied). Give"),
        (NotADirectoryError(errno.ENOTDIR, "no", "/a/b"), "write", "/a/b: cannot be used as a directory, a file is"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "write", "/a/b: cannot be written (Read-only file"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "write", "/a/b: cannot be written (No space"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(refusal, action, message, tmp_path):
    with pytest.raises(ConfigError) as caught, accessing(tmp_path, action):
        raise refusal
    assert str(caught.value).startswith(message)


def test_other_errors_of_the_system_pass():
    with pytest.raises(OSError, match="strange"), accessing("x", "read"):
        raise OSError(errno.EIO, "strange")
