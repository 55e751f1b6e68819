"""Stages at a URL: whole or not there, in memory's file system and on an S3 server on this machine."""

import os
import shutil
import socket
from pathlib import Path

import fsspec
import pytest

from salsa.errors import CheckpointError, ConfigError, WorkFailed
from salsa.runtime import store as store_module
from salsa.runtime.executors.local import ProcessPool
from salsa.runtime.store import MARKER, Store
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Graph
from tests.walks import outputs, steps_of, walks


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket on an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    known = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/runs"
    server.stop()
    os.environ.clear()
    os.environ.update(known)


@pytest.fixture(params=["memory", "s3"])
def store(request, tmp_path):
    url = "memory://runs" if request.param == "memory" else request.getfixturevalue("s3")
    return Store(f"{url}/{tmp_path.name}")


def a_stage(folder: Path, text: str = "{}") -> Path:
    stage = folder / "sft-0-abc"
    (stage / "critic").mkdir(parents=True, exist_ok=True)
    (stage / "config.json").write_text(text)
    (stage / "critic" / "weights.safetensors").write_bytes(bytes(range(256)) * 1000)
    return stage


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_fetched_is_what_was_uploaded(store, tmp_path):
    stage = a_stage(tmp_path / "here")
    there = tmp_path / "there" / stage.name
    there.parent.mkdir()
    store.check()
    assert not store.has(stage.name) and not store.fetch(there) and not there.exists()
    store.upload(stage)
    assert store.has(stage.name) and store.fetch(there)
    assert content(there) == content(stage)
    assert [p.name for p in there.parent.iterdir()] == [stage.name]


def test_two_workers_may_fetch_the_same_stage_at_once(tmp_path, monkeypatch):
    """The slower one finds it there when it is about to rename its own copy."""
    store, stage = Store(f"memory://runs/{tmp_path.name}"), a_stage(tmp_path / "here")
    there = tmp_path / "there" / stage.name
    store.upload(stage)
    finish = store_module.finish_directory

    def after_another(partial, final):
        shutil.copytree(partial, final)
        finish(partial, final)

    monkeypatch.setattr(store_module, "finish_directory", after_another)
    assert store.fetch(there) and content(there) == content(stage)
    assert [p.name for p in there.parent.iterdir()] == [stage.name]


@pytest.mark.fault(
    "an upload to the object store breaks off",
    "exit code 1 and one line; what is there is never taken for whole",
)
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_upload_that_breaks_off_is_never_taken_for_whole(store, fails_at, tmp_path, monkeypatch):
    """At its first file, at its second, at the mark."""
    stage, calls = a_stage(tmp_path / "here"), []
    files, _ = store._connect()
    for name in ("put_file", "pipe_file"):
        real = getattr(files, name)

        def failing(*call, real=real, **options):
            calls.append(call)
            if len(calls) == fails_at:
                raise ConnectionError("the network is gone")
            return real(*call, **options)

        monkeypatch.setattr(files, name, failing)
    with pytest.raises(
        WorkFailed, match=r"sft-0-abc could not be uploaded \(the network is gone\)"
    ):
        store.upload(stage)
    assert len(calls) == fails_at
    assert not store.has(stage.name) and not store.fetch(tmp_path / stage.name)
    store.upload(stage)
    assert store.fetch(tmp_path / stage.name) and content(tmp_path / stage.name) == content(stage)


def test_a_second_upload_that_breaks_off_leaves_the_first(store, tmp_path, monkeypatch):
    store.upload(a_stage(tmp_path / "first", '{"of": 1}'))
    files, _ = store._connect()

    def fails(*call, **options):
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(files, "pipe_file", fails)
    with pytest.raises(WorkFailed):
        store.upload(a_stage(tmp_path / "second", '{"of": 2}'))
    assert store.fetch(tmp_path / "sft-0-abc")
    assert (tmp_path / "sft-0-abc" / "config.json").read_text() == '{"of": 1}'


@pytest.mark.fault(
    "an object was damaged or is gone", "one line that names it; nothing of it is used"
)
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_what_was_damaged_there_is_refused_and_nothing_is_kept(store, damage, tmp_path):
    stage = a_stage(tmp_path / "here")
    store.upload(stage)
    files, root = store._connect()
    (file,) = [f for f in files.find(root) if f.endswith("weights.safetensors")]
    files.rm_file(file) if damage == "gone" else files.pipe_file(file, b"other")
    with pytest.raises(
        CheckpointError,
        match=f"weights.safetensors is not what was uploaded. Delete {MARKER} there",
    ):
        store.fetch(tmp_path / "there" / stage.name)
    assert not any((tmp_path / "there").iterdir())


@pytest.mark.slow
def test_machines_without_a_shared_path_give_the_same_digests(s3, tmp_path):
    """One machine finishes the first stages, another, with an empty disk and two processes, the rest."""
    store, runs, executors = Store(f"{s3}/two"), [], [None, ProcessPool(2)]
    alone = RunDirectory(tmp_path / "alone")
    with alone.opened("recipe"):
        Graph(alone).finish(walks())
    for name, executor, wanted in zip(("one", "two"), executors, (2, 4), strict=True):
        run = RunDirectory(tmp_path / name, store=store)
        with run.opened("recipe"):
            Graph(run, executor=executor).finish(walks()[:wanted])
        runs.append({stage.label: stage for stage in run.finished})
    executors[1].close()
    expected = {stage.label: stage.record["output"] for stage in alone.finished}
    assert outputs(runs[1]) == expected
    assert {label for label, stage in runs[1].items() if stage.reused} == {"a", "b"}
    shutil.rmtree(tmp_path / "one")
    again = RunDirectory(tmp_path / "three", store=store)
    with again.opened("recipe"):
        Graph(again).finish(walks())
    assert all(stage.reused for stage in again.finished) and len(again.finished) == 4
    assert steps_of(again.finished[0].path) == list(range(1, 13))


def test_an_input_that_is_nowhere_is_named(tmp_path):
    from salsa.artifacts import Checkpoint
    from salsa.stages.performing import perform
    from tests.walks import Walk

    job = Walk("a", (Checkpoint(tmp_path / "base", "0" * 64),), 0)
    place = RunDirectory(tmp_path / "run").place(job, "")
    with pytest.raises(
        ConfigError, match=rf"a: {tmp_path}/base is not on {socket.gethostname()}. Put it there"
    ):
        perform(place, job, Store("memory://x"), None)


def test_a_url_without_a_client_is_one_line():
    with pytest.raises(
        ConfigError, match="=nothing://bucket: there is no client for nothing:// here"
    ):
        Store("nothing://bucket").check()


def test_a_store_that_does_not_answer_is_one_line(monkeypatch):
    pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(
        ConfigError, match=r"engine.artifacts=s3://nowhere: does not answer \(.*\). Check the URL"
    ):
        Store("s3://nowhere").check()
