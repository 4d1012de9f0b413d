"""The two halves of a run as plain modules for other runtimes: padded token ids, or pixels, to features.

Training packs texts into rows and skips padding (`litune.text.packing`); here a batch is padded and masked, as other
libraries expect. Both give the same features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from litune.errors import ExportError
from litune.image.registry import ImageTower
from litune.image.tower import mean_of_views
from litune.model.lit import LiT
from litune.text.registry import HfTextTower, TextTower, VitTextTower
from litune.vectors import normalize


def plain_text(model: LiT) -> PlainText:
    """The text half. Raises `ExportError` for a tower other than hf: and vit:."""
    if not isinstance(model.text, HfTextTower | VitTextTower):
        kind = model.text.architecture.get("kind")
        raise ExportError(f"a text tower of the kind {kind!r} can't be exported: export runs of hf: and vit: towers")
    return PlainText(model.text, model.text_head).eval()


def plain_image(model: LiT) -> PlainImage:
    """The image half. Raises `ExportError` for a tower that is no torch module, `TowerError` where it is not found."""
    tower = model.load_image_tower()
    if not isinstance(tower.network, nn.Module):
        raise ExportError(
            f"the image tower {tower.spec} is no torch module: it can't be exported, encode pictures with litune"
        )
    return PlainImage(tower, model).eval()


class PlainText(nn.Module):
    """Padded texts to features. `fixed_length` is the number of tokens that every text must have, or None."""

    def __init__(self, tower: TextTower, head: nn.Module) -> None:
        super().__init__()
        self.tower: Any = tower
        self.head = head
        self.fixed_length = tower.max_positions if isinstance(tower, VitTextTower) else None

    def hidden(self, input_ids: Int[Tensor, "N T"], attention_mask: Int[Tensor, "N T"]) -> Float[Tensor, "N T W"]:
        """The last hidden states; those of padding are undefined."""
        if isinstance(self.tower, VitTextTower):
            return vit_hidden(self.tower, input_ids)
        states: Tensor = self.tower.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states

    def forward(
        self, input_ids: Int[Tensor, "N T"], attention_mask: Int[Tensor, "N T"] | None = None
    ) -> Float[Tensor, "N D"]:
        """Features of length one. The mask is 1 for tokens and 0 for padding on the right; None: no padding."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.hidden(input_ids, attention_mask)
        return normalize(self.head(pool_padded(hidden, attention_mask, self.tower.pooling)))


def pool_padded(hidden: Float[Tensor, "N T W"], mask: Int[Tensor, "N T"], how: str) -> Float[Tensor, "N W"]:
    """One vector per text: its first token, its last, or the mean of all."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, last)[:, 0]
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def vit_hidden(tower: VitTextTower, ids: Int[Tensor, "N T"]) -> Float[Tensor, "N T W"]:
    """The last hidden states of the ViT-style text transformer, for texts padded to its full length."""
    x = tower.token_embedding(ids) + tower.position_embedding
    for block in tower.blocks:
        y = block.norm1(x)  # type: ignore[operator]
        heads = [
            layer(y).unflatten(-1, (block.heads, -1)).transpose(1, 2)  # type: ignore[operator]
            for layer in (block.query, block.key, block.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + block.out(mixed)  # type: ignore[operator]
        x = x + block.down(F.gelu(block.up(block.norm2(x)), approximate="tanh"))  # type: ignore[operator]
    states: Tensor = tower.norm(x)
    return states


class PlainImage(nn.Module):
    """Pictures to features. Pixels are 0 to 255 if `raw_pixels`, else what the tower's own processor gives."""

    def __init__(self, tower: ImageTower, model: LiT) -> None:
        super().__init__()
        assert isinstance(tower.network, nn.Module)
        self.network, self.head, self.raw_pixels = tower.network, model.image_head, tower.normalize
        self.views = tower.views
        self.register_buffer("mean", tower.get_buffer("mean"))
        self.register_buffer("std", tower.get_buffer("std"))
        self.register_buffer("center", model.center)
        self.register_buffer("whitening", model.whitening)

    def forward(self, pixels: Tensor) -> Float[Tensor, "B D"]:
        """Features of length one, of pictures [B, 3, H, W], or [B, V, 3, H, W] where V views are averaged."""
        if self.views > 1:
            pixels = pixels.flatten(0, 1)
        if self.raw_pixels:
            pixels = (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        mapped = mean_of_views(self.network(pixels), self.views) - self.get_buffer("center")
        if self.whitening is not None:
            mapped = mapped @ self.get_buffer("whitening")
        return normalize(self.head(mapped))
