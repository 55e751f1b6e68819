"""Several processes on this machine, the threads divided among them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine


class ProcessPool:
    """Runs `slots` jobs at once, in processes that are started anew (spawn), so that no state of this one leaks in."""

    def __init__(self, jobs: int, threads: int | None) -> None:
        self.slots = jobs
        self.threads = max(1, (threads or os.cpu_count() or 1) // jobs)
        self._pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def submit(self, work: Callable[..., None], *call: Any) -> "Future[None]":
        """Start `work(place, job, engine)` in a process."""
        return self._pool.submit(_in_worker, self.threads, work, *call)

    def wait(self, handles: Sequence["Future[None]"]) -> "Future[None]":
        """The first that has ended; raises what it raised."""
        first = next(iter(wait(handles, return_when=FIRST_COMPLETED).done))
        first.result()
        return first

    def close(self) -> None:
        """Stop the processes; the last checkpoints of what they were at stay."""
        for process in multiprocessing.active_children():
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _in_worker(
    threads: int, work: Callable[..., None], place: Any, job: Any, engine: "Engine | None"
) -> None:
    """What a worker process does with a call: prepare itself like the process that sent it, which stops it too."""
    from salsa.runtime.tracking import plain_lines

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plain_lines()
    if engine is not None:
        from salsa.runtime.engine import Engine
        from salsa.runtime.tracking import quiet_libraries

        quiet_libraries()
        engine = replace(Engine.create(engine.precision, threads=threads), reason=engine.reason)
    work(place, job, engine)
