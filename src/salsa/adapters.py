"""LoRA: policy and critic as low-rank adapters on one frozen base.

peft puts the adapters in; the base is shared by sharing its tensors, so no adapter has to be switched on and off: each
module has its own. Adapters carry no dropout, as nothing in RL does here.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from salsa.config import LoRAConfig
from salsa.errors import ConfigError

_ADAPTER = "default"


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules anew, with the very tensors of `model`: memory for the modules only."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def add_adapters(model: PreTrainedModel, config: LoRAConfig, *, seed: int) -> None:
    """Freeze `model` and put adapters into its linear layers; at first they change nothing (B = 0).

    Raises:
        ConfigError: no layer is called what `target_modules` says.
    """
    import peft

    torch.manual_seed(seed)
    targets = list(config.target_modules) or "all-linear"
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    try:
        peft.inject_adapter_in_model(lora, model, _ADAPTER)
    except ValueError as error:
        raise ConfigError(
            f"rl.lora.target_modules={targets}: {' '.join(str(error).split())}"
        ) from error


def effective_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight as the forward pass means it, W + (alpha / r)·B·A, under its name in a model without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in adapted:
            layer = adapted[owner]
            delta = layer.get_delta_weight(_ADAPTER) if leaf == "weight" else 0  # type: ignore[attr-defined]
            yield f"{owner}.{leaf}", parameter + delta
        elif ".lora_" not in name:
            yield name, parameter


@torch.no_grad()
def copy_effective(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, a model without adapters, the effective weights of `source`."""
    parameters = dict(target.named_parameters())
    for name, value in effective_parameters(source):
        parameters[name].copy_(value)
