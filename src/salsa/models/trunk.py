"""A model's trunk: hidden states of many rows of tokens, without padding where its attention can be replaced."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from salsa.errors import CheckpointError
from salsa.runtime.packing import ATTENTION, arguments, pack, take
from salsa.types import Rollout

_TRIAL = ([0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1], [6, 7, 8, 9, 10, 11])
"""Rows that try the packing: some begin alike, one does not."""


@torch.no_grad()
def enable_packing(model: PreTrainedModel) -> bool:
    """Give the model the attention of packed rows if it computes the same with it; whether it does.

    Tried on four short rows, which would not show a limit that reaches further back, e.g. attention in chunks; the
    layers must also tell their windows.
    """
    trunk, usual = model.base_model, model.config.get_text_config()._attn_implementation
    windows: list[int | None] = []
    real = pad_sequence([torch.ones(len(row)).bool() for row in _TRIAL], batch_first=True)
    plain, where = hidden_states(trunk, _TRIAL)
    same = False
    try:
        model.set_attn_implementation(ATTENTION)
        packed, paths = hidden_states(trunk, _TRIAL, windows=windows)
        same = torch.allclose(plain[where[real]], packed[paths[real]], rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        pass  # a family that goes on with an attention of its own, or not at all
    if same and uses_packing(trunk) and _tells_windows(trunk.config, windows):
        return True
    model.set_attn_implementation(usual)
    return False


def uses_packing(trunk: Any) -> bool:
    """Whether the model has the attention of packed rows."""
    return trunk.config.get_text_config()._attn_implementation == ATTENTION


def hidden_states(
    trunk: nn.Module, rows: Sequence[Sequence[int]], **others: Any
) -> tuple[Float[Tensor, "N d"], Int[Tensor, "B T"]]:
    """The last hidden states of all tokens, and where each row's are among them; read them by `packing.take`."""
    here = next(trunk.parameters()).device
    if uses_packing(trunk):
        packing = pack(rows, here)
        inputs, paths = arguments(packing), packing.paths
    else:
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(here)
        paths = torch.arange(tokens.numel(), device=here).view(tokens.shape)
        inputs = {"input_ids": tokens}
    hidden = trunk(**inputs, **others, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1), paths


def response_hidden(trunk: nn.Module, rollout: Rollout) -> Float[Tensor, "N d"]:
    """The last hidden state before each of the N real response tokens, row after row."""
    hidden, paths = hidden_states(trunk, rollout.rows)
    rows, steps = rollout.response_mask.nonzero(as_tuple=True)
    return take(hidden, paths[rows, rollout.prompt_mask.sum(dim=1)[rows] + steps - 1])


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Let layers keep nothing but their input for the backward pass and compute the rest again (Chen et al. 2016).

    The same bits, less memory, a forward pass more.

    Raises:
        CheckpointError: the model has no layers that transformers marks for this.
    """
    is_layer = lambda module: isinstance(module, GradientCheckpointingLayer)
    if not any(map(is_layer, model.modules())):
        raise CheckpointError(
            f"{type(model).__name__} has no layers that can be recomputed. Remove rl.gradient_checkpointing."
        )
    wrap = partial(checkpoint_wrapper, preserve_rng_state=False)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=is_layer)


def _tells_windows(config: Any, windows: Sequence[int | None]) -> bool:
    """Whether the windows that the layers passed on are those of the configuration."""
    usual = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * len(windows)
    told = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return told == list(kinds)
