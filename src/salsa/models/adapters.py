"""LoRA: policy and critic as low-rank adapters on one frozen base.

peft puts the adapters in; the base is shared by sharing its tensors, so no adapter has to be switched on and off: each
module has its own. Adapters carry no dropout, as nothing in RL does here.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from salsa.config import LoRAConfig
from salsa.errors import ConfigError
from salsa.models.weights import WRAPPED

_ADAPTER = "default"


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules anew, with the very tensors of `model`: memory for the modules only."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def add_adapters(model: nn.Module, config: LoRAConfig, *, seed: int) -> None:
    """Freeze `model` and put adapters into its linear layers; at first they change nothing (B = 0).

    Raises:
        ConfigError: no layer is called what `target_modules` says.
    """
    import peft

    torch.manual_seed(seed)
    model.requires_grad_(False)
    targets = list(config.target_modules) or "all-linear"
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    try:
        peft.inject_adapter_in_model(lora, model, _ADAPTER)
    except ValueError as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"rl.lora.target_modules={targets}: {words}") from error


@torch.no_grad()
def merged(
    model: nn.Module, master: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each weight as the forward pass means it, W + (alpha / r)·B·A, under its name in a model without adapters.

    `master` gives a parameter's fp32 value.
    """
    adapted: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        weight = master(parameter)
        if layer := adapted.get(owner):
            if leaf == "weight":
                up, down = (master(m[_ADAPTER].weight) for m in (layer.lora_B, layer.lora_A))
                delta = (up @ down) * layer.scaling[_ADAPTER]
                weight = weight + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)
            name = f"{owner}.{leaf}"
        elif ".lora_" in name:
            continue
        yield name.replace(WRAPPED, ""), weight
