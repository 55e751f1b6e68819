"""Who samples responses: a model in this process, or whatever else keeps the protocol."""

from collections.abc import Sequence
from typing import Protocol

import torch

from salsa.runtime.sampler.local import LocalSampler
from salsa.types import Generation, Sampling

__all__ = ["LocalSampler", "Sampler"]


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
