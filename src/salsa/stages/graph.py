"""The lazy graph of stages: nodes say what they need and how to make their job; nothing is loaded to enumerate them.

A finished stage is found by its job's identity and skipped. Others run as soon as what they need is there, `jobs` of
them at once, each in a process of its own if `jobs` > 1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from salsa.artifacts import Checkpoint
from salsa.errors import ConfigError
from salsa.runtime.executors import Executor
from salsa.runtime.tracking import say
from salsa.stages.directory import Job, Place, RunDirectory, Stage, perform

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, eq=False)
class Node:
    """One stage to be: what it needs, and the job that its inputs make. A node is equal to itself only."""

    label: str
    needs: tuple["Node", ...]
    make: Callable[..., Job | Checkpoint]
    """Called with the checkpoint of each of `needs`; a checkpoint that is there already needs no job."""


class Graph:
    """The stages of one run directory while they are being finished."""

    def __init__(
        self,
        run: RunDirectory,
        executor: Executor,
        *,
        precision: str = "auto",
        before_work: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_work` is called once, before the first job that is not finished runs."""
        self.run, self.executor, self.precision = run, executor, precision
        self._before_work = before_work
        self._started = False
        self._outputs: dict[Node, Checkpoint] = {}
        self._made: dict[Node, Job | Checkpoint] = {}

    def finish(self, wanted: Iterable[Node]) -> None:
        """Finish `wanted` and all that they need.

        Raises:
            SalsaError: an input is bad or the work failed; finished stages are kept.
        """
        waiting = [node for node in _closure(wanted) if node not in self._outputs]
        running: dict[Any, tuple[Node, Place]] = {}
        while waiting or running:
            self._submit_ready(waiting, running)
            if running:
                handle = self.executor.wait(list(running))
                node, place = running.pop(handle)
                self._keep(node, place, reused=False)

    def __getitem__(self, node: Node) -> Checkpoint:
        """What a finished node wrote."""
        return self._outputs[node]

    def _submit_ready(self, waiting: list[Node], running: dict[Any, tuple[Node, Place]]) -> None:
        """Skip what is finished and start what is ready, in order, as long as there is room."""
        progressed = True
        while progressed:
            progressed = False
            for node in list(waiting):
                if not all(need in self._outputs for need in node.needs):
                    continue
                made = self._make(node)
                if isinstance(made, Checkpoint):
                    self._outputs[node] = made
                elif (stage := self._finished(made)) is not None:
                    self._record(node, stage)
                elif len(running) < self.executor.slots:
                    place = self._place(made)
                    running[self._submit(place, made)] = node, place
                else:
                    continue
                waiting.remove(node)
                progressed = True

    def _make(self, node: Node) -> Job | Checkpoint:
        """The node's job, made once."""
        if node not in self._made:
            self._made[node] = node.make(*(self._outputs[need] for need in node.needs))
        return self._made[node]

    def _finished(self, job: Job) -> Stage | None:
        """The job's finished stage; with precision `auto`, in whichever arithmetic it was computed."""
        choices = PRECISIONS if self.precision == "auto" else (self.precision,)
        stages = [self.run.find(self.run.place(job, choice)) for choice in choices]
        finished = [stage for stage in stages if stage is not None]
        return max(finished, key=lambda stage: stage.record["started"], default=None)

    def _place(self, job: Job) -> Place:
        """Where the job will be computed; what was begun in one arithmetic is not continued in another."""
        if not self._started:
            self._before_work()
            self._started = True
        if not job.needs_engine:
            return self.run.place(job, "")
        engine = self.executor.resolve(self.precision)
        place = self.run.place(job, engine.precision)
        for other in set(PRECISIONS) - {engine.precision}:
            begun = self.run.place(job, other).partial
            if self.precision == "auto" and begun.exists() and not place.partial.exists():
                raise ConfigError(
                    f"{begun}: {job.label} was begun in {other}, and here auto means {engine.precision} "
                    f"({engine.reason}). Set model.precision={other} to go on from its checkpoint, or delete "
                    f"that directory to begin anew."
                )
        return place

    def _submit(self, place: Place, job: Job) -> Any:
        if not job.needs_engine:
            return self.executor.submit(perform, place, job, None)
        return self.executor.submit(perform, place, job, self.executor.resolve(self.precision))

    def _keep(self, node: Node, place: Place, *, reused: bool) -> None:
        stage = self.run.find(place)
        assert stage is not None  # the executor raises if the work failed
        self._record(node, Stage(stage.label, stage.path, stage.record, reused))

    def _record(self, node: Node, stage: Stage) -> None:
        self.run.finished.append(stage)
        self._outputs[node] = stage.checkpoint
        how = "reused" if stage.reused else f"done in {stage.record['seconds']:.0f} s"
        say(f"{stage.label}: {how}")


def _closure(wanted: Iterable[Node]) -> list[Node]:
    """The wanted nodes and all that they need, what is needed first."""
    order: dict[Node, None] = {}

    def visit(nodes: Sequence[Node]) -> None:
        for node in nodes:
            if node not in order:
                visit(node.needs)
                order[node] = None

    visit(list(wanted))
    return list(order)
