"""What the KL pulls towards, and where the policy starts: expressions become checkpoints and models.

Soups and shrunk models are made once per run, as stages of their own, and shared by the arms that use them. A mixture
is several models at once: its log-probability is Σ a_i·log π_i, the geometric mean without its normaliser, so that k1
is Σ a_i·KL(π ‖ π_i). A moving anchor (ema, reset) is an fp32 copy that is saved with the run and checked on resume.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salsa import models
from salsa.adapters import effective_parameters
from salsa.artifacts import Checkpoint, RunDirectory, resolve
from salsa.config import DataSource, SoupConfig
from salsa.data import fingerprint, import_callable
from salsa.errors import CheckpointError
from salsa.expressions import Anchor, ingredients_of, shrunk
from salsa.soup import measure_soup, write_soup


class Anchors:
    """The checkpoints that a recipe's expressions stand for."""

    def __init__(
        self, run: RunDirectory, base: Checkpoint, sft: Sequence[Checkpoint], soup: SoupConfig
    ) -> None:
        self._run, self._base, self._sft, self._soup = run, base, sft, soup
        self._made: dict[str, Checkpoint] = {}

    def __getitem__(self, expression: str) -> Checkpoint:
        """The checkpoint of a model expression; a soup is cooked the first time."""
        if expression not in self._made:
            self._made[expression] = self._make(expression)
        return self._made[expression]

    def resolved(self, anchor: Anchor[str]) -> Anchor[Checkpoint]:
        """The anchor with checkpoints in place of their names."""
        found: Any = tuple(self[model] for model in anchor.models)
        return cast(Anchor[Checkpoint], replace(anchor, models=found))

    def _make(self, expression: str) -> Checkpoint:
        if expression == "base":
            return self._base
        if (inner := shrunk(expression)) is not None:
            model, share = self[inner[0]], inner[1]
            if isinstance(share, str):
                share = self._norm_ratio(self[share], model)
            return self.cook(expression, [model], method="wise", alpha=share)
        indices = ingredients_of(expression, self._soup.ingredients)
        if not indices:
            return Checkpoint.of(resolve(expression))
        ingredients = [self._sft[i] for i in indices]
        if expression.startswith("sft"):
            return ingredients[0]
        return self.cook(expression, ingredients, **self._options(expression))

    def _options(self, expression: str) -> dict[str, Any]:
        """What `soup:` says of `soup`; `soup[i,j]` is the uniform average."""
        if expression != "soup":
            return {}
        options: dict[str, Any] = {
            "method": self._soup.method,
            "alpha": self._soup.alpha,
            "score": self._soup.score,
        }
        if self._soup.weights != "uniform":
            options["weights"] = [float(w) for w in self._soup.weights]
        return {name: value for name, value in options.items() if value is not None}

    def cook(self, label: str, ingredients: Sequence[Checkpoint], **options: Any) -> Checkpoint:
        """A soup as a stage of the run; options as of `soup.write_soup`, `score` as `module:function`."""
        inputs = {f"ingredient {i}": c.digest for i, c in enumerate(ingredients)}
        given = dict(options)
        if "heads" not in options:  # reward models have another architecture than the base
            inputs["base"], given["base"] = self._base.digest, self._base
        if "score" in options:
            inputs["score"] = fingerprint(DataSource(call=options["score"]))
            given["score"] = import_callable(options["score"])
        stage = self._run.stage(
            label,
            config=options,
            inputs=inputs,
            work=lambda directory: write_soup(ingredients, directory, **given),
        )
        return stage.checkpoint

    def _norm_ratio(self, soup: Checkpoint, model: Checkpoint) -> float:
        """‖soup − base‖ / ‖model − base‖: how far to shrink a model for it to be as near the base as a soup is."""
        record = measure_soup([soup.path, model.path], base=self._base.path)
        of_soup, of_model = record["diagnostics"]["norms"]
        return of_soup / of_model


class Reference:
    """An anchor's models while a run lasts."""

    def __init__(
        self, anchor: Anchor[Checkpoint], loaded: Mapping[str, PreTrainedModel] | None = None
    ) -> None:
        """Load the anchor's models, but for those in `loaded` (digest → model)."""
        self.anchor = anchor
        ready = loaded or {}
        self.models = [
            ready[c.digest] if c.digest in ready else models.load_policy(c.path)
            for c in anchor.models
        ]
        for model in self.models:
            model.requires_grad_(False)

    @property
    def by_digest(self) -> dict[str, PreTrainedModel]:
        """The models by the digests of the checkpoints that they were loaded from."""
        return {c.digest: m for c, m in zip(self.anchor.models, self.models, strict=True)}

    def logprobs(self, of_each: Sequence[Tensor]) -> Tensor:
        """Σ a_i·log π_i of the response tokens [B, R], given each model's."""
        weighted = [w * own for w, own in zip(self.anchor.weights, of_each, strict=True)]
        return sum(weighted[1:], start=weighted[0])

    def after_step(self, policy: PreTrainedModel) -> None:
        """EMA: θ ← (1−μ)·θ + μ·θ_policy after an optimizer step (WARP, Ramé et al. 2024, stage 1)."""
        if self.anchor.ema is not None:
            self._move(policy, self.anchor.ema)

    def after_update(self, policy: PreTrainedModel, num_updates: int) -> bool:
        """Reset: θ ← θ_policy after every `reset_every` updates (TR-DPO, Gorbatovski et al. 2024); whether it did."""
        period = self.anchor.reset_every
        due = period is not None and num_updates % period == 0
        if due:
            self._move(policy, 1.0)
        return due

    @torch.no_grad()
    def _move(self, policy: PreTrainedModel, share: float) -> None:
        own = dict(self.models[0].named_parameters())
        for name, target in effective_parameters(policy):
            own[name].lerp_(target.to(own[name].dtype), share)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the digests of where it started and, if it moves, where it is."""
        kept: dict[str, Any] = {"identity": identity(self.anchor)}
        if self.anchor.moves:
            weights = dict(self.models[0].named_parameters())
            kept |= {"weights": weights, "sha256": _sha256(weights)}
        return kept

    def load_state(self, state: Mapping[str, Any], where: Path) -> None:
        """Take back `state()`.

        Raises:
            CheckpointError: it belongs to another anchor, or its weights are not those that were written.
        """
        if state["identity"] != (here := identity(self.anchor)):
            raise CheckpointError(
                f"{where}: was anchored to reference {state['identity']}, now it is {here}. "
                "Delete that directory to start this arm anew."
            )
        if not self.anchor.moves:
            return
        if _sha256(state["weights"]) != state["sha256"]:
            raise CheckpointError(
                f"{where}: the anchor's weights are not those that were written. "
                "Delete that file to go on from the checkpoint before it."
            )
        with torch.no_grad():
            for name, parameter in self.models[0].named_parameters():
                parameter.copy_(state["weights"][name])

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Write a moving anchor as an ordinary checkpoint, in fp32; one that stands still is where it was."""
        if self.anchor.moves:
            models.save(self.models[0], tokenizer, directory)


def identity(anchor: Anchor[Checkpoint]) -> str:
    """An anchor in one line: its rule and its models' digests. A model that stands still is its digest alone."""
    digests = [checkpoint.digest for checkpoint in anchor.models]
    if anchor == Anchor(anchor.models):
        return digests[0]
    rule = {k: v for k, v in vars(anchor).items() if k != "models"}
    return f"{rule} of {digests}"


def _sha256(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
