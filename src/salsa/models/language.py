"""A causal language model as RL uses it: logprobs, entropy and KL of response tokens.

Only what differs is worth computing: rows are packed without padding, a prefix that they share is computed once
(`salsa.runtime.packing`), and logits are made for the N real response tokens of a batch, LOGITS_CHUNK at a time.
Log-softmax and everything after it is fp32.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa.config import LoRAConfig
from salsa.errors import CheckpointError
from salsa.models.adapters import add_adapters, merged, shared_copy
from salsa.models.loading import load_policy, save_checkpoint, trunk_of
from salsa.models.trunk import (
    enable_packing,
    recompute_activations,
    response_hidden,
    unflatten,
)
from salsa.models.weights import Weights
from salsa.objectives import categorical_kl
from salsa.runtime.engine import Engine
from salsa.types import Rollout

LOGITS_CHUNK = 256
"""Response tokens whose logits are in memory at once; with more, the backward pass makes them again."""

T = TypeVar("T")


class TokenStats(NamedTuple):
    """Per response token, 0 outside the mask."""

    logprobs: Float[Tensor, "B R"]
    entropy: Float[Tensor, "B R"]


class LanguageModel(nn.Module):
    """A model of transformers with its precision, packing and adapters.

    Every pass is a call of this module, so that what is hooked to the root of a model (sharding, adapters) takes part.
    """

    backbone: PreTrainedModel

    def __init__(
        self,
        backbone: PreTrainedModel,
        engine: Engine,
        *,
        packs: bool,
        learns: bool = False,
        moves: bool = False,
        shared: Weights | None = None,
    ) -> None:
        """Wrap `backbone`; `packs` says whether its attention takes packed rows. See `load`."""
        super().__init__()
        self.backbone, self.engine, self.packs = backbone, engine, packs
        self.state = Weights(backbone, engine, learns=learns, moves=moves, shared=shared)

    @classmethod
    def load(
        cls,
        path: Path,
        engine: Engine,
        *,
        learns: bool = False,
        moves: bool = False,
        recompute: bool = False,
    ) -> "LanguageModel":
        """Load a checkpoint, without dropout.

        Args:
            path: the model directory.
            engine: device and precision.
            learns: it gets gradients; fp32 masters are kept.
            moves: `follow` will be called; fp32 masters are kept.
            recompute: compute activations again in the backward pass.

        Raises:
            CheckpointError: it cannot be loaded, or it does more to its logits than is known here.
        """
        backbone = load_policy(path)
        nn.Module.to(backbone, engine.device)
        return cls.of(backbone, engine, learns=learns, moves=moves, recompute=recompute)

    @classmethod
    def of(
        cls,
        backbone: PreTrainedModel,
        engine: Engine,
        *,
        learns: bool = False,
        moves: bool = False,
        recompute: bool = False,
    ) -> "LanguageModel":
        """As `load`, of an fp32 model that is in memory; it is changed."""
        _check_logits(backbone)
        packs = enable_packing(backbone)
        backbone.requires_grad_(learns)
        if recompute:
            recompute_activations(backbone)
        return cls(backbone, engine, packs=packs, learns=learns, moves=moves)

    @property
    def trunk(self) -> Any:
        """The model without its output head."""
        return trunk_of(self.backbone)

    @property
    def output_head(self) -> Any:
        """What makes logits of hidden states."""
        return self.backbone.get_output_embeddings()

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        """Do `work` as a pass of this module."""
        return work(*args)

    def logprobs(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B R"]:
        """Log π(y_t | x, y_<t) under `temperature`, in nats, to be differentiated; 0 outside the mask."""
        return self(self._logprobs, rollout, temperature)

    @torch.no_grad()
    def stats(self, rollout: Rollout, temperature: float) -> TokenStats:
        """Log π(y_t | x, y_<t) and the entropy of π(· | x, y_<t), both under `temperature`, in nats."""
        return self(self._stats, rollout, temperature)

    @torch.no_grad()
    def kl_to(
        self, other: "LanguageModel", rollout: Rollout, temperature: float
    ) -> Float[Tensor, "B R"]:
        """Exact KL(this ‖ other) of each next-token distribution, in nats; 0 outside the mask."""
        hidden = [model(model._hidden, rollout) for model in (self, other)]
        parts = []
        for own, theirs in zip(*(states.split(LOGITS_CHUNK) for states in hidden), strict=True):
            logits = self(self._logits, own, temperature)
            parts.append(categorical_kl(logits, other(other._logits, theirs, temperature)))
        return unflatten(torch.cat(parts), rollout.response_mask)

    def next_logits(self, last: Int[Tensor, " rows"], **inputs: Any) -> Float[Tensor, "rows V"]:
        """fp32 logits after the tokens at `last`, of a pass with `inputs` as transformers takes them."""

        def work() -> Tensor:
            output = self.backbone(**inputs, use_cache=False, logits_to_keep=last)
            return output.logits[0].float()

        return self(work)

    def trained(self) -> dict[str, Tensor]:
        """The fp32 weights that learn, for an optimizer."""
        return self.state.trained()

    def sync(self) -> None:
        """Compute with what an optimizer made of `trained()`."""
        self.state.sync()

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights`, by name."""
        self.state.put(weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in fp32 as a forward pass means it, adapters merged, under its name in a checkpoint."""
        return merged(self.backbone, self.state.master)

    def version(self) -> str:
        """Digest of the weights as they are now."""
        return self.state.version()

    @torch.no_grad()
    def follow(self, other: "LanguageModel", share: float) -> None:
        """θ ← θ + share·(θ_other − θ), in fp32: bf16 would lose steps this small."""
        own = dict(self.state.named())
        for name, target in other.weights():
            own[name].lerp_(target, share)
        self.state.sync()

    def shared(self) -> "LanguageModel":
        """The same modules anew on the very same weights; adapters that come later are its own."""
        copy = shared_copy(self.backbone)
        return LanguageModel(copy, self.engine, packs=self.packs, shared=self.state)

    def add_adapters(self, config: LoRAConfig, seed: int) -> None:
        """Freeze the weights and learn low-rank adapters instead; at first they change nothing."""
        add_adapters(self.backbone, config, seed=seed)
        self.state.add(self.backbone)

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Write an ordinary checkpoint in fp32."""
        save_weights(self.backbone, tokenizer, directory, dict(self.weights()))

    def _hidden(self, rollout: Rollout) -> Float[Tensor, "N d"]:
        return response_hidden(self.trunk, rollout, packs=self.packs)

    def _logits(self, hidden: Float[Tensor, "N d"], temperature: float) -> Float[Tensor, "N V"]:
        return _logits(self.backbone, hidden, temperature)

    def _logprobs(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B R"]:
        hidden, targets = self._hidden(rollout), rollout.response[rollout.response_mask]

        def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
            return -cross_entropy(self._logits(hidden, temperature), targets, reduction="none")

        pieces = list(zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True))
        if len(pieces) == 1:
            return unflatten(chunk(hidden, targets), rollout.response_mask)
        parts = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
        return unflatten(torch.cat(parts), rollout.response_mask)

    def _stats(self, rollout: Rollout, temperature: float) -> TokenStats:
        hidden, targets = self._hidden(rollout), rollout.response[rollout.response_mask]
        logprobs, entropy = [], []
        for states, tokens in zip(
            hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True
        ):
            distribution = self._logits(states, temperature).log_softmax(dim=-1)
            logprobs.append(distribution.gather(-1, tokens[:, None]).squeeze(-1))
            entropy.append(-(distribution.exp() * distribution).sum(dim=-1))
        mask = rollout.response_mask
        return TokenStats(unflatten(torch.cat(logprobs), mask), unflatten(torch.cat(entropy), mask))


def save_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    weights: dict[str, Tensor],
) -> None:
    """Write fp32 `weights` under the model's configuration; tied weights are written once, as transformers does."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    contiguous = {n: w.detach().contiguous() for n, w in (buffers | weights).items()}
    before = model.config.dtype
    model.config.dtype = torch.float32
    try:
        save_checkpoint(model, tokenizer, directory, contiguous)
    finally:
        model.config.dtype = before


def _logits(model: Any, hidden: Float[Tensor, "N d"], temperature: float) -> Float[Tensor, "N V"]:
    """fp32 logits of hidden states, as the model's own forward pass makes them, under `temperature`."""
    logits = model.get_output_embeddings()(hidden).float()
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.div_(temperature)


@torch.no_grad()
def _check_logits(model: PreTrainedModel) -> None:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    hidden = trunk_of(model)(input_ids=token, use_cache=False).last_hidden_state[0]
    if not torch.allclose(
        _logits(model, hidden, 1.0), model(token).logits[0], rtol=1e-3, atol=1e-3
    ):
        raise CheckpointError(
            f"{model.name_or_path}: {type(model).__name__} scales its logits in a way that is not known here. "
            "Use a family whose logits are head(hidden state), soft-capped or not."
        )
