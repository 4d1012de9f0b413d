"""A tower whose weights, gradients and optimizer states are shared by the ranks (FSDP2, arXiv 2304.11277).

Each rank holds its rows of every parameter. While the tower runs, the ranks lend each other theirs; going backward,
each gets the gradient of its own. The optimizer sees plain tensors, a rank's own rows, and knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from litune import distributed


class Shards:
    """A module shared by all ranks, from here on. Every rank must run it equally often, forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        """Share `module`, which is equal on all ranks."""
        from torch.distributed.fsdp import fully_shard

        # Whole from the first forward pass to the end of the backward pass, or to `release`.
        fully_shard(module, reshard_after_forward=False)
        self.module: Any = module
        self.own = {
            name: nn.Parameter(cast(Any, p).to_local().detach(), requires_grad=p.requires_grad)
            for name, p in module.named_parameters()
        }
        """This rank's rows of every parameter, by name: what an optimizer steps."""

    def take_gradients(self) -> None:
        """After the backward passes: the sum over ranks of their gradients, as gradients of `own`."""
        self.release()
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                # FSDP2 gives the mean.
                self.own[name].grad = parameter.grad.to_local() * distributed.world_size()
                parameter.grad = None

    def release(self) -> None:
        """Keep no more than this rank's rows."""
        self.module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The module with all its weights, on every rank; all ranks must come here. What is written is kept."""
        self.module.unshard()
        with _state_dicts_as_they_are(self.module):
            yield
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                self.own[name].copy_(own_rows(parameter.detach()))
        self.release()


@contextmanager
def _state_dicts_as_they_are(module: nn.Module) -> Iterator[None]:
    """FSDP2 would share the weights out again before it reads or fills a state dict."""
    hooks = [
        hooks
        for part in module.modules()
        for hooks in (part._state_dict_pre_hooks, part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks)
    ]
    before = [dict(one) for one in hooks]
    for one in hooks:
        one.clear()
    try:
        yield
    finally:
        for one, saved in zip(hooks, before, strict=True):
            one.update(cast(Any, saved))


def own_rows(whole: Tensor) -> Tensor:
    """A rank's rows of a tensor, as FSDP2 shares them out: as many for each, the last ranks may have fewer or none."""
    share = -(-len(whole) // distributed.world_size())
    begin = distributed.rank() * share
    return whole[begin : begin + share]


def all_rows(own: Tensor) -> Tensor:
    """The rows of all ranks [n, ...], which each has in part."""
    found = distributed.gather_rows(own.reshape(len(own), math.prod(own.shape[1:])))
    return found.view(-1, *own.shape[1:])
