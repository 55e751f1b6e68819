"""A recipe's data as the doctor sees it: the rows of every source, read and put through the template once."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from salsa.config import DataSource, Recipe
from salsa.data import (
    SFT_COLUMNS,
    Prompt,
    Row,
    as_prompt,
    describe,
    load_prompts,
    load_rows,
    render,
    sft_rows,
)
from salsa.doctor.evidence import Data, Pairs, Source
from salsa.rewards import FunctionScorer

SAMPLE = 64
"""Rows of a kind that are run through a model."""
READ = 5000
"""Rows of a data set that are looked at, the first ones."""
LABELLED = 1000
"""Pairs whose labeller is asked again: it may be a server that costs something."""
KNOWN_MARKS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|endoftext|>",
)  # fmt: skip
"""Marks of common chat templates; no person writes them."""

Ids = tuple[int, ...]
T = TypeVar("T")


class Sources:
    """The rows of a recipe's sources, for one tokenizer; each is read once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._read: dict[tuple[str, str], Any] = {}

    def prompts(self, source: DataSource) -> list[Prompt]:
        """All prompts of a source, of any length."""
        return self._once(
            "prompts", source, lambda: load_prompts(source, self.tokenizer, max_tokens=None)
        )

    def sft_rows(self, source: DataSource) -> list[Row]:
        """The rows of a source as SFT gets them."""
        return self._once(
            "sft",
            source,
            lambda: sft_rows(load_rows(source, SFT_COLUMNS), self.tokenizer, describe(source)),
        )

    def _once(self, kind: str, source: DataSource, read: Callable[[], T]) -> T:
        key = kind, source.model_dump_json()
        if key not in self._read:
            self._read[key] = read()
        found: T = self._read[key]
        return found


def data_of(recipe: Recipe, sources: Sources, pairs: Sequence[Row] | None) -> Data:
    """The data of every role; `pairs` are preference rows of `salsa.data`, where there are any."""
    tokenizer, contents = sources.tokenizer, list[str]()
    roles: list[Source] = []
    replies: list[str] = []
    tokens: list[int] = []
    reply_tokens: list[int] = []
    if recipe.sft.dataset is not None:
        rows = sources.sft_rows(recipe.sft.dataset)[:READ]
        roles.append(Source("sft", [words(row["prompt"]) for row in rows]))
        replies = [words(row["completion"]) for row in rows]
        shown = [shown_row(row, tokenizer) for row in rows]
        tokens = [len(prompt) + len(reply) for prompt, reply in shown]
        reply_tokens = [len(reply) for _, reply in shown]
        contents += [text for row in rows for text in _contents(row["prompt"])] + replies
    asked = [("rl", recipe.rl.prompts), ("eval", recipe.eval.prompts)]
    preferences = recipe.preferences
    if preferences is not None and preferences.prompts is not None:
        asked.insert(0, ("preferences", preferences.prompts))
    for role, source in asked:
        prompts = sources.prompts(source)[:READ]
        fit = [p for p in prompts if 0 < len(p.ids) <= recipe.rl.max_prompt_tokens]
        roles.append(Source(role, [p.text for p in fit], len(prompts) - len(fit)))
        contents += [
            text for p in fit for text in _contents(list(p.messages) if p.messages else p.text)
        ]
    found = None
    if pairs is not None:
        found = _pairs(recipe, pairs[:READ], tokenizer)
        if not any(one.role == "preferences" for one in roles):
            roles.insert(0, Source("preferences", found.prompts))
    own = sorted({t for t in tokenizer.all_special_tokens if len(t) > 2} - set(KNOWN_MARKS))
    in_use = own + [mark for mark in KNOWN_MARKS if any(mark in text for text in contents)]
    return Data(
        roles, replies, tokens, reply_tokens, recipe.sft.max_length, found, in_use, contents
    )  # fmt: skip


def words(value: Any) -> str:
    """A prompt or a reply as text: its messages' words, a line each."""
    return value if isinstance(value, str) else "\n".join(str(m["content"]) for m in value)


def _contents(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(m["content"]) for m in value]


def shown_row(row: Row, tokenizer: Any, rendering: str = "template") -> tuple[Ids, Ids]:
    """(prompt, reply with its end) in tokens, as the chat template, `twice` applied, or no template shows them."""
    prompt, reply = row["prompt"], words(row["completion"])
    encode = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = int(tokenizer.eos_token_id)
    if rendering == "bare" or not isinstance(prompt, list):
        bare = words(prompt)
        return tuple(tokenizer(bare)["input_ids"]) or (end,), (*encode(reply), end)
    if rendering == "twice":
        text = render(prompt, tokenizer, "sft", add_generation_prompt=True)
        prompt = [{"role": "user", "content": text}]
    return as_prompt({"prompt": prompt}, tokenizer).ids, (*encode(reply), end)


def _pairs(recipe: Recipe, rows: Sequence[Row], tokenizer: Any) -> Pairs:
    prompts = [words(row["prompt"]) for row in rows]
    chosen, rejected = ([words(row[side]) for row in rows] for side in ("chosen", "rejected"))
    lengths = []
    for row, a, b in zip(rows, chosen, rejected, strict=True):
        longer = a if len(a) > len(b) else b
        prompt, reply = shown_row({"prompt": row["prompt"], "completion": longer}, tokenizer)
        lengths.append(len(prompt) + len(reply))
    longest = recipe.reward.max_length if recipe.reward.trains else 0
    found = Pairs(prompts, chosen, rejected, tokens=lengths, max_length=longest)
    config = recipe.preferences
    if config is None or config.labeller is None:
        return found
    asked = [as_prompt(row, tokenizer) for row in rows[:LABELLED]]
    score = FunctionScorer([config.labeller])
    both = np.array([score(asked, replies[:LABELLED]) for replies in (chosen, rejected)]).T
    return replace(found, scores=both, noise=config.noise)


def likely_rows(source: DataSource, sources: Sources) -> dict[str, list[Row]]:
    """`seen`: rows that SFT trained on. `unseen`: rows of the same source that its limit left out."""
    seen = sources.sft_rows(source)
    rng = random.Random(0)
    kinds = {"seen": rng.sample(seen, min(SAMPLE, len(seen)))}
    if source.limit is not None:
        known = {(words(r["prompt"]), words(r["completion"])) for r in seen}
        rows = sources.sft_rows(source.model_copy(update={"limit": None}))
        unseen = [r for r in rows if (words(r["prompt"]), words(r["completion"])) not in known]
        if len(unseen) >= SAMPLE // 4:
            kinds["unseen"] = rng.sample(unseen, min(SAMPLE, len(unseen)))
    return kinds
