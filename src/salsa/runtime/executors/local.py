"""Jobs on this machine: one after another in this process, or several processes with the threads divided."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from salsa.runtime.executors import Executor

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine


def local_executor(jobs: int, threads: int | None) -> Executor:
    """The executor of `jobs` jobs at once; `threads` are shared among them."""
    return InProcess(threads) if jobs == 1 else ProcessPool(jobs, threads)


class InProcess:
    """One job at a time, here; `submit` returns when its work is done."""

    slots = 1

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self.resolve = cache(self._resolve)

    def _resolve(self, precision: str) -> "Engine":
        from salsa.runtime.engine import Engine

        return Engine.create(precision, threads=self._threads)

    def submit(
        self, work: Callable[..., None], place: Any, job: Any, engine: "Engine | None"
    ) -> Any:
        """Do the work now."""
        work(place, job, engine)
        return object()

    def wait(self, handles: Sequence[Any]) -> Any:
        """Whatever was submitted has ended."""
        return handles[0]

    def close(self) -> None:
        """Nothing runs."""


class ProcessPool:
    """`jobs` processes with their share of the threads; each is started anew (spawn), so that no state leaks in."""

    def __init__(self, jobs: int, threads: int | None) -> None:
        self.slots = jobs
        self._threads = max(1, (threads or os.cpu_count() or 1) // jobs)
        self._pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        self.resolve = cache(self._resolve)

    def _resolve(self, precision: str) -> "Engine":
        from salsa.runtime.engine import Engine

        return Engine.create(precision, threads=self._threads)

    def submit(
        self, work: Callable[..., None], place: Any, job: Any, engine: "Engine | None"
    ) -> "Future[None]":
        """Start the work in a process."""
        return self._pool.submit(_in_worker, self._threads, work, place, job, engine)

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
    """What a worker process does with a call: prepare itself like the process that sent it."""
    if engine is not None:
        from salsa.runtime.engine import Engine
        from salsa.runtime.tracking import quiet_libraries

        quiet_libraries()
        engine = replace(Engine.create(engine.precision, threads=threads), reason=engine.reason)
    work(place, job, engine)
