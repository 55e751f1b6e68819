"""SALSA on one screen: which stage feeds which.

    base ─► SFT × N ─► soup ─┐
              │              ├─► PPO per arm × seed ─► evaluation ─► report
              └─► reward ────┘

Every stage is a directory named by the digest of what goes into it: a finished one is reused, an interrupted one goes on
from its last checkpoint (`salsa.artifacts`).
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from salsa import models
from salsa.anchors import Anchors
from salsa.artifacts import Checkpoint, RunDirectory, Stage, resolve, write_atomic
from salsa.config import DataSource, Recipe
from salsa.data import Prompt, describe, fingerprint, import_callable, load_prompts, load_rows
from salsa.evaluate.scores import EvalJob, evaluate_policy
from salsa.preferences import PairsJob, read_pairs, sample_pairs
from salsa.report.page import write_report
from salsa.reward import Reward, RewardJob, function_scorer, model_scorer, train_reward
from salsa.rl import RLJob, train_rl
from salsa.runtime.local import prepare_process
from salsa.runtime.tracking import say
from salsa.sft import SFTJob, train_sft

STAGES = ("sft", "reward", "rl", "eval", "report")


def run_recipe(recipe: Recipe, *, out: Path | None = None, until: str = "report", force: bool = False) -> Path:
    """Run a recipe from the base model to the report, or `until` one of `STAGES`; returns the run directory.

    Raises:
        SalsaError: bad input, or work that failed; finished stages are kept.
    """
    directory = RunDirectory(out or Path("runs") / recipe.name)
    with directory.opened(recipe.to_yaml(), force=force) as run:
        prepare_process(recipe.engine.threads)
        pipeline = Pipeline(recipe, run)
        pipeline.check_inputs()
        sft = pipeline.sft()
        anchors = Anchors(run, pipeline.base, sft, recipe.soup)
        if until != "sft":
            reward = pipeline.reward(anchors, sft)
        if until not in ("sft", "reward"):
            policies = pipeline.rl(anchors, reward)
        if until not in ("sft", "reward", "rl"):
            samples = pipeline.evaluate(anchors, reward, policies)
        if until == "report":
            write_report(recipe, run, samples)
            say(f"report: {run.path / 'report.html'}")
    return directory.path


class Pipeline:
    """The stages of one recipe in one run directory."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self.recipe, self.run = recipe, run
        self.precision = recipe.model.precision

    @cached_property
    def base(self) -> Checkpoint:
        """The model that SFT starts from, as an ordinary checkpoint in the run directory."""
        config = self.recipe.model
        source = Checkpoint.of(resolve(config.path, revision=config.revision))
        template = Path(config.chat_template).read_text() if config.chat_template else None
        stage = self._stage(
            "base",
            {"gguf_file": config.gguf_file, "chat_template": template},
            {"source": source.digest},
            lambda directory: models.prepare_base(config, source.path, directory),
        )
        return stage.checkpoint

    def check_inputs(self) -> None:
        """Touch every data set and callable first: a typo must not surface after an hour of SFT."""
        recipe = self.recipe
        tokenizer = models.load_tokenizer(self.base.path)
        if recipe.sft.dataset is not None:
            load_rows(recipe.sft.dataset, [("messages",), ("prompt", "completion")])
        if recipe.reward.dataset is not None:
            load_rows(recipe.reward.dataset, [("chosen", "rejected")])
        if recipe.reward.preferences is not None:
            load_prompts(recipe.reward.preferences.prompts, tokenizer, max_tokens=recipe.rl.max_prompt_tokens)
            import_callable(recipe.reward.preferences.labeller.call)
        for function in (*recipe.reward.functions, *recipe.eval.scores.values()):
            import_callable(function.call)
        self._prompts(recipe.rl.prompts)
        self._prompts(recipe.eval.prompts)

    def sft(self) -> list[Checkpoint]:
        """SFT × N from one base and one data set, or the checkpoints that are given."""
        config = self.recipe.sft
        if config.dataset is None:
            return [Checkpoint.of(resolve(path)) for path in config.checkpoints]
        data = fingerprint(config.dataset)
        return [
            self._stage(
                label := f"sft[{index}]",
                config.model_dump(mode="json", exclude={"seeds", "dataset"}) | {"seed": seed},
                {"base": self.base.digest, "data": data},
                lambda d, job=SFTJob(label, self.base, config, seed, self.precision): train_sft(job, d),
            ).checkpoint
            for index, seed in enumerate(config.seeds)
        ]

    def reward(self, anchors: Anchors, sft: list[Checkpoint]) -> Reward:
        """The reward that RL maximises: callables, a finished model, or one trained here on preferences."""
        config = self.recipe.reward
        if config.functions:
            digests = [fingerprint(DataSource(call=f.call)) + str(f.weight) for f in config.functions]
            return Reward(function_scorer(config.functions), None, " ".join(digests))
        if config.path is not None:
            checkpoint = Checkpoint.of(resolve(config.path))
        else:
            checkpoint = self._train_reward(anchors, sft)
        return Reward(model_scorer(checkpoint.path, self.precision), checkpoint, checkpoint.digest)

    def rl(self, anchors: Anchors, reward: Reward) -> dict[str, list[Checkpoint]]:
        """One run per arm and seed: arm → policies, a seed each."""
        section, prompts = self.recipe.rl, self._prompts(self.recipe.rl.prompts)
        monitors = {name: function_scorer([f]) for name, f in self.recipe.eval.scores.items()}
        policies: dict[str, list[Checkpoint]] = {}
        for name, arm in section.arms.items():
            init, reference = anchors[arm.init], anchors[arm.reference]
            critic_init = self._critic_init(reward, init)
            policies[name] = [
                self._stage(
                    label := f"rl {name} seed {seed}",
                    section.config.model_dump(mode="json") | {"seed": seed, "monitors": sorted(monitors)},
                    {
                        "init": init.digest,
                        "reference": reference.digest,
                        "critic": critic_init.digest,
                        "reward": reward.digest,
                        "prompts": fingerprint(section.prompts),
                    },
                    lambda d, job=RLJob(
                        label, init, reference, critic_init, section.config, prompts, reward.score, seed, self.precision, monitors
                    ): train_rl(job, d),
                ).checkpoint
                for seed in section.seeds
            ]
        return policies

    def evaluate(
        self, anchors: Anchors, reward: Reward, policies: Mapping[str, list[Checkpoint]]
    ) -> dict[str, list[Stage]]:
        """Every arm, and the anchor itself as `sft`, on the same held-out prompts: arm → samples, a seed each."""
        config, section = self.recipe.eval, self.recipe.rl
        anchor, prompts = anchors[config.anchor], self._prompts(config.prompts)
        scorers = {"proxy": reward.score} | {n: function_scorer([f]) for n, f in config.scores.items()}
        entries = {"sft": ([anchor] * len(section.seeds), anchor)}
        entries |= {name: (policies[name], anchors[arm.reference]) for name, arm in section.arms.items()}
        inputs = {"prompts": fingerprint(config.prompts), "reward": reward.digest, "anchor": anchor.digest}
        inputs |= {name: fingerprint(DataSource(call=f.call)) for name, f in config.scores.items()}
        samples: dict[str, list[Stage]] = {}
        for name, (checkpoints, reference) in entries.items():
            samples[name] = []
            for number, checkpoint in enumerate(checkpoints):
                job = EvalJob(
                    label=f"eval {name} seed {section.seeds[number]}",
                    policy=checkpoint,
                    kl_to={"anchor": anchor, "reference": reference},
                    prompts=prompts,
                    scorers=scorers,
                    max_new_tokens=config.max_new_tokens or section.max_new_tokens,
                    temperature=section.temperature,
                    batch_size=config.batch_size,
                    seed=config.seed + number,
                    precision=self.precision,
                )
                stage = self._stage(
                    job.label,
                    config.model_dump(mode="json", exclude={"baseline"})
                    | {"max_new_tokens": job.max_new_tokens, "temperature": job.temperature, "seed": job.seed},
                    inputs | {"policy": checkpoint.digest, "reference": reference.digest},
                    lambda d, job=job: evaluate_policy(job, d),
                )
                samples[name].append(stage)
        return samples

    def _train_reward(self, anchors: Anchors, sft: list[Checkpoint]) -> Checkpoint:
        config = self.recipe.reward
        init = anchors[config.init]
        if config.preferences is not None:
            job = PairsJob("preferences", sft, config.preferences, self._preference_prompts(), self.precision)
            pairs = self._stage(
                job.label,
                config.preferences.model_dump(mode="json"),
                {f"sft[{i}]": c.digest for i, c in enumerate(sft)}
                | {
                    "prompts": fingerprint(config.preferences.prompts),
                    "labeller": fingerprint(DataSource(call=config.preferences.labeller.call)),
                },
                lambda d: sample_pairs(job, d),
            )
            rows, where, data = read_pairs(pairs.path), str(pairs.path), pairs.checkpoint.digest
        else:
            assert config.dataset is not None  # the schema: one of the four sources
            rows = load_rows(config.dataset, [("chosen", "rejected")])
            where, data = describe(config.dataset), fingerprint(config.dataset)
        reward_job = RewardJob("reward", init, rows, where, config, self.precision)
        return self._stage(
            "reward",
            config.model_dump(mode="json", exclude={"dataset", "preferences", "path", "functions", "init"}),
            {"init": init.digest, "data": data},
            lambda d: train_reward(reward_job, d),
        ).checkpoint

    def _critic_init(self, reward: Reward, init: Checkpoint) -> Checkpoint:
        """The reward model where it speaks the policy's tokens, else the policy's own start with a new head."""
        if reward.checkpoint is None:
            return init
        vocabularies = [models.load_tokenizer(c.path).get_vocab() for c in (reward.checkpoint, init)]
        return reward.checkpoint if vocabularies[0] == vocabularies[1] else init

    def _prompts(self, source: DataSource) -> list[Prompt]:
        tokenizer = models.load_tokenizer(self.base.path)
        return load_prompts(source, tokenizer, max_tokens=self.recipe.rl.max_prompt_tokens)

    def _preference_prompts(self) -> list[Prompt]:
        assert self.recipe.reward.preferences is not None
        return self._prompts(self.recipe.reward.preferences.prompts)

    def _stage(self, label, config, inputs, work) -> Stage:  # noqa: ANN001
        stage = self.run.stage(label, config=config | {"precision": self.precision}, inputs=inputs, work=work)
        say(f"{label}: {'reused' if stage.reused else 'done in %.0f s' % stage.record['seconds']}")
        return stage
