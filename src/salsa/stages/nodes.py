"""A recipe's sections as nodes of the stage graph."""

from dataclasses import dataclass, replace
from typing import Any, cast

from salsa import data
from salsa.artifacts import Checkpoint, FileHashes, resolve
from salsa.config import DPOConfig, ForecastConfig, LandscapeConfig, Recipe
from salsa.config.expressions import Given, Model, ReferenceRule, parse_model, sft_indices
from salsa.resolve import Models
from salsa.rewards import RewardSource
from salsa.stages import jobs
from salsa.stages.directory import policy_label
from salsa.stages.graph import Node


def base(recipe: Recipe, hashes: FileHashes) -> Node:
    """The model that SFT starts from; made into an ordinary checkpoint first if it is GGUF or gets a template."""
    config = recipe.model

    def source() -> Checkpoint:
        return Checkpoint.of(resolve(config.path, revision=config.revision), hashes)

    if config.gguf_file is None and config.chat_template is None:
        return Node("base", (), source)
    return Node("base", (), lambda: jobs.BaseJob("base", source(), config))


def sft(recipe: Recipe, base: Node, index: int, hashes: FileHashes) -> Node:
    """The SFT model of the index-th seed, or the index-th checkpoint that is given."""
    config, label = recipe.sft, f"sft[{index}]"
    if (dataset := config.dataset) is not None:
        own, seed = config.of_model(index), config.seeds[index]
        return Node.of(jobs.SFTJob, label, base, own, dataset, seed)
    name = config.checkpoints[index]

    def given(made: Checkpoint) -> jobs.SoupJob | Checkpoint:
        path = resolve(name)
        if not (path / "adapter_config.json").is_file():
            return Checkpoint.of(path, hashes)
        adapter = Checkpoint(path, hashes.tree(path))  # LoRA: added to the recipe's base
        return jobs.SoupJob(label, (adapter,), made)

    return Node(label, (base,), given)


def preferences(recipe: Recipe, sft: list[Node]) -> Node | None:
    """The preference pairs, where the recipe has any."""
    if (config := recipe.preferences) is None:
        return None
    replying = () if config.dataset is not None else tuple(sft)
    longest = recipe.rl.max_prompt_tokens
    return Node.of(jobs.PreferencesJob, "preferences", replying, config, longest)


def reward(recipe: Recipe, models: Models, preferences: Node | None) -> Node | None:
    """The reward model: given, or trained once per seed; of several the weight average. None for functions."""
    config = recipe.reward
    if config.functions:
        return None
    parts = [models[path] for path in config.paths]
    if not parts:
        init = models[config.init]
        label = "reward seed {}" if len(config.seeds) > 1 else "reward"
        parts = [
            Node.of(jobs.RewardJob, label.format(seed), init, preferences, config, seed)
            for seed in config.seeds
        ]
    return parts[0] if len(parts) == 1 else models.average("reward soup", parts, heads="average")


def policy(
    recipe: Recipe, name: str, seed: int, models: Models, reward: Node | None, pairs: Node | None
) -> Node:
    """The policy of the arm `name` and one seed."""
    section, arm = recipe.rl, recipe.rl.arms[name]
    label, config = policy_label(name, seed), section.config_of(name)
    init = models[arm.init]
    reference = _nodes_of(arm.rule, models)
    if isinstance(config, DPOConfig):
        return Node.of(jobs.DPOJob, label, init, *reference.models, pairs, config, seed)
    soup = recipe.soup.ingredients
    decisive = recipe.decisive_expressions()
    used = {index for _, model in decisive for index in sft_indices(model, soup)}
    return Node.of(
        jobs.RLJob,
        label,
        init=init,
        reference=reference,
        kl_to={name: models[name] for name in ("base", *(f"sft[{i}]" for i in sorted(used)))},
        reward=_rewards(recipe, models, reward)["proxy"],
        config=config,
        prompts=section.prompts,
        seed=seed,
        monitors=_scores(recipe, models),
    )


def samples(
    recipe: Recipe, arm: str, number: int, policy: Node, models: Models, reward: Node | None
) -> Node:
    """What the `number`-th seed of an arm replies to the held-out prompts, scored."""
    config, section = recipe.eval, recipe.rl
    shown = ReferenceRule((parse_model(config.shown),))
    rule = section.arms[arm].rule if arm in section.arms else shown
    reference = _nodes_of(rule, models)
    if rule.moves:
        moved = Node(f"reference of {policy.label}", (policy,), jobs.moved_reference)
        reference = ReferenceRule((moved,))
    return Node.of(
        jobs.EvalJob,
        f"eval {arm} seed {section.seeds[number]}",
        policy=policy,
        kl_to={name: models[name] for name in config.kl_to},
        references=reference.models,
        reference_weights=reference.weights,
        rewards=_rewards(recipe, models, reward),
        prompts=config.prompts,
        max_prompt_tokens=section.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens or section.max_new_tokens,
        temperature=section.temperature,
        batch_size=config.batch_size,
        seed=config.seed + number,
    )


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
    model = models[candidate]
    asked = _asked(recipe, own, own.batch_prompts)
    replies = Node.of(jobs.RepliesJob, f"replies {candidate}", model, asked)
    rewards = _rewards(recipe, models, reward)
    scores = Node.of(jobs.ScoresJob, f"scores {candidate}", model, replies, asked, rewards)
    logprobs = {}
    for name in recipe.eval.kl_to:
        if name != candidate:
            fields = (model, replies, models[name], asked.temperature)
            label = f"logprobs {candidate} under {name}"
            logprobs[name] = Node.of(jobs.LogprobsJob, label, *fields)
    return Sampled(replies, scores, logprobs)


def landscape(recipe: Recipe, models: Models, reward: Node | None, own: LandscapeConfig) -> Node:
    """The places on the line or the plane through the section's models."""
    return Node.of(
        jobs.LandscapeJob,
        "landscape",
        models=tuple(models[text] for text in own.models),
        alphas=own.alphas,
        asked=_asked(recipe, own, 1),
        kl_to={text: models[text] for text in recipe.eval.kl_to},
        rewards=_rewards(recipe, models, reward),
        validation=own.validation,
    )


def _asked(recipe: Recipe, own: ForecastConfig | LandscapeConfig, batch_prompts: int) -> jobs.Asked:
    section = recipe.rl
    return jobs.Asked(
        prompts=own.prompts or recipe.eval.prompts,
        max_prompt_tokens=section.max_prompt_tokens,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        num_samples=own.num_samples,
        seed=own.seed,
        batch_prompts=batch_prompts,
    )


def check_inputs(recipe: Recipe) -> None:
    """Touch what is given before any work: a typo must not surface after an hour of SFT."""
    from salsa.models import check_reward_model, load_tokenizer
    from salsa.runtime.tracking import quiet_libraries

    quiet_libraries()
    model, longest = recipe.model, recipe.rl.max_prompt_tokens
    path = resolve(model.path, revision=model.revision)
    tokenizer = load_tokenizer(path, gguf_file=model.gguf_file, chat_template=model.chat_template)
    looks = [look for look in (recipe.forecast, recipe.landscape) if look is not None]
    validation = recipe.landscape.validation if recipe.landscape else None
    conversations = ((recipe.sft.dataset, recipe.sft.assistant_only_loss), (validation, False))
    for source, whole in conversations:
        if source is not None:
            rows = data.load_rows(source, data.SFT_COLUMNS)
            data.sft_rows(rows, tokenizer, data.describe(source), whole=whole)
    prompts = [recipe.rl.prompts, recipe.eval.prompts]
    prompts += [look.prompts for look in looks if look.prompts is not None]
    functions = [*recipe.reward.functions, *recipe.eval.scores.values()]
    if (pairs := recipe.preferences) is not None:
        if pairs.dataset is not None:
            rows = data.load_rows(pairs.dataset, data.PREFERENCE_COLUMNS)
            data.preference_rows(rows, tokenizer, data.describe(pairs.dataset))
        else:
            assert pairs.prompts is not None and pairs.labeller is not None  # the schema
            prompts.append(pairs.prompts)
            functions.append(pairs.labeller)
    calls = [function.call for function in functions]
    for call in [*calls, recipe.soup.score] if recipe.soup.score is not None else calls:
        data.import_callable(call)
    for source in prompts:
        data.load_prompts(source, tokenizer, max_tokens=longest)
    for given in (*recipe.reward.paths, *recipe.eval.reward_models.values()):
        check_reward_model(resolve(given))


def _nodes_of(rule: ReferenceRule[Model], models: Models) -> ReferenceRule[Node]:
    """The rule with the nodes of its models in place of their names."""
    return replace(cast(Any, rule), models=tuple(models[model] for model in rule.models))


def _rewards(recipe: Recipe, models: Models, reward: Any) -> dict[str, RewardSource]:
    """The training reward, whose checkpoint is a node yet, as `proxy`; and further scores by their names."""
    return {"proxy": RewardSource(recipe.reward.functions, reward)} | _scores(recipe, models)


def _scores(recipe: Recipe, models: Models) -> dict[str, RewardSource]:
    """What else scores a reply: functions, and reward models, whose checkpoints are nodes yet."""
    functions = {name: RewardSource((function,)) for name, function in recipe.eval.scores.items()}
    made: Any = {name: models[Given(path)] for name, path in recipe.eval.reward_models.items()}
    return functions | {name: RewardSource(checkpoint=node) for name, node in made.items()}
