"""The machines of a Ray cluster. Experimental: run on two nodes of one machine only, with one process a job."""

import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salsa.errors import ConfigError, WorkerLost, WorkFailed
from salsa.runtime.executors.task import Outcome, Request, Task, run_task
from salsa.runtime.tracking import say

CONNECT_SECONDS = 5.0
UNPLACED_SECONDS = 10.0
"""So long a machine may be missing that is as large as a task asks for, before a person is told."""


class RayCluster:
    """Each task is one Ray task, with the CPUs, GPUs and memory that it asks for."""

    remote = True

    def __init__(
        self, address: str | None, slots: int | None = None, ship: Path | None = None
    ) -> None:
        """Join the cluster at `address`: `host:port`, `auto` for the one of this machine, `local` to start one here.

        `ship` is a directory that Ray copies to the machines (without `runs/`), where they do not share it.

        Raises:
            ConfigError: Ray is not installed, or no cluster answers.
        """
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "engine.executor=ray: Ray is not installed here. Run: pip install 'salsa-rlhf[ray]'"
            ) from error
        address = address or "auto"
        _answers(address)
        environment = {"working_dir": str(ship), "excludes": ["runs/", ".git/"]} if ship else None
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address, runtime_env=environment, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{_no_cluster(address)} ({reason})") from error
        self._ray, self.slots = ray, slots
        self._labels: dict[Any, tuple[Task, float]] = {}

    def submit(self, task: Task) -> Any:
        """Queue the task for the first machine that has room; retries are the caller's, so Ray makes none."""
        request = task.request
        options: dict[str, Any] = {
            "name": task.label,
            "num_cpus": request.cpus * request.processes,
            "num_gpus": request.gpus * request.processes,
            "max_retries": 0,
        }
        if request.memory_gib is not None:
            options["memory"] = int(request.memory_gib * request.processes * 2**30)
        handle = self._ray.remote(run_task).options(**options).remote(task)
        self._labels[handle] = task, time.monotonic()
        return handle

    def wait(self, handles: Sequence[Any], seconds: float) -> Any | None:
        """The first that has ended within `seconds`."""
        done, _ = self._ray.wait(list(handles), num_returns=1, timeout=seconds)
        if done:
            return done[0]
        self._say_what_fits_nowhere()
        return None

    def outcome(self, handle: Any) -> Outcome:
        """What the task returned or raised; WorkerLost if its process or machine is gone."""
        self._labels.pop(handle, None)
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:  # our own errors come in the outcome
            raise WorkFailed(
                f"engine.executor=ray: a worker could not begin ({str(error).strip().splitlines()[-1]}). Is the same "
                "version of salsa-rlhf installed on every machine?"
            ) from error
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(_reason(error)) from error

    def close(self) -> None:
        """Stop what still runs and leave the cluster."""
        for handle in self._labels:
            self._ray.cancel(handle, force=True)
        self._ray.shutdown()

    def _say_what_fits_nowhere(self) -> None:
        """Tell a person once of a task that no machine of the cluster is large enough for; it waits for one."""
        for handle, (task, since) in list(self._labels.items()):
            if time.monotonic() - since > UNPLACED_SECONDS:
                nodes = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
                if not any(_fits(task.request, node) for node in nodes):
                    say(
                        f"{task.label}: waits for a machine with {task.request}; the cluster has none so large "
                        f"({'; '.join(map(_size, nodes))}). Add one, or ask for less."
                    )
                self._labels[handle] = task, float("inf")


def _answers(address: str) -> None:
    """ConfigError if nothing listens at `host:port`; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        if address not in ("auto", "local"):
            raise ConfigError(f"engine.address={address}: write host:port, auto or local.")
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_no_cluster(address)} ({error})") from error


def _no_cluster(address: str) -> str:
    return (
        f"engine.address={address}: no Ray cluster answers there. Start one (ray start --head), give the address "
        "that it prints, or set engine.executor=local"
    )


def _fits(request: Request, node: dict[str, float]) -> bool:
    count = request.processes
    return (
        node.get("CPU", 0) >= request.cpus * count
        and node.get("GPU", 0) >= request.gpus * count
        and node.get("memory", 0) >= (request.memory_gib or 0) * count * 2**30
    )


def _size(node: dict[str, float]) -> str:
    memory = node.get("memory", 0) / 2**30
    return f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs, {memory:.1f} GiB"


def _reason(error: Exception) -> str:
    """Ray's report of a lost worker in a few words."""
    name, words = type(error).__name__, (str(error).strip() or "no reason given").splitlines()[0]
    return {
        "OutOfMemoryError": "Ray stopped it, its machine was running out of memory",
        "NodeDiedError": "its machine is gone",
        "WorkerCrashedError": "its process ended without a word",
    }.get(name, f"{name}: {words}")
