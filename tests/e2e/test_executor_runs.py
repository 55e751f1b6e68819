"""A recipe on two nodes of Ray and on a disk that fills up: the digests of one process that nothing disturbs."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from tests.ray_here import two_nodes
from tests.whole_run import salsa

pytestmark = pytest.mark.slow


def outputs(run) -> dict[str, str]:
    records = (json.loads(file.read_text()) for file in run.glob("stages/*/stage.json"))
    return {record["stage"]: record["output"] for record in records}


@pytest.mark.fault(
    "a worker is killed in the middle of RL (the tiny recipe)",
    "the job goes on from its last checkpoint: the same output digests of ten stages",
    where="Ray",
)
def test_ray_gives_the_digests_of_one_process_also_when_a_worker_is_killed(
    finished, inputs, tmp_path
):
    run, killed = tmp_path / "run", []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for state in run.glob("stages/rl-salsa-seed-0-*.partial/resume/state-*.pt"):
                killed.append(json.loads((state.parent / "progress.json").read_text())["pid"])
                os.kill(killed[0], signal.SIGKILL)
                break
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with two_nodes() as cluster:
        ray = ["engine.executor=ray", f"engine.address={cluster.address}", "engine.memory_gib=0.8"]
        done = salsa(inputs, "rl", "tiny.yaml", "rl.seeds=[0]", *ray, "-o", str(run))
    assert done.returncode == 0, done.stderr
    assert (
        "rl salsa seed 0: lost, " in done.stderr
        and "rl salsa seed 0: going on from step" in done.stderr
    )
    made, expected = outputs(run), outputs(finished)
    assert len(made) == 10 and made == {stage: expected[stage] for stage in made}


@pytest.mark.fault(
    "the disk fills up during SFT (the tiny recipe)",
    "exit code 1 and one line; with space again, it goes on: the same output digests",
    where="one process",
)
def test_a_disk_that_fills_up_costs_what_came_after_the_last_checkpoint(finished, inputs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = lambda size, *how: subprocess.run(
        ["mount", *how, "-o", f"{'remount,' * (not how)}size={size}", *(["tmpfs"] * bool(how)), str(disk)],
        capture_output=True,
    ).returncode  # fmt: skip
    if size("450k", "-t", "tmpfs"):
        pytest.skip("mounting a file system needs root")
    try:
        done = salsa(inputs, "sft", "tiny.yaml", "-o", str(disk / "run"))
        assert done.returncode == 1, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert (
            last.startswith("error: sft[")
            and f"the disk of {disk}/run/stages is full. Free some" in last
        )
        assert size("64m") == 0
        done = salsa(inputs, "sft", "tiny.yaml", "-o", str(disk / "run"))
        assert done.returncode == 0, done.stderr
        made, expected = outputs(disk / "run"), outputs(finished)
        assert len(made) == 3 and made == {stage: expected[stage] for stage in made}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
