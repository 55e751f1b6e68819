"""A module's weights in the engine's arithmetic, with fp32 masters where they may change.

    fp32   the parameters are their own masters
    bf16   the parameters are bf16 roundings of fp32 masters; what each backward pass gives is added up in fp32
           (Micikevicius et al. 2018, section 3.1); `sync` rounds anew after the masters changed

A model that is frozen in bf16 computes the same bits as one with masters, so a policy that starts at its reference has
a KL of exactly 0.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from salsa.runtime.engine import Engine

WRAPPED = "_checkpoint_wrapped_module."
"""What torch's checkpoint_wrapper puts into the names of parameters."""


class Weights:
    """The weights of one module."""

    def __init__(
        self,
        module: nn.Module,
        engine: Engine,
        *,
        learns: bool = False,
        moves: bool = False,
        shared: "Weights | None" = None,
    ) -> None:
        """Lower the parameters to the engine's arithmetic; keep fp32 masters of what learns or moves.

        Parameters that the module shares with another have their masters in `shared`.
        """
        self._module, self._engine = module, engine
        self._learns, self._moves = learns, moves
        self._masters: dict[nn.Parameter, Tensor] = shared._masters if shared else {}
        self._version: str | None = None
        self.add(module)

    def add(self, module: nn.Module) -> None:
        """Lower those parameters of `module` that are new here; buffers (rotary frequencies) stay fp32."""
        self._version = None
        if self._engine.dtype == torch.float32:
            return
        for parameter in module.parameters():
            if parameter in self._masters:
                continue
            if self._learns or self._moves:
                master = parameter.detach().to(torch.float32, copy=True)
                self._masters[parameter] = master
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_add_up, master))
            parameter.data = parameter.data.to(self._engine.dtype)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 value of a parameter."""
        return self._masters.get(parameter, parameter)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Names as in a checkpoint, and fp32 masters; the lowered weights themselves where there are none."""
        for name, parameter in self._module.named_parameters():
            yield name.replace(WRAPPED, ""), self.master(parameter)

    def trained(self) -> dict[str, Tensor]:
        """The masters of the parameters that learn."""
        return {
            name.replace(WRAPPED, ""): self.master(parameter)
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def sync(self) -> None:
        """Round the parameters anew from their masters, which have changed."""
        self._version = None
        for parameter, master in self._masters.items():
            if parameter.requires_grad or self._moves:
                parameter.copy_(master)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights`, by name."""
        for name, master in self.named():
            master.copy_(weights[name])
        self.sync()

    def version(self) -> str:
        """Digest over the names and the content of all weights; computed once after each change."""
        if self._version is None:
            self._version = digest_of_weights(self.named())
        return self._version


@torch.no_grad()
def digest_of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex sha256 over names, shapes and a 64-bit sum of each tensor's bits: a tenth of a second for 135 M parameters.

    It tells an update from none; it is no defence against forgery.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = (
            weight.detach().contiguous().view(torch.int32 if weight.itemsize == 4 else torch.int16)
        )
        digest.update(f"{name} {tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def _add_up(master: Tensor, parameter: Tensor) -> None:
    """Move a gradient that has just been written onto the master, in fp32."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
