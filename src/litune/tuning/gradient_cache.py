"""Exact batches of any size in the memory of a micro-batch (gradient caching, arXiv 2101.06983).

A contrastive loss needs the features of the whole batch, but these are small; what takes memory is what a tower keeps
for its backward pass. So a batch is encoded twice, micro-batch by micro-batch: once without gradients, for the
features; then, when the loss has given the gradient of every feature, again with gradients, each micro-batch's
backward pass following its forward pass at once. The gradient is the whole batch's, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

Part = Callable[[], Tensor]
"""Encodes one micro-batch: features [b, D]. Called twice, it must give the same (seed what is random in it)."""


class Encoded:
    """The features of a batch, with the way back into the tower that made them.

    `features` [B, D] is a leaf: after the loss's backward pass, `backward` carries its gradient into the parameters.
    """

    def __init__(self, parts: Sequence[Part], modules: Sequence[nn.Module]) -> None:
        """Encode the micro-batches `parts` with `modules`; where none of their parameters is tuned, for good."""
        self._parts, self._modules = parts, modules
        self._whole: Tensor | None = None
        tuned = any(p.requires_grad for module in modules for p in module.parameters())
        if len(parts) == 1 and tuned:
            self._whole = parts[0]()  # one micro-batch is the batch: its graph is kept, nothing is computed twice
            self.features: Float[Tensor, "B D"] = self._whole.detach().requires_grad_()
            return
        with torch.no_grad():
            self.features = torch.cat([part() for part in parts])
        self.features.requires_grad_(tuned)

    def backward(self, before_last: Callable[[], None] = lambda: None) -> None:
        """Add the gradients of the tower's parameters, given `features.grad`.

        `before_last` is called before the last backward pass: after it, all gradients are whole.
        """
        gradient = self.features.grad
        if gradient is None:
            before_last()
            return
        with still_statistics(self._modules):
            if self._whole is not None:
                before_last()
                self._whole.backward(gradient)  # computes again where the tower has gradient checkpointing
                return
            start = 0
            for number, part in enumerate(self._parts, 1):
                features = part()
                if number == len(self._parts):
                    before_last()
                features.backward(gradient[start : start + len(features)])
                start += len(features)


class still_statistics:  # noqa: N801
    """Batch norm's running statistics are afterwards as before: the first pass has moved them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        parts = (part for module in modules for part in module.modules())
        norms = (part for part in parts if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training)
        self.statistics = [statistic for norm in norms for statistic in norm.buffers()]

    def __enter__(self) -> None:
        self.before = [statistic.clone() for statistic in self.statistics]

    def __exit__(self, *_: object) -> None:
        for statistic, before in zip(self.statistics, self.before, strict=True):
            statistic.copy_(before)
