"""Image towers: an encoder with its own preprocessing, locked unless `unlock` is called.

Locked means no gradients and `eval()` mode: no dropout, no drop-path, frozen batch-norm statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from litune.devices import send
from litune.errors import LituneError, StoreError, TowerError
from litune.image.pictures import ImageTransform, Preprocess, Views, one_view
from litune.towers.locking import eval_locked, lock
from litune.towers.specs import reason


class ImageTower(nn.Module):
    """An image encoder: pictures to raw features of its own width. It starts locked; `unlock` makes it trainable.

    `encode` and `forward` take preprocessed pictures; `preprocess` makes them. `provenance` identifies the tower:
    equal provenance means equal features. An unlocked tower keeps the provenance of its initial weights.

    Batch norm in train mode uses the statistics of the pictures of one call of `forward`, which are those of a
    micro-batch where a batch is split. Its running statistics move with every call, also where gradient
    checkpointing computes the same features again (`litune.tuning.gradient_cache` puts them back after that).

    A network that is not an `nn.Module` chooses its own device: it gets pictures on the CPU, wherever the tower is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: str,
        network: Callable[[Tensor], Tensor],
        preprocess: Preprocess,
        *,
        description: dict[str, Any],
        weights: str,
        pooling: str,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.network = network
        self.preprocess = preprocess
        self.provenance = {
            "spec": spec,
            "weights": weights,
            "pooling": pooling,
            "preprocess": description,
        }
        transform = one_view(preprocess)
        self.normalize = isinstance(transform, ImageTransform)
        mean = torch.tensor(transform.mean if isinstance(transform, ImageTransform) else [0.0] * 3)
        std = torch.tensor(transform.std if isinstance(transform, ImageTransform) else [1.0] * 3)
        if isinstance(network, nn.Module):
            self.register_buffer("mean", 255 * mean.view(3, 1, 1), persistent=False)
            self.register_buffer("std", 255 * std.view(3, 1, 1), persistent=False)
        else:  # not buffers, which would move with the model that contains the tower
            self.mean, self.std = 255 * mean.view(3, 1, 1), 255 * std.view(3, 1, 1)
        lock(self)

    @property
    def device(self) -> torch.device:
        """The device on which the network takes its pictures."""
        return self.mean.device

    @property
    def views(self) -> int:
        """Of how many views of a picture its features are the mean; `preprocess` makes them."""
        return self.preprocess.count if isinstance(self.preprocess, Views) else 1

    @property
    def locked(self) -> bool:
        """Whether no parameter has gradients. Without parameters, as in an ONNX tower, there is nothing to unlock."""
        return not any(p.requires_grad for p in self.parameters())

    def unlock(self) -> None:
        """Give all parameters gradients; the mode stays as it is until `train` is called.

        Raises `TowerError` where the tower is no torch module with parameters, or averages views of a picture.
        """
        if self.views > 1:
            raise TowerError(
                f"{self.spec} averages {self.views} views of a picture, which is for locked towers: leave out views, "
                "or lock it"
            )
        if not any(p.is_floating_point() for p in self.parameters()):
            raise TowerError(
                f"{self.spec} can't be unlocked, it has no torch parameters: lock it, or use a timm: or hf: tower"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def train(self, mode: bool = True) -> ImageTower:
        """Set the mode of all unlocked parts; locked parts, or the whole of a locked tower, stay in eval mode."""
        super().train(mode and not self.locked)
        if self.training:
            eval_locked(self)
        return self

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute most activations in the backward pass instead of keeping them: less memory, same gradients.

        Raises `TowerError` where the network can't.
        """
        model: Any = getattr(self.network, "model", self.network)
        try:
            if hasattr(model, "set_grad_checkpointing"):  # timm
                model.set_grad_checkpointing(enabled)
            elif (setting := _hf_checkpointing(model, enabled)) is not None:
                setting()
            elif enabled:
                raise ValueError(f"{type(model).__name__} has no such setting")
        except (AssertionError, ValueError) as why:
            raise TowerError(reason(f"{self.spec} can't do gradient checkpointing", why)) from None

    def forward(self, pixels: Tensor, *, bfloat16: bool = False) -> Float[Tensor, "B W"]:
        """Raw float32 features [B, width] of preprocessed pictures, with gradients if enabled.

        Pictures are [B, 3, H, W], or [B, V, 3, H, W] where the tower averages V views of each.
        """
        pixels = send(pixels, self.device)
        if self.views > 1:
            pixels = pixels.flatten(0, 1)
        if self.normalize:
            pixels = (pixels.float() - self.mean) / self.std
        if pixels.ndim == 4:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            features = self.network(pixels)
        if features.ndim != 2:
            raise TowerError(f"{self.spec} gave features of shape {tuple(features.shape)}, expected [batch, width]")
        return mean_of_views(features.float(), self.views)

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, bfloat16: bool = False) -> Float[Tensor, "B W"]:
        """`forward` without gradients, in the tower's current mode: call `eval` first on an unlocked one."""
        features: Tensor = self(pixels, bfloat16=bfloat16)
        return features


def mean_of_views(features: Float[Tensor, "N W"], views: int) -> Float[Tensor, "B W"]:
    """The mean over the views of each picture, which follow each other."""
    return features if views == 1 else features.unflatten(0, (-1, views)).mean(1)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between the provenances of two towers, as clauses that name both sides.

    The spec may differ: the same weights, pooling and preprocessing give the same features.
    """
    clauses = []
    for part in ("weights", "pooling", "preprocess"):
        a, b = one.get(part), other.get(part)
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted({*a, *b})
            clauses += [f"{part} {k} {a.get(k)!r} and {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]
        elif a != b:
            clauses.append(f"{part} {str(a)[:12]} and {str(b)[:12]}")
    return clauses


@dataclass(frozen=True)
class MadeWith:
    """Which image tower something was made with, as far as it is known: a store, or what a run needs."""

    name: str
    """What it is called in a message."""
    tower: dict[str, Any] | None
    """The tower's provenance."""
    width: int | None = None
    """The width of the features."""


def check_same_tower(
    made: MadeWith,
    other: MadeWith,
    remedy: str = "",
    *,
    strict: bool = False,
    also: Sequence[str] = (),
    error: type[LituneError] = StoreError,
) -> None:
    """Raise `error`, naming both sides, what differs and the remedy, unless both were made with the same image tower.

    With `strict` an unknown tower is another one than a known one; otherwise it is the same if the widths are. `also`
    are further differences.
    """
    known = made.tower is not None and other.tower is not None
    clauses = differences(made.tower or {}, other.tower or {}) if known or strict else []
    then = f": {remedy}" if remedy else ""
    if clauses := [*clauses, *also]:
        specs = [(side.tower or {}).get("spec", "unknown") for side in (made, other)]
        as_other = f" as {other.name}" if other.name else ""
        raise error(
            f"{made.name} was made with the image tower {specs[0]}, not with {specs[1]}{as_other} "
            f"({'; '.join(clauses)}){then}"
        )
    if None not in (made.width, other.width) and made.width != other.width:
        raise error(f"{made.name} has features of width {made.width}, {other.name} of {other.width}{then}")


def is_convolutional(tower: ImageTower | None) -> bool:
    """Whether the tower has more convolutions than linear layers (a ViT has one, for its patches)."""
    layers = list(tower.modules()) if tower is not None else []
    return sum(isinstance(layer, nn.Conv2d) for layer in layers) > sum(isinstance(layer, nn.Linear) for layer in layers)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _hf_checkpointing(model: Any, enabled: bool) -> Callable[[], None] | None:
    """The method of a transformers model that turns gradient checkpointing on or off; None where it has none."""
    word = "enable" if enabled else "disable"
    # transformers 5 renamed both; the new name comes first, as the old one warns.
    for name in (f"activation_checkpointing_{word}", f"gradient_checkpointing_{word}"):
        if hasattr(model, name):
            method: Callable[..., None] = getattr(model, name)
            return partial(method, {"use_reentrant": False}) if enabled else method
    return None
