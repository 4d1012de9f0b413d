"""Heads: what maps a tower's own width to the shared dimension."""

from __future__ import annotations

from torch import nn

from litune.errors import ConfigError


def make_head(kind: str, width: int, dim: int) -> nn.Module:
    """A head from `width` to `dim`: none (the identity), linear (with bias), or mlp (one hidden layer, 4×).

    A text tower always has a linear head; a locked image tower has none by default, so that its feature space
    never changes.
    """
    if kind == "none":
        if width != dim:
            raise ConfigError(f"without a head the dimension is the tower's width {width}, not {dim}")
        return nn.Identity()
    if kind == "linear":
        return _reset(nn.Linear(width, dim))
    if kind == "mlp":
        return nn.Sequential(
            _reset(nn.Linear(width, 4 * dim)), nn.GELU(approximate="tanh"), _reset(nn.Linear(4 * dim, dim))
        )
    raise ConfigError(f"unknown head {kind!r}: known: none, linear, mlp")


def _reset(layer: nn.Linear) -> nn.Linear:
    # The official code's dense layers: Glorot uniform weights, zero bias.
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
