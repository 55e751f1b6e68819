"""What a model in this process says: a policy's answers to one or two turns, resumable by the batch, or judgments."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from salsa.artifacts import append_jsonl, drop_half_line, read_jsonl, resolve, write_jsonl
from salsa.data import Message, Prompt, as_prompt
from salsa.errors import DataError
from salsa.evaluate import arena_hard, mtbench
from salsa.evaluate.judge import Judge, Refusal, Reply
from salsa.evaluate.spec import JudgeConfig
from salsa.models import LanguageModel, load_tokenizer, sampling_for
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.tracking import tracker
from salsa.stages.jobs import AnswersJob
from salsa.types import Rollout

GREEDY = 1e-8
"""The temperature that stands for 0: the sampler divides logits by it, and the largest takes all."""

ROWS = {"mt_bench": mtbench.answer_row, "arena_hard": arena_hard.answer_row}
"""Benchmark → a row of `answers.jsonl` in upstream's format."""


def write_answers(job: AnswersJob, directory: Path, engine: Engine) -> None:
    """Write `answers.jsonl`: a row for every question, the second turn answered after the first's answer."""
    writer = Writer(job.policy.path, job.max_new_tokens, job.batch_size, engine)
    talks: list[list[Message]] = [[] for _ in job.questions]
    for turn in range(max(len(question.turns) for question in job.questions)):
        asked = [i for i, question in enumerate(job.questions) if turn < len(question.turns)]
        for i in asked:
            talks[i].append({"role": "user", "content": job.questions[i].turns[turn]})
        replies = writer.replies(
            [talks[i] for i in asked],
            [job.temperatures[i] for i in asked],
            seed=job.seed * 2 + turn,
            label=f"{job.label} turn {turn + 1}",
            directory=directory / "resume" / f"turn-{turn + 1}",
        )
        for i, reply in zip(asked, replies, strict=True):
            talks[i].append({"role": "assistant", "content": reply})
    answers = [[message["content"] for message in talk[1::2]] for talk in talks]
    row = ROWS[job.benchmark]
    rows = [row(q, given, job.name) for q, given in zip(job.questions, answers, strict=True)]
    write_jsonl(directory / "answers.jsonl", rows)


class Writer:
    """A loaded policy that replies to conversations."""

    def __init__(self, path: Path, max_new_tokens: int, batch_size: int, engine: Engine) -> None:
        self.path, self.batch_size, self.engine = path, batch_size, engine
        self.max_new_tokens, self.tokenizer = max_new_tokens, load_tokenizer(path)
        policy = LanguageModel.load(path, engine)
        self.sampler = LocalSampler(policy)
        self.context = getattr(policy.backbone.config, "max_position_embeddings", None) or 10**9

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        temperatures: Sequence[float],
        *,
        seed: int,
        label: str,
        directory: Path,
    ) -> list[str]:
        """A reply to each; finished batches are kept in `directory` and not written again."""
        prompts = [as_prompt({"messages": list(c)}, self.tokenizer, label) for c in conversations]
        order = sorted(range(len(prompts)), key=lambda i: (temperatures[i], len(prompts[i].ids), i))
        batches = _batches(order, temperatures, self.batch_size)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "replies.jsonl"
        drop_half_line(file)
        known = {row["index"]: row["text"] for row in read_jsonl(file)}
        with tracker(directory, label, len(batches), ("answered",)) as log:
            log.resume_at(0)
            for number, batch in enumerate(batches):
                if not all(i in known for i in batch):
                    rollout = self.batch(
                        [prompts[i] for i in batch], temperatures[batch[0]], seed, number
                    )
                    known |= dict(zip(batch, rollout.texts(self.tokenizer), strict=True))
                    append_jsonl(file, [{"index": i, "text": known[i]} for i in batch])
                log.advance(number + 1, {"answered": len(known)})
        return [known[i] for i in range(len(prompts))]

    def batch(
        self, prompts: Sequence[Prompt], temperature: float, seed: int, number: int
    ) -> Rollout:
        """Replies to one batch, drawn from (seed, number); DataError if a prompt leaves no room to answer."""
        longest = max(len(prompt.ids) for prompt in prompts)
        room = min(self.max_new_tokens, self.context - longest)
        if room < 1:
            raise DataError(
                f"{self.path}: a conversation of {longest} tokens fills the model's {self.context} positions. "
                "Lower max_new_tokens, or evaluate a model with a longer context."
            )
        sampling = sampling_for(
            self.path, self.tokenizer, max_new_tokens=room, temperature=temperature or GREEDY
        )
        generator = self.engine.generator(seed, number)
        return self.sampler.generate([p.ids for p in prompts], sampling, generator).rollout


class LocalJudge(Judge):
    """Any chat model that transformers loads; greedy (or sampled) judgments, `concurrency` in a batch."""

    def __init__(self, config: JudgeConfig, engine: Engine) -> None:
        assert config.path is not None  # the schema
        path = resolve(config.path)
        self.model = config.model or path.resolve().name
        self.batch_size = config.concurrency
        self.parameters: dict[str, Any] = config.request | {"precision": engine.precision}
        self._temperature = config.temperature
        self._writer = Writer(path, config.max_tokens, config.concurrency, engine)

    async def ask(self, batch: Sequence[Sequence[Message]]) -> Sequence[Reply | Refusal]:
        """One forward pass after another; a conversation that leaves no room for a judgment is refused."""
        writer = self._writer
        prompts = [as_prompt({"messages": list(m)}, writer.tokenizer, "judge") for m in batch]
        room = writer.context - writer.max_new_tokens
        fitting = [prompt for prompt in prompts if len(prompt.ids) <= room]
        replies = iter(self._replies(fitting) if fitting else ())
        return [
            Refusal(f"{len(prompt.ids)} tokens and a judgment exceed the model's context")
            if len(prompt.ids) > room
            else next(replies)
            for prompt in prompts
        ]

    def _replies(self, prompts: Sequence[Prompt]) -> list[Reply]:
        rollout = self._writer.batch(prompts, self._temperature, 0, 0)
        texts = rollout.texts(self._writer.tokenizer)
        lengths = rollout.lengths.tolist()
        limit = self._writer.max_new_tokens
        return [
            Reply(text, "length" if length == limit else "stop", len(prompt.ids), length)
            for prompt, text, length in zip(prompts, texts, lengths, strict=True)
        ]


def _batches(order: Sequence[int], temperatures: Sequence[float], size: int) -> list[list[int]]:
    """Runs of at most `size` of `order`, none with two temperatures."""
    runs = [list(run) for _, run in groupby(order, key=lambda i: temperatures[i])]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]
