"""A run as `Results`: its arms, their samples and curves, and what its recipe obliges a reader to know."""

from collections.abc import Mapping, Sequence

from salsa.artifacts import Checkpoint
from salsa.config import PreferencesConfig, Recipe, RLConfig
from salsa.evaluate.results import Arm, Results
from salsa.stages.directory import Stage, policy_label


def results_of(
    recipe: Recipe, stages: Sequence[Stage], samples: Mapping[str, Sequence[Checkpoint]]
) -> Results:
    """What a finished run measured.

    Args:
        recipe: the run's.
        stages: all of its finished stages.
        samples: arm → seed → the directory of `samples.jsonl`.
    """
    policies = {
        s.path: s.record["inputs"]["policy"] for s in stages if "policy" in s.record["inputs"]
    }
    metrics = {stage.label: stage.metrics for stage in stages}
    seeds = recipe.rl.seeds
    arms = {}
    for name, of_arm in samples.items():
        arm = recipe.rl.arms.get(name)
        arms[name] = Arm(
            labels=[f"{name}-seed-{seed}" for seed in seeds],
            seeds=seeds,
            policies=[policies[one.path] for one in of_arm],
            init=arm.init if arm else recipe.eval.shown,
            reference=arm.reference if arm else recipe.eval.shown,
            trained=arm is not None,
        )
    return Results(
        name=recipe.name,
        baseline=recipe.eval.baseline,
        arms=arms,
        recipe=recipe.model_dump(mode="json"),
        samples=samples,
        scores=("proxy", *recipe.eval.scores),
        kl_to=recipe.eval.kl_to,
        remarks=remarks(recipe),
        curves={
            name: [metrics[policy_label(name, seed)] for seed in seeds] for name in recipe.rl.arms
        },
        stages=stages,
    )


def remarks(recipe: Recipe) -> list[str]:
    """What a reader must know of how the models were made."""
    sentences = []
    if (preferences := recipe.preferences) is not None and preferences.labeller is not None:
        sentences.append(_synthetic(preferences, recipe.sft.count))
    sentences.append(
        f"{_betas(recipe)} The same β is another constraint once the reference moves, so compare arms at equal KL to "
        f"{recipe.eval.shown} (the reward–KL plot), not by reward alone."
    )
    sentences.append(
        "The proxy is what the policies were trained to raise. A proxy that rises while a held-out score does not is "
        "reward hacking, not improvement."
    )
    return sentences


def _betas(recipe: Recipe) -> str:
    """Which β the RL arms used."""
    configs = {name: recipe.rl.config_of(name) for name in recipe.rl.arms}
    betas = {name: c.kl_coef for name, c in configs.items() if isinstance(c, RLConfig)}
    if len(set(betas.values())) > 1:
        return "β: " + ", ".join(f"{name} {beta:g}" for name, beta in betas.items()) + "."
    return f"Every arm used the same β = {next(iter(betas.values()), recipe.rl.kl_coef):g}."


def _synthetic(preferences: PreferencesConfig, num_models: int) -> str:
    assert preferences.labeller is not None
    return (
        f"The preferences are synthetic. Two replies per prompt were sampled from the {num_models} SFT models and "
        f"scored by {preferences.labeller.call}; reply a was labelled better with probability sigmoid((score a − "
        f"score b) / {preferences.noise:g}). No person compared them."
    )
