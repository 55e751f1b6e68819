"""Models with a scalar head: the critic's values of response tokens, the reward model's score of a conversation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa.config import LoRAConfig
from salsa.models.language import LanguageModel
from salsa.models.loading import load_classifier, load_tokenizer, save_checkpoint
from salsa.models.trunk import (
    enable_gradient_checkpointing,
    enable_packing,
    hidden_states,
    response_hidden,
)
from salsa.models.weights import MixedPrecisionModule, add_adapters, merged, shared_copy
from salsa.runtime.engine import Engine
from salsa.runtime.packing import packs_of
from salsa.runtime.sharding import reshard, whole_on_main
from salsa.types import Rollout

if TYPE_CHECKING:
    from salsa.data import Prompt

SCORING_TOKENS = 4096
"""Distinct tokens per forward pass of a reward model."""


class ValueModel(MixedPrecisionModule):
    """The critic: a trunk of its own or the policy's, and a scalar head in fp32."""

    trunk: nn.Module
    _owner: LanguageModel | None
    """Whose trunk it is, where it is not its own: a pass through it is a pass of that model too."""

    def __init__(
        self,
        trunk: Any,
        engine: Engine,
        *,
        score: nn.Linear | None = None,
        owns_trunk: bool = True,
        shared: LanguageModel | None = None,
    ) -> None:
        """Put `score` on `trunk`, a new head if not given; it starts at 0, so that every value does.

        The parameters of a trunk that it does not own are not this module's.
        """
        super().__init__(engine, learns=True, shared=shared)
        (setattr if owns_trunk else object.__setattr__)(self, "trunk", trunk)
        object.__setattr__(self, "_owner", None if owns_trunk else shared)
        if score is None:
            size = trunk.config.get_text_config().hidden_size
            score = nn.Linear(size, 1, bias=False, device=engine.device)
            nn.init.zeros_(score.weight)
        self.score, self.owns_trunk = score, owns_trunk
        self.lower()

    @classmethod
    def load(
        cls,
        path: Path,
        engine: Engine,
        *,
        pad_id: int,
        new_head_seed: int,
        gradient_checkpointing: bool = False,
    ) -> "ValueModel":
        """A model of its own, from a sequence classifier, or a language model that gets a new head.

        Raises:
            CheckpointError: it cannot be loaded, or has several labels.
        """
        model: Any = load_classifier(path, pad_id=pad_id, new_head_seed=new_head_seed)
        enable_packing(model.to(engine.device))
        if gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return cls(model.base_model, engine, score=model.score)

    @classmethod
    def head_on(cls, policy: LanguageModel) -> "ValueModel":
        """A new head on the policy's trunk."""
        return cls(policy.trunk, policy.engine, owns_trunk=False, shared=policy)

    @classmethod
    def adapters_on(cls, policy: LanguageModel, config: LoRAConfig, seed: int) -> "ValueModel":
        """Adapters of its own and a new head, on the policy's frozen weights."""
        trunk = shared_copy(policy.backbone).base_model
        add_adapters(trunk, config, seed=seed)
        return cls(trunk, policy.engine, shared=policy)

    def values(self, rollout: Rollout) -> Float[Tensor, "B R"]:
        """V(x, y_<t): the head, in fp32, on the hidden state before each response token; 0 outside the mask."""
        work = lambda: rollout.unflatten(scalar(self.score, response_hidden(self.trunk, rollout)))
        return self(work) if self._owner is None else self(self._owner, work)

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path, like: Path) -> None:
        """Write a sequence classifier in fp32, adapters merged, configured as the model at `like`."""
        model = load_classifier(like, pad_id=int(tokenizer.pad_token_id), new_head_seed=0)
        for module in (self, self._owner or self):
            reshard(module)
        trunk = merged(self.trunk, self.master)
        weights = {f"{model.base_model_prefix}.{name}": weight for name, weight in trunk}
        weights["score.weight"] = self.master(self.score.weight)
        weights = whole_on_main(weights, self.engine.is_main)
        if self.engine.is_main:
            save_checkpoint(model, tokenizer, directory, weights)


class RewardModel(nn.Module):
    """A sequence classifier as a scorer of (prompt, response), with its own chat template and tokenizer.

    It knows no token of the policy's, so it may differ from the policy in both.
    """

    is_divided = True
    """In several processes each computes a part of the scores."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: Engine
    ) -> None:
        """Freeze the fp32 `model` in the engine's arithmetic."""
        super().__init__()
        self.engine = engine
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        enable_packing(model)
        for parameter in model.requires_grad_(False).parameters():
            parameter.data = parameter.data.to(engine.dtype)

    @classmethod
    def load(cls, path: Path, engine: Engine) -> "RewardModel":
        """Load a checkpoint; CheckpointError if it cannot be, has no head or several labels."""
        tokenizer = load_tokenizer(path)
        reward = cls(load_classifier(path, pad_id=int(tokenizer.pad_token_id)), tokenizer, engine)
        reward.model.to(engine.device)
        engine.shard(reward)
        return reward

    def forward(self, prompts: "Sequence[Prompt]", responses: Sequence[str]) -> list[float]:
        """One score each; in several processes all of them call it, with the same."""
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            if prompt.messages is None:
                rows.append(self.token_ids(prompt.text, response))
            else:
                reply = {"role": "assistant", "content": response}
                rows.append(self.token_ids(prompt.messages, [reply]))
        return self.scores(rows, SCORING_TOKENS)

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], max_tokens: int) -> list[float]:
        """The score of each token sequence, `max_tokens` distinct ones at once.

        Read off where the model was trained to be read off: at the last token that is not its padding token.
        """
        pad_id = int(self.model.config.pad_token_id)
        scores, packs = torch.zeros(len(sequences)), packs_of(sequences, max_tokens)
        for pack, counts in self.engine.share(packs):
            rows = [sequences[row] for row in pack]
            hidden, paths = hidden_states(self.model.base_model, rows)
            last = [max((i for i, t in enumerate(row) if t != pad_id), default=0) for row in rows]
            values = scalar(self.model.score, hidden[paths[range(len(pack)), last]])
            if counts:
                scores[pack] = values.cpu()
        return self.engine.sum(scores.to(self.engine.device)).tolist()

    def token_ids(self, prompt: Any, reply: Any) -> list[int]:
        """Prompt and reply, both bare text or both messages, as the model was trained to see them."""
        from salsa.data import render

        if isinstance(prompt, str):
            return self.tokenizer(prompt + reply + self.tokenizer.eos_token)["input_ids"]
        text = render([*prompt, *reply], self.tokenizer, "reward")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def scalar(head: nn.Linear, hidden: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """A scalar head in fp32: bf16 would leave a score three digits."""
    return linear(hidden.float(), head.weight.float()).squeeze(-1)
