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
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from salsa.artifacts import Checkpoint, read_jsonl, resolve, write_jsonl
from salsa.config import RewardFunction
from salsa.data import Prompt, as_prompt, describe, load_rows
from salsa.errors import ConfigError, DataError
from salsa.evaluate import arena_hard, games, inputs
from salsa.evaluate.inputs import TEMPERATURES, JudgePrompt, Question
from salsa.evaluate.judge import (
    EndpointJudge,
    Judge,
    JudgmentCache,
    Message,
    Refusal,
    ReplayJudge,
    Reply,
    Totals,
    judge_all,
)
from salsa.evaluate.results import Bench, Results
from salsa.evaluate.spec import EvalSpec, JudgeConfig, RewardModel
from salsa.models import load_tokenizer, same_vocabulary
from salsa.rewards import RewardSource
from salsa.runtime.tracking import quiet_libraries, say
from salsa.stages.directory import Job, RunDirectory
from salsa.stages.evaluation import AnswersJob, EvalJob
from salsa.stages.graph import Graph, Node


@dataclass(frozen=True)
class Entrant:
    """One checkpoint of one arm."""

    arm: str
    seed: int
    """0 for an arm's first checkpoint."""
    label: str
    checkpoint: Checkpoint


def evaluate_checkpoints(spec: EvalSpec, out: Path, *, force: bool = False) -> Path:
    """Evaluate what `spec` names into the directory `out`; returns it. Resumable.

    Raises:
        SalsaError: bad input, or work that failed; what is finished is kept.
    """
    directory = RunDirectory(out)
    with directory.opened(spec.to_yaml(), force=force) as run:
        quiet_libraries()
        from salsa.report.evaluation import write_evaluation

        write_evaluation(_Evaluation(spec, run).results(), run)
        say(f"report: {run.path / 'report.html'}")
    return directory.path


class _Evaluation:
    """The parts of one evaluation; inputs are read first, so that a typo surfaces at once."""

    def __init__(self, spec: EvalSpec, run: RunDirectory) -> None:
        self.spec, self.run = spec, run
        self.graph = Graph(run, precision=spec.precision)
        self.entrants = _entrants(spec)
        self.models = {arm: [e.label for e in self.entrants if e.arm == arm] for arm in spec.models}
        self.pairs = games.pairings(self.models, spec.against)
        self.totals = Totals()
        self._mt_bench = self._read_mt_bench()
        self._arena_hard = self._read_arena_hard()
        self._prompts = self._read_prompts()
        self._judge_prompts = (
            inputs.load_judge_prompts(spec.prompts.judge_prompts)
            if spec.prompts and spec.prompts.judge_prompts
            else None
        )
        self.judge = make_judge(spec.judge, self.graph) if spec.judge else None

    def results(self) -> Results:
        """All the work, and what it found."""
        samples = self._samples() if self._prompts else {}
        benches = []
        if self._mt_bench:
            benches.append(self._play_mt_bench(*self._mt_bench))
        if self._arena_hard:
            benches.append(self._play_arena_hard(*self._arena_hard))
        if samples and self._judge_prompts and self.judge:
            benches.append(self._play_prompts(samples, self._judge_prompts))
        digests = {e.label: e.checkpoint.digest for e in self.entrants}
        return Results(self.spec, self.models, digests, samples, benches, self.totals)

    # reading

    def _read_mt_bench(self) -> tuple[list[Question], dict[str, JudgePrompt]] | None:
        config = self.spec.mt_bench
        if config is None:
            return None
        questions = inputs.load_questions(config.questions, config.references, config.corrections)
        prompts = inputs.load_judge_prompts(config.judge_prompts)
        for question in questions:  # every prompt that will be needed is there
            for turn in range(1, len(question.turns) + 1):
                for kind in ("single", "pair"):
                    inputs.judge_prompt(prompts, kind, question, turn)
        return questions, prompts

    def _read_arena_hard(
        self,
    ) -> tuple[list[Question], arena_hard.ArenaPrompt, dict[Any, tuple[str, ...]] | None] | None:
        config = self.spec.arena_hard
        if config is None:
            return None
        questions = arena_hard.load_questions(config.questions)
        prompt = arena_hard.load_judge_prompt(config.judge_prompt)
        if config.baseline is None:
            return questions, prompt, None
        answers = arena_hard.load_answers(config.baseline)
        if missing := [q.id for q in questions if q.id not in answers]:
            raise DataError(
                f"{config.baseline}: no answer to {len(missing)} of {len(questions)} questions, e.g. {missing[0]}. "
                "Give the baseline's answers to these questions."
            )
        return questions, prompt, answers

    def _read_prompts(self) -> dict[str, list[Prompt]]:
        """Model → the prompts as it sees them; those that fit every model, so that all answer the same ones."""
        config, spec = self.spec.prompts, self.spec
        if config is None:
            return {}
        rows = load_rows(config.source, [("prompt",), ("messages",)])
        where, seen = describe(config.source), {}
        for entrant in self.entrants:
            tokenizer = load_tokenizer(entrant.checkpoint.path)
            seen[entrant.label] = [as_prompt(row, tokenizer, where) for row in rows]
            if spec.kl_to and not same_vocabulary(resolve(spec.kl_to), entrant.checkpoint.path):
                raise ConfigError(
                    f"kl_to={spec.kl_to!r} and {entrant.label} ({entrant.checkpoint.path}) differ in "
                    "vocabulary, so no KL between them is defined. Leave kl_to out."
                )
        fits = [
            all(0 < len(own[i].ids) <= config.max_prompt_tokens for own in seen.values())
            for i in range(len(rows))
        ]
        if not any(fits):
            raise DataError(
                f"{where}: none of {len(rows)} prompts has at most {config.max_prompt_tokens} tokens for every model. "
                "Raise prompts.max_prompt_tokens."
            )
        if dropped := fits.count(False):
            say(f"{where}: {dropped} of {len(rows)} prompts dropped, too long for a model")
        self._fitting = tuple(number for number, fit in enumerate(fits) if fit)
        return {label: list(compress(own, fits)) for label, own in seen.items()}

    # answering

    def _samples(self) -> dict[str, list[Checkpoint]]:
        """Arm → seed → responses to the held-out prompts, scored."""
        spec, config = self.spec, self.spec.prompts
        assert config is not None
        rewards = {name: _source(reward) for name, reward in spec.rewards.items()}
        measured = {spec.kl_to: Checkpoint.of(resolve(spec.kl_to))} if spec.kl_to else {}
        samples: dict[str, list[Checkpoint]] = {}
        for entrant in self.entrants:
            job = EvalJob(
                label=f"samples {entrant.label}",
                policy=entrant.checkpoint,
                prompts=config.source,
                max_prompt_tokens=config.max_prompt_tokens,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                batch_size=spec.batch_size,
                seed=spec.seed + entrant.seed,
                rewards=rewards,
                kl_to=measured,
                only=self._fitting,
            )
            samples.setdefault(entrant.arm, []).append(self._finish(job))
        return samples

    def _answers(
        self,
        bench: str,
        questions: Sequence[Question],
        temperature: float | None,
        limit: int,
    ) -> None:
        """Write every model's answers in upstream's format, copied to `<bench>/model_answer`."""
        temperatures = tuple(_temperature(question, temperature) for question in questions)
        for entrant in self.entrants:
            job = AnswersJob(
                label=f"{bench} {entrant.label}",
                benchmark=bench,
                name=entrant.label,
                policy=entrant.checkpoint,
                questions=tuple(questions),
                temperatures=temperatures,
                max_new_tokens=limit,
                batch_size=self.spec.batch_size,
                seed=self.spec.seed + entrant.seed,
            )
            rows = read_jsonl(self._finish(job).path / "answers.jsonl")
            write_jsonl(self._file(bench, "model_answer", entrant.label), rows)

    # judging

    def _play_mt_bench(
        self, questions: list[Question], prompts: Mapping[str, JudgePrompt]
    ) -> Bench:
        config, judge = self.spec.mt_bench, self._needed_judge()
        assert config is not None
        self._answers("mt_bench", questions, None, config.max_new_tokens)
        answers = {
            e.label: inputs.load_answers(self._file("mt_bench", "model_answer", e.label))
            for e in self.entrants
        }
        singles = games.single_rows(questions, prompts, answers, judge.model, self._ask)
        write_jsonl(self._judgments("mt_bench", "single"), singles)
        pairs = games.pair_rows(questions, prompts, answers, self.pairs, judge.model, self._ask)
        write_jsonl(self._judgments("mt_bench", "pair"), pairs)
        return Bench("MT-Bench", questions, answers, pairs, singles)

    def _play_arena_hard(
        self,
        questions: list[Question],
        prompt: arena_hard.ArenaPrompt,
        baseline: dict[Any, tuple[str, ...]] | None,
    ) -> Bench:
        config, judge = self.spec.arena_hard, self._needed_judge()
        assert config is not None
        self._answers("arena_hard", questions, config.temperature, config.max_new_tokens)
        answers = {
            e.label: arena_hard.load_answers(self._file("arena_hard", "model_answer", e.label))
            for e in self.entrants
        }
        pairs = [pair for pair in self.pairs if pair[1] in self.models[self.spec.against]]
        if baseline is not None:
            name = Path(str(config.baseline)).stem
            pairs = [(entrant.label, name) for entrant in self.entrants]
            answers[name] = baseline
        rows = games.arena_rows(questions, prompt, answers, pairs, judge.model, self._ask)
        for label in {model for model, _ in pairs}:
            folder = self.run.path / "arena_hard" / "model_judgment" / _slug(judge.model)
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / f"{label}.jsonl", [row for row in rows if row["model"] == label])
        return Bench("Arena-Hard", questions, answers, rows, [])

    def _play_prompts(
        self, samples: Mapping[str, Sequence[Checkpoint]], prompts: Mapping[str, JudgePrompt]
    ) -> Bench:
        judge = self._needed_judge()
        prompts_seen = next(iter(self._prompts.values()))
        questions = [Question(i, "", (prompt.text,)) for i, prompt in enumerate(prompts_seen)]
        answers = {}
        for arm, stages in samples.items():
            for label, stage in zip(self.models[arm], stages, strict=True):
                rows = read_jsonl(stage.path / "samples.jsonl")
                answers[label] = {i: (row["response"],) for i, row in enumerate(rows)}
        pairs = games.pair_rows(questions, prompts, answers, self.pairs, judge.model, self._ask)
        write_jsonl(self._judgments("prompts", "pair"), pairs)
        return Bench("held-out prompts", questions, answers, pairs, [])

    def _ask(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Reply | Refusal]:
        judge = self._needed_judge()
        cache = JudgmentCache(self.run.path / "judgments.jsonl")
        replies, totals = judge_all(conversations, judge, cache, f"judge {judge.model}")
        self.totals = self.totals + totals
        return replies

    def _needed_judge(self) -> Judge:
        assert self.judge is not None  # the schema: benchmarks need a judge
        return self.judge

    def _file(self, bench: str, kind: str, label: str) -> Path:
        path = self.run.path / bench / kind / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _judgments(self, bench: str, kind: str) -> Path:
        return self._file(bench, "model_judgment", f"{_slug(self._needed_judge().model)}_{kind}")

    def _finish(self, job: Job) -> Checkpoint:
        node = Node(job.label, (), lambda: job)
        self.graph.finish([node])
        return self.graph[node]


def make_judge(config: JudgeConfig, graph: Graph) -> Judge:
    """The backend that `config` names."""
    if config.url is not None:
        return EndpointJudge(config)
    if config.replay is not None:
        return ReplayJudge(config.replay, config.model)
    from salsa.evaluate.local_judge import LocalJudge

    return LocalJudge(config, graph.engine())


def _entrants(spec: EvalSpec) -> list[Entrant]:
    return [
        Entrant(
            arm,
            seed,
            arm if spec.num_seeds == 1 else f"{arm}-seed-{seed}",
            Checkpoint.of(resolve(path)),
        )
        for arm, paths in spec.models.items()
        for seed, path in enumerate(paths)
    ]


def _temperature(question: Question, fixed: float | None) -> float:
    if question.temperature is not None:
        return question.temperature
    return TEMPERATURES.get(question.category, 0.0) if fixed is None else fixed


def _source(reward: RewardModel) -> RewardSource:
    if reward.call is not None:
        return RewardSource((RewardFunction(call=reward.call),))
    return RewardSource(checkpoint=Checkpoint.of(resolve(str(reward.path))))


def _slug(name: str) -> str:
    """A judge's name as a file name: endpoints call models `org/name` or by their path."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "judge"
