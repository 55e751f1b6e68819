"""A recipe's sections as nodes of the stage graph."""

from dataclasses import dataclass

from salsa.artifacts import Checkpoint, FileHashes, resolve
from salsa.config import DPOConfig, ForecastConfig, LandscapeConfig, Recipe
from salsa.config.expressions import SFT, Base, Model, parse_model, sft_indices, text_of
from salsa.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    describe,
    import_callable,
    load_prompts,
    load_rows,
    preference_rows,
    sft_rows,
)
from salsa.resolve import Models, checkpoints_of
from salsa.rewards import RewardSource
from salsa.stages.analysis import Asked, LandscapeJob, LogprobsJob, RepliesJob, ScoresJob
from salsa.stages.directory import policy_label
from salsa.stages.evaluation import EvalJob, rewards_of
from salsa.stages.graph import Node
from salsa.stages.jobs import (
    BaseJob,
    DPOJob,
    PreferencesJob,
    RewardJob,
    RLJob,
    SFTJob,
    SoupJob,
    moved_reference,
)


def base(recipe: Recipe, hashes: FileHashes) -> Node:
    """The model that SFT starts from; made into an ordinary checkpoint first if it is GGUF or gets a template."""
    config = recipe.model

    def source() -> Checkpoint:
        return Checkpoint.of(resolve(config.path, revision=config.revision), hashes)

    if config.gguf_file is None and config.chat_template is None:
        return Node("base", (), source)
    return Node("base", (), lambda: BaseJob("base", source(), config))


def sft(recipe: Recipe, base: Node, index: int, hashes: FileHashes) -> Node:
    """The SFT model of the index-th seed, or the index-th checkpoint that is given."""
    config, label = recipe.sft, f"sft[{index}]"
    if config.dataset is not None:
        own, dataset, seed = config.of_model(index), config.dataset, config.seeds[index]
        return Node(label, (base,), lambda made: SFTJob(label, made, own, dataset, seed))
    name = config.checkpoints[index]

    def given(made: Checkpoint) -> SoupJob | Checkpoint:
        path = resolve(name)
        if not (path / "adapter_config.json").is_file():
            return Checkpoint.of(path, hashes)
        adapter = Checkpoint(path, hashes.tree(path))  # LoRA: added to the recipe's base
        return SoupJob(label, (adapter,), made)

    return Node(label, (base,), given)


def preferences(recipe: Recipe, sft: list[Node]) -> Node | None:
    """The preference pairs, where the recipe has any."""
    config = recipe.preferences
    if config is None:
        return None
    needs = () if config.dataset is not None else tuple(sft)
    return Node(
        "preferences",
        needs,
        lambda *made: PreferencesJob("preferences", made, config, recipe.rl.max_prompt_tokens),
    )


def reward(
    recipe: Recipe, models: Models, preferences: Node | None, hashes: FileHashes
) -> Node | None:
    """The reward model: given, or trained once per seed; of several the weight average. None for functions."""
    config = recipe.reward
    if config.functions:
        return None
    if config.paths:
        parts = [models[parse_model(path)] for path in config.paths]
    else:
        assert preferences is not None  # the schema
        several = len(config.seeds) > 1
        parts = [
            _trained_reward(
                recipe, f"reward seed {s}" if several else "reward", s, models, preferences
            )
            for s in config.seeds
        ]
    return parts[0] if len(parts) == 1 else models.average("reward soup", parts, heads="average")


def _trained_reward(
    recipe: Recipe, label: str, seed: int, models: Models, preferences: Node
) -> Node:
    config = recipe.reward
    return Node(
        label,
        (models[parse_model(config.init)], preferences),
        lambda init, pairs: RewardJob(label, init, pairs, config, seed),
    )


def policy(
    recipe: Recipe,
    arm_name: str,
    seed: int,
    models: Models,
    reward: Node | None,
    preferences: Node | None,
) -> Node:
    """The policy of one arm and seed."""
    section, arm = recipe.rl, recipe.rl.arms[arm_name]
    label, config, rule = policy_label(arm_name, seed), section.config_of(arm_name), arm.rule
    init = models[parse_model(arm.init)]
    references = tuple(models[model] for model in rule.models)
    if isinstance(config, DPOConfig):
        assert preferences is not None  # the schema
        return Node(
            label,
            (init, *references, preferences),
            lambda init, reference, pairs: DPOJob(label, init, reference, pairs, config, seed),
        )
    monitored = _monitored(recipe, models)
    needs = (init, *references, *monitored.values(), *([reward] if reward else []))

    def job(init: Checkpoint, *made: Checkpoint) -> RLJob:
        own, others = made[: len(references)], made[len(references) :]
        return RLJob(
            label=label,
            init=init,
            reference=checkpoints_of(rule, own),
            reward=_source(recipe, others[len(monitored)] if reward else None),
            config=config,
            prompts=section.prompts,
            seed=seed,
            monitors=dict(recipe.eval.scores),
            kl_to=dict(zip(monitored, others, strict=False)),
        )

    return Node(label, needs, job)


def samples(
    recipe: Recipe, arm: str, number: int, policy: Node, models: Models, reward: Node | None
) -> Node:
    """What the `number`-th seed of an arm replies to the held-out prompts, scored."""
    config, section = recipe.eval, recipe.rl
    measured = {name: models[parse_model(name)] for name in config.kl_to}
    rule = section.arms[arm].rule if arm in section.arms else None
    moves = rule is not None and rule.moves
    owned = (
        [] if moves else [models[m] for m in (rule.models if rule else [parse_model(config.shown)])]
    )
    label = f"eval {arm} seed {section.seeds[number]}"

    def job(policy: Checkpoint, *made: Checkpoint) -> EvalJob:
        rest = made[len(measured) :]
        references = (moved_reference(policy),) if moves else rest[: len(owned)]
        return EvalJob(
            label=label,
            policy=policy,
            kl_to=dict(zip(measured, made, strict=False)),
            references=references,
            reference_weights=rule.weights if rule and not moves else (1.0,),
            prompts=config.prompts,
            max_prompt_tokens=section.max_prompt_tokens,
            rewards=rewards_of(_source(recipe, rest[-1] if reward else None), config.scores),
            max_new_tokens=config.max_new_tokens or section.max_new_tokens,
            temperature=section.temperature,
            batch_size=config.batch_size,
            seed=config.seed + number,
        )

    return Node(label, (policy, *measured.values(), *owned, *([reward] if reward else [])), job)


@dataclass(frozen=True)
class Sampled:
    """One candidate reference: its replies, their scores, and their log-probabilities under each yardstick."""

    replies: Node
    scores: Node
    logprobs: dict[str, Node]
    """Yardstick, but for the candidate itself → the replies under it."""

    @property
    def all(self) -> list[Node]:
        """Every node."""
        return [self.replies, self.scores, *self.logprobs.values()]


def sampled(
    recipe: Recipe, candidate: str, models: Models, reward: Node | None, own: ForecastConfig
) -> Sampled:
    """What a forecast needs of one candidate."""
    model = models[parse_model(candidate)]
    asked = _asked(recipe, own, own.batch_prompts)
    replies = Node(
        f"replies {candidate}",
        (model,),
        lambda made: RepliesJob(f"replies {candidate}", made, asked),
    )

    def scored(made: Checkpoint, rows: Checkpoint, *trained: Checkpoint) -> ScoresJob:
        rewards = rewards_of(_source(recipe, trained[0] if trained else None), recipe.eval.scores)
        return ScoresJob(f"scores {candidate}", made, rows, asked, rewards)

    def under(name: str) -> Node:
        label, other = f"logprobs {candidate} under {name}", models[parse_model(name)]
        return Node(
            label,
            (model, other, replies),
            lambda author, made, rows: LogprobsJob(label, made, author, rows, asked.temperature),
        )

    needs = (model, replies, *([reward] if reward else []))
    return Sampled(
        replies,
        Node(f"scores {candidate}", needs, scored),
        {name: under(name) for name in recipe.eval.kl_to if name != candidate},
    )


def landscape(recipe: Recipe, models: Models, reward: Node | None, own: LandscapeConfig) -> Node:
    """The places on the line or the plane through the section's models."""
    corners = [models[parse_model(text)] for text in own.models]
    measured = [models[parse_model(text)] for text in recipe.eval.kl_to]

    def job(*made: Checkpoint) -> LandscapeJob:
        yardsticks = made[len(corners) : len(corners) + len(measured)]
        trained = made[-1] if reward else None
        return LandscapeJob(
            label="landscape",
            models=made[: len(corners)],
            alphas=own.alphas,
            asked=_asked(recipe, own, 1),
            rewards=rewards_of(_source(recipe, trained), recipe.eval.scores),
            kl_to=dict(zip(recipe.eval.kl_to, yardsticks, strict=True)),
            validation=own.validation,
        )

    return Node("landscape", (*corners, *measured, *([reward] if reward else [])), job)


def _asked(recipe: Recipe, own: ForecastConfig | LandscapeConfig, batch_prompts: int) -> Asked:
    section = recipe.rl
    return Asked(
        prompts=own.prompts or recipe.eval.prompts,
        max_prompt_tokens=section.max_prompt_tokens,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        num_samples=own.num_samples,
        seed=own.seed,
        batch_prompts=batch_prompts,
    )


def check_inputs(recipe: Recipe) -> None:
    """Touch every data set and callable before any work: a typo must not surface after an hour of SFT."""
    from salsa.models import load_tokenizer
    from salsa.runtime.tracking import quiet_libraries

    quiet_libraries()
    tokenizer = load_tokenizer(
        resolve(recipe.model.path, revision=recipe.model.revision),
        gguf_file=recipe.model.gguf_file,
        chat_template=recipe.model.chat_template,
    )
    if (source := recipe.sft.dataset) is not None:
        sft_rows(load_rows(source, SFT_COLUMNS), tokenizer, describe(source))
    prompts = [recipe.rl.prompts, recipe.eval.prompts]
    functions = [*recipe.reward.functions, *recipe.eval.scores.values()]
    if (pairs := recipe.preferences) is not None:
        if pairs.dataset is not None:
            rows = load_rows(pairs.dataset, PREFERENCE_COLUMNS)
            preference_rows(rows, tokenizer, describe(pairs.dataset))
        else:
            assert pairs.prompts is not None and pairs.labeller is not None  # the schema
            prompts.append(pairs.prompts)
            functions.append(pairs.labeller)
    for function in functions:
        import_callable(function.call)
    for source in prompts:
        load_prompts(source, tokenizer, max_tokens=recipe.rl.max_prompt_tokens)


def _source(recipe: Recipe, checkpoint: Checkpoint | None) -> RewardSource:
    return RewardSource(recipe.reward.functions, checkpoint)


def _monitored(recipe: Recipe, models: Models) -> dict[str, Node]:
    """The base and every SFT model that goes into any arm: the models whose KL is logged."""
    used = {
        index
        for _, model in recipe.expressions()
        for index in sft_indices(model, recipe.soup.ingredients)
    }
    named: list[Model] = [Base(), *(SFT(index) for index in sorted(used))]
    return {text_of(model): models[model] for model in named}
