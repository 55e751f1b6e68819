"""A causal language model as RL uses it: logprobs, entropy and KL of response tokens.

Only what differs is worth computing: rows are packed without padding, a prefix that they share is computed once
(`salsa.runtime.packing`), and logits are made for the N real response tokens of a batch, LOGITS_CHUNK at a time.
Log-softmax and everything after it is fp32.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa.config import LoRAConfig
from salsa.errors import CheckpointError
from salsa.models.loading import load_policy, save_checkpoint
from salsa.models.trunk import (
    enable_gradient_checkpointing,
    enable_packing,
    response_hidden,
    uses_packing,
)
from salsa.models.weights import MixedPrecisionModule, add_adapters, lerp, merged, shared_copy
from salsa.objectives import categorical_kl
from salsa.runtime.engine import Engine
from salsa.runtime.sharding import reshard, whole_on_main
from salsa.types import Rollout

LOGITS_CHUNK = 256
"""Response tokens whose logits are in memory at once; with more, the backward pass makes them again."""


class TokenStats(NamedTuple):
    """Per response token, 0 outside the mask."""

    logprobs: Float[Tensor, "B R"]
    entropy: Float[Tensor, "B R"]


class LanguageModel(MixedPrecisionModule):
    """A model of transformers with its precision, packing and adapters."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        engine: Engine,
        *,
        learns: bool = False,
        moves: bool = False,
        gradient_checkpointing: bool = False,
        shared: "LanguageModel | None" = None,
    ) -> None:
        """Wrap an fp32 model that is in memory, which is changed, or a copy of that of `shared`.

        One that `learns` gets gradients, one that `moves` can `follow` or be `put`; both keep fp32 masters. With
        `gradient_checkpointing`, activations are computed again in the backward pass.

        Raises:
            CheckpointError: it does more to its logits than is known here.
        """
        super().__init__(engine, learns=learns, moves=moves, shared=shared)
        if shared is None:
            _check_logits(backbone)
            enable_packing(backbone)
            backbone.requires_grad_(learns)
        if gradient_checkpointing:
            enable_gradient_checkpointing(backbone)
        self.backbone = backbone
        if shared is None:
            self.lower()

    @classmethod
    def load(cls, path: Path, engine: Engine, **options: Any) -> "LanguageModel":
        """Load a checkpoint, without dropout; options and errors as above, and CheckpointError if it cannot be."""
        frozen = not (options.get("learns") or options.get("moves"))
        if frozen and engine.world_size == 1:  # in fp32 it would need twice the room on a card
            return cls(load_policy(path), engine, **options).to(engine.device)
        return cls(nn.Module.to(load_policy(path), engine.device), engine, **options)

    @property
    def trunk(self) -> Any:
        """The model without its output head."""
        return self.backbone.base_model

    @property
    def uses_packing(self) -> bool:
        """Whether rows are packed without padding."""
        return uses_packing(self.trunk)

    def logprobs(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B R"]:
        """Log π(y_t | x, y_<t) under `temperature`, in nats, to be differentiated; 0 outside the mask."""
        return self(self._logprobs, rollout, temperature)

    def logprobs_and_entropy(self, rollout: Rollout, temperature: float) -> TokenStats:
        """As `logprobs`, with the entropy of π(· | x, y_<t), both to be differentiated, of one forward pass."""
        return self(self._logprobs_and_entropy, rollout, temperature)

    @torch.no_grad()
    def stats(self, rollout: Rollout, temperature: float) -> TokenStats:
        """Log π(y_t | x, y_<t) and the entropy of π(· | x, y_<t), both under `temperature`, in nats."""
        return self(self._stats, rollout, temperature)

    @torch.no_grad()
    def states(self, rollout: Rollout) -> Float[Tensor, "N d"]:
        """The last hidden state before each of the N response tokens, row after row."""
        return self(response_hidden, self.trunk, rollout)

    @torch.no_grad()
    def kl_to(
        self,
        other: "LanguageModel",
        rollout: Rollout,
        temperature: float,
        states: Float[Tensor, "N d"] | None = None,
    ) -> Float[Tensor, "B R"]:
        """Exact KL(this ‖ other) of each next-token distribution, in nats; 0 outside the mask.

        With this model's `states` of the rollout its own pass is not made again for every `other`.
        """
        models = self, other
        hidden = self.states(rollout) if states is None else states, other.states(rollout)
        parts = []
        for chunks in zip(*(each.split(LOGITS_CHUNK) for each in hidden), strict=True):
            logits = map(lambda m, h: m(_logits, m.backbone, h, temperature), models, chunks)
            parts.append(categorical_kl(*logits))
        return rollout.unflatten(torch.cat(parts))

    def next_logits(self, last: Int[Tensor, " rows"], **inputs: Any) -> Float[Tensor, "rows V"]:
        """fp32 logits after the tokens at `last`, of a pass with `inputs` as transformers takes them."""
        output = self(self.backbone, **inputs, use_cache=False, logits_to_keep=last)
        return output.logits[0].float()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in fp32 as a forward pass means it, adapters merged, under its name in a checkpoint."""
        reshard(self)
        return merged(self.backbone, self.master)

    def follow(self, other: "LanguageModel", share: float) -> None:
        """θ ← θ + share·(θ_other − θ), in fp32."""
        lerp(dict(self.named()), other.weights(), share)
        self.sync()

    def shared(self) -> "LanguageModel":
        """The same modules anew on the very same weights; adapters that come later are its own."""
        return LanguageModel(shared_copy(self.backbone), self.engine, shared=self)

    def add_adapters(self, config: LoRAConfig, seed: int) -> None:
        """Freeze the weights and learn low-rank adapters instead; at first they change nothing."""
        add_adapters(self.backbone, config, seed=seed)
        self.lower()
        self.store_frozen_masters()

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Write an ordinary checkpoint in fp32."""
        weights = whole_on_main(dict(self.weights()), self.engine.is_main)
        if self.engine.is_main:
            save_checkpoint(self.backbone, tokenizer, directory, weights)

    def _logprobs(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B R"]:
        def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
            logits = _logits(self.backbone, hidden, temperature)
            return -cross_entropy(logits, tokens, reduction="none")

        return rollout.unflatten(self._of_chunks(chunk, rollout))

    def _logprobs_and_entropy(self, rollout: Rollout, temperature: float) -> TokenStats:
        def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
            logits = _logits(self.backbone, hidden, temperature)
            logprobs = -cross_entropy(logits, tokens, reduction="none")
            return torch.stack([logprobs, _entropy(logits.log_softmax(dim=-1))])

        return TokenStats(*map(rollout.unflatten, self._of_chunks(chunk, rollout)))

    def _stats(self, rollout: Rollout, temperature: float) -> TokenStats:
        def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
            distribution = _logits(self.backbone, hidden, temperature).log_softmax(dim=-1)
            logprobs = distribution.gather(-1, tokens[:, None]).squeeze(-1)
            return torch.stack([logprobs, _entropy(distribution)])

        return TokenStats(*map(rollout.unflatten, self._of_chunks(chunk, rollout)))

    def _of_chunks(self, work: Callable[[Tensor, Tensor], Tensor], rollout: Rollout) -> Tensor:
        """What `work` makes of the hidden states before the response tokens and of these, LOGITS_CHUNK at a time.

        Its last axis is that of the tokens. For a backward pass it works again, so that logits are not kept.
        """
        hidden = response_hidden(self.trunk, rollout)
        tokens = rollout.response[rollout.response_mask]
        chunks = list(zip(hidden.split(LOGITS_CHUNK), tokens.split(LOGITS_CHUNK), strict=True))
        again = len(chunks) > 1 and torch.is_grad_enabled()
        parts = [checkpoint(work, *c, use_reentrant=False) if again else work(*c) for c in chunks]
        return torch.cat(parts, dim=-1)


def _logits(model: Any, hidden: Float[Tensor, "N d"], temperature: float) -> Float[Tensor, "N V"]:
    """fp32 logits of hidden states, as the model's own forward pass makes them, under `temperature`."""
    logits = model.get_output_embeddings()(hidden).float()
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.div_(temperature)


def _entropy(distribution: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """−Σ_v π(v)·log π(v) of log-probabilities, in nats."""
    return -(distribution.exp() * distribution).sum(dim=-1)


@torch.no_grad()
def _check_logits(model: PreTrainedModel) -> None:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    hidden = model.base_model(input_ids=token, use_cache=False).last_hidden_state[0]
    ours, theirs = _logits(model, hidden, 1.0), model(token).logits[0]
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise CheckpointError(
            f"{model.name_or_path}: {type(model).__name__} scales its logits in a way that is not known here. "
            "Use a family whose logits are head(hidden state), soft-capped or not."
        )
