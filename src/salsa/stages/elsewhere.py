"""Jobs that an executor runs: started, followed, and started again when they are lost."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from salsa.errors import WorkerLost, WorkFailed
from salsa.runtime.executors import Executor, Request, Task
from salsa.runtime.tracking import Followed, Status, View, say
from salsa.stages.directory import Place, RunDirectory
from salsa.stages.jobs import Job

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

LOOK_SECONDS = 1.0
"""Between two looks at what the jobs publish."""
VISIBLE_SECONDS = 60.0
"""So long a network file system may take to show here what was finished elsewhere."""

N = TypeVar("N")


@dataclass
class _Job(Generic[N]):
    node: N
    place: Place
    task: Task
    followed: Followed
    lost: int = 0


class Elsewhere(Generic[N]):
    """Jobs that an executor runs: started, followed, restarted when lost."""

    def __init__(
        self,
        executor: Executor,
        run: RunDirectory,
        work: Callable[..., None],
        view: View,
        retries: int,
    ) -> None:
        """`work` is `performing.perform`, with what it needs besides a job."""
        self._executor, self._run, self._work = executor, run, work
        self._view, self._retries = view, retries
        self.running: dict[Any, _Job[N]] = {}

    @property
    def room(self) -> int | None:
        """How many more may be started; None for any number."""
        slots = self._executor.slots
        return None if slots is None else slots - len(self.running)

    def start(
        self, node: N, place: Place, job: Job, engine: "Engine | None", request: Request
    ) -> None:
        """Send a job off."""
        store = self._run.store
        task = Task(
            label=job.label,
            request=request,
            work=self._work,
            args=(place, job, store),
            engine=engine,
            home=place.partial,
            working_directory=None if store else os.getcwd(),
        )
        if store is None:  # else nobody needs to see the same directory
            task = task.issued()
        followed = Followed(place.partial, job.label, self._view)
        self.running[self._executor.submit(task)] = _Job(node, place, task, followed)

    def ended(self) -> Iterator[tuple[N, Place]]:
        """What has ended within the next moment.

        Raises:
            SalsaError: a job failed, or was lost more often than it may be.
        """
        handle = self._executor.wait(list(self.running), LOOK_SECONDS)
        for job in self.running.values():
            job.followed.look()
        if handle is None:
            return
        job = self.running.pop(handle)
        try:
            self._executor.outcome(handle).get()
        except WorkerLost as error:
            self._again(job, error)
            return
        except Exception:
            job.followed.look()
            self._view.show(Status(job.task.label, "failed"))
            raise
        self._wait_until_visible(job.place)
        job.followed.look(job.place.final)
        yield job.node, job.place

    def _again(self, job: _Job[N], error: WorkerLost) -> None:
        label, job.lost = job.task.label, job.lost + 1
        if job.lost > self._retries:
            self._view.show(Status(label, "failed"))
            raise WorkFailed(
                f"{label}: lost {job.lost} times, the last time because {error}. Finished stages and its last "
                "checkpoint are kept: run the same command again, with more memory or fewer jobs at once if that is "
                "the cause."
            ) from error
        say(
            f"{label}: lost, {error}; it goes on from its last checkpoint ({job.lost} of {self._retries})"
        )
        self.running[self._executor.submit(job.task)] = job

    def _wait_until_visible(self, place: Place) -> None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while self._run.find(place) is None:
            if time.monotonic() > deadline:
                raise WorkFailed(
                    f"{place.final}: was finished elsewhere and is not to be seen here. Is it on a path that all "
                    "machines share?"
                )
            time.sleep(0.2)

    @staticmethod
    def only(executor: Executor, task: Task) -> Any:
        """The value of one task that belongs to no stage."""
        handle = executor.submit(task)
        while executor.wait([handle], LOOK_SECONDS) is None:
            pass
        return executor.outcome(handle).get()
