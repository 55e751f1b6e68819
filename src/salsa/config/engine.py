"""The recipe's `engine:` section: where and how much runs at once. It decides no result."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from salsa.config.schema import Count, Execution, Positive, Strict


class SlurmConfig(Strict):
    """What `sbatch` is told beside the CPUs, GPUs and memory of a stage."""

    partition: Execution[str | None] = None
    """The cluster's default if not given."""
    hours: Execution[Positive] = 24.0
    """Time limit of a stage. One that reaches it is queued again and goes on from its last checkpoint."""
    account: Execution[str | None] = None
    """Who pays."""
    parameters: Execution[dict[str, str | int | bool]] = Field(default_factory=dict)
    """Further options of sbatch, e.g. {constraint: a100, qos: long}."""


class EngineConfig(Strict):
    """Where and how much at once."""

    threads: Execution[Count | None] = None
    """CPU threads; PyTorch's choice if not given. Elsewhere than in this process: CPUs that a stage asks for."""
    price_per_hour: Execution[Positive | None] = None
    """What this machine costs an hour, in your currency; the report then says what each arm cost."""
    jobs: Execution[Count | None] = None
    """Independent stages that run at once. If not given: on this machine one, in this process; elsewhere all."""
    processes: Execution[Count] = 1
    """Processes that share one RL, SFT, reward or DPO job, and its models, on one machine; torchrun's number where it
    started salsa."""
    timeout: Execution[Positive] = 1800.0
    """Seconds that these wait for each other before one counts as lost: longer than the slowest reward takes."""
    executor: Execution[Literal["local", "ray", "slurm"]] = "local"
    """What runs the stages: this machine (several `jobs` in processes of their own), a Ray cluster, SLURM."""
    address: Execution[str | None] = None
    """Of the Ray cluster: host:port, `auto` for the one that this machine is in, `local` to start one here."""
    slurm: Execution[SlurmConfig | None] = None
    """What SLURM is told besides, with executor: slurm."""
    gpus: Execution[Annotated[int, Field(ge=0)]] = 0
    """GPUs that each process of a stage which computes with torch asks Ray or SLURM for."""
    memory_gib: Execution[Positive | None] = None
    """Memory that each process asks for; the planner's figure if not given."""
    retries: Execution[Annotated[int, Field(ge=0)]] = 2
    """How often a stage is started again, from its last checkpoint, after its process or machine was lost."""
    artifacts: Execution[str | None] = None
    """URL for finished stages, e.g. s3://bucket/runs, where machines share no path (any URL of fsspec)."""

    @model_validator(mode="after")
    def _each_belongs_to_its_executor(self) -> Self:
        for name, owner in (("address", "ray"), ("slurm", "slurm")):
            if getattr(self, name) is not None and self.executor != owner:
                raise ValueError(
                    f"{name} is for executor: {owner}, and executor is {self.executor}. Set executor: {owner} or "
                    f"drop {name}"
                )
        if self.executor == "local":
            why = "with executor: local: all stages run on this machine as it is"
            self.check_unset(("gpus", "memory_gib"), why)
        if self.artifacts is not None and "://" not in self.artifacts:
            raise ValueError(
                f"artifacts={self.artifacts!r} is no URL. Write e.g. s3://bucket/runs; a path needs none, the run "
                "directory itself may lie on a shared one"
            )
        return self
