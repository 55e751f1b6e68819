"""Every gate, in the order of the pipeline, and what they say of a run or of a recipe."""

from pathlib import Path
from typing import Any

from salsa.config import Recipe
from salsa.doctor import (
    advantages,
    critic,
    data,
    evaluation,
    hacking,
    kl,
    optimisation,
    reward,
    rollout,
    sft,
)
from salsa.doctor.evidence import Evidence
from salsa.doctor.findings import Diagnosis, diagnosis
from salsa.runtime.tracking import say
from salsa.stages.directory import RunDirectory

SMALL = 10**8
"""Bytes of a base model up to which the end of a run may load it and its descendants in fp32 without asking."""


def judge(seen: Evidence) -> Diagnosis:
    """What the gates say of the evidence."""
    precision = seen.runs[0].precision if seen.runs else "fp32"
    findings = (
        data.template_marks(seen.data),
        data.template_known(seen.sft),
        data.truncated(seen.data),
        data.empty_replies(seen.data),
        data.repeats(seen.data),
        data.leaks(seen.data),
        data.length_labels(seen.data),
        data.labels_follow_labeller(seen.data),
        sft.learned(seen.sft),
        sft.overfitted(seen.sft),
        sft.ends(seen.sft),
        sft.differ(seen.sft),
        sft.barrier(seen.sft),
        reward.accuracy(seen.reward),
        reward.calibration(seen.reward),
        reward.constant(seen.episodes),
        reward.scores_in_training(seen.episodes),
        reward.length_bias(seen.samples),
        reward.drift(seen.samples),
        rollout.prompts(seen.episodes),
        rollout.ends(seen.episodes, seen.runs),
        rollout.old_logprobs(seen.episodes),
        rollout.sampler(seen.runs),
        kl.reference_named(seen.runs),
        kl.reference_used(seen.episodes),
        kl.sign(seen.episodes),
        kl.weight(seen.runs, seen.num_eval),
        kl.negative(seen.runs),
        critic.start(seen.episodes),
        critic.trained(seen.runs),
        critic.explained(seen.runs),
        advantages.placement(seen.episodes),
        advantages.recursion(seen.episodes),
        advantages.signal(seen.runs),
        optimisation.moved(seen.runs),
        optimisation.step_size(seen.runs),
        optimisation.improves(seen.runs),
        hacking.proxy_against_gold(seen.samples, seen.held_out_scores),
        hacking.over_optimised(seen.runs, seen.held_out_scores),
        evaluation.scores(seen.samples, precision),
        evaluation.paired(seen.samples),
        evaluation.power(seen.samples, seen.baseline),
    )
    return diagnosis(seen.name, findings, seen.not_measured)


def examine_run(path: Path) -> Diagnosis:
    """Diagnose a run directory, as far as the run got.

    Raises:
        ConfigError: it holds no run.
        DataError, CheckpointError: an input of the run is gone or cannot be read any more.
    """
    from salsa.doctor.files import RunFiles
    from salsa.doctor.gather import after

    return judge(after(RunFiles.open(path)))


def diagnosed(run: RunDirectory) -> dict[str, Any] | None:
    """The diagnosis at the end of a run, for its report; None, and a line that says why, where it could not be made."""
    from salsa.doctor.files import RunFiles
    from salsa.doctor.gather import after

    try:
        own = {stage.label: stage for stage in run.finished}
        found = judge(after(RunFiles.open(run.path, own), largest=SMALL))
    except Exception as error:  # whatever it is, it must not cost the run its report
        say(f"doctor: could not look at the run ({type(error).__name__}: {error})")
        return None
    say(f"doctor: {found.headline}")
    return found.as_json()


def examine_recipe(recipe: Recipe) -> Diagnosis:
    """Diagnose the inputs of a recipe: nothing is trained, no model is run.

    Raises:
        DataError, CheckpointError: an input is missing or has the wrong shape.
    """
    from salsa.doctor.gather import before

    return judge(before(recipe))
