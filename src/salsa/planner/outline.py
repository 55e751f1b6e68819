"""What a recipe will do: stages, batch arithmetic, the memory without activations. No torch."""

from pathlib import Path

from salsa.artifacts import EMBEDDED, resolve
from salsa.config import DPOConfig, Recipe
from salsa.errors import ConfigError
from salsa.planner.estimate import planned_stages
from salsa.planner.hardware import GIB, hardware_of
from salsa.planner.shapes import is_known, shape_of
from salsa.untrusted import parameter_count


def plan(recipe: Recipe) -> str:
    """Stages, batch arithmetic, and the memory that is held beside activations."""
    rl, forecast = recipe.rl, recipe.forecast
    steps = rl.num_updates * rl.num_epochs * (rl.rollout_size // rl.minibatch)
    prompts = rl.rollout_size // rl.group_size
    groups = f", {rl.group_size} to each of {prompts} prompts" if rl.group_size > 1 else ""
    lines = [
        f"{recipe.name}: sound",
        _sft_line(recipe),
        _reward_line(recipe),
        f"rl       {rl.algorithm}, {len(rl.arms)} arms x {len(rl.seeds)} seeds; each {rl.num_updates} updates "
        f"of {rl.rollout_size} episodes{groups} ({rl.num_updates * rl.rollout_size} in all), "
        f"{steps} optimizer steps of {rl.minibatch} episodes, in forward passes of "
        f"{rl.microbatch_tokens} tokens",
        *(
            f"         {name:<10} starts at {arm.init}, pulled towards {arm.reference}{_own(recipe, name)}"
            for name, arm in rl.arms.items()
        ),
        f"eval     {len(rl.arms) + 1} models x {len(rl.seeds)} seeds against "
        f"{recipe.eval.baseline}, KL to {', '.join(recipe.eval.kl_to)}",
    ]
    if forecast is not None:
        candidates = ", ".join(recipe.candidates())
        lines.append(f"forecast {forecast.num_samples} replies a prompt of each of {candidates}")
    return "\n".join([*lines, _memory_line(recipe)])


def _sft_line(recipe: Recipe) -> str:
    sft = recipe.sft
    if sft.checkpoints:
        return f"sft      {sft.count} finished checkpoints"
    each = sft.epochs if isinstance(sft.epochs, tuple) else (sft.epochs,)
    epochs = ", ".join(f"{number:g}" for number in each)
    of = f"{sft.count} seeds x {epochs} epochs, {sft.batch_size} sequences a step"
    return f"sft      {of}; soup of {list(recipe.soup.ingredients)}"


def _reward_line(recipe: Recipe) -> str:
    reward, pairs = recipe.reward, recipe.preferences
    if reward.functions:
        return "reward   " + ", ".join(f"{f.weight:g} x {f.call}" for f in reward.functions)
    source = "synthetic preferences" if pairs and pairs.labeller else "preference pairs"
    trained = f"{reward.epochs:g} epochs over {source}, {reward.batch_size} pairs a step"
    what = f"finished: {', '.join(reward.paths)}" if reward.paths else trained
    count = len(reward.paths or reward.seeds)
    return f"reward   {what}" + (f"; the weight average of {count}" if count > 1 else "")


def _own(recipe: Recipe, arm: str) -> str:
    """What an arm sets for itself, and its β."""
    config = recipe.rl.config_of(arm)
    if isinstance(config, DPOConfig):
        return f", DPO with beta {config.beta:g}"
    others = {k: v for k, v in recipe.rl.arms[arm].settings.items() if k != "kl_coef"}
    return f", beta {config.kl_coef:g}" + "".join(f", {k} {v}" for k, v in others.items())


def _memory_line(recipe: Recipe) -> str:
    """Parameters, and what is held beside activations by the stage that holds most, planned for one process."""
    path = recipe.model.path
    if (count := _parameters(path)) is None:
        return f"memory   unknown until {path} is here"
    line = f"memory   {count / 1e6:.1f} M parameters"
    try:
        stages = planned_stages(recipe, one := hardware_of("cpu:1"))
    except ConfigError:  # a family whose shape is not known
        return line
    held = {
        stage.name: max(
            m.weights + m.gradients + m.optimizer + m.frozen for m in stage.phases.values()
        )
        for stage in stages
    }
    most = max(held, key=lambda name: held[name])
    return (
        f"{line}; weights, gradients, optimizer and frozen models take up to {held[most] / GIB:.2f} GiB ({most}, "
        f"{one.rank(recipe.model.precision).precision}), activations come on top (--on)"
    )


def _parameters(path: str) -> int | None:
    """From the files' headers where they are here, else from the shape; None if neither is known."""
    here = path == EMBEDDED or Path(path).is_dir()
    if here and (count := parameter_count(resolve(path))) is not None:
        return count
    return shape_of(path).parameters if is_known(path) else None
