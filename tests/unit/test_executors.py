"""Where jobs run changes nothing: one process, several, Ray, SLURM's client; with and without faults."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from salsa.artifacts import locked, write_atomic
from salsa.config import DataSource, EngineConfig, Recipe
from salsa.config.engine import SlurmConfig
from salsa.errors import ConfigError, WorkFailed
from salsa.planner.estimate import planned_stages
from salsa.planner.hardware import hardware_of
from salsa.runtime.checkpoint import save_state
from salsa.runtime.executors import Request, Task
from salsa.runtime.executors.local import ProcessPool
from salsa.runtime.executors.ray_cluster import RayCluster
from salsa.runtime.executors.slurm import Slurm
from salsa.runtime.executors.task import run_task
from salsa.runtime.store import Store
from salsa.runtime.tracking import progress_file
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Node
from salsa.stages.jobs import SFTJob, SoupJob
from salsa.stages.performing import is_disk_full, perform
from salsa.stages.placing import request_of
from tests.ray_here import SMALL, two_nodes
from tests.walks import LABELS, STEPS, Walk, finish, outputs, steps_of, walks

RESUMED = [*range(1, 8), *range(7, STEPS + 1)]
"""Killed in step 8, the last checkpoint after step 6."""


@pytest.fixture(scope="module")
def ray_nodes():
    """Two nodes of Ray on this machine, a CPU each; the second one can be taken away and comes back."""
    with two_nodes() as cluster:
        yield cluster


KINDS = ["pool", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("slurm", "ray"))]


@pytest.fixture
def make(request, tmp_path, monkeypatch):
    """`make(kind)`: an executor, closed at the end."""
    made, submitted = [], []
    # so long submitit waits for the result of a job that ended without one; files are here at once
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1, raising=True)

    def make(kind: str):
        if kind == "ray":
            executor = RayCluster(request.getfixturevalue("ray_nodes").address)
        elif kind == "slurm":
            executor = Slurm(tmp_path / "slurm", slots=2, cluster="local")
            submit = executor._executor.submit
            executor._executor.submit = lambda *call: (
                submitted.append(submit(*call)) or submitted[-1]
            )
        else:
            executor = ProcessPool(2)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()
    for job in submitted:
        job._process.wait()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The output digests of a run in this process, without a fault."""
    return outputs(finish(tmp_path_factory.mktemp("here") / "run", None, walks()))


@pytest.mark.fault(
    "a worker is killed, as one is when memory runs out",
    "the job goes on from its last checkpoint: the same output digests",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_killed_worker_is_retried_from_its_checkpoint_and_changes_no_digest(
    kind, make, expected, tmp_path, capfd
):
    stages = finish(tmp_path / "run", make(kind), walks(a="killed", ab="killed"))
    assert outputs(stages) == expected and set(expected) == set(LABELS)
    assert steps_of(stages["a"].path) == steps_of(stages["ab"].path) == RESUMED
    assert steps_of(stages["b"].path) == list(range(1, STEPS + 1))
    said = capfd.readouterr().err
    assert "a: lost, " in said and "it goes on from its last checkpoint (1 of 2)" in said
    assert "a: went on" in said and "a: going on from step 6 of 12" in said


@pytest.mark.fault(
    "it is killed every time",
    "after `retries` more attempts exit code 1 and one line; finished stages and the last checkpoint stay",
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_is_lost_every_time_ends_in_one_line(kind, make, tmp_path):
    with pytest.raises(WorkFailed) as error:
        finish(tmp_path / "run", make(kind), walks(ab="always killed"), retries=1)
    message = str(error.value)
    assert message.startswith("ab: lost 2 times, the last time because ") and "\n" not in message
    assert "Finished stages and its last checkpoint are kept" in message
    done = {p.parent.name.split("-")[0] for p in (tmp_path / "run").glob("stages/*/stage.json")}
    assert done == {"a", "b"}
    assert len(list((tmp_path / "run" / "stages").glob("ab-*.partial/resume/state.jsonl"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_job_raises_is_raised_here_and_not_retried(kind, make, tmp_path):
    with pytest.raises(OSError, match="the server is gone"):
        finish(tmp_path / "run", make(kind), walks(a="raises"))
    (partial,) = (tmp_path / "run" / "stages").glob("a-*.partial")
    assert steps_of(partial) == list(range(1, 8))


@pytest.mark.fault(
    "the disk is full",
    "exit code 1 and one line; with space again, the job goes on from its last checkpoint: the same output digests",
)
@pytest.mark.parametrize("kind", ["here", *KINDS])
def test_a_full_disk_is_one_message_and_loses_nothing(kind, make, expected, tmp_path):
    executor = None if kind == "here" else make(kind)
    with pytest.raises(WorkFailed, match=r"^ab: the disk of .*stages is full. Free some space"):
        finish(tmp_path / "run", executor, walks(ab="disk full"))
    stages = finish(tmp_path / "run", executor, walks(ab="disk full"))
    assert outputs(stages) == expected
    assert stages["a"].reused and stages["b"].reused
    assert steps_of(stages["ab"].path) == RESUMED


@pytest.mark.fault("a worker is slow", "the others go on with all that does not need it")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_slow_worker_does_not_hold_up_the_others(kind, make, tmp_path):
    slow, first = walks(a="slow")[:2]
    second = Node.of(Walk, "after b", (first,), 7, "")
    stages = finish(tmp_path / "run", make(kind), [slow, first, second])
    assert next(iter(stages)) == "b"
    assert stages["a"].record["seconds"] < 30, "it waits, 40 s at most, until `after b` is there"


@pytest.mark.fault(
    "a machine is lost",
    "its job goes on elsewhere, from its last checkpoint: the same output digests",
    where="Ray",
)
@pytest.mark.slow
def test_a_lost_node_of_ray_costs_what_came_after_its_checkpoint(
    make, ray_nodes, expected, tmp_path
):
    """Both nodes are in the middle of a job; one is taken away, its job goes on on the other."""
    executor = make("ray")
    (lost,) = (node for node in ray_nodes.list_all_nodes() if node is not ray_nodes.head_node)

    def take_it_away() -> None:
        stages, deadline = tmp_path / "run" / "stages", time.monotonic() + 60
        at_seven = lambda: [d for d in stages.glob("*.partial") if 7 in _steps(d)]
        while len(at_seven()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [json.loads(progress_file(d).read_text())["pid"] for d in at_seven()]
        ray_nodes.remove_node(lost, allow_graceful=False)
        while all(map(_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        (tmp_path / "run" / "stages" / "go").touch()

    thread = threading.Thread(target=take_it_away)
    thread.start()
    try:
        stages = finish(tmp_path / "run", executor, walks(a="waits", b="waits"))
    finally:
        thread.join()
        ray_nodes.add_node(**SMALL)
    assert outputs(stages) == expected
    done = sorted((steps_of(stages[label].path) for label in "ab"), key=len)
    assert done == [list(range(1, STEPS + 1)), RESUMED]


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _steps(directory: Path) -> list[int]:
    return steps_of(directory) if (directory / "steps.log").exists() else []


@pytest.mark.fault(
    "a job is preempted, or reaches its time limit",
    "it is queued again and goes on from its last checkpoint: the same output digests",
    where="SLURM's client",
)
@pytest.mark.slow
def test_slurm_queues_a_job_again_that_it_interrupts(tmp_path, make, expected):
    """submitit's signal before the time limit or preemption: the same job goes on from its checkpoint."""
    executor = make("slurm")

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if [d for d in (tmp_path / "run" / "stages").glob("a-*.partial") if 7 in _steps(d)]:
                pid = json.loads(progress_file(_partial(tmp_path, "a")).read_text())["pid"]
                os.kill(pid, signal.SIGUSR2)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stages = finish(tmp_path / "run", executor, walks(a="waits"), retries=0)
    thread.join()
    assert outputs(stages) == expected and steps_of(stages["a"].path) == RESUMED


def _partial(folder: Path, label: str) -> Path:
    (directory,) = (folder / "run" / "stages").glob(f"{label}-*.partial")
    return directory


@pytest.mark.fault(
    "the driver is killed",
    "its workers end with it; the same command again goes on from the last checkpoints",
    where="processes",
)
@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    """A driver that is killed leaves nobody who writes beside the next one; the next one resumes."""
    code = (
        "import sys; from pathlib import Path; from salsa.runtime.executors.local import ProcessPool\n"
        "from tests.walks import finish, walks\n"
        "if __name__ == '__main__': finish(Path(sys.argv[1]), ProcessPool(2), walks(a='waits'))"
    )
    file = tmp_path / "driver.py"
    file.write_text(code)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])}
    driver = subprocess.Popen(
        [sys.executable, str(file), str(tmp_path / "run")],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not [d for d in (tmp_path / "run").glob("stages/a-*.partial") if 7 in _steps(d)]:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    worker = json.loads(progress_file(_partial(tmp_path, "a")).read_text())["pid"]
    driver.kill()
    driver.wait()
    while _alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stages = finish(tmp_path / "run", None, walks(a="waits"))
    assert steps_of(stages["a"].path) == RESUMED


def test_closing_leaves_other_processes_of_the_program_alone(tmp_path):
    """A notebook may have a pool of its own."""
    executor, others = (
        ProcessPool(1),
        multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,)),
    )
    others.start()
    handle = executor.submit(Task("a", Request(), time.sleep, (60,)))
    try:
        executor.close()
        assert others.is_alive() and handle.done()
    finally:
        others.kill()
        others.join()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "engine.address=127.0.0.1:1: no Ray cluster answers there. Start one"),
        ("somewhere", "engine.address=somewhere: write host:port, auto or local"),
    ],
)
def test_an_address_where_no_ray_answers_is_one_line(address, message):
    with pytest.raises(ConfigError) as error:
        RayCluster(address)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("package", "start", "extra"),
    [("ray", lambda: RayCluster(None), "ray"), ("submitit", lambda: Slurm(Path("x")), "slurm")],
)
def test_a_package_that_is_not_installed_is_named(package, start, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"is not installed here. Run: pip install 'salsa-rlhf\[{extra}\]'"
    ):
        start()


def test_no_slurm_here_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no SLURM here .* Run salsa where sbatch works"):
        Slurm(tmp_path / "slurm")


@pytest.mark.fault(
    "a machine does not see the run directory",
    "one line that names the directory and the machine",
    where="one process",
)
def test_a_directory_that_a_worker_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("salsa.runtime.executors.task.PATIENCE", 0.2)
    task = Task("a", Request(), print, home=tmp_path / "here").issued()
    assert (
        task.issued() == task
    )  # a job in a queue keeps a valid ticket when its driver starts again
    elsewhere = replace(task, home=tmp_path / "there")
    for wrong in (elsewhere, replace(task, ticket="of another run")):
        with pytest.raises(
            ConfigError,
            match="does not see what this machine wrote there. Put the run directory on",
        ):
            run_task(wrong).get()
    lost = replace(task, working_directory=str(tmp_path / "nowhere"))
    with pytest.raises(
        ConfigError, match="nowhere: is not there on .*Start the run in a directory that all"
    ):
        run_task(lost).get()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"executor": "foo"}, "engine.executor='foo': input should be 'local', 'ray' or 'slurm'"),
        ({"address": "auto"}, "engine: address is for executor: ray, and executor is local"),
        ({"executor": "ray", "slurm": {}}, "engine: slurm is for executor: slurm, and executor is ray"),
        ({"artifacts": "/data"}, "engine: artifacts='/data' is no URL. Write e.g. s3://bucket/runs"),
        ({"executor": "slurm", "slurm": {"queue": "gpu"}}, "unknown key 'engine.slurm.queue'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_one_line(engine, message, repository, tmp_path):
    values = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text()) | {
        "engine": engine
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        Recipe.load(tmp_path / "r.yaml")
    assert message in str(error.value)


def test_where_it_runs_decides_no_result():
    engine = EngineConfig(
        executor="slurm", slurm=SlurmConfig(partition="gpu", parameters={"qos": "long"}), gpus=8, retries=5,
        artifacts="s3://bucket/runs", memory_gib=80, jobs=3, threads=2,
    )  # fmt: skip
    assert engine.identity() == engine.decisive() == {} == EngineConfig(executor="ray").decisive()


def test_a_job_asks_for_what_the_planner_says(make_checkpoint, repository):
    model = make_checkpoint()
    recipe = Recipe.load(
        repository / "recipes" / "quickstart.yaml",
        ["engine={executor: ray, gpus: 2, threads: 4}", "rl.critic=separate"],
    )
    on_cpus = Recipe.load(repository / "recipes" / "quickstart.yaml", ["engine.executor=ray"])
    planned = {s.name: s.peak.total / 2**30 for s in planned_stages(on_cpus, hardware_of("cpu:1"))}
    trains = SFTJob("sft[0]", model, recipe.sft, DataSource(path="x"), 0)
    averages = SoupJob("soup", (model,), None)

    class Remote:
        remote, slots = True, None

    asked = request_of(trains, recipe, Remote())
    assert (asked.cpus, asked.gpus, asked.processes) == (4, 2, 1)
    assert request_of(averages, recipe, Remote()).gpus == 0
    memory = request_of(trains, on_cpus, Remote()).memory_gib
    assert memory == pytest.approx(planned["sft"] + 1, abs=0.01)
    assert request_of(averages, on_cpus, Remote()).memory_gib < memory
    here = Recipe.load(repository / "recipes" / "quickstart.yaml", ["engine.threads=4"])
    assert request_of(trains, here, ProcessPool(2)) == Request(cpus=2)


def test_a_model_that_the_planner_does_not_know_asks_for_no_memory(make_checkpoint, repository):
    recipe = Recipe.load(
        repository / "recipes" / "quickstart.yaml",
        ["engine.executor=ray", "model.path=hub/unknown"],
    )
    trains = SFTJob("sft[0]", make_checkpoint(), recipe.sft, DataSource(path="x"), 0)

    class Remote:
        remote, slots = True, None

    assert request_of(trains, recipe, Remote()).memory_gib is None


@pytest.mark.slow
def test_ray_carries_the_working_directory_to_machines_that_share_none(
    ray_nodes, expected, tmp_path, monkeypatch
):
    """The workers are in a copy of it; finished stages go through the store and are fetched from there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    executor = RayCluster(ray_nodes.address, ship=tmp_path / "here")
    store = Store(f"file://{tmp_path}/store")
    try:
        stages = finish(Path("runs/walks"), executor, walks(), store=store)
    finally:
        executor.close()
    assert outputs(stages) == expected
    assert all(store.has(stage.path.name) for stage in stages.values())
    assert not list((tmp_path / "here").rglob("ticket"))


@pytest.mark.slow
def test_a_job_that_fits_on_no_machine_of_ray_waits_and_says_so_once(make, monkeypatch, capfd):
    monkeypatch.setattr("salsa.runtime.executors.ray_cluster.UNPLACED_SECONDS", 0.0)
    executor = make("ray")
    handle = executor.submit(Task("rl ppo seed 0", Request(cpus=64, gpus=1, memory_gib=2.0), print))
    for _ in range(2):
        assert executor.wait([handle], 0.3) is None
    waits = [line for line in capfd.readouterr().err.splitlines() if "waits" in line]
    assert len(waits) == 1
    asked = "rl ppo seed 0: waits for a machine with 64 CPUs, 1 GPUs, 2.0 GiB of memory; the cluster has none so large"
    assert waits[0].startswith(asked) and "1 CPUs, 0 GPUs" in waits[0]


# one process at a time


@pytest.fixture
def place(tmp_path):
    run = RunDirectory(tmp_path / "run")
    (tmp_path / "run" / "stages").mkdir(parents=True)
    return run.place(Walk("a", (), 0), "")


@pytest.mark.fault(
    "another process still writes the stage",
    "the new one waits for it, half a minute at most",
    where="one process",
)
def test_a_stage_that_another_process_still_writes_is_waited_for(place):
    """As one does whose driver was killed a moment ago."""
    times = []

    def hold() -> None:
        with locked(place.lock, place.partial):
            held.set()
            time.sleep(0.5)
            times.append(time.monotonic())

    held, thread = threading.Event(), threading.Thread(target=hold)
    thread.start()
    held.wait()
    perform(place, Walk("a", (), 0), None, None)
    thread.join()
    assert steps_of(place.final) == list(range(1, STEPS + 1))
    assert (place.final / "steps.log").stat().st_mtime > 0 and times
    assert not place.lock.exists()


def test_a_stage_that_stays_in_use_is_refused(place, monkeypatch):
    monkeypatch.setattr("salsa.stages.performing.PATIENCE", 0.3)
    with (
        locked(place.lock, place.partial),
        pytest.raises(ConfigError, match=r"a-.*partial: in use by another salsa process"),
    ):
        perform(place, Walk("a", (), 0), None, None)
    assert not place.final.exists() and not place.partial.exists()


def test_what_another_process_has_finished_meanwhile_is_not_done_again(place):
    perform(place, Walk("a", (), 0), None, None)
    place.partial.mkdir()
    perform(place, Walk("a", (), 0), None, None)
    assert steps_of(place.final) == list(range(1, STEPS + 1)) and not place.partial.exists()


# a full disk, as the libraries say it


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB that is full after half of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    (disk / "ballast").write_bytes(bytes(2**19))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _save_tensors(file: Path) -> None:
    save_file({"weight": torch.zeros(2**20)}, file)


WRITERS = {
    "a resume state": lambda path: save_state(path / "state.pt", {"weight": torch.zeros(2**20)}),
    "a checkpoint": lambda path: _save_tensors(path / "model.safetensors"),
    "a text": lambda path: write_atomic(path / "text.json", "x" * 2**20),
}


@pytest.mark.parametrize("writes", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_recognised_whatever_the_library_calls_it(writes, small_disk, tmp_path):
    with pytest.raises(Exception, match=".") as error:
        writes(small_disk)
    assert is_disk_full(error.value, small_disk)


def test_other_failures_are_not_put_down_to_the_disk(small_disk, tmp_path):
    for words in ("could not write", "basic_ios::clear: iostream error"):  # torch's, of two sizes
        assert is_disk_full(RuntimeError(words), small_disk)
        assert not is_disk_full(RuntimeError(words), tmp_path)
    assert not is_disk_full(PermissionError(13, "Permission denied"), small_disk)
    assert not is_disk_full(ValueError("loss is NaN"), small_disk)
