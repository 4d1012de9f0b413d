"""The optimizers and their parameter groups. Schedules are in litune.schedules.

All state is in `optimizer.state[parameter]`, as tensors: a checkpoint that saves these and puts them back on the
parameter's device goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from litune.errors import ConfigError, nearest


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to weight matrices and the kernels of patches only, big_vision's `.*/kernel`.

    Not to biases, norms, the temperature, or tables of tokens and positions (LiT's "embeddings-like vectors").
    """
    return parameter.ndim >= 2 and ("patch_embed" in name or not any(table in name for table in _TABLES))


_TABLES = (
    "embedding", "embed_tokens", "shared.weight", "pos_embed", "cls_token", "reg_token", "relative_attention_bias",
    "relative_position", "attn_pool.latent", "head.probe",
)  # fmt: skip


def rate_of(name: str, rates: Sequence[tuple[str, float]]) -> float:
    """The learning rate's multiplier for this parameter: that of the first pattern that matches its full name, else 1.

    Patterns are the shell's (* ? [a-z]), with upper and lower case told apart; * also matches dots. 0: locked.

    >>> rates = [("image.blocks.1?.*", 0.1), ("image.*", 0.0)]
    >>> [rate_of(n, rates) for n in ("image.blocks.11.mlp.weight", "image.blocks.2.mlp.weight", "text.weight")]
    [0.1, 0.0, 1.0]
    """
    return next((rate for pattern, rate in rates if fnmatchcase(name, pattern)), 1.0)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    rates: Sequence[tuple[str, float]] = (),
) -> list[dict[str, Any]]:
    """The optimizer's groups: all parameters with gradients and a rate; locked ones are in none.

    `rates` multiplies the learning rate by name (see rate_of). `weight_decay` is the paper's, the share that a
    weight loses per step at the schedule's peak: it follows the schedule but is multiplied neither by the learning
    rate nor by `rates`. The optimizers here multiply by the rate, so the groups hold weight_decay / peak. A group's
    "unlock" says whether it belongs to the image tower and follows its unlocking (see set_rate).
    """
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in named:
        rate = rate_of(name, rates)
        if not parameter.requires_grad or rate == 0:
            continue
        peak, decayed, unlock = learning_rate * rate, decays(name, parameter), name.startswith("image.")
        group = groups.setdefault(
            (rate, decayed, unlock),
            {
                "params": [],
                "names": [],
                "lr": 0.0,
                "peak": peak,
                "weight_decay": weight_decay / peak if decayed else 0.0,
                "unlock": unlock,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_rate(optimizer: torch.optim.Optimizer, share: float, image_share: float = 1.0) -> None:
    """Set every group's learning rate to this share of its peak; the image tower's also to `image_share` of that."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share * (image_share if group["unlock"] else 1.0)


def stepping(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that the next step moves: those with a rate above 0. Call before clipping, and clip only these.

    The gradients of the others are dropped (set to None), so that the optimizer passes them by: no decay, and their
    moments and step counts stand still. An image tower that is unlocked late thus begins with Adam's bias correction
    as at step 0, and one that is locked again goes on with the moments that it had.
    """
    found: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        if group["lr"] > 0:
            found += group["params"]
        else:
            for parameter in group["params"]:
                parameter.grad = None
    return found


def make_optimizer(
    kind: str, groups: list[dict[str, Any]], *, beta1: float = 0.9, beta2: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer `kind` over these groups, with decoupled weight decay: each step, p −= lr × weight_decay × p.

    adamw        Adam (arXiv 1412.6980), ε = 1e-8
    lion         the sign of β1 m + (1 − β1) g, then m ← β2 m + (1 − β2) g (arXiv 2302.06675). Use about a tenth of
                 Adam's learning rate.
    adafactor    see Adafactor

    `beta1` is the momentum; `beta2` is by default 0.999 for adamw, 0.99 for lion; for adafactor it is the cap of its
    β2, 0.999. Raises ConfigError for another kind.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, 0.999 if beta2 is None else beta2), fused=True)
    if kind == "lion":
        from timm.optim import Lion  # slow to import

        lion: torch.optim.Optimizer = Lion(groups, lr=0.0, betas=(beta1, 0.99 if beta2 is None else beta2))
        return lion
    if kind == "adafactor":
        return Adafactor(groups, beta1=beta1, beta2_cap=0.999 if beta2 is None else beta2)
    raise ConfigError(f"there is no optimizer {kind!r}: {nearest(kind, ('adamw', 'lion', 'adafactor'))}")


class Adafactor(torch.optim.Optimizer):
    """Adafactor as in "Scaling Vision Transformers" (arXiv 2106.04560), the optimizer of LiT's large runs.

    At a parameter's step t = 1, 2, …, with β2 = min(1 − t^−0.8, cap) and the squared gradient g² + 1e-30:

        V ← β2 V + (1 − β2) g²        m ← β1 m + (1 − β1) g / √V        p ← p − lr × (m + weight_decay × p)

    If at least two axes are 32 long or more, V is factored over the two longest: only its means over either, R and
    C, are kept, and V = R C / mean(R). m is stored in bfloat16, and the β1 beside it is rounded to bfloat16 too (0.9 to
    0.8984), since that is what big_vision's optimizer computes: optax.ema multiplies the stored moment in its own
    type. Together the state takes half a parameter's memory, where Adam's takes twice. Unlike in the original
    Adafactor (arXiv 1804.04235), the update is neither clipped nor scaled by the parameter.

    timm's AdafactorBigVision also rounds g / √V and the update itself to bfloat16, not only the stored m, and its
    older versions scale matrices with more rows than columns wrongly.
    """

    def __init__(self, groups: list[dict[str, Any]], *, beta1: float, beta2_cap: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.beta1, self.beta2_cap = beta1, beta2_cap
        self.kept = torch.tensor(beta1, dtype=torch.bfloat16).item()
        """β1 as the stored moment is multiplied by it."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(parameter.grad, self.state[parameter])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _update(self, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The new momentum, before it is rounded for storage; the state is updated in place."""
        axes = factored_axes(grad.shape)
        squared = grad.square() + 1e-30
        if not state:
            state["step"] = torch.zeros((), device=grad.device)  # a tensor on the device: nothing waits for its value
            state["momentum"] = torch.zeros_like(grad, dtype=torch.bfloat16)
            if axes is None:
                state["square"] = torch.zeros_like(grad)
            else:
                for axis, key in zip(axes, ("columns", "rows"), strict=True):
                    state[key] = torch.zeros_like(squared.mean(axis, keepdim=True))
        state["step"] += 1
        fresh = (state["step"] ** -0.8).clamp(min=1 - self.beta2_cap)  # 1 − β2
        if axes is None:
            scaled = grad * state["square"].lerp_(squared, fresh).rsqrt()
        else:
            shorter, longer = axes
            columns = state["columns"].lerp_(squared.mean(shorter, keepdim=True), fresh)
            rows = state["rows"].lerp_(squared.mean(longer, keepdim=True), fresh)
            scaled = grad * (rows / rows.mean(shorter, keepdim=True)).rsqrt() * columns.rsqrt()
        momentum = (state["momentum"].to(grad.dtype) * self.kept).add_(scaled, alpha=1 - self.beta1)
        state["momentum"].copy_(momentum)
        return momentum


def factored_axes(shape: Sequence[int], least: int = 32) -> tuple[int, int] | None:
    """The two longest axes, the longest last, if both are `least` long or more; of equals, later ones are longer.

    >>> factored_axes((3072, 768)), factored_axes((16, 3, 64, 32)), factored_axes((768, 31))
    ((1, 0), (3, 2), None)
    """
    if len(shape) < 2:
        return None
    *_, shorter, longer = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (shorter, longer) if shape[shorter] >= least else None
