"""Which executor a recipe asks for, and what each job asks of a machine."""

import os
from pathlib import Path

from salsa.config.engine import EngineConfig, SlurmConfig
from salsa.runtime.executors import Executor, Request
from salsa.stages.jobs import DPOJob, Job, RewardJob, RLJob, SFTJob, directories_of
from salsa.untrusted import parameter_count

_PROCESS_GIB = 1.5
"""A Python process with torch and transformers, before any model."""
_BYTES_FROZEN, _BYTES_TRAINED = 4, 18
"""Per parameter: fp32; with gradient, two Adam moments and a bf16 copy."""
_ACTIVATIONS = 1.5
"""Factor for what the planner does not know yet."""


def executor_of(engine: EngineConfig, jobs: int | None, run: Path) -> Executor | None:
    """The executor of the section, `jobs` at once (its own number if not given); None: all runs in this process.

    Raises:
        ConfigError: its package is not installed, or its cluster does not answer.
    """
    jobs = jobs or engine.jobs
    if engine.executor == "ray":
        from salsa.runtime.executors.ray_cluster import RayCluster

        return RayCluster(engine.address, jobs, ship=Path.cwd() if engine.artifacts else None)
    if engine.executor == "slurm":
        from salsa.runtime.executors.slurm import Slurm

        asked = engine.slurm or SlurmConfig()
        return Slurm(run / "slurm", slots=jobs, **asked.model_dump())
    if jobs is None or jobs == 1:
        return None
    from salsa.runtime.executors.local import ProcessPool

    return ProcessPool(jobs)


def request_of(job: Job, engine: EngineConfig, executor: Executor | None) -> Request:
    """What the job asks for. On this machine: its share of the processors; elsewhere also GPUs and memory."""
    if executor is None or not executor.remote:
        slots = (executor.slots if executor else None) or 1
        return Request(cpus=max(1, (engine.threads or os.cpu_count() or 1) // slots))
    cpus, memory = engine.threads or 1, engine.memory_gib or _memory_gib(job)
    gpus = engine.gpus if job.needs_engine else 0
    processes = engine.processes if getattr(job, "can_be_divided", False) else 1
    return Request(cpus=cpus, gpus=gpus, memory_gib=memory, processes=processes)


def _memory_gib(job: Job) -> float:
    """An estimate from the parameters of the job's models, as far as they can be counted."""
    models = {path: parameter_count(path) for path in directories_of(job)}
    counts = [count for count in models.values() if count is not None]
    trains = {SFTJob: 1, RewardJob: 1, DPOJob: 1, RLJob: 2}.get(type(job), 0)
    total = _BYTES_FROZEN * sum(counts) + _BYTES_TRAINED * trains * max(counts, default=0)
    return round(_PROCESS_GIB + _ACTIVATIONS * total / 2**30, 2)
