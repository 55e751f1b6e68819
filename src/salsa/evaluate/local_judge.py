"""A judge in this process: any chat model that transformers loads."""

from collections.abc import Sequence
from typing import Any

from salsa.artifacts import resolve
from salsa.data import Prompt, as_prompt
from salsa.evaluate.answers import Writer
from salsa.evaluate.judge import Judge, Message, Refusal, Reply
from salsa.evaluate.spec import JudgeConfig
from salsa.runtime.engine import Engine


class LocalJudge(Judge):
    """Greedy (or sampled) judgments, `concurrency` in a batch."""

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
        room = (writer.context or 10**9) - writer.max_new_tokens
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
