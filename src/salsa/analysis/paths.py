"""Evaluated policies, and the path that each arm's make over β in every complete cluster."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from salsa.errors import DataError

MIN_PROMPTS = 20
"""Fewer prompts say nothing by resampling them."""
START = math.inf
"""The β of an arm's init model."""


@dataclass(frozen=True)
class Policy:
    """One evaluated policy."""

    point: str
    """The run it is of, for messages."""
    cluster: str
    arm: str
    beta: float
    """KL coefficient; START for the arm's init model."""
    seed: int
    prompts: Sequence[str]
    columns: Mapping[str, np.ndarray]
    """Scores, `kl_own` and `kl_to_<yardstick>`, one value a prompt."""
    rewards: Mapping[str, str]
    """Score → digest of what scored; the first is the reward that was trained on."""
    curve: Sequence[Mapping[str, float]] = ()
    """Metrics of its training, a row an update."""

    @property
    def label(self) -> str:
        """Names it in a message."""
        return f"{self.point}, {self.arm} seed {self.seed}"


@dataclass(frozen=True)
class ArmPath:
    """One arm's policies in every cluster, by falling β."""

    betas: tuple[float, ...]
    columns: Mapping[str, np.ndarray]
    """Column → [clusters, βs, seeds, prompts]."""


def check(policies: Sequence[Policy]) -> None:
    """Refuse what cannot lie on one frontier.

    Raises:
        DataError: nothing to compare, other prompts, another reward within a cluster, or fewer than 20 prompts.
    """
    if not policies:
        raise DataError("frontier: no evaluated policy. Finish the points of the sweep first.")
    first = policies[0]
    of_cluster: dict[str, Policy] = {}
    for policy in policies:
        if tuple(policy.prompts) != tuple(first.prompts):
            raise DataError(
                f"frontier: {policy.label} answered other prompts ({len(policy.prompts)}) than {first.label} "
                f"({len(first.prompts)}). Give all points one eval.prompts, or make it an axis of its own."
            )
        other = of_cluster.setdefault(policy.cluster, policy)
        for score in first.rewards:
            if policy.rewards.get(score) != other.rewards.get(score):
                raise DataError(
                    f"frontier: {score} of {policy.label} is another reward than that of {other.label}. Rewards differ "
                    "between clusters only: vary them along the cluster axis, or along an axis of their own."
                )
    if len(first.prompts) < MIN_PROMPTS:
        raise DataError(
            f"frontier: {len(first.prompts)} held-out prompts are too few to resample. Give eval.prompts "
            f"{MIN_PROMPTS} or more."
        )


def gather(
    policies: Sequence[Policy], yardstick: str
) -> tuple[list[str], list[str], dict[str, ArmPath]]:
    """The complete clusters, the incomplete ones, and arm → its path in the complete ones.

    Raises:
        DataError: every cluster lacks something that another has.
    """
    known: dict[tuple[str, str, float, int], Policy] = {}
    for policy in policies:
        if yardstick in policy.columns:
            known.setdefault((policy.cluster, policy.arm, policy.beta, policy.seed), policy)
    every = list(dict.fromkeys(policy.cluster for policy in policies))
    wanted = {key[1:] for key in known}
    clusters = [c for c in every if all((c, *key) in known for key in wanted)]
    if not clusters or not wanted:
        raise DataError(
            f"frontier: no cluster has every arm at every β with {yardstick}. Finish the points of the sweep first."
        )
    paths = {}
    for arm in dict.fromkeys(policy.arm for policy in policies):
        betas = sorted({beta for name, beta, _ in wanted if name == arm}, reverse=True)
        seeds = {
            b: sorted(s for name, beta, s in wanted if (name, beta) == (arm, b)) for b in betas
        }
        if not betas:
            continue
        if len({len(of_beta) for of_beta in seeds.values()}) > 1:
            raise DataError(
                f"frontier: {arm} has another number of RL seeds at one β than at another. Give every point the same "
                "rl.seeds, or make them an axis of its own."
            )
        names = [*policies[0].rewards, yardstick]
        columns = {
            name: np.array(
                [
                    [[known[c, arm, b, s].columns[name] for s in seeds[b]] for b in betas]
                    for c in clusters
                ]
            )
            for name in names
        }
        paths[arm] = ArmPath(tuple(betas), columns)
    return clusters, [c for c in every if c not in clusters], paths
