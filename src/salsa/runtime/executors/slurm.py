"""SLURM through submitit. Experimental: run on one node only, with one process a job."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa.errors import ConfigError, WorkerLost
from salsa.runtime.executors.task import Outcome, Task, run_task

MOST_TIMEOUTS = 1000
"""So often a job that reaches its time limit is queued again; every time it goes on from its last checkpoint."""


class Slurm:
    """Each task is one job of SLURM, which queues it again when it is preempted or reaches its time limit.

    Jobs go on if the process that submitted them dies; the next one to submit the same task finds it by its number.
    """

    remote = True

    def __init__(
        self,
        folder: Path,
        *,
        slots: int | None = None,
        partition: str | None = None,
        hours: float = 24.0,
        account: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
    ) -> None:
        """Submit from this machine, at most `slots` jobs at once; options as of sbatch, `parameters` are further ones.

        Each job's output goes to `folder`, on a path that all machines share. `cluster` is what submitit calls it:
        `local` runs jobs as processes here, without a queue. ConfigError without submitit or SLURM.
        """
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "engine.executor=slurm: submitit is not installed here. Run: pip install 'salsa-rlhf[slurm]'"
            ) from error
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.slots, self._submitit, self._cluster = slots, submitit, cluster
        limit = {} if cluster == "local" else {"slurm_max_num_timeout": MOST_TIMEOUTS}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **limit)
        except RuntimeError as error:
            raise ConfigError(
                "engine.executor=slurm: there is no SLURM here (srun is not found). Run salsa where sbatch works, or "
                "set engine.executor=local."
            ) from error
        self._options: dict[str, Any] = {"timeout_min": max(1, round(hours * 60)), "nodes": 1}
        if cluster == "slurm":
            self._options |= {
                "slurm_partition": partition,
                "slurm_account": account,
                "slurm_additional_parameters": {"requeue": True} | dict(parameters or {}),
            }
        self._jobs: list[Any] = []

    def submit(self, task: Task) -> Any:
        """Queue the task as a job, unless one that was submitted before is still queued or running."""
        if (job := self._submitted_before(task)) is None:
            request = task.request
            self._executor.update_parameters(
                name="".join(c if c.isalnum() else "-" for c in task.label),
                tasks_per_node=1,  # which starts the processes of the job
                cpus_per_task=request.cpus * request.processes,
                gpus_per_node=request.gpus * request.processes or None,
                mem_gb=request.memory_gib and request.memory_gib * request.processes,
                **self._options,
            )
            try:
                job = self._executor.submit(_Resumable(), task)
            except (
                self._submitit.core.utils.FailedSubmissionError,
                self._submitit.core.utils.FailedJobError,
            ) as error:
                raise ConfigError(
                    f"{task.label}: sbatch refused it: {_last_line(error)}"
                ) from error
            if task.home is not None:  # gone, if a job that seemed lost has finished the stage
                _number_file(task.home).parent.mkdir(parents=True, exist_ok=True)
                _number_file(task.home).write_text(job.job_id, encoding="utf-8")
        self._jobs.append(job)
        return job

    def wait(self, handles: Sequence[Any], seconds: float) -> Any | None:
        """The first that has ended within `seconds`; that a job was lost shows when sacct is asked, rarely."""
        deadline = time.monotonic() + seconds
        while True:
            for job in handles:
                if job.done():
                    return job
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)

    def outcome(self, handle: Any) -> Outcome:
        """What the task returned or raised; WorkerLost if the job ended without a word."""
        self._jobs.remove(handle)
        try:
            outcome: Outcome = handle.result()
        except self._submitit.core.utils.UncompletedJobError as error:
            state = handle.state
            handle.cancel(check=False)  # SLURM may be about to queue it again by itself
            raise WorkerLost(
                f"SLURM's job {handle.job_id} ended without a result (state {state})"
            ) from error
        return outcome

    def close(self) -> None:
        """Cancel what is queued or running."""
        for job in self._jobs:
            job.cancel(check=False)

    def _submitted_before(self, task: Task) -> Any | None:
        """The job that another process submitted for the same stage, if SLURM still has it."""
        if self._cluster != "slurm" or task.home is None or not _number_file(task.home).exists():
            return None
        number = _number_file(task.home).read_text(encoding="utf-8")
        job: Any = self._submitit.SlurmJob(self._executor.folder, number)
        known = job.state != "UNKNOWN"  # asks sacct
        return job if known and not job.watcher.is_done(number, mode="cache") else None


class _Resumable:
    """What submitit pickles, and asks for what to run next when SLURM takes the machine away."""

    def __call__(self, task: Task) -> Outcome:
        """Run the task."""
        return run_task(task)

    def checkpoint(self, task: Task) -> Any:
        """The same again: it goes on from the stage's last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, task)


def _number_file(home: Path) -> Path:
    return home / "resume" / "slurm-job"


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
