"""A soup, or a reference that moves, in TRL's DPO, GRPO and RLOO trainers; with LoRA too.

TRL keeps its reference in `trainer.ref_model`. GRPO and RLOO take none as an argument, so the soup's weights are copied
into theirs. Under PEFT they have none at all (the reference is the policy with its adapters off), so one is loaded
beside the policy, and moves by the policy's *merged* weights: the mean of two products B·A is not the product of the
means, so an average of adapters is not taken factor by factor.

Nothing of TRL is imported or subclassed: a trainer's attributes and a callback of transformers are all that is used.
"""

import copy
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from salsa.artifacts import Checkpoint, resolve
from salsa.config.expressions import (
    Given,
    Model,
    RecipeSoup,
    ReferenceRule,
    parse_reference,
    text_of,
)
from salsa.errors import CheckpointError, ConfigError
from salsa.models import check_vocabulary, load_policy
from salsa.models.weights import lerp, merged
from salsa.references import Reference
from salsa.runtime.checkpoint import load_state, save_state
from salsa.runtime.engine import Engine

STATE = "salsa_reference.pt"
"""In each of the trainer's checkpoints: what the reference was then."""
_NOT_PLAIN = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
)  # fmt: skip
"""Options of a LoRA adapter under which a weight is more than W + (alpha / r)·B·A."""


def use_reference(trainer: Any, words: str, *, soup: str | Path | None = None) -> None:
    """Make `words` the reference of a TRL trainer, before `trainer.train()`; a second call replaces the first.

    `words` are a recipe's (`salsa.config.expressions`): `soup` or a path stand still, `ema(soup, 0.01)` follows the
    policy at every optimizer step, `reset(soup, 100)` becomes the policy every 100 optimizer steps (a recipe counts
    updates) and `reset(soup, 100, optimizer)` drops the optimizer's moments too. `soup` is where the soup lies, a
    directory or a hub name. A moving reference is saved with each of the trainer's checkpoints, and taken back on
    resume.

    Raises:
        ConfigError: the words cannot be meant here, or the trainer has no use for a reference.
        CheckpointError: the model is not there, or does not fit the policy.
    """
    _check_trainer(trainer)
    rule = _rule(words, soup)
    if rule.moves:
        _check_follows(trainer.accelerator.unwrap_model(trainer.model))
    checkpoint = rule.models[0]
    source = load_policy(checkpoint.path)
    if isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        check_vocabulary(trainer.processing_class, checkpoint.path, "reference")
    if trainer.ref_model is None:
        trainer.ref_model = _model_beside(trainer, source)
    target = trainer.accelerator.unwrap_model(trainer.ref_model)
    weights = _Weights(target, keep_fp32=rule.moves)
    weights.check(source, checkpoint.path)
    weights.put(dict(source.named_parameters()))
    engine = Engine(trainer.accelerator.device, "fp32", "not used: the trainer's model is there")
    loaded: Mapping[str, Any] = {checkpoint.digest: weights}
    trainer.remove_callback(ReferenceCallback)
    trainer.add_callback(ReferenceCallback(trainer, Reference(rule, engine, loaded)))


class ReferenceCallback(TrainerCallback):
    """Moves a trainer's reference after each optimizer step; saves and resumes it with the trainer's checkpoints."""

    def __init__(self, trainer: Any, reference: Reference) -> None:
        self.trainer, self.reference = trainer, reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On resume, take back where the reference was; CheckpointError if that is not known."""
        if state.global_step == 0:
            return
        file = _state_file(args, state)
        if not file.exists():
            raise CheckpointError(
                f"{file}: the reference of step {state.global_step} is missing. Resume from a checkpoint in "
                f"{args.output_dir} that was written with this reference."
            )
        self.reference.load_state(load_state(file), file)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the policy, which has just taken a step."""
        policy: Any = _Policy(self.trainer.accelerator.unwrap_model(self.trainer.model))
        self.reference.after_step(policy)
        was_reset = self.reference.after_update(policy, state.global_step)
        if was_reset and self.reference.rule.reset_optimizer:
            kwargs["optimizer"].state.clear()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the reference into the checkpoint that has just been written."""
        if state.is_world_process_zero:
            save_state(_state_file(args, state), self.reference.state())


class _Weights:
    """The weights of a trainer's reference model, and what `Reference` does with them."""

    def __init__(self, model: nn.Module, *, keep_fp32: bool) -> None:
        """With `keep_fp32`, a weight in a shorter format is the rounding of an fp32 copy, which is what moves."""
        self._parameters = dict(model.named_parameters())
        self._fp32 = {
            name: parameter.detach().float() if keep_fp32 else parameter.detach()
            for name, parameter in self._parameters.items()
        }  # `float` and `detach` of an fp32 weight are that very weight

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._fp32.items())

    def follow(self, policy: "_Policy", share: float) -> None:
        lerp(self._fp32, policy.weights(), share)
        self._round()

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        for name, own in self._fp32.items():
            own.copy_(weights[name])
        self._round()

    def check(self, source: nn.Module, where: Path) -> None:
        """CheckpointError if `source` has other weights than these."""
        own, given = ({n: tuple(p.shape) for n, p in one.items()} for one in (
            self._parameters, dict(source.named_parameters())))  # fmt: skip
        for name in sorted(own.keys() | given.keys()):
            if own.get(name) != given.get(name):
                raise CheckpointError(
                    f"{where}: {name} is {given.get(name, 'missing')}, in the trainer's reference "
                    f"{own.get(name, 'missing')}. Use models of one architecture."
                )

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._fp32[name])


class _Policy:
    """A trainer's policy, as a moving reference reads it."""

    def __init__(self, model: Any) -> None:
        self._model = _without_peft(model)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight in fp32, adapters merged."""
        return merged(self._model, lambda parameter: parameter.detach().float())


def _without_peft(model: Any) -> Any:
    """The model of transformers inside a PeftModel, its adapters in its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _model_beside(trainer: Any, source: Any) -> Any:
    """`source` as the reference of a trainer with PEFT, which has none: in the policy's arithmetic, and frozen."""
    policy = _without_peft(trainer.accelerator.unwrap_model(trainer.model))
    model = copy.deepcopy(source)
    model.requires_grad_(False).eval().to(trainer.accelerator.device, policy.dtype)
    model.set_attn_implementation(policy.config._attn_implementation)
    if "forward" in vars(policy):
        # TRL gives its models a forward pass of its own for calls with fused_lm_head=True; others go to the class's,
        # but that of the policy is bound to the policy
        plain, fused = model.forward, types.MethodType(policy.forward.__func__, model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (fused if kwargs.get("fused_lm_head") else plain)(*args, **kwargs)

        model.forward = forward
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def _rule(words: str, soup: str | Path | None) -> ReferenceRule[Checkpoint]:
    """The words, with a checkpoint in the place of their model."""
    try:
        rule = parse_reference(words, init="base")
    except ValueError as error:
        raise ConfigError(f"reference={words!r}: {error}") from None
    if not rule.pulls:
        raise ConfigError(
            f"reference={words!r}: pulls towards nothing. Set the trainer's beta to 0."
        )
    if len(rule.models) > 1:
        raise ConfigError(
            f"reference={words!r}: a TRL trainer has one reference model. "
            "Use one, or a mixture in a recipe of salsa."
        )
    checkpoint = Checkpoint.of(_place(rule.models[0], words, soup))
    return ReferenceRule(
        (checkpoint,),
        ema=rule.ema,
        reset_every=rule.reset_every,
        reset_optimizer=rule.reset_optimizer,
    )


def _place(model: Model, words: str, soup: str | Path | None) -> Path:
    if isinstance(model, Given):
        return resolve(model.path)
    if not isinstance(model, RecipeSoup):
        raise ConfigError(
            f"reference={words!r}: {text_of(model)} is a model of a recipe. "
            "Make it with `salsa soup`, and give its directory (a path with a /)."
        )
    if soup is None:
        raise ConfigError(f"reference={words!r}: where is the soup? Give soup=its directory.")
    return resolve(str(soup))


def _check_trainer(trainer: Any) -> None:
    """ConfigError if a trainer reads no reference, reads it before it could be set, or moves it by itself."""
    args = trainer.args
    name = type(trainer).__name__
    if not hasattr(trainer, "ref_model") or getattr(args, "beta", None) is None:
        raise ConfigError(f"{name} has no reference model. Use TRL's DPO, GRPO or RLOO trainer.")
    if args.beta == 0:
        raise ConfigError(f"{name}: beta=0 asks for no reference. Set beta above 0.")
    if getattr(args, "precompute_ref_log_probs", False):
        raise ConfigError(
            f"{name}: precompute_ref_log_probs=True has asked the reference already. "
            "Set it to False, or pass the soup as ref_model."
        )
    if getattr(args, "sync_ref_model", False):
        raise ConfigError(f"{name}: sync_ref_model=True moves the reference too. Set it to False.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"{name}: under FSDP and DeepSpeed the reference is in pieces, which is not supported. "
            "Use one process or DDP."
        )
    if trainer.accelerator.num_processes > 1:
        warnings.warn("use_reference is experimental on several processes: not run.", stacklevel=3)


def _check_follows(policy: Any) -> None:
    """ConfigError if the policy's adapters are not plain LoRA, or its weights are quantized: neither can be merged."""
    configs = getattr(policy, "peft_config", {})
    others = set(configs) - {"default", "ref"}
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        special = [key for key in _NOT_PLAIN if getattr(config, key, None)]
        if kind != "LORA" or special or others:
            what = ", ".join(special) or (f"adapters {sorted(others)}" if others else kind)
            raise ConfigError(
                f"a moving reference follows one plain LoRA adapter, and this policy has {what}. "
                "Leave that out, or use a reference that stands still."
            )
    base = _without_peft(policy)
    embedding = [name for name, _ in base.named_parameters() if ".lora_embedding_" in name]
    integers = [name for name, p in base.named_parameters() if not p.is_floating_point()]
    if embedding or integers:
        what = "an adapter on the embedding" if embedding else "quantized weights"
        raise ConfigError(
            f"a moving reference cannot follow {what} ({(embedding or integers)[0]}). "
            "Leave that out, or use a reference that stands still."
        )


def _state_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
