"""`salsa eval` of any checkpoints: answers, scores, KL and judgments in one directory, and a report.

    <out>/recipe.yaml                       what was asked for, every default written out
    <out>/stages/…                          samples and answers, a directory per model (as in a run)
    <out>/judgments.jsonl                   every judgment that was ever bought, by key
    <out>/mt_bench/model_answer/*.jsonl, mt_bench/model_judgment/*.jsonl      FastChat's formats
    <out>/arena_hard/model_answer/*.jsonl, arena_hard/model_judgment/…        arena-hard-auto's formats (v2.0)
    <out>/prompts/model_judgment/*.jsonl    judged held-out prompts, FastChat's format
    <out>/report.html, report.json

The same command again reuses what is finished; `salsa.evaluate.results` turns rows into figures.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from salsa.artifacts import Checkpoint, read_jsonl, resolve
from salsa.config import RewardFunction
from salsa.data import Prompt, as_prompt, describe, load_rows
from salsa.errors import ConfigError, DataError
from salsa.evaluate.answers import LocalJudge
from salsa.evaluate.arena_hard import ArenaHard
from salsa.evaluate.benchmarks import Answers, Bench, Benchmark, Match, Question, pairings
from salsa.evaluate.judge import EndpointJudge, Judge, JudgmentCache, ReplayJudge, judge_all
from salsa.evaluate.mtbench import MTBench, load_judge_prompts
from salsa.evaluate.results import Arm, Results
from salsa.evaluate.spec import EvalSpec, JudgeConfig
from salsa.models import load_tokenizer, same_vocabulary
from salsa.rewards import RewardSource
from salsa.runtime.tracking import quiet_libraries, round_metric, say
from salsa.stages.directory import Job, RunDirectory
from salsa.stages.graph import Graph, Node
from salsa.stages.jobs import AnswersJob, EvalJob


def evaluate_checkpoints(spec: EvalSpec, out: Path, *, force: bool = False) -> Path:
    """Evaluate what `spec` names into the directory `out`; returns it. After a SalsaError, what is finished is kept."""
    directory = RunDirectory(out)
    with directory.opened(spec.to_yaml(), force=force) as run:
        quiet_libraries()
        from salsa.report.page import write_report

        write_report(_Evaluation(spec, run).results(), run)
        say(f"report: {run.path / 'report.html'}")
    return directory.path


class _Evaluation:
    """The parts of one evaluation; inputs are read first, so that a typo surfaces at once."""

    def __init__(self, spec: EvalSpec, run: RunDirectory) -> None:
        self.spec, self.run = spec, run
        self.graph = Graph(run, precision=spec.precision)
        one = len(spec.models[spec.against]) == 1
        self.entrants = [  # arm, training seed, label, checkpoint
            (arm, seed, arm if one else f"{arm}-seed-{seed}", Checkpoint.of(resolve(path)))
            for arm, paths in spec.models.items()
            for seed, path in enumerate(paths)
        ]
        self.models = {arm: [e[2] for e in self.entrants if e[0] == arm] for arm in spec.models}
        self.benchmarks: list[Benchmark] = []
        if spec.mt_bench is not None:
            self.benchmarks.append(MTBench.load(spec.mt_bench))
        if spec.arena_hard is not None:
            self.benchmarks.append(ArenaHard(spec.arena_hard))
        self._prompts = self._read_prompts()
        file = spec.prompts and spec.prompts.judge_prompts
        self._judge_prompts = load_judge_prompts(file) if file else None
        self.match = self._match(spec.judge) if spec.judge else None

    def results(self) -> Results:
        """All the work, and what it measured."""
        spec, match = self.spec, self.match
        samples = self._samples() if self._prompts else {}
        benches = []
        if match is not None:  # benchmarks need a judge, the schema says
            benches = [b.judged(self._answers(b, match), match) for b in self.benchmarks]
            if samples and self._judge_prompts:
                benches.append(self._judge_samples(samples, match))
        return Results(
            name=spec.name,
            baseline=spec.against,
            arms={
                arm: Arm(own, range(len(own)), [e[3].digest for e in self.entrants if e[0] == arm])
                for arm, own in self.models.items()
            },
            recipe=spec.model_dump(mode="json"),
            samples=samples,
            scores=tuple(spec.rewards) if samples else (),
            kl_to=(spec.kl_to,) if samples and spec.kl_to else (),
            benches=benches,
            judge=judge_record(spec.judge, match) if spec.judge and match else None,
            stages=self.run.finished,
        )

    def _read_prompts(self) -> dict[str, list[Prompt]]:
        """Model → the prompts as it sees them; those that fit every model, so that all answer the same ones."""
        config, spec = self.spec.prompts, self.spec
        if config is None:
            return {}
        rows = load_rows(config.source, [("prompt",), ("messages",)])
        where, seen = describe(config.source), {}
        for _, _, label, checkpoint in self.entrants:
            tokenizer = load_tokenizer(checkpoint.path)
            seen[label] = [as_prompt(row, tokenizer, where) for row in rows]
            if spec.kl_to and not same_vocabulary(resolve(spec.kl_to), checkpoint.path):
                raise ConfigError(
                    f"kl_to={spec.kl_to!r} and {label} ({checkpoint.path}) differ in vocabulary, so no KL between them "
                    "is defined. Leave kl_to out."
                )
        fits = [
            all(0 < len(prompt.ids) <= config.max_prompt_tokens for prompt in of_one)
            for of_one in zip(*seen.values(), strict=True)
        ]
        if not any(fits):
            raise DataError(
                f"{where}: none of {len(rows)} prompts has at most {config.max_prompt_tokens} tokens for every model. "
                "Raise prompts.max_prompt_tokens."
            )
        if dropped := fits.count(False):
            say(f"{where}: {dropped} of {len(rows)} prompts dropped, too long for a model")
        self._fitting = tuple(compress(range(len(rows)), fits))
        return {label: list(compress(own, fits)) for label, own in seen.items()}

    def _samples(self) -> dict[str, list[Checkpoint]]:
        """Arm → seed → responses to the held-out prompts, scored."""
        spec, config = self.spec, self.spec.prompts
        assert config is not None
        rewards = {
            name: RewardSource((RewardFunction(call=reward.call),))
            if reward.call is not None
            else RewardSource(checkpoint=Checkpoint.of(resolve(str(reward.path))))
            for name, reward in spec.rewards.items()
        }
        measured = {spec.kl_to: Checkpoint.of(resolve(spec.kl_to))} if spec.kl_to else {}
        samples: dict[str, list[Checkpoint]] = {}
        for arm, seed, label, checkpoint in self.entrants:
            job = EvalJob(
                label=f"samples {label}",
                policy=checkpoint,
                prompts=config.source,
                max_prompt_tokens=config.max_prompt_tokens,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                batch_size=spec.batch_size,
                seed=spec.seed + seed,
                rewards=rewards,
                kl_to=measured,
                only=self._fitting,
            )
            samples.setdefault(arm, []).append(self._finish(job))
        return samples

    def _answers(self, benchmark: Benchmark, match: Match) -> Answers:
        """The answers to a benchmark; also written to `<folder>/model_answer` in upstream's format."""
        answers = {}
        for _, seed, label, checkpoint in self.entrants:
            job = AnswersJob(
                label=f"{benchmark.folder} {label}",
                benchmark=benchmark.folder,
                name=label,
                policy=checkpoint,
                questions=tuple(benchmark.questions),
                temperatures=tuple(question.temperature for question in benchmark.questions),
                max_new_tokens=benchmark.max_new_tokens,
                batch_size=self.spec.batch_size,
                seed=self.spec.seed + seed,
            )
            rows = read_jsonl(self._finish(job).path / "answers.jsonl")
            file = match.write(f"{benchmark.folder}/model_answer", label, rows)
            answers[label] = benchmark.load_answers(file)
        return answers

    def _judge_samples(self, samples: Mapping[str, Sequence[Checkpoint]], match: Match) -> Bench:
        """The responses to the held-out prompts, judged in pairs by MT-Bench's prompts."""
        assert self._judge_prompts is not None
        prompts = next(iter(self._prompts.values()))
        questions = [Question(i, "", (prompt.text,)) for i, prompt in enumerate(prompts)]
        answers = {}
        for arm, of_arm in samples.items():
            for label, one in zip(self.models[arm], of_arm, strict=True):
                rows = read_jsonl(one.path / "samples.jsonl")
                answers[label] = {i: (row["response"],) for i, row in enumerate(rows)}
        pairs = MTBench(questions, self._judge_prompts).pair_rows(answers, match)
        match.write("prompts/model_judgment", f"{match.judge_slug}_pair", pairs)
        return Bench("held-out prompts", questions, answers, pairs, [])

    def _match(self, config: JudgeConfig) -> Match:
        judge: Judge
        if config.url is not None:
            judge = EndpointJudge(config)
        elif config.replay is not None:
            judge = ReplayJudge(config.replay, config.model)
        else:
            judge = LocalJudge(config, self.graph.engine())
        cache = JudgmentCache(self.run.path / "judgments.jsonl")
        ask = partial(judge_all, judge=judge, cache=cache, label=f"judge {judge.model}")
        baseline, pairs = self.spec.against, pairings(self.models, self.spec.against)
        return Match(self.models[baseline], pairs, judge.model, ask, self.run.path)

    def _finish(self, job: Job) -> Checkpoint:
        node = Node(job.label, (), lambda: job)
        self.graph.finish([node])
        return self.graph[node]


def judge_record(config: JudgeConfig, match: Match) -> dict[str, Any]:
    """The judge's name and parameters, and what judging took."""
    cost = match.totals.cost(config.price)
    return {
        "model": match.judge,
        "parameters": {} if config.replay else config.request,
        **{k: value for k, value in vars(match.totals).items() if k not in ("asked", "reused")},
        "cost": None if cost is None else round_metric(cost),
    }
