"""The stages of a run: which function does the work, and what its digest covers."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from salsa import models
from salsa.anchors import Anchors, identity
from salsa.artifacts import Checkpoint, RunDirectory, Stage, resolve, sha256_tree
from salsa.config import DataSource, PreferencesConfig, Recipe
from salsa.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    Prompt,
    Row,
    describe,
    fingerprint,
    import_callable,
    load_prompts,
    load_rows,
    preference_rows,
    sft_rows,
)
from salsa.evaluate.scores import EvalJob, evaluate_policy
from salsa.expressions import ingredients_of
from salsa.preferences import PairsJob, read_pairs, sample_pairs
from salsa.reward import Reward, RewardJob, model_scorer, train_reward
from salsa.reward_functions import FunctionScorer, function_digest, function_scorers
from salsa.rl import RLJob, train_rl
from salsa.runtime.tracking import say
from salsa.sft import SFTJob, train_sft
from salsa.soup import write_soup


def rl_label(arm: str, seed: int) -> str:
    """Name of an RL stage; the report finds its learning curves by it."""
    return f"rl {arm} seed {seed}"


class Stages:
    """The stages of one recipe in one run directory: what each is made of, and so its digest."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self.recipe, self.run = recipe, run
        self.precision = recipe.model.precision
        self._loaded: dict[DataSource, list[Prompt]] = {}

    @cached_property
    def base(self) -> Checkpoint:
        """The model that SFT starts from; made into an ordinary checkpoint first if it is GGUF or lacks a template."""
        config = self.recipe.model
        source = Checkpoint.of(resolve(config.path, revision=config.revision))
        if config.gguf_file is None and config.chat_template is None:
            return source
        template = (
            Path(config.chat_template).read_text(encoding="utf-8") if config.chat_template else None
        )
        return self._stage(
            "base",
            {"gguf_file": config.gguf_file, "chat_template": template},
            {"source": source.digest},
            lambda directory: models.prepare_base(config, source.path, directory),
        ).checkpoint

    def check_inputs(self) -> None:
        """Touch every data set and callable first: a typo must not surface after an hour of SFT."""
        recipe = self.recipe
        tokenizer = models.load_tokenizer(self.base.path)
        if (source := recipe.sft.dataset) is not None:
            sft_rows(load_rows(source, SFT_COLUMNS), tokenizer, describe(source))
        if (source := recipe.reward.dataset) is not None:
            preference_rows(load_rows(source, PREFERENCE_COLUMNS), tokenizer, describe(source))
        if recipe.reward.preferences is not None:
            self._prompts(recipe.reward.preferences.prompts)
            import_callable(recipe.reward.preferences.labeller.call)
        for function in (*recipe.reward.functions, *recipe.eval.scores.values()):
            import_callable(function.call)
        self._prompts(recipe.rl.prompts)
        self._prompts(recipe.eval.prompts)

    def sft(self, index: int) -> Checkpoint:
        """The SFT model of the index-th seed, or the index-th checkpoint that is given."""
        config = self.recipe.sft
        if config.dataset is None:
            return self._finished_sft(index, resolve(config.checkpoints[index]))
        seed = config.seeds[index]
        job = SFTJob(f"sft[{index}]", self.base, config, seed, self.precision)
        return self._stage(
            job.label,
            config.model_dump(mode="json", exclude={"seeds", "dataset"}) | {"seed": seed},
            {"base": self.base.digest, "data": fingerprint(config.dataset)},
            lambda directory: train_sft(job, directory),
        ).checkpoint

    def _finished_sft(self, index: int, path: Path) -> Checkpoint:
        """A checkpoint that was given; a LoRA adapter is added to the recipe's base first."""
        if not (path / "adapter_config.json").is_file():
            return Checkpoint.of(path)
        adapter = Checkpoint(path, sha256_tree(path))
        return self._stage(
            f"sft[{index}]",
            {},
            {"base": self.base.digest, "adapter": adapter.digest},
            lambda directory: write_soup([adapter], directory, base=self.base),
        ).checkpoint

    def reward(self, anchors: Anchors, sft: list[Checkpoint]) -> Reward:
        """The reward that RL maximises: callables, a finished model, or one trained here on preferences."""
        config = self.recipe.reward
        if config.functions:
            digest = " ".join(function_digest(f) for f in config.functions)
            return Reward(function_scorers(config.functions), None, digest)
        if config.paths:
            found = [Checkpoint.of(resolve(path)) for path in config.paths]
        else:
            found = self._train_rewards(anchors, sft)
        checkpoint = found[0]
        if len(found) > 1:
            checkpoint = anchors.cook("reward soup", found, heads="average")
        scorer = model_scorer(checkpoint.path, self.precision)
        return Reward({"model": scorer}, checkpoint, checkpoint.digest)

    def rl(self, arm: str, seed: int, anchors: Anchors, reward: Reward) -> Checkpoint:
        """The policy of one arm and seed."""
        section = self.recipe.rl
        init = anchors[section.arms[arm].init]
        reference = anchors.resolved(section.arms[arm].anchor)
        monitored = self._monitored(anchors)
        monitors = {name: FunctionScorer([f]) for name, f in self.recipe.eval.scores.items()}
        job = RLJob(
            label=rl_label(arm, seed),
            init=init,
            reference=reference,
            critic_init=self._critic_init(reward, init),
            config=section.config,
            prompts=self._prompts(section.prompts),
            reward=reward.parts,
            seed=seed,
            precision=self.precision,
            monitors=monitors,
            kl_to=monitored,
        )
        return self._stage(
            job.label,
            section.config.model_dump(mode="json") | {"seed": seed},
            {
                "init": init.digest,
                "reference": identity(reference),
                "critic": job.critic_init.digest,
                "reward": reward.digest,
                "prompts": fingerprint(section.prompts),
            }
            | {f"kl_to {name}": checkpoint.digest for name, checkpoint in monitored.items()}
            | self._score_digests(),
            lambda directory: train_rl(job, directory),
        ).checkpoint

    def evaluate(
        self, arm: str, number: int, policy: Checkpoint, anchors: Anchors, reward: Reward
    ) -> Stage:
        """Samples of one policy, the `number`-th seed of its arm, on the held-out prompts."""
        config, section = self.recipe.eval, self.recipe.rl
        anchor = anchors[config.anchor]
        references, mixed = self._references(arm, policy, anchors, anchor)
        scorers = {"proxy": reward.score} | {
            n: FunctionScorer([f]) for n, f in config.scores.items()
        }
        job = EvalJob(
            label=f"eval {arm} seed {section.seeds[number]}",
            policy=policy,
            kl_to={"anchor": anchor} | references,
            mixed=mixed,
            prompts=self._prompts(config.prompts),
            scorers=scorers,
            max_new_tokens=config.max_new_tokens or section.max_new_tokens,
            temperature=section.temperature,
            batch_size=config.batch_size,
            seed=config.seed + number,
            precision=self.precision,
        )
        return self._stage(
            job.label,
            {
                "max_new_tokens": job.max_new_tokens,
                "temperature": job.temperature,
                "batch_size": job.batch_size,
                "seed": job.seed,
                "max_prompt_tokens": section.max_prompt_tokens,
            },
            {
                "policy": policy.digest,
                **{name: checkpoint.digest for name, checkpoint in references.items()},
                "mixed": str(mixed),
                "anchor": anchor.digest,
                "reward": reward.digest,
                "prompts": fingerprint(config.prompts),
            }
            | self._score_digests(),
            lambda directory: evaluate_policy(job, directory),
        )

    def _references(
        self, arm: str, policy: Checkpoint, anchors: Anchors, anchor: Checkpoint
    ) -> tuple[dict[str, Checkpoint], dict[str, dict[str, float]]]:
        """What an arm's KL is measured to (a moving anchor: where it ended), and how a mixture's parts weigh."""
        if arm not in self.recipe.rl.arms:
            return {"reference": anchor}, {}
        rule = self.recipe.rl.arms[arm].anchor
        if rule.moves:
            return {"reference": Checkpoint.of(policy.path / "reference")}, {}
        if len(rule.models) == 1:
            return {"reference": anchors[rule.models[0]]}, {}
        parts = {f"reference[{i}]": anchors[model] for i, model in enumerate(rule.models)}
        return parts, {"reference": dict(zip(parts, rule.weights, strict=True))}

    def _train_rewards(self, anchors: Anchors, sft: list[Checkpoint]) -> list[Checkpoint]:
        """One reward model per seed, all on the same pairs."""
        config = self.recipe.reward
        init = anchors[config.init]
        if config.preferences is not None:
            pairs = self._preferences(config.preferences, sft)
            rows, where, data = read_pairs(pairs.path), str(pairs.path), pairs.checkpoint.digest
        else:
            assert config.dataset is not None  # the schema: one of the four sources
            rows = load_rows(config.dataset, PREFERENCE_COLUMNS)
            where, data = describe(config.dataset), fingerprint(config.dataset)
        return [self._train_reward(seed, init, rows, where, data) for seed in config.seeds]

    def _train_reward(
        self, seed: int, init: Checkpoint, rows: list[Row], where: str, data: str
    ) -> Checkpoint:
        config = self.recipe.reward
        label = "reward" if len(config.seeds) == 1 else f"reward seed {seed}"
        job = RewardJob(label, init, rows, where, config, seed, self.precision)
        elsewhere = {"dataset", "preferences", "paths", "functions", "init", "seeds"}
        return self._stage(
            label,
            config.model_dump(mode="json", exclude=elsewhere) | {"seed": seed},
            {"init": init.digest, "data": data},
            lambda directory: train_reward(job, directory),
        ).checkpoint

    def _preferences(self, config: PreferencesConfig, sft: list[Checkpoint]) -> Stage:
        prompts = self._prompts(config.prompts)
        job = PairsJob("preferences", sft, config, prompts, self.precision)
        return self._stage(
            job.label,
            config.model_dump(mode="json")
            | {"max_prompt_tokens": self.recipe.rl.max_prompt_tokens},
            {f"sft[{i}]": c.digest for i, c in enumerate(sft)}
            | {
                "prompts": fingerprint(config.prompts),
                "labeller": function_digest(config.labeller),
            },
            lambda directory: sample_pairs(job, directory),
        )

    def _critic_init(self, reward: Reward, init: Checkpoint) -> Checkpoint:
        """The reward model where it speaks the policy's tokens, else the policy's own start with a new head."""
        if reward.checkpoint is None:
            return init
        shared = models.same_vocabulary(reward.checkpoint.path, init.path)
        return reward.checkpoint if shared else init

    def _monitored(self, anchors: Anchors) -> dict[str, Checkpoint]:
        """The base and every SFT model that goes into any arm: the models whose KL is logged."""
        used = {
            index
            for _, expression in self.recipe.expressions()
            for index in ingredients_of(expression, self.recipe.soup.ingredients)
        }
        names = ["base", *(f"sft[{index}]" for index in sorted(used))]
        return {name: anchors[name] for name in names}

    def _prompts(self, source: DataSource) -> list[Prompt]:
        if source not in self._loaded:
            tokenizer = models.load_tokenizer(self.base.path)
            self._loaded[source] = load_prompts(
                source, tokenizer, max_tokens=self.recipe.rl.max_prompt_tokens
            )
        return self._loaded[source]

    def _score_digests(self) -> dict[str, str]:
        return {
            f"score {name}": function_digest(function)
            for name, function in self.recipe.eval.scores.items()
        }

    def _stage(
        self,
        label: str,
        config: dict[str, Any],
        inputs: dict[str, str],
        work: Callable[[Path], object],
    ) -> Stage:
        stage = self.run.stage(
            label, config=config | {"precision": self.precision}, inputs=inputs, work=work
        )
        say(
            f"{label}: "
            + ("reused" if stage.reused else f"done in {stage.record['seconds']:.0f} s")
        )
        return stage
