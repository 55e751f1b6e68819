"""A module's weights in the engine's arithmetic, with fp32 masters where they may change, and with LoRA.

    fp32   the parameters are their own masters
    bf16   the parameters are bf16 roundings of fp32 masters; what each backward pass gives is added up in fp32
           (Micikevicius et al. 2018, section 3.1); `sync` rounds anew after the masters changed. In several processes
           the parameters are the masters, divided; they are rounded when they are gathered for a pass

A model that is frozen in bf16 computes the same bits as one with masters, so a policy that starts at its reference has
a KL of exactly 0.

LoRA: policy and critic are low-rank adapters on one frozen base. peft puts them in; the base is shared by sharing its
tensors, so no adapter has to be switched on and off: each module has its own. They carry no dropout, as nothing in RL
does here.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from salsa.config import LoRAConfig
from salsa.runtime.engine import Engine
from salsa.runtime.lora import finding_targets, lora_config
from salsa.runtime.sharding import divided_like, local, reshard

WRAPPED = "_checkpoint_wrapped_module."
"""What torch's checkpoint_wrapper puts into the names of parameters."""
_ADAPTER = "default"

T = TypeVar("T")


class MixedPrecisionModule(nn.Module):
    """A module that computes in the engine's arithmetic.

    Every pass is a call of this module, so that what is hooked to the root of a model (sharding, adapters) takes part.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        learns: bool = False,
        moves: bool = False,
        shared: "MixedPrecisionModule | None" = None,
    ) -> None:
        """Parameters that the module has in common with `shared` have their masters there."""
        super().__init__()
        self.engine, self._learns, self._moves = engine, learns, moves
        self._masters: dict[Tensor, Tensor] = shared._masters if shared else {}
        self._digest: str | None = None

    def forward(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Do `work` as a pass of this module."""
        return work(*args, **kwargs)

    def lower(self) -> None:
        """Lower parameters that are new here to the engine's arithmetic; keep masters of what learns or moves.

        Buffers (rotary frequencies) stay fp32.
        """
        self._digest = None
        rounded_when_gathered = self.engine.mesh is not None and (self._learns or self._moves)
        if self.engine.dtype == torch.float32 or rounded_when_gathered:
            return
        for parameter in self.parameters():
            if parameter in self._masters:
                continue
            if self._learns or self._moves:
                master = parameter.detach().to(torch.float32, copy=True)
                self._masters[parameter] = master
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_add_up, master))
            parameter.data = parameter.data.to(self.engine.dtype)

    def store_frozen_masters(self) -> None:
        """Keep the masters of what learns no longer in the host's memory: only what is saved is made from them."""
        for parameter, master in self._masters.items():
            if not parameter.requires_grad:
                self._masters[parameter] = master.cpu()

    def master(self, parameter: Tensor) -> Tensor:
        """The fp32 value of a parameter; the lowered one itself where there is no master."""
        return self._masters.get(parameter, parameter)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in a checkpoint, and masters."""
        reshard(self)
        for name, parameter in self.named_parameters():
            yield name.removeprefix("backbone.").replace(WRAPPED, ""), self.master(parameter)

    def trained(self) -> dict[str, Tensor]:
        """The fp32 weights that learn, for an optimizer."""
        pairs = zip(self.named(), self.parameters(), strict=True)
        return {name: master for (name, master), parameter in pairs if parameter.requires_grad}

    @torch.no_grad()
    def sync(self) -> None:
        """Round the parameters anew from their masters, which an optimizer has changed."""
        self._digest = None
        for parameter in self.parameters():
            if parameter in self._masters and (parameter.requires_grad or self._moves):
                parameter.copy_(self._masters[parameter])

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights`, by name."""
        for name, master in self.named():
            local(master).copy_(local(divided_like(weights[name], master)))
        self.sync()

    def version(self) -> str:
        """Digest over the names and the content of all weights; computed once after each change."""
        if self._digest is None:
            self._digest = digest_of_weights(self.named(), self.engine.sum)
        return self._digest


@torch.no_grad()
def digest_of_weights(
    weights: Iterable[tuple[str, Tensor]], total: Callable[[Tensor], Tensor] = lambda x: x
) -> str:
    """Hex sha256 over names, shapes and a 64-bit sum of each tensor's bits: a tenth of a second for 135 M parameters.

    It tells an update from none; it is no defence against forgery. `total` adds up over processes.
    """
    names, sums = [], []
    for name, weight in weights:
        bits = local(weight.detach()).contiguous()
        bits = bits.view({4: torch.int32, 2: torch.int16}[weight.itemsize])
        names.append(f"{name} {tuple(weight.shape)}")
        sums.append(bits.sum(dtype=torch.int64))
    device = next((one.device for one in sums if one.device.type != "cpu"), torch.device("cpu"))
    totals = total(torch.stack([one.to(device) for one in sums])).tolist()
    digest = hashlib.sha256()
    for name, number in zip(names, totals, strict=True):
        digest.update(f"{name} {number}".encode())
    return digest.hexdigest()


def _add_up(master: Tensor, parameter: Tensor) -> None:
    """Move a gradient that has just been written onto the master, in fp32."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)


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
    with finding_targets(config, "rl"):
        peft.inject_adapter_in_model(lora_config(config), model, _ADAPTER)


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
                delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
                weight = weight + delta.to(weight.device)
            name = f"{owner}.{leaf}"
        elif ".lora_" in name:
            continue
        yield name.replace(WRAPPED, ""), weight


@torch.no_grad()
def lerp(own: Mapping[str, Tensor], target: Iterable[tuple[str, Tensor]], share: float) -> None:
    """θ ← θ + share·(θ_target − θ) in place, by name; `own` is fp32: bf16 would lose steps this small."""
    for name, weight in target:
        mine = local(own[name])
        mine.lerp_(local(weight).to(mine.device), share)
