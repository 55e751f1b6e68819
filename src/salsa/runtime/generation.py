"""Sample responses, many rows at once: rows that have ended make room for prompts that wait (continuous batching).

    wait:  p3 p4 p5 …          speak:  . . p p p r r r        a row a prompt, right-aligned, so that all rows
                                       . p p p p r            grow at the same edge of one cache
                                       p p p r r r r

Equal prompts are read once. Logits are fp32, masks come from lengths. Each row has its own random numbers, drawn before
anything else: what a row says depends on the seed and its place in the batch, not on which rows it met while speaking
(but for rounding: matrix products of another shape may differ in the last bit).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

MAX_ROWS = 64
"""Rows that speak at once."""
REFILL_SHARE = 4
"""Waiting prompts are let in when a quarter of the rows are free: reading one prompt costs as much as a step of all."""


class Generation(NamedTuple):
    """What was said: `pad_id` and 0 after the end. R is the longest response."""

    response: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    """1 on real tokens, EOS included."""
    logprobs: Float[Tensor, "B R"]
    """Of the tokens that were drawn, in nats, under the temperature."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator,
    max_rows: int = MAX_ROWS,
) -> Generation:
    """Sample from softmax(logits / temperature) until EOS or `max_new_tokens`, at most `max_rows` rows at once.

    Prompts are left-padded; several samples of one prompt are equal rows.
    """
    count, here = len(prompt), prompt.device
    ends = torch.tensor(list(eos_ids), device=here)
    noise = torch.rand(count, max_new_tokens, generator=generator, device=here, dtype=torch.float64)
    response = torch.full((count, max_new_tokens), pad_id, device=here)
    logprobs = torch.zeros(count, max_new_tokens, device=here)
    lengths = torch.zeros(count, dtype=torch.long, device=here)
    waiting = prompt_mask.sum(dim=1).argsort(descending=True, stable=True)
    speakers = Speakers(model, here)
    logits = torch.empty(0, device=here)
    while len(waiting) or len(speakers.rows):
        free = max_rows - len(speakers.rows)
        if len(waiting) and free * REFILL_SHARE >= max_rows:
            rows, waiting = waiting[:free], waiting[free:]
            first = speakers.read(rows, prompt[rows], prompt_mask[rows])
            logits = torch.cat([logits, first]) if len(logits) else first
        rows = speakers.rows
        step = lengths[rows]
        token, logprob = _draw(logits / temperature, noise[rows, step])
        response[rows, step], logprobs[rows, step] = token, logprob
        lengths[rows] += 1
        speaking = ~torch.isin(token, ends) & (lengths[rows] < max_new_tokens)
        if not speaking.all():
            speakers.keep(speaking)
        logits = speakers.step(token[speaking]) if speaking.any() else logits[:0]
    width = int(lengths.max())
    mask = torch.arange(width, device=here) < lengths[:, None]
    return Generation(response[:, :width], mask, logprobs[:, :width])


class Speakers:
    """The rows that speak now: their numbers, the tokens seen so far as a mask, and the cache they share."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.rows = torch.empty(0, dtype=torch.long, device=device)
        self.mask = torch.empty(0, 0, dtype=torch.long, device=device)  # (rows, cache's columns)
        self.cache: Any = DynamicCache()

    def read(
        self, rows: Int[Tensor, " new"], prompt: Int[Tensor, "new P"], mask: Bool[Tensor, "new P"]
    ) -> Tensor:
        """Let rows in, reading equal prompts once; the logits [new, V] of their first tokens."""
        width = int(mask.sum(dim=1).max())
        prompt, seen = prompt[:, -width:], mask[:, -width:].long()
        first, which = _distinct(prompt, seen)
        cache = DynamicCache()
        position = (seen[first].cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(prompt[first], seen[first], position, cache)
        if len(first) < len(rows):
            cache.batch_select_indices(which)
            logits = logits[which]
        columns = max(self.mask.shape[1], width)
        self.cache = _joined(self.cache, cache, columns) if len(self.rows) else cache
        self.mask = torch.cat([_left_padded(self.mask, columns), _left_padded(seen, columns)])
        self.rows = torch.cat([self.rows, rows])
        return logits

    def step(self, token: Int[Tensor, " rows"]) -> Tensor:
        """Say one token each; the logits [rows, V] of the next."""
        self.mask = pad(self.mask, (0, 1), value=1)
        position = self.mask.sum(dim=1, keepdim=True) - 1
        return self._forward(token[:, None], self.mask, position, self.cache)

    def keep(self, which: Bool[Tensor, " rows"]) -> None:
        """Let the others go, with the columns that only they used."""
        index = which.nonzero().squeeze(1)
        used = self.mask[index].any(dim=0)
        unused = int(used.long().argmax()) if len(index) else self.mask.shape[1]
        self.rows, self.mask = self.rows[index], self.mask[index, unused:]
        self.cache.batch_select_indices(index)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def _draw(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [rows] whose cumulative probability passes `noise` [rows], uniform on [0, 1), and their logprobs."""
    logprobs = logits.log_softmax(dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    level = noise[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, level, right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(-1, token).squeeze(1)


def _distinct(prompt: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Row numbers of the distinct prompts, for each row which of them it is)."""
    number: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    which: list[int] = []
    for row, key in enumerate(torch.cat([prompt, mask], dim=1).tolist()):
        if (found := number.setdefault(tuple(key), len(number))) == len(first):
            first.append(row)
        which.append(found)
    return torch.tensor(first, device=prompt.device), torch.tensor(which, device=prompt.device)


def _joined(cache: Any, more: Any, columns: int) -> Any:
    """The rows of both caches, right-aligned in `columns` columns."""
    for layer, added in zip(cache.layers, more.layers, strict=True):
        for name in ("keys", "values"):
            both = getattr(layer, name), getattr(added, name)  # each (rows, heads, columns, size)
            aligned = [pad(x, (0, 0, columns - x.shape[2], 0)) for x in both]
            setattr(layer, name, torch.cat(aligned))
    return cache


def _left_padded(mask: Tensor, columns: int) -> Tensor:
    return pad(mask, (columns - mask.shape[1], 0))
