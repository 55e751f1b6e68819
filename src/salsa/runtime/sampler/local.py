"""Sample with a model in this process, many sequences at once, with continuous batching: a sequence that has ended
makes room for a prompt that waits.

    slot 0   p p p p r r r           the KV cache has a slot per sequence, from its first token on: sequences of any
         1   p p r r r r r r         length are decoded side by side, a token each per step, and a slot that gets free
         2   p p p r                 is filled from the last slot, then by a waiting prompt
    wait     p p p, p p, …

Prompts are prefilled packed: what several have in common is computed once (`salsa.runtime.packing`). Logits are fp32.
Each sequence has its own random numbers, drawn before anything else: its response depends on the generator and its
place in the batch, not on which sequences are decoded beside it, nor in which process (but for rounding: matrix
products of another shape may differ in the last bit). Several processes decode a run of the rows each, and all get all
responses.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from salsa.runtime.packing import KVCache
from salsa.types import Generation, Rollout, Sampling

if TYPE_CHECKING:
    from salsa.models import LanguageModel
    from salsa.runtime.engine import Engine

MAX_SEQUENCES = 64
"""Sequences decoded at once."""
REFILL_SHARE = 4
"""Waiting prompts are prefilled when a quarter of the slots are free: one prefill costs as much as a step of all."""


class Sampler(Protocol):
    """Samples one response per prompt and stamps which weights it sampled from."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> Generation:
        """Sample from softmax(logits / temperature) until an EOS or `max_new_tokens`.

        Args:
            prompts: token ids, none empty; several samples of one prompt are equal rows.
            sampling: temperature, limits and special tokens.
            generator: the only source of randomness.
        """


class LocalSampler:
    """A sampler that reads the weights of a model in this process."""

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
        own = self.model.engine.own_rows(len(prompts))
        with self.model.engine.resident(self.model):
            if self.model.uses_packing:
                self._generate_packed(prompts, responses, own.tolist())
            else:
                for rows in own.split(self.max_sequences) if len(own) else ():
                    self._generate_padded(prompt[rows], prompt_mask[rows], responses, rows)
        responses.gather(self.model.engine, own)
        width = int(responses.lengths.max())
        mask = torch.arange(width, device=here) < responses.lengths[:, None]
        rollout = Rollout(prompt, prompt_mask, responses.tokens[:, :width], mask)
        return Generation(rollout, responses.logprobs[:, :width], self.model.version())

    def _generate_packed(
        self, prompts: Sequence[Sequence[int]], responses: "Responses", rows: Sequence[int]
    ) -> None:
        """Until each response of `rows` has ended; long prompts first, equal ones together."""
        here, limit = responses.lengths.device, self.max_sequences
        order = lambda row: (-len(prompts[row]), list(prompts[row]))
        waiting = sorted(rows, key=order)
        cache = KVCache(self.model, min(limit, len(waiting)))
        logits = torch.empty(0, device=here)
        while waiting or len(cache.rows):
            free = limit - len(cache.rows)
            if waiting and free * REFILL_SHARE >= limit:
                new, waiting = waiting[:free], waiting[free:]
                first = cache.prefill(torch.tensor(new, device=here), [prompts[r] for r in new])
                logits = torch.cat([logits, first]) if len(logits) else first
            token = responses.draw(cache.rows, logits)
            token = token[cache.keep(responses.unfinished[cache.rows])]
            logits = cache.decode(token) if len(token) else logits[:0]

    def _generate_padded(
        self,
        prompt: Int[Tensor, "rows P"],
        mask: Bool[Tensor, "rows P"],
        responses: "Responses",
        rows: Int[Tensor, " rows"],
    ) -> None:
        """By transformers, for a model that does not pack: padded prompts, until the last response has ended."""

        class Draws(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                unfinished = responses.unfinished[rows]
                token = torch.zeros_like(rows)
                token[unfinished] = responses.draw(rows[unfinished], scores[unfinished].float())
                return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

        limit, ends = responses.tokens.shape[1], responses.ends.tolist()
        options = GenerationConfig(
            do_sample=False, max_new_tokens=limit, eos_token_id=ends, pad_token_id=0
        )
        backbone: Any = self.model.backbone
        self.model(
            backbone.generate, prompt, attention_mask=mask.long(), generation_config=options,
            logits_processor=LogitsProcessorList([Draws()]), synced_gpus=False,
        )  # fmt: skip


class Responses:
    """The responses so far, and random numbers, uniform on [0, 1), of what comes next."""

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
        """Append to each row the token whose cumulative probability passes the row's next random number."""
        step = self.lengths[rows]
        logprobs = (logits / self.temperature).log_softmax(dim=-1)
        cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
        level = self.noise[rows, step, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, level, right=True).clamp(max=logits.shape[-1] - 1)
        token = drawn.squeeze(1)
        self.tokens[rows, step] = token
        self.logprobs[rows, step] = logprobs.gather(-1, drawn).squeeze(1)
        self.lengths[rows] += 1
        at_limit = self.lengths[rows] == self.tokens.shape[1]
        self.unfinished[rows] = ~torch.isin(token, self.ends) & ~at_limit
        return token

    def gather(self, engine: "Engine", own: Int[Tensor, " rows"]) -> None:
        """Take in what the other processes drew, who have the other rows."""
        self.tokens = engine.gather(self.tokens, own)
        self.logprobs = engine.gather(self.logprobs, own)
        self.lengths = engine.gather(self.lengths, own)


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Prompts left-padded to the longest; the mask comes from the lengths."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(-ids.shape[1], 0) >= -lengths[:, None]
    return ids.to(device), mask.to(device)
