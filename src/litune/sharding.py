"""A tower whose weights, gradients and optimizer states are shared by the ranks (FSDP2, arXiv 2304.11277).

Each rank holds its rows of every parameter. A layer is whole on a rank only while it runs, forward or backward; going
backward, each rank gets the gradient of its own rows. The optimizer sees plain tensors, a rank's own rows, and knows
nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from litune import distributed

Rows = Callable[[str], Tensor]
"""By a parameter's name, this rank's rows of it (see `own_rows`), in float32."""


def share(
    tower: nn.Module,
    layers: Sequence[nn.Module],
    table: nn.Module,
    rows: Rows,
    device: torch.device,
    *,
    bfloat16: bool = False,
) -> None:
    """Fill the parameters of `tower`, which are on the meta device, with each rank's rows, and share it from here on.

    Every rank must run it equally often, forward and backward. With `bfloat16` the layers compute in it, from weights
    that are sent in it; gradients are summed in float32. The table of tokens and what lies outside of the layers is
    computed in float32, as without sharing.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Without a mesh FSDP2 takes the machine's GPUs, whatever was asked for.
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bfloat16 else full
    for part, policy in ((table, full), *((layer, half) for layer in layers), (tower, full)):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    names = [name for name, _ in tower.named_parameters()]
    filled = {name: _shared(rows(name).to(device), cast(Any, tower.get_parameter(name))) for name in names}
    tower.load_state_dict(filled, strict=False, assign=True)
    for module in tower.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


class Shards:
    """The optimizer's view of a tower that the ranks share."""

    def __init__(self, tower: nn.Module) -> None:
        self.parameters: dict[str, Any] = dict(tower.named_parameters())
        self.own = {
            name: nn.Parameter(own_part(p).detach(), requires_grad=p.requires_grad)
            for name, p in self.parameters.items()
        }
        """This rank's rows of every parameter, by name: what an optimizer steps."""

    def take_gradients(self) -> None:
        """After the backward passes: the sum over ranks of their gradients, as gradients of `own`."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                # FSDP2 gives the mean.
                self.own[name].grad = parameter.grad.to_local().mul_(distributed.world_size())
                parameter.grad = None

    def shared(self, name: str, own: Tensor) -> Tensor:
        """Rows like those of the parameter `name`, of which each rank brings its own, as one tensor."""
        return _shared(own, self.parameters[name])


def is_shared(tensor: Tensor) -> bool:
    """Whether each rank has only its rows of this tensor."""
    if distributed.world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # slow to import

    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are this rank's; all of one that is not shared."""
    return cast(Any, tensor).to_local() if is_shared(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor, on every rank; all ranks must come here."""
    return cast(Any, tensor).full_tensor() if is_shared(tensor) else tensor


def own_rows(count: int) -> slice:
    """This rank's rows of `count`, as FSDP2 shares them out: as many for each, the last ranks may have fewer or none."""
    share = -(-count // distributed.world_size())
    begin = min(count, distributed.rank() * share)
    return slice(begin, min(count, begin + share))


def _shared(own: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
