"""Ask a judge: bounded concurrency, retries, and a cache that a kill cannot spoil.

A judge is anything with `model`, `parameters`, `batch_size` and `ask`. Three exist: an OpenAI-compatible endpoint here,
a model in this process (`salsa.evaluate.answers`), and the replay of a judgments file here.

The cache is append-only jsonl, a line a judgment, keyed by sha256 of model, parameters and messages. A judgment is
written, in one piece, the moment it arrives: a kill loses what was under way and nothing else, and the same command
again asks only for what is missing. Errors are no judgments and are never cached. Keys are never written or shown.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from salsa.artifacts import append_jsonl, digest_of, drop_half_line, parse_jsonl
from salsa.errors import ConfigError, DataError, WorkFailed
from salsa.evaluate.judgments import PathOrRows, read_rows
from salsa.evaluate.spec import JudgeConfig
from salsa.runtime.tracking import Tracker, say, tracker

Message = dict[str, str]

GIVE_UP_AFTER = 3
"""Requests in a row that fail after all their retries: the judge is gone."""

GARBAGE_SECONDS = 0.5
"""First pause after an unusable reply; it doubles."""


@dataclass(frozen=True)
class Reply:
    """A judge's reply."""

    text: str
    finish_reason: str | None = None
    """`length` if the judgment was cut."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Refusal:
    """The judge will not judge this request, however often it is asked."""

    reason: str


class Unreachable(Exception):
    """A request failed after all its retries."""


class Judge(Protocol):
    """Answers batches of conversations."""

    model: str
    parameters: dict[str, Any]
    """What decides its answer besides the messages."""
    batch_size: int = 1
    concurrency: int = 1
    """Batches under way at once."""

    async def ask(self, batch: Sequence[Sequence[Message]]) -> Sequence[Reply | Refusal]:
        """One reply a conversation; raises Unreachable."""

    async def close(self) -> None:
        """Let go of connections, if there are any."""
        return None


@dataclass
class Totals:
    """What judging took."""

    asked: int = 0
    """Judgments bought this time."""
    reused: int = 0
    """Judgments found in the cache."""
    prompt_tokens: int = 0
    """Of all judgments, bought now or before."""
    completion_tokens: int = 0
    refused: int = 0
    cut: int = 0
    """Judgments that hit the length limit."""

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def cost(self, price: tuple[float, float] | None) -> float | None:
        """Price of all tokens, from the prices of a million prompt and completion tokens."""
        if price is None:
            return None
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6


class JudgmentCache:
    """Append-only jsonl of judgments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if drop_half_line(path):
            say(f"{path}: dropped half a line that an interrupted write had left")
        if path.exists():
            with path.open(encoding="utf-8") as lines:
                names = [f.name for f in fields(Reply)]
                for number, row in parse_jsonl(lines, str(path)):
                    try:
                        reply = Reply(**{name: row[name] for name in names if name in row})
                        self.replies.setdefault(row["key"], reply)
                    except (LookupError, TypeError) as error:
                        raise DataError(
                            f"{path}: line {number} is no cached judgment. Remove that line."
                        ) from error

    def write(self, key: str, judge: Judge, reply: Reply) -> None:
        """Append one judgment, as one whole line."""
        append_jsonl(self.path, [{"key": key, "model": judge.model, **asdict(reply)}])
        self.replies[key] = reply


def judge_all(
    requests: Sequence[Sequence[Message]],
    judge: Judge,
    cache: JudgmentCache,
    label: str = "judging",
) -> tuple[list[Reply | Refusal], Totals]:
    """A reply to every request, in order; equal requests are asked once. `label` names the work on the screen.

    Raises:
        WorkFailed: some requests failed after all retries; what was judged is in the cache.
        ConfigError: the judge cannot be asked at all (no such model, no valid key).
    """
    asked = {"model": judge.model, "parameters": judge.parameters}
    keys = [digest_of({**asked, "messages": list(messages)}) for messages in requests]
    missing = {k: m for k, m in zip(keys, requests, strict=True) if k not in cache.replies}
    totals = Totals(reused=len(set(keys)) - len(missing))
    refusals: dict[str, Refusal] = {}
    if missing:
        with tracker(cache.path.parent, label, len(missing), ("judged", "refused")) as progress:
            refusals = asyncio.run(_ask_missing(missing, judge, cache, totals, progress))
    replies = {key: cache.replies.get(key) or refusals[key] for key in keys}
    for reply in replies.values():
        if isinstance(reply, Reply):
            totals.prompt_tokens += reply.prompt_tokens
            totals.completion_tokens += reply.completion_tokens
            totals.cut += reply.finish_reason == "length"
    return [replies[key] for key in keys], totals


async def _ask_missing(
    missing: Mapping[str, Sequence[Message]],
    judge: Judge,
    cache: JudgmentCache,
    totals: Totals,
    progress: Tracker,
) -> dict[str, Refusal]:
    """Workers that take batches off one list until it is empty or the judge is gone; returns what it refused."""
    waiting = list(missing.items())[::-1]
    failures: list[str] = []
    refusals: dict[str, Refusal] = {}
    failed_in_a_row = 0

    async def work() -> None:
        nonlocal failed_in_a_row
        while waiting and failed_in_a_row < GIVE_UP_AFTER:
            batch = [waiting.pop() for _ in range(min(judge.batch_size, len(waiting)))]
            try:
                replies = await judge.ask([messages for _, messages in batch])
            except Unreachable as error:
                failures.append(str(error))
                failed_in_a_row += 1
                continue
            failed_in_a_row = 0
            for (key, _), reply in zip(batch, replies, strict=True):
                if isinstance(reply, Refusal):
                    refusals[key] = reply
                    totals.refused += 1
                else:
                    cache.write(key, judge, reply)
                    totals.asked += 1
            done = totals.asked + totals.refused
            progress.advance(done, {"judged": done, "refused": totals.refused})

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(judge.concurrency):
                group.create_task(work())
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    finally:
        await judge.close()
    if failures:
        left = len(missing) - totals.asked - totals.refused
        raise WorkFailed(
            f"judge {judge.model}: {left} of {len(missing)} judgments are missing ({failures[-1]}). The others are "
            "kept: run the same command again to ask for those only."
        )
    return refusals


class EndpointJudge(Judge):
    """An OpenAI-compatible chat endpoint, through the `openai` package (extra `[judge]`)."""

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "judge.url needs the package openai. Install it: pip install 'salsa-rlhf[judge]'"
            ) from error
        assert config.model is not None and config.url is not None  # the schema
        self.model, self.parameters = config.model, config.request
        self.concurrency, self._retries = config.concurrency, config.retries
        url = urlsplit(config.url)  # without user, password and query, where keys are sometimes put
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"judge.url={config.url.split('@')[-1]!r} is no http(s) address.")
        self._host = f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "")
        self._key, self._key_env = os.environ.get(config.key_env, ""), config.key_env
        self._openai = openai
        self._new_client = partial(
            openai.AsyncOpenAI,
            base_url=config.url,
            api_key=self._key or "none",
            timeout=config.timeout,
            max_retries=config.retries,
        )
        self._client: Any = None

    async def ask(self, batch: Sequence[Sequence[Message]]) -> Sequence[Reply | Refusal]:
        """One reply; transport errors are retried by the client, unusable replies here."""
        if self._client is None:  # made within the event loop that uses it
            self._client = self._new_client()
        (messages,) = batch
        for attempt in range(self._retries + 1):
            try:
                response = await self._client.chat.completions.create(
                    model=self.model, messages=list(messages), extra_body=self.parameters
                )
                return [self._reply(response)]
            except self._openai.APIStatusError as error:
                return [self._status(error)]
            except self._openai.APIConnectionError as error:
                raise Unreachable(self._clean(f"{self._host}: {error}")) from None
            except (self._openai.APIError, ValueError, TypeError, LookupError, AttributeError) as e:
                reason = self._clean(f"{self._host}: unusable reply, {type(e).__name__}: {e}")
            if attempt < self._retries:
                await asyncio.sleep(min(GARBAGE_SECONDS * 2**attempt, 8.0))
        raise Unreachable(reason)

    async def close(self) -> None:
        """Close the connections; the next `ask` opens new ones."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _reply(self, response: Any) -> Reply:
        choice = response.choices[0]
        if not isinstance(choice.message.content, str):
            raise ValueError(f"content is {type(choice.message.content).__name__}, not text")
        names = ("prompt_tokens", "completion_tokens")
        tokens = {name: int(getattr(response.usage, name, 0) or 0) for name in names}
        text = self._clean(choice.message.content, whole=True)
        return Reply(text, choice.finish_reason, **tokens)

    def _status(self, error: Any) -> Refusal:
        reason = self._clean(f"{self._host}: HTTP {error.status_code}: {error.message}")
        no_key = "" if self._key else ", which is empty"
        hint = {
            401: f"The key comes from ${self._key_env}{no_key}.",
            403: f"The key comes from ${self._key_env}{no_key}.",
            404: "Check judge.url (it usually ends in /v1) and judge.model.",
        }.get(error.status_code)
        if hint is not None:
            raise ConfigError(f"judge {self.model}: {reason} {hint}") from None
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            raise Unreachable(reason) from None
        return Refusal(reason)

    def _clean(self, text: str, *, whole: bool = False) -> str:
        """Text without the key, in one short line unless `whole`."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return text if whole else " ".join(text.split())[:300]


class ReplayJudge(Judge):
    """Reads the texts of a judgments file again instead of asking."""

    def __init__(self, source: PathOrRows, model: str | None = None) -> None:
        self.model = model or str(source)
        self._texts: dict[str, str] = {}
        for row in read_rows(source):
            for prompt, text in _judged_texts(row.values):
                if self._texts.setdefault(prompt, text) != text:
                    raise DataError(
                        f"{row.where}: a second, different judgment of the same prompt. Remove one."
                    )
        if not self._texts:
            raise DataError(f"{source}: no row holds a prompt and the judge's text.")
        # part of what cached judgments are found by: another file, or a line put right, has others
        self.parameters: dict[str, Any] = {"replay": digest_of(self._texts)}

    async def ask(self, batch: Sequence[Sequence[Message]]) -> Sequence[Reply | Refusal]:
        """The file's text for each conversation's last message."""
        (messages,) = batch
        text = self._texts.get(messages[-1]["content"])
        return [Refusal("the replayed file has no such judgment") if text is None else Reply(text)]


def _judged_texts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(the judge's prompt, its text) of a row in FastChat's or Arena-Hard's format."""
    games = [(row.get(f"{g}user_prompt"), row.get(f"{g}judgment")) for g in ("", "g1_", "g2_")]
    for game in filter(lambda game: isinstance(game, Mapping), row.get("games") or []):
        prompt, text = game.get("user_prompt", game.get("prompt")), game.get("judgment")
        prompt = prompt[-1]["content"] if isinstance(prompt, list) and prompt else prompt
        games.append((prompt, text.get("answer") if isinstance(text, Mapping) else text))
    return [(p, t) for p, t in games if isinstance(p, str) and isinstance(t, str)]
