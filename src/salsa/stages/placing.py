"""Which executor a recipe asks for, and what each job asks of a machine."""

import os
from pathlib import Path

from salsa.config import Recipe
from salsa.config.engine import EngineConfig, SlurmConfig
from salsa.errors import ConfigError
from salsa.planner.estimate import planned_stages
from salsa.planner.hardware import GIB, hardware_of
from salsa.planner.memory import LIBRARIES
from salsa.planner.shapes import shape_of
from salsa.runtime.executors import Executor, Request
from salsa.stages.jobs import DPOJob, Job, RewardJob, RLJob, SFTJob

SPARE = GIB
"""On top of what is planned: other builds of the libraries, reading and hashing files."""
_LOADING_BYTES = 8
"""Of the machine's own memory, per parameter, where a GPU computes: fp32 weights on their way, and those that wait."""


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


def request_of(job: Job, recipe: Recipe, executor: Executor | None) -> Request:
    """What the job asks for. On this machine: its share of the processors; elsewhere also GPUs and memory."""
    engine = recipe.engine
    if executor is None or not executor.remote:
        slots = (executor.slots if executor else None) or 1
        return Request(cpus=max(1, (engine.threads or os.cpu_count() or 1) // slots))
    gpus = engine.gpus if job.needs_engine else 0
    return Request(
        cpus=engine.threads or 1,
        gpus=gpus,
        memory_gib=engine.memory_gib or _memory_gib(job, recipe, gpus),
        processes=engine.processes if job.can_be_divided else 1,
    )


def _memory_gib(job: Job, recipe: Recipe, gpus: int) -> float | None:
    """What the planner says that a process of this kind of job needs; None if it does not know the model's family.

    Arms are not told apart: an RL job asks for what the largest needs. Stages that only generate or score count as
    evaluation, which holds the most models of them.
    """
    try:
        shape, stages = shape_of(recipe.model.path), planned_stages(recipe, hardware_of("cpu:1"))
    except ConfigError:
        return None
    peaks = {stage.name: stage.peak.total for stage in stages}
    if not job.needs_engine:  # a soup is streamed, a base model copied
        bytes_needed = LIBRARIES
    elif gpus:
        bytes_needed = LIBRARIES + _LOADING_BYTES * shape.parameters
    elif isinstance(job, RLJob | DPOJob):
        bytes_needed = max(peaks[arm] for arm in recipe.rl.arms)
    else:
        bytes_needed = peaks[{SFTJob: "sft", RewardJob: "reward"}.get(type(job), "eval")]
    return round((bytes_needed + SPARE) / GIB, 2)
