"""Heads: what maps a tower's own width to the shared dimension."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from litune.errors import ConfigError

HEADS = ("none", "linear", "mlp", "gated")


def make_head(kind: str, width: int, dim: int) -> nn.Module:
    """A head from `width` to `dim`: none (the identity), linear (with bias), mlp (one hidden layer, 4×), or gated.

    A text tower has a linear head by default; a locked image tower has none, so that its feature space never
    changes. gated is SwiGLU (arXiv 2002.05202) with the mlp's number of parameters.
    """
    if kind == "none":
        if width != dim:
            raise ConfigError(f"without a head the dimension is the tower's width {width}, not {dim}")
        return nn.Identity()
    if kind == "linear":
        return _dense(width, dim)
    if kind == "mlp":
        return nn.Sequential(_dense(width, 4 * dim), nn.GELU(approximate="tanh"), _dense(4 * dim, dim))
    if kind == "gated":
        hidden = 4 * dim * (width + dim) // (2 * width + dim)
        return nn.Sequential(_Gate(width, max(1, hidden)), _dense(max(1, hidden), dim))
    raise ConfigError(f"unknown head {kind!r}: known: {', '.join(HEADS)}")


class _Gate(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = _dense(width, hidden), _dense(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = F.silu(self.gate(x)) * self.up(x)
        return gated


def _dense(width: int, dim: int) -> nn.Linear:
    # The official code's dense layers: Glorot uniform weights, zero bias.
    layer = nn.Linear(width, dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
