"""What a recipe will do: stages, batch arithmetic, the memory of weights. No torch."""

from pathlib import Path

from salsa.artifacts import EMBEDDED, resolve
from salsa.config import DPOConfig, Recipe
from salsa.planner.shapes import PUBLISHED, shape_of
from salsa.untrusted import parameter_count

_BYTES_TRAINED = 12
"""fp32 weight and two Adam moments."""
_BYTES_STEPPING = 6
"""fp32 gradient and bf16 copy of the model that steps; policy and critic take turns."""
_BYTES_FROZEN = {"fp32": 4, "auto": 4, "bf16": 2}
"""A reference or reward model; `auto` is counted as if the device had no bf16."""


def plan(recipe: Recipe) -> str:
    """Stages, batch arithmetic and the memory that weights and optimizers need."""
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
    """What learns and what stands still; activations come on top."""
    path, rl = recipe.model.path, recipe.rl
    if (count := _parameters(path)) is None:
        return f"memory   unknown until {path} is here"
    trained = 2 if rl.algorithm == "ppo" and rl.critic == "separate" else 1
    frozen = max(len(arm.rule.models) for arm in rl.arms.values())
    frozen += not recipe.reward.functions
    if rl.lora is not None:
        trained, frozen = 0, frozen + 1
    frozen_bytes = frozen * _BYTES_FROZEN[recipe.model.precision]
    gigabytes = count * (trained * _BYTES_TRAINED + _BYTES_STEPPING + frozen_bytes) / 1e9
    adapters = ", adapters and" if rl.lora is not None else ","
    return (
        f"memory   {count / 1e6:.1f} M parameters; weights and optimizers of RL take {gigabytes:.2f} GB"
        f"{adapters} activations come on top"
    )


def _parameters(path: str) -> int | None:
    """From the files' headers where they are here, else from the published shape; None if neither is known."""
    here = path == EMBEDDED or Path(path).is_dir()
    if here and (count := parameter_count(resolve(path))) is not None:
        return count
    return shape_of(path).parameters if path in PUBLISHED else None
