"""What the KL pulls towards while RL runs: one model, several at once, or one that moves.

A mixture's log-probability is Σ a_i·log π_i, the geometric mean without its normaliser, so that k1 is
Σ a_i·KL(π ‖ π_i). A moving reference (ema, reset) is an fp32 copy that is saved with the run and checked on resume.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from salsa.artifacts import Checkpoint
from salsa.config.expressions import ReferenceRule, identity_of
from salsa.errors import CheckpointError
from salsa.models import LanguageModel
from salsa.runtime.engine import Engine
from salsa.runtime.sharding import whole_on_main


class Reference:
    """A reference's models while a run lasts."""

    def __init__(
        self,
        rule: ReferenceRule[Checkpoint],
        engine: Engine,
        loaded: Mapping[str, LanguageModel] | None = None,
    ) -> None:
        """Verify and load the rule's models, but for those in `loaded` (digest → model).

        Raises:
            CheckpointError: a checkpoint is not what its digest says.
        """
        self.rule, self._engine = rule, engine
        self.models = []
        for checkpoint in rule.models:
            checkpoint.verify()
            own = (loaded or {}).get(checkpoint.digest)
            self.models.append(own or LanguageModel.load(checkpoint.path, engine, moves=rule.moves))

    @property
    def by_digest(self) -> dict[str, LanguageModel]:
        """The models that stand still by the digests of their checkpoints; none of one that moves."""
        if self.rule.moves:
            return {}
        return {c.digest: m for c, m in zip(self.rule.models, self.models, strict=True)}

    def logprobs(self, of_each: Sequence[Tensor]) -> Tensor:
        """Σ a_i·log π_i of the response tokens [B, R], given each model's."""
        weighted = [w * own for w, own in zip(self.rule.weights, of_each, strict=True)]
        return sum(weighted[1:], start=weighted[0])

    def after_step(self, policy: LanguageModel) -> None:
        """EMA: θ ← (1−μ)·θ + μ·θ_policy after an optimizer step (WARP, Ramé et al. 2024, stage 1)."""
        if self.rule.ema is not None:
            self.models[0].follow(policy, self.rule.ema)

    def after_update(self, policy: LanguageModel, updates_done: int) -> bool:
        """Reset: θ ← θ_policy after every `reset_every` updates (TR-DPO, Gorbatovski et al. 2024); whether it did."""
        period = self.rule.reset_every
        if due := period is not None and updates_done % period == 0:
            self.models[0].follow(policy, 1.0)
        return due

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the digests of where it started and, if it moves, where it is.

        The weights are whole in the main process, which writes them; the others have none.
        """
        identity = {"identity": identity_of(self.rule)}
        if not self.rule.moves:
            return identity
        model = self.models[0]
        weights = whole_on_main(dict(model.weights()), self._engine.is_main)
        if not self._engine.is_main:
            return identity
        return identity | {"weights": weights, "sha256": sha256_of(weights.items())}

    def load_state(self, state: Mapping[str, Any], where: Path) -> None:
        """Take back `state()`.

        Raises:
            CheckpointError: it belongs to another reference, or its weights are not those that were written.
        """
        if state["identity"] != (here := identity_of(self.rule)):
            raise CheckpointError(
                f"{where}: was pulled towards reference {state['identity']}, now it is {here}. "
                f"Delete {where.parent} to start this arm anew."
            )
        if not self.rule.moves:
            return
        if sha256_of(state["weights"].items()) != state["sha256"]:
            raise CheckpointError(
                f"{where}: the reference's weights are not those that were written. "
                "Delete that file to go on from the checkpoint before it."
            )
        self.models[0].put(state["weights"])

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Write a moving reference as an ordinary checkpoint, in fp32; one that stands still is where it was."""
        if self.rule.moves:
            self.models[0].save(tokenizer, directory)


def sha256_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex sha256 over names and bytes of weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
