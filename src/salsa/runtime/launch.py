"""One job in several processes: who takes part, how they are started, and what is said when one is lost.

Two ways lead to the same work:

    engine: {processes: N}    this process starts N others for a job (torch's elastic agent, one node) and waits
    torchrun -m salsa run …   N processes are there; rank 0 runs the command line and leads, the others `follow` its
                              calls. Work that is not divided is done by rank 0 alone while they wait

A process group lasts as long as a job, and torchrun's variables are taken out of the environment, so that libraries in
work that is not divided do not look for company. Imports no torch until there is work.
"""

import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa import errors
from salsa.errors import SalsaError, WorkFailed

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

TIMEOUT = 1800.0
"""Seconds that a process waits for the others at a meeting, if nothing else is asked for."""
_GRACE = 3.0
"""Seconds in which processes that lost another one say that they are still there."""
_POLL = 0.05
_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip

SharedWork = Callable[[Any, Any, "Engine"], None]
"""`work(place, job, engine)`: picklable, and so are place and job."""


class Lost(WorkFailed):
    """Other processes of the same job do not answer."""

    def __init__(self, ranks: Sequence[int], message: str) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Member:
    """One of several processes that torchrun, or an agent of its kind, started: this one."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: Any
    """The TCPStore that they share."""

    @classmethod
    def from_environment(cls) -> "Member | None":
        """What RANK, WORLD_SIZE, … say, which are taken out; None if this process is on its own."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return None
        import torch.distributed

        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, size))
        for name in _VARIABLES:
            os.environ.pop(name, None)
        return cls(rank, size, local_rank, local_size, store)


_world: Member | None = None
"""torchrun's description of this process, read once."""
_member: Member | None = None
"""The same, set on rank 0 while the others wait for its calls."""
_calls = 0
"""Calls that were made or followed."""


def spread(
    work: SharedWork, place: Any, job: Any, engine: "Engine", *, processes: int, timeout: float
) -> None:
    """Do `work(place, job, engine)` in all processes that torchrun started, else in `processes` new ones.

    Each gets an engine that knows the others; with one process it is done here.

    Raises:
        SalsaError: what the work raised in one of them.
        WorkFailed: a process was lost, by rank.
    """
    global _calls
    if _member is not None:
        number, _calls = _calls, _calls + 1
        _member.store.set(f"call {number}", pickle.dumps((work, place, job, engine, timeout)))
        _take_part(_member, f"job {number}", work, place, job, engine, timeout)
    elif processes > 1:
        run_in_processes(work, place, job, engine, processes=processes, timeout=timeout)
    else:
        work(place, job, engine)


def run_in_processes(
    work: SharedWork,
    place: Any,
    job: Any,
    engine: "Engine",
    *,
    processes: int,
    timeout: float = TIMEOUT,
) -> None:
    """Do `work(place, job, engine)` in new `processes`, one or more, on this machine, the threads divided among them.

    All arguments are pickled. `engine` says precision and threads; each process gets one that knows the others.
    `place` is the stage's unfinished directory: what the first of them says is published there, and shown here.
    `timeout` is how long, in seconds, they wait for each other. It is no time limit on the work. Errors as of `spread`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from salsa.runtime.tracking import following

    for name in list(
        logging.root.manager.loggerDict
    ):  # the agent's words are said here, in one line
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    main_thread = threading.current_thread() is threading.main_thread()
    handlers = {
        n: signal.getsignal(n)
        for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    stopped_by: int | None = None
    with tempfile.TemporaryDirectory(prefix="salsa-") as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id=f"salsa-{os.getpid()}", max_restarts=0, local_addr="localhost", shutdown_timeout=5,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )  # fmt: skip
        try:
            with following(Path(place), str(getattr(job, "label", place))):
                elastic_launch(config, _worker)(work, place, job, engine, engine.threads, timeout)
        except ChildFailedError as failed:
            raise _reason(failed, processes) from None
        except SignalException as stop:
            stopped_by = stop.sigval
        finally:
            for number, handler in handlers.items() if main_thread else ():
                signal.signal(number, handler)
    if stopped_by is not None:
        signal.raise_signal(stopped_by)
        raise KeyboardInterrupt


@contextmanager
def leading() -> Iterator[bool]:
    """Around what only one of torchrun's processes may do: True there, or without torchrun.

    The others do their part of the leader's calls until its block ends, and get False.
    """
    global _world, _member, _calls
    _world = _world or Member.from_environment()
    if _world is None or _member is not None:
        yield True
    elif _world.rank > 0:
        _follow(_world)
        yield False
    else:
        _member = _world
        try:
            yield True
        finally:
            _member.store.set(f"call {_calls}", pickle.dumps(None))
            _member, _calls = None, _calls + 1


def led() -> int:
    """How many processes take part in what this process leads: 1 without torchrun."""
    return 1 if _member is None else _member.size


@contextmanager
def joined(engine: "Engine", member: Member, timeout: float) -> Iterator["Engine"]:
    """The engine as one of the processes that do a job together, for as long as the block lasts.

    The threads are divided among those on one machine.

    Raises:
        Lost: another process was lost, or did not come to a meeting for `timeout` seconds.
    """
    import torch
    import torch.distributed as dist

    on_cpu, threads = engine.device.type == "cpu", torch.get_num_threads()
    if not on_cpu:
        torch.cuda.set_device(member.local_rank)
    torch.set_num_threads(max(1, engine.threads // member.local_size))
    try:
        dist.init_process_group(
            "gloo" if on_cpu else "cuda:nccl,cpu:gloo", store=member.store, rank=member.rank,
            world_size=member.size, timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        yield engine.spread_over(dist.init_device_mesh(engine.device.type, (member.size,)))
    except RuntimeError as error:
        if isinstance(error, SalsaError) or not _is_lost_contact(error):
            raise
        raise _lost(member, timeout, str(error)) from error
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


def _take_part(
    member: Member,
    name: str,
    work: SharedWork,
    place: Any,
    job: Any,
    engine: "Engine",
    timeout: float,
) -> None:
    """Do this process's part of one job; each has a corner of the store to itself."""
    from torch.distributed import PrefixStore

    member = replace(member, store=PrefixStore(name, member.store))
    with joined(engine, member, timeout) as one_of_them:
        work(place, job, one_of_them)


def _follow(member: Member) -> None:
    """Do the leader's calls until there are no more."""
    global _calls
    from salsa.runtime.engine import Engine
    from salsa.runtime.tracking import mute, quiet_libraries

    _leave_signals_to_others()
    mute()
    quiet_libraries()
    while True:
        number, _calls = _calls, _calls + 1
        while not member.store.check([f"call {number}"]):
            time.sleep(_POLL)
        call = pickle.loads(member.store.get(f"call {number}"))
        if call is None:
            return
        work, place, job, engine, timeout = call
        engine = replace(
            Engine.create(engine.precision, threads=engine.threads), reason=engine.reason
        )
        try:
            _take_part(member, f"job {number}", work, place, job, engine, timeout)
        except SalsaError as error:
            if isinstance(error, Lost) and 0 in error.ranks:
                raise  # nobody else can say it
            sys.exit(1)


def _worker(
    work: SharedWork, place: Any, job: Any, engine: "Engine", threads: int, timeout: float
) -> None:
    """What a process that was started for a job does; `threads` are those of the process that started it."""
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_recorded)(work, place, job, engine, threads, timeout)


def _recorded(
    work: SharedWork, place: Any, job: Any, engine: "Engine", threads: int, timeout: float
) -> None:
    from salsa.runtime.engine import Engine
    from salsa.runtime.tracking import mute, publish, quiet_libraries

    _leave_signals_to_others()
    member = Member.from_environment()
    if member is not None and member.rank:
        mute()
    else:
        publish(Path(place), socket.gethostname())
    quiet_libraries()
    engine = replace(Engine.create(engine.precision, threads=threads), reason=engine.reason)
    if member is None:
        work(place, job, engine)
    else:
        _take_part(member, "job", work, place, job, engine, timeout)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a meeting of the processes failed, and not the work of this one."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _leave_signals_to_others() -> None:
    """Ctrl-C reaches every process of a terminal; the one that leads, or started this one, ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _lost(member: Member, timeout: float, error: str) -> Lost:
    """Which ranks do not answer a roll call through the store."""
    others = [rank for rank in range(member.size) if rank != member.rank]
    try:
        member.store.set(f"here {member.rank}", "")
        deadline = time.monotonic() + _GRACE
        while others and time.monotonic() < deadline:
            others = [rank for rank in others if not member.store.check([f"here {rank}"])]
            time.sleep(_POLL)
    except RuntimeError:
        others = [0]  # with the store, which is where the leader is
    except KeyboardInterrupt:
        pass  # torchrun has seen it too, and stops the rest
    who = f"rank {', '.join(map(str, others))} of {member.size}" if others else "the network"
    late = "Timed out" in error or "timed out" in error
    what = f"did not come to a meeting within {timeout:g} s" if late else "was lost"
    return Lost(
        others,
        f"{who} {what} (said by rank {member.rank}). What was written is intact: run again to go on from the last "
        "checkpoint. Slow rewards or models need a longer engine.timeout.",
    )


def _reason(failed: Any, size: int) -> SalsaError:
    """Why processes failed: the first that a signal ended, else what the first of them raised."""
    by_signal = {
        r: f for r, f in failed.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM
    }
    for rank, failure in by_signal.items():
        hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        return WorkFailed(
            f"rank {rank} of {size} was ended by {failure.signal_name()}{hint}. What was written is intact: run again "
            "to go on from the last checkpoint."
        )
    rank, failure = failed.get_first_failure()
    message = failure.message if isinstance(failure.message, str) else failure.message["message"]
    kind, _, text = message.partition(": ")
    known = WorkFailed if kind == Lost.__name__ else getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, SalsaError):
        return known(text)
    return WorkFailed(
        f"rank {rank} of {size} failed with exit code {failure.exitcode}: {message}. What was written is intact."
    )
