"""Several processes on this machine, the processors divided among them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from salsa.errors import WorkerLost
from salsa.runtime.executors.task import Outcome, Task, run_task


class ProcessPool:
    """Runs `slots` tasks at once, in processes that are started anew (spawn), so that no state of this one leaks in.

    Every slot is a pool of its own: a process that the system kills takes no other down.
    """

    slots: int | None
    remote = False

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Outcome], ProcessPoolExecutor] = {}

    def submit(self, task: Task) -> "Future[Outcome]":
        """Start the task in a process that is free, or in a new one."""
        pool = self._free.pop() if self._free else _one_process()
        try:
            handle = pool.submit(run_task, task)
        except BrokenProcessPool:  # it was killed while it waited
            pool = _one_process()
            handle = pool.submit(run_task, task)
        self._busy[handle] = pool
        return handle

    def wait(
        self, handles: "Sequence[Future[Outcome]]", seconds: float
    ) -> "Future[Outcome] | None":
        """The first that has ended within `seconds`."""
        done = wait(handles, timeout=seconds, return_when=FIRST_COMPLETED).done
        return next(iter(done), None)

    def outcome(self, handle: "Future[Outcome]") -> Outcome:
        """What the task returned or raised; WorkerLost if its process is gone."""
        pool = self._busy.pop(handle)
        try:
            outcome = handle.result()
        except BrokenProcessPool as error:
            pool.shutdown(wait=False)
            raise WorkerLost(
                "its process ended without a word (one that needs more memory than there is gets killed)"
            ) from error
        self._free.append(pool)
        return outcome

    def close(self) -> None:
        """Stop the processes; the last checkpoints of what they were at stay."""
        pools = (*self._free, *self._busy.values())
        for pool in pools:  # terminate_workers() is in Python 3.14 only
            for process in tuple((pool._processes or {}).values()):
                process.terminate()
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._free, self._busy = [], {}


def _one_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_start)


def _start() -> None:
    """A worker ends with the process that started it, however that ends: it must not go on writing beside the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
