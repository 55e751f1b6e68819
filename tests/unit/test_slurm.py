"""What SLURM's commands are told and how their answers are read, with stand-ins for them in PATH."""

import re
import shutil
from pathlib import Path

import pytest

from salsa.errors import ConfigError, WorkerLost
from salsa.runtime.executors import Request, Task
from salsa.runtime.executors.slurm import Slurm


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """`commands(sbatch=…, sacct=…)` writes shell scripts of these names; `sbatch` numbers jobs from 12."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def write(**scripts: str) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    count = tmp_path / "count"
    submit = f"n=$(cat {count} 2>/dev/null || echo 12); echo $((n + 1)) > {count}; cp $1 {tmp_path}/script-$n"
    write(srun="", scancel=f"echo $@ >> {tmp_path}/cancelled")
    write(sbatch=f"{submit}; echo Submitted batch job $n", sacct="exit 1")
    return write


def a_task(home: Path, **asked) -> Task:
    (home / "resume").mkdir(parents=True, exist_ok=True)
    return Task("rl ppo seed 0", Request(**asked), print, home=home)


def test_sbatch_is_told_what_the_job_and_the_recipe_ask_for(commands, tmp_path):
    slurm = Slurm(
        tmp_path / "slurm",
        partition="gpu",
        hours=1.5,
        account="lab",
        parameters={"constraint": "a100"},
    )
    slurm.submit(a_task(tmp_path / "home", cpus=4, gpus=2, memory_gib=30.0, processes=2))
    script = (tmp_path / "script-12").read_text()
    told = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))
    expected = {
        "partition": "gpu", "account": "lab", "time": "90", "nodes": "1", "ntasks-per-node": "1", "constraint": "a100",
        "cpus-per-task": "8", "gpus-per-node": "4", "mem": "60GB", "job-name": "rl-ppo-seed-0", "requeue": "",
        "signal": "USR2@90",
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected


def test_what_is_not_asked_for_is_the_clusters_choice(commands, tmp_path):
    Slurm(tmp_path / "slurm").submit(a_task(tmp_path / "home"))
    script = (tmp_path / "script-12").read_text()
    assert not re.search(r"--(partition|account|gpus-per-node|mem)\b", script)
    assert "--time=1440" in script


@pytest.mark.parametrize(
    ("state", "number"), [("RUNNING", "12"), ("PENDING", "12"), ("FAILED", "13"), ("CANCELLED by 0", "13")]
)  # fmt: skip
def test_a_job_that_slurm_still_has_is_not_submitted_again(state, number, commands, tmp_path):
    """The process that submitted it was killed."""
    task = a_task(tmp_path / "home")
    assert Slurm(tmp_path / "slurm").submit(task).job_id == "12"
    commands(sacct=f"printf 'JobID|State|NodeList\\n12|{state}|node-7\\n'")
    assert Slurm(tmp_path / "slurm").submit(task).job_id == number
    assert (tmp_path / "home" / "resume" / "slurm-job").read_text() == number


def test_a_stage_that_was_finished_meanwhile_is_submitted_all_the_same(commands, tmp_path):
    """A job that seemed lost has renamed the stage's unfinished directory; the new one finds the stage finished."""
    task = a_task(tmp_path / "home")
    shutil.rmtree(tmp_path / "home")
    assert Slurm(tmp_path / "slurm").submit(task).job_id == "12"


def test_a_job_that_ended_without_a_word_is_lost_and_not_left_in_the_queue(commands, tmp_path):
    slurm = Slurm(tmp_path / "slurm")
    job = slurm.submit(a_task(tmp_path / "home"))
    job._results_timeout_s = 0
    commands(sacct="printf 'JobID|State|NodeList\\n12|OUT_OF_MEMORY|node-7\\n'")
    assert slurm.wait([job], 30.0) is job
    with pytest.raises(
        WorkerLost, match=r"SLURM's job 12 ended without a result \(state OUT_OF_MEMORY\)"
    ):
        slurm.outcome(job)
    assert (tmp_path / "cancelled").read_text() == "12\n"


def test_what_sbatch_refuses_is_one_line(commands, tmp_path):
    commands(sbatch="echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1")
    with pytest.raises(ConfigError) as error:
        Slurm(tmp_path / "slurm", partition="gpus").submit(a_task(tmp_path / "home"))
    assert str(error.value) == (
        "rl ppo seed 0: sbatch refused it: sbatch: error: invalid partition specified: gpus"
    )


def test_closing_cancels_what_is_under_way(commands, tmp_path):
    slurm = Slurm(tmp_path / "slurm")
    for number in range(2):
        slurm.submit(a_task(tmp_path / f"home-{number}"))
    slurm.close()
    assert (tmp_path / "cancelled").read_text() == "12\n13\n"
