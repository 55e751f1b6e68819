"""Stages are done once, named by what goes in, and complete or absent."""

import json
import subprocess
import sys

import pytest

from salsa.artifacts import Checkpoint, RunDirectory
from salsa.errors import CheckpointError, ConfigError


def writer(calls, text="hello"):
    def work(directory):
        calls.append(directory)
        (directory / "out.jsonl").write_text(text)

    return work


def test_a_finished_stage_is_reused_and_a_changed_one_redone(tmp_path):
    calls = []
    run = RunDirectory(tmp_path / "run")
    with run.opened("recipe"):
        first = run.stage("a[0]", config={"x": 1}, inputs={"i": "1"}, work=writer(calls))
        again = run.stage("a[0]", config={"x": 1}, inputs={"i": "1"}, work=writer(calls))
        other = run.stage("a[0]", config={"x": 2}, inputs={"i": "1"}, work=writer(calls))
        third = run.stage("a[0]", config={"x": 1}, inputs={"i": "2"}, work=writer(calls))
    assert (first.reused, again.reused, len(calls)) == (False, True, 3)
    assert first.path == again.path and len({first.path, other.path, third.path}) == 3
    assert first.checkpoint.digest == other.checkpoint.digest
    record = json.loads((first.path / "stage.json").read_text())
    assert record["inputs"] == {"i": "1"} and record["versions"]["torch"] and record["seconds"] >= 0


def test_what_fails_leaves_no_finished_stage_and_keeps_its_resume_state(tmp_path):
    run = RunDirectory(tmp_path / "run")

    def fails(directory):
        (directory / "resume").mkdir()
        (directory / "resume" / "state").write_text("half")
        raise RuntimeError("killed")

    def goes_on(directory):
        assert (directory / "resume" / "state").read_text() == "half"

    with run.opened("recipe"):
        with pytest.raises(RuntimeError):
            run.stage("a", config={}, inputs={}, work=fails)
        assert [p.suffix for p in (run.path / "stages").iterdir()] == [".partial"]
        stage = run.stage("a", config={}, inputs={}, work=goes_on)
    assert not (stage.path / "resume").exists()
    assert [p.suffix for p in (run.path / "stages").iterdir()] == [""]


def test_another_recipe_does_not_overwrite(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.opened("beta: 1\n"):
        pass
    with (
        pytest.raises(ConfigError, match=r"another recipe \(there 'beta: 1', now 'beta: 2'\)"),
        run.opened("beta: 2\n"),
    ):
        pass
    assert (run.path / "recipe.yaml").read_text() == "beta: 1\n"
    with run.opened("beta: 2\n", force=True):
        assert (run.path / "recipe.yaml").read_text() == "beta: 2\n"


def test_foreign_directories_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="files that are not a run's"),
        RunDirectory(tmp_path).opened("recipe"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="is a file"),
        RunDirectory(tmp_path / "thesis.tex").opened("recipe"),
    ):
        pass


def test_a_directory_in_use_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path\n"
        "from salsa.artifacts import RunDirectory; from salsa.errors import ConfigError\n"
        "try:\n    with RunDirectory(Path(sys.argv[1])).opened('recipe'): pass\n"
        "except ConfigError as error: print(error)"
    )
    with run.opened("recipe"):
        said = subprocess.run(
            [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True
        ).stdout
    assert "in use by another salsa process" in said
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True
        ).stdout
        == ""
    )


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
