"""A recipe's stages on given hardware: memory of one rank, work, and the smallest change with which each fits.

No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from salsa.config import DataSource, DPOConfig, Recipe, RewardConfig, RLConfig, SFTConfig
from salsa.config.expressions import parse_model
from salsa.planner import memory, work
from salsa.planner.hardware import Hardware
from salsa.planner.memory import Memory, Rank
from salsa.planner.shapes import Shape, shape_of, shape_or
from salsa.planner.work import Work

PUBLISHED_ROWS = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 208_000,
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_100,
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): 2_000,
    ("trl-lib/ultrafeedback_binarized", "train"): 62_100,
}
"""(data set, split) → rows, as its page says, rounded."""


@dataclass(frozen=True)
class PlannedStage:
    """One kind of stage, as one rank sees it."""

    name: str
    phases: dict[str, Memory]
    """Phase → memory; the largest counts."""
    work: Work | None
    """Of one run; None if the number of rows is not known."""
    runs: int = 1
    """How often the recipe runs it: seeds, arms."""
    divided: bool = True
    """Whether all ranks share it; else one of them does it and the others wait."""

    def seconds(self, hardware: Hardware) -> float | None:
        """Of all its runs; None if its work is not known."""
        if self.work is None:
            return None
        return self.runs * self.work.seconds(hardware if self.divided else hardware.single)

    @property
    def peak(self) -> Memory:
        """The phase that needs most."""
        return max(self.phases.values(), key=lambda one: one.total)


def planned_stages(recipe: Recipe, hardware: Hardware) -> list[PlannedStage]:
    """Every kind of stage that computes with torch, in the order of the pipeline.

    Raises:
        ConfigError: a model's shape is not known.
    """
    rank, shape = hardware.rank(recipe.model.precision), shape_of(recipe.model.path)
    found = [*_sft(recipe, shape, rank, hardware), *_reward(recipe, shape, rank, hardware)]
    for name in recipe.rl.arms:
        config = recipe.rl.config_of(name)
        runs = len(recipe.rl.seeds)
        if isinstance(config, DPOConfig):
            found.append(_dpo(recipe, name, config, shape, rank, hardware, runs))
            continue
        found.append(_rl(recipe, name, config, shape, rank, hardware, runs))
    return [*found, _evaluation(recipe, shape, hardware)]


def num_rows(source: DataSource | None) -> int | None:
    """Rows of a source: its limit, a published number, or the lines of a .jsonl file; None if it has to be read."""
    if source is None:
        return None
    known = PUBLISHED_ROWS.get((str(source.path), source.split))
    if known is None and str(source.path).endswith(".jsonl") and Path(str(source.path)).is_file():
        with Path(str(source.path)).open("rb") as file:
            known = sum(1 for _ in file)
    return min((n for n in (known, source.limit) if n is not None), default=None)


def _sft(recipe: Recipe, shape: Shape, rank: Rank, hardware: Hardware) -> Iterator[PlannedStage]:
    sft, assumed = recipe.sft, hardware.assumed
    if sft.dataset is None:
        return
    divided = sft.can_be_divided
    rank = rank if divided else replace(rank, world_size=1)
    micro = -(-(sft.microbatch_size or sft.batch_size) // rank.world_size)
    peak = memory.trainer_memory(shape, rank, micro, sft.max_length, head=True)
    rows, done = num_rows(sft.dataset), None
    if rows is not None:
        epochs = sum(sft.epochs) / sft.count if isinstance(sft.epochs, tuple) else sft.epochs
        replies = assumed.replies if "ultrachat" in str(sft.dataset.path) else 1.0
        done = work.sft_work(
            shape,
            rows * replies,
            sft.max_length * assumed.fill,
            epochs,
            micro * rank.world_size,
            rank,
        )
    yield PlannedStage("sft", {"update": peak}, done, sft.count, divided)


def _reward(recipe: Recipe, shape: Shape, rank: Rank, hardware: Hardware) -> Iterator[PlannedStage]:
    reward = recipe.reward
    if not reward.trains or recipe.preferences is None:
        return
    divided = reward.can_be_divided
    rank = rank if divided else replace(rank, world_size=1)
    micro = 2 * -(-(reward.microbatch_size or reward.batch_size) // rank.world_size)
    peak = memory.trainer_memory(shape, rank, micro, reward.max_length, head=False)
    pairs = num_rows(recipe.preferences.dataset or recipe.preferences.prompts)
    done = _pairs_work(shape, pairs, reward, micro, rank, hardware)
    yield PlannedStage("reward", {"update": peak}, done, len(reward.seeds), divided)


def _dpo(
    recipe: Recipe, name: str, config: DPOConfig, shape: Shape, rank: Rank, hardware: Hardware, runs: int
) -> PlannedStage:  # fmt: skip
    assert recipe.preferences is not None  # the schema
    micro = 2 * -(-(config.microbatch_size or config.batch_size) // rank.world_size)
    peak = memory.trainer_memory(shape, rank, micro, config.max_length, head=True, frozen=shape)
    pairs = num_rows(recipe.preferences.dataset or recipe.preferences.prompts)
    done = _pairs_work(shape, pairs, config, micro, rank, hardware)
    return PlannedStage(name, {"update": peak}, None if done is None else done * (4 / 3), runs)


def _pairs_work(
    shape: Shape, pairs: int | None, config: Any, micro: int, rank: Rank, hardware: Hardware
) -> Work | None:
    if pairs is None:
        return None
    length = config.max_length * hardware.assumed.fill
    return work.sft_work(shape, 2 * pairs, length, config.epochs, micro * rank.world_size, rank)


def _rl(
    recipe: Recipe, name: str, config: RLConfig, shape: Shape, rank: Rank, hardware: Hardware, runs: int
) -> PlannedStage:  # fmt: skip
    arm, reward = recipe.rl.arms[name], reward_shape(recipe, shape)
    models = set(arm.rule.models)
    if config.lora is not None and not arm.rule.moves:
        models -= {parse_model(arm.init)}  # its weights are the policy's
    one = memory.RLWork(
        shape, config, config.max_prompt_tokens, config.max_new_tokens, references=len(models),
        moves=arm.rule.moves, reward=reward,
    )  # fmt: skip
    fill = hardware.assumed.fill
    lengths = config.max_prompt_tokens * fill, config.max_new_tokens * fill
    done = work.rl_work(shape, config, *lengths, len(arm.rule.models), reward, rank)
    return PlannedStage(name, memory.rl_memory(one, rank), done, runs)


def _evaluation(recipe: Recipe, shape: Shape, hardware: Hardware) -> PlannedStage:
    """By one rank: policy and reward model, then policy, its last states and one model that its KL is measured to."""
    config, rank = recipe.eval, hardware.single.rank(recipe.model.precision)
    e, limit = rank.bytes, config.max_new_tokens or recipe.rl.max_new_tokens
    prompt, slots = recipe.rl.max_prompt_tokens, min(memory.SLOTS, config.batch_size)
    reward = reward_shape(recipe, shape)
    one = memory.Pass(slots * (prompt + limit), slots, prompt + limit, prompt + limit)
    held = Memory(
        weights=shape.parameters * e,
        activations=memory.forward_bytes(shape, one, e),
        logits=2 * memory.LOGITS_CHUNK * shape.vocabulary * 4 * memory.FP32,
    )
    cache = memory.kv_cache_bytes(shape, slots, prompt, limit, rank)
    scored = (reward.trunk if reward else 0) * e
    rows, done, fill = num_rows(config.prompts), None, hardware.assumed.fill
    states = (rows or 0) * limit * fill * shape.hidden * e
    phases = {
        "rollout": replace(held, frozen=scored, kv_cache=cache),
        "KL": replace(held, frozen=shape.parameters * e, activations=held.activations + states),
    }
    measured = {parse_model(text) for text in config.kl_to}
    others = max(len(measured | set(arm.rule.models)) for arm in recipe.rl.arms.values())
    if rows is not None:
        lengths = prompt * fill, limit * fill
        done = work.generation_work(shape, rows, *lengths, rank)
        flops = work.forward_flops(shape, rows * sum(lengths), sum(lengths), rows * limit * fill)
        done += Work(flops=flops * (1 + others))
    runs = (len(recipe.rl.arms) + 1) * len(recipe.rl.seeds)
    resident = {name: memory.resident(one, rank) for name, one in phases.items()}
    return PlannedStage("eval", resident, done, runs, divided=False)


def reward_shape(recipe: Recipe, shape: Shape) -> Shape | None:
    """Of the model that scores; None for functions."""
    if recipe.reward.functions:
        return None
    return shape_or(recipe.reward.paths[0], shape) if recipe.reward.paths else shape


@dataclass(frozen=True)
class Change:
    """What to set so that everything fits."""

    settings: dict[str, str]
    """`key=value`, as on the command line; empty if only the hardware changes."""
    hardware: Hardware
    keeps_result: bool
    """Whether it decides how something is computed and not what comes out."""

    @property
    def words(self) -> str:
        """As a person would type it."""
        settings = " ".join(f"{key}={value}" for key, value in self.settings.items())
        return settings or f"--on {self.hardware.text}"


def smallest_change(recipe: Recipe, hardware: Hardware, stage: PlannedStage) -> list[Change]:
    """What makes the one `stage` fit: the smallest change of settings, and of the number of cards. May be empty."""
    fits = lambda one, on: _peak(one, on, stage.name) <= on.budget
    found = []
    for settings, keeps_result in _settings(recipe, hardware, stage):
        changed = _changed(recipe, settings)
        if changed is not None and fits(changed, hardware):
            found.append(Change(settings, hardware, keeps_result))
            break
    if not hardware.on_cpu:
        wider = (hardware.times(factor) for factor in (2, 4, 8, 16, 32, 64, 128))
        more = next((on for on in wider if on.count <= 1024 and fits(recipe, on)), None)
        found += [Change({}, more, True)] if more else []
    return found


def _settings(
    recipe: Recipe, hardware: Hardware, stage: PlannedStage
) -> Iterator[tuple[dict[str, str], bool]]:
    """Changes to try, the smallest first: of how it is computed, then of what is trained."""
    trainers: dict[str, SFTConfig | RewardConfig] = {"sft": recipe.sft, "reward": recipe.reward}
    if (trainer := trainers.get(stage.name)) is not None:
        size = trainer.microbatch_size or trainer.batch_size
        for smaller in _divisors(trainer.batch_size, below=size):
            yield {f"{stage.name}.microbatch_size": str(smaller)}, True
        return
    if stage.name == "eval":
        for smaller in (recipe.eval.batch_size >> k for k in range(1, 6)):
            yield {"eval.batch_size": str(max(1, smaller))}, True
        return
    if stage.name not in recipe.rl.arms or recipe.rl.arms[stage.name].method == "dpo":
        return
    config = recipe.rl.config_of(stage.name)
    assert isinstance(config, RLConfig)
    own = recipe.rl.arms[stage.name].settings
    key = lambda name: f"rl.arms.{stage.name}.{name}" if name in own else f"rl.{name}"
    sizes = [config.microbatch_tokens >> k for k in range(1, 6)]
    length = config.max_prompt_tokens + config.max_new_tokens
    micro = [{key("microbatch_tokens"): str(size)} for size in sizes if size >= length]
    again = {} if config.gradient_checkpointing else {key("gradient_checkpointing"): "true"}
    bf16 = {} if hardware.rank(recipe.model.precision).bytes == 2 else {"model.precision": "bf16"}
    separate = config.algorithm == "ppo" and config.critic == "separate"
    head = {key("critic"): "head"} if separate else {}
    lora = {} if config.lora is not None else {key("lora"): "{rank: 16}"}
    computed = [one for one in (again, *micro, *(again | m for m in micro if again)) if one]
    for one in computed:
        yield one, True
    for other, one in product((bf16, head, lora, bf16 | lora), ({}, *computed)):
        if other:
            yield other | one, False


def _divisors(number: int, *, below: int) -> list[int]:
    return [size for size in range(below - 1, 0, -1) if number % size == 0]


def _changed(recipe: Recipe, settings: dict[str, str]) -> Recipe | None:
    """The recipe with these settings; None if they do not go together."""
    from salsa.config.recipe import apply_override

    values = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        apply_override(values, f"{key}={value}")
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None


def _peak(recipe: Recipe, hardware: Hardware, name: str) -> float:
    return next(s.peak.total for s in planned_stages(recipe, hardware) if s.name == name)
