"""Sample with a model in this process, many sequences at once, with continuous batching: a sequence that has ended
makes room for a prompt that waits.

    slot 0   p p p p r r r           the KV cache has a slot per sequence, from its first token on: sequences of any
         1   p p r r r r r r         length are decoded side by side, a token each per step, and a slot that gets free
         2   p p p r                 is filled from the last slot, then by a waiting prompt
    wait     p p p, p p, …

Prompts are prefilled packed: what several have in common is computed once (`salsa.runtime.packing`). Logits are fp32.
Each sequence has its own random numbers, drawn before anything else: its response depends on the generator and its
place in the batch, not on which sequences are decoded beside it (but for rounding: matrix products of another shape may
differ in the last bit).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from salsa.runtime.packing import arguments, attend, pack
from salsa.types import Generation, Rollout, Sampling

if TYPE_CHECKING:
    from salsa.models import LanguageModel

MAX_SEQUENCES = 64
"""Sequences decoded at once."""
REFILL_SHARE = 4
"""Waiting prompts are prefilled when a quarter of the slots are free: one prefill costs as much as a step of all."""
SPARE_COLUMNS = 64
"""Tokens for which a slot has room beyond what it needs, when it is made."""


class LocalSampler:
    """A sampler (`salsa.runtime.sampler.Sampler`) that reads the weights of a model in this process."""

    def __init__(self, model: "LanguageModel", max_sequences: int = MAX_SEQUENCES) -> None:
        self.model, self.max_sequences = model, max_sequences

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> Generation:
        """Sample one response per prompt; see `Sampler.generate`."""
        here = self.model.engine.device
        shape = len(prompts), sampling.max_new_tokens
        noise = torch.rand(shape, generator=generator, device=here, dtype=torch.float64)
        responses = Responses(noise, sampling)
        prompt, prompt_mask = left_padded(prompts, sampling.pad_id, here)
        if self.model.packs:
            _generate_packed(self.model, prompts, responses, self.max_sequences)
        else:
            for rows in torch.arange(len(prompts), device=here).split(self.max_sequences):
                _generate_padded(self.model, prompt[rows], prompt_mask[rows], responses, rows)
        width = int(responses.lengths.max())
        mask = torch.arange(width, device=here) < responses.lengths[:, None]
        rollout = Rollout(prompt, prompt_mask, responses.tokens[:, :width], mask)
        return Generation(rollout, responses.logprobs[:, :width], self.model.version())


class Responses:
    """The responses so far, and the random numbers of what comes next."""

    def __init__(self, noise: Float[Tensor, "B R"], sampling: Sampling) -> None:
        here = noise.device
        self.noise, self.temperature = noise, sampling.temperature
        self.ends = torch.tensor(list(sampling.eos_ids), device=here)
        self.tokens = torch.full_like(noise, sampling.pad_id, dtype=torch.long)
        self.logprobs = torch.zeros(noise.shape, device=here)
        self.lengths = torch.zeros(len(noise), dtype=torch.long, device=here)
        self.unfinished = torch.ones(len(noise), dtype=torch.bool, device=here)

    def draw(
        self, rows: Int[Tensor, " rows"], logits: Float[Tensor, "rows V"]
    ) -> Int[Tensor, " rows"]:
        """Draw and append the next token of each row."""
        step = self.lengths[rows]
        token, logprob = _draw(logits / self.temperature, self.noise[rows, step])
        self.tokens[rows, step], self.logprobs[rows, step] = token, logprob
        self.lengths[rows] += 1
        at_limit = self.lengths[rows] == self.tokens.shape[1]
        self.unfinished[rows] = ~torch.isin(token, self.ends) & ~at_limit
        return token


class KVCache:
    """The sequences being decoded: row numbers, lengths, and in every layer a slot each for keys and values."""

    def __init__(self, model: "LanguageModel", slots: int) -> None:
        self.model, self.slots = model, slots
        here = model.engine.device
        self.rows = torch.empty(0, dtype=torch.long, device=here)
        """Which response each sequence is."""
        self.lengths = torch.empty(0, dtype=torch.long, device=here)
        """Tokens of each sequence that are in its slot."""
        self.longest = 0
        """Columns in use."""
        self.keys: dict[int, Tensor] = {}
        """Layer → keys, (slots, heads, columns, size); fp32 on a CPU: its bf16 products copy what is not contiguous."""
        self.values: dict[int, Tensor] = {}

    def prefill(
        self, rows: Int[Tensor, " new"], prompts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "new V"]:
        """Give prompts a slot each; the logits of their first response tokens."""
        packing = pack(prompts, rows.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
        last = packing.paths.gather(1, lengths[:, None] - 1).squeeze(1)
        self.longest = max(self.longest, packing.paths.shape[1])
        logits = self.model.next_logits(last, cache=self, **arguments(packing))
        self.rows = torch.cat([self.rows, rows])
        self.lengths = torch.cat([self.lengths, lengths])
        return logits

    def decode(self, token: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences V"]:
        """Append a token to each sequence; the logits of the next."""
        self.longest = int(self.lengths.max()) + 1
        every = torch.arange(len(token), device=token.device)
        visible = torch.arange(self.longest, device=token.device) <= self.lengths[:, None]
        logits = self.model.next_logits(
            every,
            input_ids=token[None],
            position_ids=self.lengths[None],
            attention_mask=visible[:, None, None],  # (sequences, 1, 1, columns)
            cache=self,
        )
        self.lengths = self.lengths + 1
        return logits

    def keep(self, which: Bool[Tensor, " sequences"]) -> Int[Tensor, " kept"]:
        """Drop the other sequences and fill their slots from the end; where each of the kept ones was before."""
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

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Prefill of one layer: keys and values of the new sequences, each (new, heads, columns, size)."""
        slots = slice(len(self.rows), len(self.rows) + len(keys))
        for store, new in ((self.keys, keys), (self.values, values)):
            self._with_room(store, layer, new)[slots, :, : new.shape[2]] = new

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Tensor:
        """Decode of one layer: a new token attends to its sequence, (1, heads, rows, size) → (1, rows, heads, size)."""
        rows = torch.arange(len(self.rows), device=query.device)
        keys = self._with_room(self.keys, layer, key)
        values = self._with_room(self.values, layer, value)
        keys[rows, :, self.lengths] = key[0].transpose(0, 1).to(keys.dtype)
        values[rows, :, self.lengths] = value[0].transpose(0, 1).to(values.dtype)
        used = slice(len(rows)), slice(None), slice(self.longest)
        queries = query.transpose(0, 2).to(keys.dtype)
        attended = attend(queries, keys[used], values[used], *given)
        return attended[:, :, 0][None].to(query.dtype)

    def _with_room(self, store: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """A layer's slots, with room for `longest` columns; what is not written yet is 0."""
        if layer not in store:
            shape = (self.slots, like.shape[1], self.longest + SPARE_COLUMNS, like.shape[3])
            dtype = torch.float32 if like.device.type == "cpu" else like.dtype
            store[layer] = torch.zeros(shape, dtype=dtype, device=like.device)
        elif (columns := store[layer].shape[2]) < self.longest:
            store[layer] = pad(store[layer], (0, 0, 0, max(columns, self.longest - columns)))
        return store[layer]


def _generate_packed(
    model: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    max_sequences: int,
) -> None:
    """Until every response has ended; long prompts first, equal ones together."""
    here = responses.lengths.device
    waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), list(prompts[row])))
    cache = KVCache(model, min(max_sequences, len(prompts)))
    logits = torch.empty(0, device=here)
    while waiting or len(cache.rows):
        free = max_sequences - len(cache.rows)
        if waiting and free * REFILL_SHARE >= max_sequences:
            rows, waiting = waiting[:free], waiting[free:]
            first = cache.prefill(torch.tensor(rows, device=here), [prompts[row] for row in rows])
            logits = torch.cat([logits, first]) if len(logits) else first
        token = responses.draw(cache.rows, logits)
        token = token[cache.keep(responses.unfinished[cache.rows])]
        logits = cache.decode(token) if len(token) else logits[:0]


def _generate_padded(
    model: "LanguageModel",
    prompt: Int[Tensor, "rows P"],
    prompt_mask: Bool[Tensor, "rows P"],
    responses: Responses,
    rows: Int[Tensor, " rows"],
) -> None:
    """By transformers, for a model that does not pack: padded prompts, until the last response has ended."""

    class Draws(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            unfinished = responses.unfinished[rows]
            token = torch.zeros_like(rows)
            token[unfinished] = responses.draw(rows[unfinished], scores[unfinished].float())
            return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=responses.tokens.shape[1],
        eos_token_id=responses.ends.tolist(),
        pad_token_id=0,
    )
    backbone: Any = model.backbone
    model(
        lambda: backbone.generate(
            prompt,
            attention_mask=prompt_mask.long(),
            generation_config=options,
            logits_processor=LogitsProcessorList([Draws()]),
        )
    )


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Prompts left-padded to the longest; the mask comes from the lengths."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = True
    return ids.to(device), mask.to(device)


def _draw(
    logits: Float[Tensor, "rows V"], noise: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Tokens whose cumulative probability passes `noise`, uniform on [0, 1), and their logprobs."""
    logprobs = logits.log_softmax(dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    level = noise[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, level, right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(-1, token).squeeze(1)
