"""Trackers: every row once, under its step and name, also over a kill; a tracker that fails stops nothing."""

import json
import os
import sqlite3
import struct
import sys
import time
from pathlib import Path

import pytest

from salsa.errors import ConfigError
from salsa.runtime import trackers
from salsa.runtime.trackers import Mirror, TensorBoard, tracked
from tests.tiny_rl import rows_in, run, run_killed

STAGE = "rl-ppo-seed-0-aaaaaaaaaaaa"


def rows(first, last, **others):
    return [{"step": i, "score": i / 8, "kl": float(i), **others} for i in range(first, last + 1)]


def write(folder: Path, content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


class Memory:
    """A tracker that remembers what it was told."""

    def __init__(self, fails: bool = False) -> None:
        self.sent, self.ended, self.fails = [], [], fails

    def send(self, stage, rows):
        if self.fails:
            raise OSError("no network\nat all")
        self.sent += [(stage, row["step"]) for row in rows]

    def end(self, stage):
        self.ended.append(stage)


def test_each_row_is_sent_once_also_by_another_process(tmp_path):
    partial, memory = tmp_path / "stages" / f"{STAGE}.partial", Memory()
    mirror = Mirror(tmp_path, {"memory": memory})
    write(partial, rows(1, 3))
    mirror.look()
    mirror.look()
    assert memory.sent == [(STAGE, 1), (STAGE, 2), (STAGE, 3)] and not memory.ended
    write(partial, rows(1, 2))  # killed, and resumed at step 2: step 3 comes again
    again = Memory()
    mirror = Mirror(tmp_path, {"memory": again})
    mirror.look()
    write(partial, rows(1, 5))
    mirror.look()
    partial.rename(tmp_path / "stages" / STAGE)
    mirror.look()
    assert again.sent == [(STAGE, 4), (STAGE, 5)] and again.ended == [STAGE]


def test_a_line_that_is_being_written_waits(tmp_path):
    folder, memory = tmp_path / "stages" / f"{STAGE}.partial", Memory()
    write(folder, rows(1, 1))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sco')
    mirror = Mirror(tmp_path, {"memory": memory})
    mirror.look()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('re": 1.0}\n')
    mirror.look()
    assert memory.sent == [(STAGE, 1), (STAGE, 2)]


def test_a_tracker_that_fails_is_told_once_and_sent_the_rest_later(tmp_path, capsys):
    write(tmp_path / "stages" / STAGE, rows(1, 2))
    good, bad = Memory(), Memory(fails=True)
    mirror = Mirror(tmp_path, {"bad": bad, "good": good})
    mirror.look()
    mirror.look()
    told = "track: bad failed (no network at all). The work goes on; run again to send the rest."
    assert capsys.readouterr().err.splitlines() == [told]
    assert good.sent == [(STAGE, 1), (STAGE, 2)]
    later = Memory()
    Mirror(tmp_path, {"bad": later}).look()
    assert later.sent == good.sent


def test_rows_come_while_the_block_lasts(tmp_path, monkeypatch):
    import threading

    came = threading.Event()

    class Telling(Memory):
        def send(self, stage, rows):
            super().send(stage, rows)
            came.set()

    memory = Telling()
    monkeypatch.setattr(trackers, "SECONDS", 0.01)
    monkeypatch.setitem(trackers.BACKENDS, "json", lambda *arguments: memory)
    with tracked(tmp_path, ["json"], "p", {}):
        write(tmp_path / "stages" / f"{STAGE}.partial", rows(1, 2))
        assert came.wait(20)
        write(tmp_path / "stages" / f"{STAGE}.partial", rows(1, 3))
    assert memory.sent == [(STAGE, 1), (STAGE, 2), (STAGE, 3)] and memory.ended[-1] == STAGE


def test_a_tracker_that_is_not_installed_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'salsa-rlhf\[trackio\]'"):
        tracked(tmp_path, ["trackio"], "p", {}).__enter__()


def test_wandb_without_a_key_is_told_before_any_work(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="no API key. Run wandb login, or set WANDB_MODE=offline"):
        tracked(tmp_path, ["wandb"], "p", {}).__enter__()


def curve(run_directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Name → (step, value) of a stage, in the order in which TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run_directory / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_curve_in_tensorboard(job, tmp_path):
    stage = tmp_path / "stages" / f"{STAGE}.partial"
    stage.parent.mkdir()
    run_killed(job, stage, 4)  # three rows, the newest checkpoint after two
    with tracked(tmp_path, ["tensorboard"], "p", {}):
        pass
    run(job, stage)
    with tracked(tmp_path, ["tensorboard"], "p", {}):
        pass
    logged = rows_in(stage)
    shown = curve(tmp_path)
    assert shown.keys() >= {"score", "kl", "entropy", "policy_loss", "seconds_rollout"}
    for name in ("score", "kl", "entropy", "policy_loss"):
        assert shown[name] == [(row["step"], pytest.approx(row[name])) for row in logged], name


def records_in(file: Path) -> list[bytes]:
    """Records of W&B's log: LevelDB's format, blocks of 32 KiB with (crc, length, kind) before each fragment."""
    content, at, records, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            records.append(parts)
            parts = b""
    return records


@pytest.mark.slow
def test_wandb_offline_keeps_the_run_id_and_no_step_twice(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "runs" / "mine"
    for content in (rows(1, 3), rows(1, 5, gold=2.0)):
        write(folder / "stages" / f"{STAGE}.partial", content)
        with tracked(folder, ["wandb"], "project", {"rl": {"kl_coef": 0.1}}):
            pass
        time.sleep(1.1)  # W&B names its folders by the second
    steps, ids = [], []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_in(file):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.append((record.run.run_id, record.run.project, record.run.run_group))
            if record.HasField("history"):
                items = {(i.key or i.nested_key[0]): i.value_json for i in record.history.item}
                steps.append((int(items["_step"]), float(items["score"]), float(items["kl"])))
    assert steps == [(row["step"], row["score"], row["kl"]) for row in rows(1, 5)]
    assert set(ids) == {(STAGE, "project", "mine")} and len(ids) >= 2


@pytest.mark.slow
def test_trackio_keeps_its_run_and_no_step_twice(tmp_path):
    pytest.importorskip("trackio", reason="not in the dev extra")
    code = """
import sys
import time
from pathlib import Path
from salsa.runtime.trackers import tracked
with tracked(Path(sys.argv[1]), ["trackio"], "project", {"a": 1}):
    pass
"""
    import subprocess

    for content in (rows(1, 3), rows(1, 5)):
        write(tmp_path / "stages" / f"{STAGE}.partial", content)
        place = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=place)
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as base:
        found = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in found] == [(STAGE, step) for step in range(1, 6)]
    assert [json.loads(text)["score"] for *_, text in found] == [r["score"] for r in rows(1, 5)]


def test_tensorboard_takes_numbers_only(tmp_path):
    board = TensorBoard(tmp_path, "p", {})
    board.send(STAGE, rows(1, 2, note="text"))
    board.end(STAGE)
    assert curve(tmp_path) == {
        "score": [(1, 0.125), (2, 0.25)],
        "kl": [(1, 1.0), (2, 2.0)],
    }
