"""Every tensor object that crosses a function. B episodes, P prompt tokens, R response tokens.

One row of a batch, with a prompt of 3 tokens, a reply "hi there" and its end-of-sequence token E:

    prompt         .  .  p0 p1 p2                     left-padded, prompt_mask 0 0 1 1 1
    response                       hi there E  .  .   right-padded
    response_mask                  1  1     1  0  0   1 on every token that the policy chose, EOS included
    logprobs       log π(hi|p)  log π(there|p,hi)  log π(E|…)  0  0
    values         V(p)         V(p,hi)            V(…)        0  0    before the token is chosen
    rewards        kl           kl                 kl + score  0  0    the score sits on the mask's last 1

A response that hits the length limit has no EOS and a full mask. Masks come from lengths, never from token identity,
so that pad may equal EOS. Logprobs are in nats, under the sampling temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float
    eos_ids: tuple[int, ...]
    """Every token that ends a response."""
    pad_id: int


@dataclass(frozen=True)
class Rollout:
    """Prompts with the policy's responses."""

    prompt: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    response: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    sampler_logprobs: Float[Tensor, "B R"] | None = None
    """Of the response under the sampler, where it computes with other numerics than the policy (a server); in nats."""

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def tokens(self) -> Int[Tensor, "B T"]:
        """Prompt and response side by side; T = P + R."""
        return torch.cat([self.prompt, self.response], dim=1)

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """Real tokens of prompt and response."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of prompt and response."""
        return [r[m].tolist() for r, m in zip(self.tokens.cpu(), self.mask.cpu(), strict=True)]

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Response lengths in tokens, EOS included."""
        return self.response_mask.sum(dim=1)

    def ended(self, eos_ids: Sequence[int]) -> Bool[Tensor, " B"]:
        """Whether each response ends in EOS; one that hit the length limit does not."""
        last = self.response.gather(1, (self.lengths - 1)[:, None]).squeeze(1)
        return torch.isin(last, torch.tensor(list(eos_ids), device=last.device))

    def unflatten(self, flat: Float[Tensor, " N"]) -> Float[Tensor, "B R"]:
        """Put one number per real response token where it belongs, 0 elsewhere."""
        mask = self.response_mask
        return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat.float())

    def texts(self, tokenizer: Any) -> list[str]:
        """Response texts without special tokens."""
        ids = [r[m].tolist() for r, m in zip(self.response, self.response_mask, strict=True)]
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@dataclass(frozen=True)
class Generation:
    """What a sampler returns."""

    rollout: Rollout
    logprobs: Float[Tensor, "B R"]
    """Of the tokens that were drawn, in nats, under the temperature; 0 outside the mask."""
    version: str
    """Digest of the weights that were sampled from."""


@dataclass(frozen=True)
class Experience:
    """A rollout with all that an update needs. Every per-token field is 0 where `response_mask` is 0."""

    rollout: Rollout
    logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"]
    """0 without a critic, as are `returns`."""
    scores: Float[Tensor, " B"]
    """The score of each response, normalised, clipped and fined for a missing EOS, before the KL penalty."""
    rewards: Float[Tensor, "B R"]
    """Per token, after the KL penalty."""
    advantages: Float[Tensor, "B R"]
    """PPO: whitened over the batch's real tokens. RLOO, GRPO: the episode's, on each of its tokens."""
    returns: Float[Tensor, "B R"]
    weights: Float[Tensor, "B R"] | None = None
    """Truncated importance weights, where the sampler's numerics are not the policy's."""

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class UpdateStats:
    """Means over the optimizer steps of one update (docs/metrics.md); None where nothing of that kind happened."""

    policy_loss: float | None = None
    clip_fraction: float | None = None
    approx_kl: float | None = None
    ratio: float | None = None
    kl_loss: float | None = None
    entropy_loss: float | None = None
    grad_norm: float | None = None
    value_loss: float | None = None
    value_clip_fraction: float | None = None
    critic_grad_norm: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Those that were measured."""
        return {name: value for name, value in vars(self).items() if value is not None}


Batch = TypeVar("Batch", Rollout, Experience)


def rows_of(batch: Batch, index: Tensor | slice) -> Batch:
    """The batch with only the rows of `index`; every tensor field has B as its first axis, None stays None."""
    chosen: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is not None:
            value = value[index] if isinstance(value, Tensor) else rows_of(value, index)
        chosen[field.name] = value
    return replace(batch, **chosen)
