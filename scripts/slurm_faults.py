"""The tests' tiny recipe on the SLURM that is there, with and without faults: one line each, and JSON at the end.

python scripts/slurm_faults.py DIRECTORY        (scripts/slurm_here.sh makes a SLURM of one node and calls this)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.whole_run import write_inputs

Driver = subprocess.Popen[str]
RECIPE = ("run", "tiny.yaml", "rl.seeds=[0]", "model.precision=fp32", "engine.threads=1")
SLURM = ("engine.executor=slurm", "engine.slurm={hours: 0.5, partition: all}")


def main(folder: Path) -> None:
    """Run everything; exits with 1 if a digest differs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder)
    finish(start(folder, "alone", *RECIPE))
    expected = outputs(folder / "alone")
    checks = {
        "no fault": nothing,
        "a running job requeued": requeue,
        "a running job killed": kill_job,
        "the driver killed": kill_driver,
    }
    results = {}
    for number, (name, fault) in enumerate(checks.items()):
        run, began = folder / f"slurm-{number}", time.monotonic()
        if number:  # what comes before RL is done
            shutil.copytree(folder / "slurm-0", run)
            for stage in (*run.glob("stages/rl-*"), *run.glob("stages/eval-*")):
                shutil.rmtree(stage)
        driver = start(folder, run.name, *RECIPE, *SLURM)
        said = finish(fault(run, driver))
        same = outputs(run) == expected
        results[name] = {"same digests": same, "seconds": round(time.monotonic() - began)}
        told = [line for line in said.splitlines() if "lost" in line or "going on from" in line]
        verdict = "the same" if same else "OTHER"
        print(
            f"{name}: {verdict} output digests of {len(expected)} stages",
            *told,
            sep="\n  ",
            flush=True,
        )
    jobs = sacct()
    states = {state: jobs.count(state) for state in sorted(set(jobs))}
    print(json.dumps({"results": results, "jobs by state": states}))
    sys.exit(not all(one["same digests"] for one in results.values()))


def nothing(run: Path, driver: Driver) -> Driver:
    """The whole recipe on SLURM."""
    return driver


def requeue(run: Path, driver: Driver) -> Driver:
    """SLURM takes the machine away from the first RL job that has a checkpoint, and gives it back."""
    subprocess.run(["scontrol", "requeue", job_at_work(run, driver)], check=True)
    return driver


def kill_job(run: Path, driver: Driver) -> Driver:
    """The job ends as one does that needs more memory than there is: killed, without a word."""
    job = job_at_work(run, driver)
    subprocess.run(["scancel", "--signal=KILL", "--full", job], check=True)
    return driver


def kill_driver(run: Path, driver: Driver) -> Driver:
    """The process that submits is killed; its job goes on, and the next process waits for that one."""
    job = job_at_work(run, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    again = start(run.parent, run.name, *RECIPE, *SLURM)
    while again.poll() is None and not (
        numbers := list(run.glob("stages/rl-*.partial/resume/slurm-job"))
    ):
        time.sleep(0.1)
    print(
        f"  the driver was killed while SLURM ran job {job}; {len(numbers)} jobs known to the next driver"
    )
    return again


def start(folder: Path, out: str, *arguments: str) -> Driver:
    """Start salsa in `folder`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "salsa", *arguments, "-o", out]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(driver: Driver) -> str:
    """What it said, once it has ended well."""
    _, said = driver.communicate()
    if driver.returncode:
        sys.exit(said)
    return said


def job_at_work(run: Path, driver: Driver) -> str:
    """The number of an RL job's SLURM job once the RL job has written a checkpoint."""
    while driver.poll() is None:
        for state in run.glob("stages/rl-*.partial/resume/state-*.pt"):
            return (state.parent / "slurm-job").read_text()
        time.sleep(0.02)
    sys.exit(f"no checkpoint was seen: {driver.communicate()[1]}")


def outputs(run: Path) -> dict[str, str]:
    """Stage → digest of what it wrote."""
    records = (json.loads(file.read_text()) for file in run.glob("stages/*/stage.json"))
    return {record["stage"]: record["output"] for record in records}


def sacct() -> list[str]:
    """The state of every job."""
    command = ["sacct", "-X", "-n", "--parsable2", "-o", "State"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
