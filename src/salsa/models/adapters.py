"""LoRA: policy and critic as low-rank adapters on one frozen base.

peft puts the adapters in; the base is shared by sharing its tensors, so no adapter has to be switched on and off: each
module has its own. Adapters carry no dropout, as nothing in RL does here.
"""

import copy
from collections.abc import Callable, Iterator

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
        raise ConfigError(
            f"rl.lora.target_modules={targets}: {' '.join(str(error).split())}"
        ) from error


@torch.no_grad()
def merged(
    model: nn.Module, master: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each weight as the forward pass means it, W + (alpha / r)·B·A, under its name in a model without adapters.

    Args:
        model: the model with adapters.
        master: gives a parameter's fp32 value.
    """
    adapted = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        weight = master(parameter)
        if owner in adapted:
            if leaf == "weight":
                weight = weight + _delta(adapted[owner], master)
            yield f"{owner}.{leaf}".replace(WRAPPED, ""), weight
        elif ".lora_" not in name:
            yield name.replace(WRAPPED, ""), weight


def _delta(layer: nn.Module, master: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """(alpha / r)·B·A of one linear layer, in fp32."""
    up, down = (
        master(getattr(layer, name)[_ADAPTER].weight)  # type: ignore[index]
        for name in ("lora_B", "lora_A")
    )
    delta = (up @ down) * layer.scaling[_ADAPTER]  # type: ignore[index]
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta
