"""A small graph of jobs that any executor can run: random walks that build on each other, and what can go wrong."""

import errno
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from salsa.artifacts import Checkpoint, read_jsonl, write_atomic, write_jsonl
from salsa.runtime.executors import Executor
from salsa.runtime.store import Store
from salsa.runtime.tracking import say, tracker
from salsa.stages.directory import RunDirectory, Stage
from salsa.stages.graph import Graph, Node
from salsa.stages.jobs import Job, Undecisive

STEPS, CHECKPOINT_EVERY, FAULT_AT = 12, 3, 8
LABELS = ("a", "b", "ab", "last")


@dataclass(frozen=True)
class Walk(Job):
    """Steps from where others ended, a checkpoint every third; the fault comes once, in step 8, or always."""

    needs_engine: ClassVar[bool] = False
    starts: tuple[Checkpoint, ...]
    seed: int
    fault: Undecisive[str] = ""

    def run(self, directory: Path, engine: None) -> None:
        state = directory / "resume" / "state.jsonl"
        state.parent.mkdir(exist_ok=True)
        done = read_jsonl(state)
        place = done[-1]["place"] if done else sum(map(_end, self.starts))
        first = done[-1]["step"] if done else 0
        if done:
            say(f"{self.label}: went on")
        with tracker(directory, self.label, STEPS, ("place",)) as log:
            log.resume_at(first)
            for step in range(first + 1, STEPS + 1):
                if step == FAULT_AT:
                    self._go_wrong(directory)
                place += random.Random(f"{self.seed} {step}").gauss(0, 1)
                with (directory / "steps.log").open("a") as file:
                    file.write(f"{step}\n")
                log.log(step, {"place": place})
                if step % CHECKPOINT_EVERY == 0:
                    write_jsonl(state, [*done, {"step": step, "place": place}])
        write_atomic(directory / "config.json", repr(place))

    def _go_wrong(self, directory: Path) -> None:
        before = directory / "resume" / "fault"
        if not self.fault or (before.exists() and self.fault != "always killed"):
            return
        before.touch()
        if self.fault in ("killed", "always killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "disk full":
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / "resume"))
        if self.fault == "slow":
            _wait_for(directory.parent, "after-b-*/stage.json")
        if self.fault == "waits":
            _wait_for(directory.parent, "go")
        if self.fault == "raises":
            raise OSError("the server is gone")


def _wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 40
    while not list(folder.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(checkpoint: Checkpoint) -> float:
    return float((checkpoint.path / "config.json").read_text())


def walks(**faults: str) -> list[Node]:
    """`a` and `b`, then `ab` from both, then `last`; each with the fault that is named for it."""
    a, b = (
        Node.of(Walk, label, (), seed, faults.get(label, "")) for seed, label in enumerate("ab")
    )
    both = Node.of(Walk, "ab", (a, b), 2, faults.get("ab", ""))
    return [a, b, both, Node.of(Walk, "last", (both,), 3, faults.get("last", ""))]


def finish(
    path: Path,
    executor: Executor | None,
    nodes: list[Node],
    store: Store | None = None,
    **options,
) -> dict[str, Stage]:
    """The finished stages of `nodes` in the run directory at `path`."""
    run = RunDirectory(path, store=store)
    with run.opened("recipe"):
        Graph(run, executor=executor, **options).finish(nodes)
    return {stage.label: stage for stage in run.finished}


def outputs(stages: dict[str, Stage]) -> dict[str, str]:
    return {label: stage.record["output"] for label, stage in stages.items()}


def steps_of(directory: Path) -> list[int]:
    """The steps that were computed, in order, those that a fault undid included."""
    return [int(line) for line in (directory / "steps.log").read_text().split()]
