"""Sample responses, many rows at once: rows that have ended make room for prompts that wait (continuous batching).

    slot 0   p p p p r r r           a row's keys and values lie in a slot of its own, from its first token on: rows
         1   p p r r r r r r         of any length speak side by side, one token each a step, and a slot that gets
         2   p p p r                 free is filled from the end of the list, then with a prompt that waits
    wait     p p p, p p, …

Prompts are read packed: what several have in common is read once (`salsa.runtime.packing`). Logits are fp32. Each row
has its own random numbers, drawn before anything else: what a row says depends on the seed and its place in the batch,
not on which rows it met while speaking (but for rounding: matrix products of another shape may differ in the last bit).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, GenerationConfig, LogitsProcessor, LogitsProcessorList

from salsa.runtime.packing import arguments, attend, attending_by, pack, packs_rows, within

MAX_ROWS = 64
"""Rows that speak at once."""
REFILL_SHARE = 4
"""Waiting prompts are let in when a quarter of the rows are free: reading one prompt costs as much as a step of all."""
SPARE_COLUMNS = 64
"""Tokens for which a slot has room beyond what it needs, when it is made."""


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

    Several samples of one prompt are equal rows.
    """
    count, here = len(prompt), prompt.device
    noise = torch.rand(count, max_new_tokens, generator=generator, device=here, dtype=torch.float64)
    ends = torch.tensor(list(eos_ids), device=here)
    said = Said(noise, temperature, ends, torch.full_like(noise, pad_id, dtype=torch.long))
    if packs_rows(model):
        prompts = [row[mask].tolist() for row, mask in zip(prompt, prompt_mask, strict=True)]
        _speak(model, prompts, said, max_rows)
    else:
        for rows in torch.arange(count, device=here).split(max_rows):
            _speak_with_transformers(model, prompt[rows], prompt_mask[rows], said, rows)
    width = int(said.lengths.max())
    mask = torch.arange(width, device=here) < said.lengths[:, None]
    return Generation(said.response[:, :width], mask, said.logprobs[:, :width])


class Said:
    """What each row has said so far, and the random numbers of what it says next."""

    def __init__(self, noise: Tensor, temperature: float, ends: Tensor, response: Tensor) -> None:
        self.noise, self.temperature, self.ends, self.response = noise, temperature, ends, response
        self.logprobs = torch.zeros(noise.shape, device=noise.device)
        self.lengths = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.speaking = torch.ones(len(noise), dtype=torch.bool, device=noise.device)

    def draw(
        self, rows: Int[Tensor, " rows"], logits: Float[Tensor, "rows V"]
    ) -> Int[Tensor, " rows"]:
        """The next token of each row."""
        step = self.lengths[rows]
        token, logprob = _draw(logits / self.temperature, self.noise[rows, step])
        self.response[rows, step], self.logprobs[rows, step] = token, logprob
        self.lengths[rows] += 1
        at_limit = self.lengths[rows] == self.response.shape[1]
        self.speaking[rows] = ~torch.isin(token, self.ends) & ~at_limit
        return token


class Speakers:
    """The rows that speak now: their numbers, their lengths, and in every layer a slot each for keys and values."""

    def __init__(self, model: nn.Module, slots: int, device: torch.device) -> None:
        self.model, self.slots = model, slots
        self.rows = torch.empty(0, dtype=torch.long, device=device)
        self.lengths = torch.empty(0, dtype=torch.long, device=device)
        """Tokens of each row that are in its slot."""
        self.longest = 0
        """Columns in use."""
        self.keys: dict[int, Tensor] = {}
        """Layer → keys, (slots, heads, columns, size); fp32 on a CPU: its bf16 products copy what is not contiguous."""
        self.values: dict[int, Tensor] = {}

    def read(self, rows: Int[Tensor, " new"], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Let rows in; the logits [new, V] of their first tokens."""
        packing = pack(prompts, rows.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
        last = packing.paths.gather(1, lengths[:, None] - 1).squeeze(1)
        self.longest = max(self.longest, packing.paths.shape[1])
        logits = self._forward("salsa_packed", last, memory=self, **arguments(packing))
        self.rows = torch.cat([self.rows, rows])
        self.lengths = torch.cat([self.lengths, lengths])
        return logits

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """What `packed_attention` found for the rows that are let in, each (new, heads, columns, size)."""
        slots = slice(len(self.rows), len(self.rows) + len(keys))
        for store, found in ((self.keys, keys), (self.values, values)):
            self._room(store, layer, found)[slots, :, : found.shape[2]] = found

    def step(self, token: Int[Tensor, " rows"]) -> Tensor:
        """Say one token each; the logits [rows, V] of the next."""
        self.longest = int(self.lengths.max()) + 1
        every = torch.arange(len(token), device=token.device)
        visible = torch.arange(self.longest, device=token.device) <= self.lengths[:, None]
        logits = self._forward(
            "salsa_speaking",
            every,
            input_ids=token[None],
            position_ids=self.lengths[None],
            attention_mask=visible[:, None, None],  # (rows, 1, 1, columns)
            memory=self,
        )
        self.lengths = self.lengths + 1
        return logits

    def keep(self, which: Bool[Tensor, " rows"]) -> Int[Tensor, " kept"]:
        """Let the others go and fill their slots from the end; where each of those that stay was before."""
        count = int(which.sum())
        if count == len(which):
            return torch.arange(count, device=which.device)
        holes = (~which[:count]).nonzero().squeeze(1)
        movers = which[count:].nonzero().squeeze(1) + count
        order = torch.arange(count, device=which.device)
        order[holes] = movers
        for store in (self.keys, self.values):
            for slots in store.values():
                slots[holes, :, : self.longest] = slots[movers, :, : self.longest]
        self.rows, self.lengths = self.rows[order], self.lengths[order]
        return order

    def _forward(self, attention: str, last: Tensor, **inputs: Any) -> Tensor:
        with attending_by(attention, self.model):
            output = self.model(**inputs, use_cache=False, logits_to_keep=last)
        return output.logits[0].float()

    def _room(self, store: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """A layer's slots, with room for `longest` columns; what is not written yet is 0."""
        if layer not in store:
            shape = (self.slots, like.shape[1], self.longest + SPARE_COLUMNS, like.shape[3])
            dtype = torch.float32 if like.device.type == "cpu" else like.dtype
            store[layer] = torch.zeros(shape, dtype=dtype, device=like.device)
        elif (columns := store[layer].shape[2]) < self.longest:
            store[layer] = pad(store[layer], (0, 0, 0, max(columns, self.longest - columns)))
        return store[layer]

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Tensor:  # fmt: skip
        """Attention of one new token of each row to all its tokens: (1, heads, rows, size) → (1, rows, heads, size)."""
        rows = torch.arange(len(self.rows), device=query.device)
        keys, values = (
            self._room(self.keys, layer, key),
            self._room(self.values, layer, value),
        )
        keys[rows, :, self.lengths] = key[0].transpose(0, 1).to(keys.dtype)
        values[rows, :, self.lengths] = value[0].transpose(0, 1).to(values.dtype)
        seen = slice(len(rows)), slice(None), slice(self.longest)
        queries = query.transpose(0, 2).to(keys.dtype)
        found = attend(queries, keys[seen], values[seen], *given)
        return found[:, :, 0][None].to(query.dtype)


def _speaking_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    memory: Speakers,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it."""
    visible = within(sliding_window, attention_mask, memory.lengths[:, None])
    return memory.attention(module.layer_idx, query, key, value, visible, scaling, softcap), None


AttentionInterface.register("salsa_speaking", _speaking_attention)


def _speak(model: nn.Module, prompts: Sequence[list[int]], said: Said, max_rows: int) -> None:
    """Until no row speaks and none waits; long prompts first, equal ones together."""
    here = said.lengths.device
    waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), prompts[row]))
    speakers = Speakers(model, min(max_rows, len(prompts)), here)
    logits = torch.empty(0, device=here)
    while waiting or len(speakers.rows):
        free = max_rows - len(speakers.rows)
        if waiting and free * REFILL_SHARE >= max_rows:
            rows, waiting = waiting[:free], waiting[free:]
            first = speakers.read(torch.tensor(rows, device=here), [prompts[row] for row in rows])
            logits = torch.cat([logits, first]) if len(logits) else first
        token = said.draw(speakers.rows, logits)
        token = token[speakers.keep(said.speaking[speakers.rows])]
        logits = speakers.step(token) if len(token) else logits[:0]


def _speak_with_transformers(
    model: Any, prompt: Tensor, prompt_mask: Tensor, said: Said, rows: Tensor
) -> None:
    """For a model whose attention is its own: the batch is read padded, and lasts until its last row ends."""

    class Draws(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            speaking = said.speaking[rows]
            token = torch.zeros_like(rows)
            token[speaking] = said.draw(rows[speaking], scores[speaking].float())
            return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=said.response.shape[1],
        eos_token_id=said.ends.tolist(),
        pad_token_id=0,
    )
    model.generate(
        prompt,
        attention_mask=prompt_mask.long(),
        generation_config=options,
        logits_processor=LogitsProcessorList([Draws()]),
    )


def _draw(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [rows] whose cumulative probability passes `noise` [rows], uniform on [0, 1), and their logprobs."""
    logprobs = logits.log_softmax(dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    level = noise[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, level, right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(-1, token).squeeze(1)
