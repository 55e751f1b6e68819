"""The lazy graph of stages: nodes say what they need and how to make their job; nothing is loaded to enumerate them.

A finished stage is found by its job's identity and skipped. Others run one after another in this process, or, with an
executor, elsewhere and at once as soon as what they need is there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from salsa.artifacts import Checkpoint
from salsa.config.expressions import ReferenceRule
from salsa.errors import CheckpointError, ConfigError
from salsa.rewards import RewardSource
from salsa.runtime.executors import Executor, Request, Task
from salsa.runtime.launch import TIMEOUT
from salsa.runtime.tracking import Lines, Status, View, say
from salsa.stages.directory import Place, RunDirectory, Stage
from salsa.stages.elsewhere import Elsewhere
from salsa.stages.jobs import Job
from salsa.stages.performing import measure, perform

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, eq=False)
class Node:
    """One stage to be: what it needs, and the job that its inputs make. A node is equal to itself only."""

    label: str
    needs: tuple["Node", ...]
    make: Callable[..., Job | Checkpoint]
    """Called with the checkpoint of each of `needs`; a checkpoint that is there already needs no job."""

    @classmethod
    def of(cls, kind: Callable[..., Job], label: str, *fields: Any, **named: Any) -> "Node":
        """The node of the job `kind(label, …)`: the fields have nodes wherever the job has checkpoints."""
        needs: dict[Node, None] = {}
        _replaced((fields, named), needs.setdefault)

        def make(*made: Checkpoint) -> Job:
            outputs = dict(zip(needs, made, strict=True))
            own, others = _replaced((fields, named), outputs.__getitem__)
            return kind(label, *own, **others)

        return cls(label, tuple(needs), make)


def _replaced(value: Any, of: Callable[[Node], Any]) -> Any:
    """`value` with what `of` gives for each node in it, in tuples, dictionaries and dataclasses too."""
    match value:
        case Node():
            return of(value)
        case tuple():
            return tuple(_replaced(one, of) for one in value)
        case dict():
            return {key: _replaced(one, of) for key, one in value.items()}
        case ReferenceRule() | RewardSource():
            return replace(value, **_replaced(vars(value), of))
    return value


class Graph:
    """The stages of one run directory while they are being finished."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        precision: str = "auto",
        threads: int | None = None,
        executor: Executor | None = None,
        request: Callable[[Job], Request] = lambda job: Request(),
        retries: int = 2,
        processes: int = 1,
        timeout: float = TIMEOUT,
        before_work: Callable[[], None] = lambda: None,
        view: View | None = None,
    ) -> None:
        """Jobs run here, or, with an `executor`, where it chooses.

        Args:
            run: the run directory.
            precision: as of `model.precision`.
            threads: CPU threads of this process.
            executor: runs jobs elsewhere.
            request: what a job asks the executor for.
            retries: how often a job is started again that an executor lost.
            processes: do a job that can be divided, on one machine.
            timeout: seconds that these wait for each other.
            before_work: called once, before the first job that runs.
            view: is told where every stage stands.
        """
        self._perform = partial(perform, processes=processes, timeout=timeout)
        self.run, self.precision, self.executor = run, precision, executor
        self._threads, self._request, self._retries = threads, request, retries
        self._before_work = before_work
        self._view: View = view or Lines()
        self._the_engine: Engine | None = None
        self._outputs: dict[Node, Checkpoint] = {}

    def __getitem__(self, node: Node) -> Checkpoint:
        """What a finished node wrote."""
        return self._outputs[node]

    def made_from(self, nodes: Iterable[Node]) -> dict[str, str]:
        """Label → output digest of all that finished `nodes` needed, they themselves not included."""
        own = list(nodes)
        needed = [node for node in _closure(own) if node not in own]
        return {node.label: self._outputs[node].digest for node in needed}

    def finish(self, wanted: Iterable[Node]) -> None:
        """Finish `wanted` and all that they need.

        Raises:
            SalsaError: an input is bad or the work failed; finished stages are kept.
        """
        waiting = [node for node in _closure(wanted) if node not in self._outputs]
        for node in waiting:
            self._view.show(Status(node.label, "waiting"))
        if self.executor is not None:
            self._finish_elsewhere(waiting, self.executor)
            return
        for node in waiting:
            if (job := self._skip(node)) is not None:
                place, engine = self._begin(job)
                self._view.show(Status(node.label, "running"))
                self._perform(place, job, self.run.store, engine)
                self._end(node, place)

    def _finish_elsewhere(self, waiting: list[Node], executor: Executor) -> None:
        """As `finish`, as many jobs at once as the executor has slots."""
        jobs: dict[Node, Job] = {}
        elsewhere: Elsewhere[Node] = Elsewhere(
            executor, self.run, self._perform, self._view, self._retries
        )
        while waiting or jobs or elsewhere.running:
            for node in [n for n in waiting if all(need in self._outputs for need in n.needs)]:
                waiting.remove(node)
                if (job := self._skip(node)) is not None:
                    jobs[node] = job
            for node in list(jobs)[: elsewhere.room]:
                job = jobs.pop(node)
                place, engine = self._begin(job)
                elsewhere.start(node, place, job, engine, self._request(job))
            if elsewhere.running:
                for node, place in elsewhere.ended():
                    self._end(node, place)

    def remaining(self, wanted: Iterable[Node]) -> dict[str, str]:
        """Digest → label of the jobs that are left for `wanted`; nothing is run.

        The output of a job that has not run is known by that job's digest, so these digests name no directory, but
        what two recipes share has one digest in both.
        """
        left: dict[str, str] = {}
        for node in _closure(wanted):
            needed = [self._outputs[need] for need in node.needs]
            try:
                made = node.make(*needed)
            except CheckpointError:
                if not any(checkpoint.digest in left for checkpoint in needed):
                    raise
                made = needed[0]  # a model that the job will leave beside its output
            if not isinstance(made, Checkpoint):
                if (stage := self._finished(made)) is not None:
                    made = stage.checkpoint
                else:
                    place = self.run.place(made, "")
                    left[place.identity["digest"]] = made.label
                    made = Checkpoint(place.final, place.identity["digest"])
            self._outputs[node] = made
        return left

    def _skip(self, node: Node) -> Job | None:
        """The node's job, if there is anything left to do."""
        job = node.make(*(self._outputs[need] for need in node.needs))
        if isinstance(job, Checkpoint):
            self._outputs[node] = job
        elif (stage := self._finished(job)) is not None:
            unlogged = job.identity()["inputs"].keys() - stage.record["inputs"].keys()
            self._record(node, stage, unlogged)
        else:
            return job
        return None

    def _finished(self, job: Job) -> Stage | None:
        """The job's finished stage, if any; `auto` takes one in any arithmetic.

        One that only logged other things will do, so an arm or a score more makes no arm train again.
        """
        choices = PRECISIONS if self.precision == "auto" else (self.precision,)
        places = {place.final: place for place in (self.run.place(job, p) for p in choices)}
        exact, alike = self.run.find, partial(self.run.find_alike, decides=job.decides)
        for find in (exact, alike):
            if finished := [stage for p in places.values() if (stage := find(p)) is not None]:
                return max(finished, key=lambda stage: stage.record["started"])
        return None

    def _begin(self, job: Job) -> tuple[Place, "Engine | None"]:
        """Where the job will be computed and by what; what was begun in one arithmetic stays in it."""
        self._before_work()
        self._before_work = lambda: None
        if not job.needs_engine:
            return self.run.place(job, ""), None
        engine = self.engine(self._request(job))
        place = self.run.place(job, engine.precision)
        (other,) = set(PRECISIONS) - {engine.precision}
        begun = self.run.place(job, other)
        if place.partial.exists() or not begun.partial.exists():
            return place, engine
        if self.precision != "auto":
            raise ConfigError(
                f"{begun.partial}: {job.label} was begun in {other}, and model.precision={self.precision}. Set "
                f"model.precision={other} to go on from its checkpoint, or delete that directory to begin anew."
            )
        say(f"{job.label}: goes on in {other}, as it was begun, and so does what comes after it")
        self._the_engine = replace(engine, precision=other, reason="as it was begun")  # type: ignore[arg-type]
        return begun, self._the_engine

    def engine(self, request: Request | None = None) -> "Engine":
        """Made before the first job that computes with torch.

        `auto` is what was measured when the run began, for its arms are compared; in a new run it is measured: by a
        worker if they differ from this process.
        """
        if self._the_engine is None:
            begun = self.run.precision() if self.precision == "auto" else None
            precision = begun or self.precision
            remote = self.executor if self.executor and self.executor.remote else None
            if remote and precision == "auto":
                request = request or Request()
                task = Task("precision", request, measure, (request.cpus,))
                self._the_engine = Elsewhere.only(remote, task)
            else:
                from salsa.runtime.engine import Engine

                made = Engine.create(precision, threads=self._threads)
                self._the_engine = replace(made, reason="as the run was begun") if begun else made
            say(f"precision: {self._the_engine.precision} ({self._the_engine.reason})")
            if not remote and (warning := self._the_engine.emulation_warning()):
                say(warning)
        return self._the_engine

    def _end(self, node: Node, place: Place) -> None:
        stage = self.run.find(place)
        assert stage is not None  # the work raised nothing
        self._record(node, replace(stage, reused=False))

    def _record(self, node: Node, stage: Stage, unlogged: Iterable[str] = ()) -> None:
        self.run.finished.append(stage)
        self._outputs[node] = stage.checkpoint
        self._view.show(Status(node.label, "reused" if stage.reused else "done"))
        how = "reused" if stage.reused else f"done in {stage.record['seconds']:.0f} s"
        if unlogged:
            how += f"; trained when {', '.join(sorted(unlogged))} was not logged"
        say(f"{stage.label}: {how}")


def _closure(wanted: Iterable[Node]) -> list[Node]:
    """The wanted nodes and all that they need, what is needed first."""
    order: dict[Node, None] = {}

    def visit(nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node not in order:  # what many nodes need is walked once
                visit(node.needs)
                order[node] = None

    visit(wanted)
    return list(order)
