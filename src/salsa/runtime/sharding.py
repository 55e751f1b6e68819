"""Models whose parameters are divided among processes, by PyTorch's FSDP2 (`fully_shard`).

Each layer is a group of parameters that is gathered for its pass and dropped after it; what is in no layer
(embeddings, head, last norm) is the root's group. Gradients are summed over the processes, not averaged: a loss is
already divided by what all of them count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

_LAYER = (CheckpointWrapper, GradientCheckpointingLayer)


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Divide the parameters of `model`, layer by layer; passes compute in `dtype`, gradients are summed in fp32."""
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _drop_after_forward(model)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Make the divided parameters those of the modules, as they must be whenever they are read or written."""
    for part in _parts(model):
        part.reshard()


@contextmanager
def resident(model: nn.Module) -> Iterator[None]:
    """Keep all parameters gathered while the block lasts, for passes without gradients."""
    root: Any = model
    for part in _parts(model):
        part.unshard()
    root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        _drop_after_forward(root)
        root.reset_iter_state()


def local(x: Tensor) -> Tensor:
    """The part of a divided tensor that this process has; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A divided tensor put together, in every process; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_on_main(tree: Any, is_main: bool) -> Any:
    """The divided tensors in dicts and lists put together for the main process; elsewhere None is in their place."""
    match tree:
        case DTensor():
            together = tree.full_tensor().cpu()
            return together if is_main else None
        case dict():
            return {key: whole_on_main(value, is_main) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(whole_on_main(value, is_main) for value in tree)
    return tree


def divided_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every process, divided as `like` is."""
    if not isinstance(like, DTensor):
        return x
    where = like.device_mesh, like.placements
    return distribute_tensor(x.to(like.device), *where, src_data_rank=None)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model, outermost modules only."""
    for child in model.children():
        if isinstance(child, _LAYER):
            yield child
        else:
            yield from _layers(child)


def _drop_after_forward(root: Any) -> None:
    """Drop each group after its pass, but the root's of a model that learns: its backward pass follows at once."""
    learns = any(parameter.requires_grad for parameter in root.parameters())
    root.set_reshard_after_forward(True)
    root.set_reshard_after_forward(not learns, recurse=False)


def _parts(model: nn.Module) -> list[Any]:
    """The modules with groups of parameters of their own, the root first; none of a model that is not divided."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
