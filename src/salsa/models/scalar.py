"""Models with a scalar head: the critic's values of response tokens, the reward model's score of a conversation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa.config import LoRAConfig
from salsa.models.adapters import add_adapters, merged, shared_copy
from salsa.models.language import LanguageModel, save_weights
from salsa.models.loading import load_classifier, load_tokenizer, trunk_of
from salsa.models.trunk import (
    enable_packing,
    hidden_states,
    recompute_activations,
    response_hidden,
    unflatten,
)
from salsa.models.weights import Weights
from salsa.runtime.engine import Engine
from salsa.runtime.packing import packs_of
from salsa.types import Rollout

if TYPE_CHECKING:
    from salsa.data import Prompt

SCORING_TOKENS = 4096
"""Distinct tokens per forward pass of a reward model."""

T = TypeVar("T")


class ValueModel(nn.Module):
    """The critic: a trunk of its own or the policy's, and a scalar head in fp32."""

    trunk: nn.Module
    score: nn.Linear
    output_head = None
    """It makes no logits."""

    def __init__(
        self,
        trunk: nn.Module,
        score: nn.Linear,
        engine: Engine,
        *,
        packs: bool,
        owns_trunk: bool,
        shared: Weights | None = None,
    ) -> None:
        """Put `score` on `trunk`; the parameters of a trunk that it does not own are not this module's.

        Parameters that are another model's have their masters in `shared`.
        """
        super().__init__()
        (setattr if owns_trunk else object.__setattr__)(self, "trunk", trunk)
        self.score, self.packs, self.owns_trunk = score, packs, owns_trunk
        self.state = Weights(self, engine, learns=True, shared=shared if owns_trunk else None)
        self._trunk_state = shared or self.state

    @classmethod
    def load(
        cls, path: Path, engine: Engine, *, pad_id: int, new_head_seed: int, recompute: bool = False
    ) -> "ValueModel":
        """A model of its own, from a sequence classifier, or a language model that gets a new head.

        Raises:
            CheckpointError: it cannot be loaded, or has several labels.
        """
        model = load_classifier(path, pad_id=pad_id, new_head_seed=new_head_seed)
        nn.Module.to(model, engine.device)
        packs = enable_packing(model)
        if recompute:
            recompute_activations(model)
        return cls(
            trunk_of(model),
            cast(nn.Linear, model.get_submodule("score")),
            engine,
            packs=packs,
            owns_trunk=True,
        )

    @classmethod
    def head_on(cls, policy: LanguageModel) -> "ValueModel":
        """A head on the policy's trunk; it starts at 0, so that every value does."""
        trunk = trunk_of(policy.backbone)
        return cls(
            trunk, _new_head(trunk), policy.engine, packs=policy.packs, owns_trunk=False,
            shared=policy.state,
        )  # fmt: skip

    @classmethod
    def adapters_on(cls, policy: LanguageModel, config: LoRAConfig, seed: int) -> "ValueModel":
        """Adapters of its own and a head that starts at 0, on the policy's frozen weights."""
        trunk = trunk_of(shared_copy(policy.backbone))
        add_adapters(trunk, config, seed=seed)
        return cls(
            trunk, _new_head(trunk), policy.engine, packs=policy.packs, owns_trunk=True,
            shared=policy.state,
        )  # fmt: skip

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        """Do `work` as a pass of this module."""
        return work(*args)

    def values(self, rollout: Rollout) -> Float[Tensor, "B R"]:
        """V(x, y_<t): the head, in fp32, on the hidden state before each response token; 0 outside the mask."""

        def work() -> Tensor:
            hidden = response_hidden(self.trunk, rollout, packs=self.packs)
            return unflatten(scalar(self.score, hidden), rollout.response_mask)

        return self(work)

    def trained(self) -> dict[str, Tensor]:
        """The fp32 weights that learn, for an optimizer."""
        return self.state.trained()

    def sync(self) -> None:
        """Compute with what an optimizer made of `trained()`."""
        self.state.sync()

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path, like: Path) -> None:
        """Write a sequence classifier in fp32, adapters merged, configured as the model at `like`."""
        model = load_classifier(like, pad_id=int(tokenizer.pad_token_id), new_head_seed=0)
        prefix, master = model.base_model_prefix, self._trunk_state.master
        weights = {f"{prefix}.{name}": weight for name, weight in merged(self.trunk, master)}
        weights["score.weight"] = self.state.master(cast(nn.Parameter, self.score.weight))
        save_weights(model, tokenizer, directory, weights)


class RewardModel:
    """A sequence classifier as a scorer of (prompt, response), with its own chat template and tokenizer.

    It knows no token of the policy's, so it may differ from the policy in both.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: Engine
    ) -> None:
        """Freeze the fp32 `model` in the engine's arithmetic."""
        self.packs = enable_packing(model)
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer
        Weights(model, engine)

    @classmethod
    def load(cls, path: Path, engine: Engine) -> "RewardModel":
        """Load a checkpoint.

        Raises:
            CheckpointError: it cannot be loaded, has no head or several labels.
        """
        tokenizer = load_tokenizer(path)
        model = load_classifier(path, pad_id=int(tokenizer.pad_token_id))
        nn.Module.to(model, engine.device)
        return cls(model, tokenizer, engine)

    def __call__(self, prompts: "Sequence[Prompt]", responses: Sequence[str]) -> list[float]:
        """One score each."""
        return self.scores(
            [self._ids(p, r) for p, r in zip(prompts, responses, strict=True)], SCORING_TOKENS
        )

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], max_tokens: int) -> list[float]:
        """The score of each token sequence, `max_tokens` distinct ones at once.

        Read off where the model was trained to be read off: at the last token that is not its padding token.
        """
        pad_id = int(self.model.config.pad_token_id)
        trunk, head = trunk_of(self.model), self.model.get_submodule("score")
        scores = [0.0] * len(sequences)
        for pack in packs_of(sequences, max_tokens):
            rows = [sequences[row] for row in pack]
            hidden, paths = hidden_states(trunk, rows, packs=self.packs)
            last = [max((i for i, t in enumerate(row) if t != pad_id), default=0) for row in rows]
            values = scalar(head, hidden[paths[range(len(pack)), last]])
            for row, score in zip(pack, values.tolist(), strict=True):
                scores[row] = score
        return scores

    def _ids(self, prompt: "Prompt", response: str) -> list[int]:
        """Prompt and response as the model was trained to see them."""
        from salsa.data import render

        tokenizer: Any = self.tokenizer
        if prompt.messages is None:
            return tokenizer(prompt.text + response + tokenizer.eos_token)["input_ids"]
        messages = [*prompt.messages, {"role": "assistant", "content": response}]
        text = render(messages, tokenizer, "reward")
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def scalar(head: nn.Module, hidden: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """A scalar head in fp32: bf16 would leave a score three digits."""
    weight = head.get_parameter("weight")
    return linear(hidden.float(), weight.float()).squeeze(-1)


def _new_head(trunk: Any) -> nn.Linear:
    """A head that gives 0."""
    size = trunk.config.get_text_config().hidden_size
    head = nn.Linear(size, 1, bias=False, device=next(trunk.parameters()).device)
    nn.init.zeros_(head.weight)
    return head
