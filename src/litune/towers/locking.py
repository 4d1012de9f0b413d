"""Locking: which parts of a tower are tuned, and the mode that each part runs in.

A part is locked if all its parameters are (`requires_grad` off). Locked parts run in eval mode throughout tuning: no
dropout, no drop-path, fixed batch-norm statistics. A module that calls `eval_locked` at the end of its `train` method
stays that way, whichever mode is set:

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            eval_locked(self)
        return self
"""

from __future__ import annotations

from torch import nn


def lock(module: nn.Module) -> None:
    """Lock a whole module: no gradients, eval mode."""
    module.requires_grad_(False)
    module.eval()


def eval_locked(module: nn.Module) -> None:
    """Put every locked part of a module, with all its submodules, in eval mode; the other parts stay as they are.

    A part without parameters, such as dropout, follows the part that contains it.
    """
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def train_unlocked(module: nn.Module) -> None:
    """Put a module in train mode, its locked parts in eval mode."""
    module.train()
    eval_locked(module)
