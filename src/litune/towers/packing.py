"""Texts without padding: several in one row, each attending to itself alone.

A step should cost what its real tokens cost. Texts are packed first-fit into rows of one width, so that every
operation of a tower sees a few large, dense matrices of a recurring shape: fast on every processor, and equal to
running each text on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from litune.data.tokenizers import Tokens
from litune.losses import wide
from litune.towers.dropout import drop, keep_mask

ROW = 32
"""The least width of a row: two captions of 16 tokens."""


@dataclass(frozen=True)
class Packed:
    """N texts in R rows of T tokens: what a text tower reads.

    `ids` and `positions` [R, T] are 0 in the gaps between texts; `texts` [R, T] says which text a token belongs
    to (−1: none). In the flattened rows, text i is the `lengths[i]` tokens from `first[i]` on.
    """

    ids: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    texts: Int[Tensor, "R T"]
    first: Int[Tensor, " N"]
    lengths: Int[Tensor, " N"]

    @cached_property
    def together(self) -> Tensor:
        """Which tokens of a row attend to each other, [R, 1, T, T]: those of one text."""
        return (self.texts[:, :, None] == self.texts[:, None, :])[:, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention's scores, [R, 1, T, T]: 0 within a text, else so little that nothing is left."""
        if self._masks.get(dtype) is None:
            self._masks[dtype] = torch.zeros(self.together.shape, dtype=dtype, device=self.ids.device).masked_fill_(
                ~self.together, -1e4
            )
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, Tensor]:
        return {}

    def in_line(self) -> Packed:
        """The same texts in one row, one after the other; the row ends with a gap, for its length to recur."""
        tokens = int(self.lengths.sum())
        rest = recurring(tokens, share=32, least=32) - tokens
        first = self.lengths.cumsum(0) - self.lengths
        texts = torch.arange(len(first), device=first.device).repeat_interleave(self.lengths)
        places = torch.arange(tokens, device=first.device) + (self.first - first)[texts]
        ids, positions = (F.pad(grid.flatten()[places], (0, rest))[None] for grid in (self.ids, self.positions))
        return Packed(ids, positions, F.pad(texts, (0, rest), value=-1)[None], first, self.lengths)

    def by_length(self) -> list[tuple[Tensor, Tensor]]:
        """The texts of each length L: their numbers [n] and the places [n, L] of their tokens."""
        found = []
        for length in self.lengths.unique().tolist():
            numbers = (self.lengths == length).nonzero()[:, 0]
            found.append((numbers, self.first[numbers, None] + torch.arange(length, device=self.first.device)))
        return found


def pack(tokens: Tokens, device: torch.device) -> Packed:
    """Pack N texts into the row width that wastes least."""
    narrowest = max(ROW, -16 * (-int(tokens.lengths.max(initial=1)) // 16))
    # A row's gaps cost as much as its tokens, and attention more the wider the row.
    layouts = [(width, *first_fit(tokens.lengths, width)) for width in (narrowest, narrowest + 16)]
    width, first, rows = min(layouts, key=lambda found: found[2] * found[0] * (1 + found[0] / 250))
    rows = recurring(rows)
    ends = np.cumsum(tokens.lengths)
    within = np.arange(len(tokens.ids)) - np.repeat(ends - tokens.lengths, tokens.lengths)
    places = np.repeat(first, tokens.lengths) + within
    ids, positions = np.zeros((2, rows * width), dtype=np.int64)
    texts = np.full(rows * width, -1)
    ids[places], positions[places] = tokens.ids, within
    texts[places] = np.repeat(np.arange(len(tokens)), tokens.lengths)
    grids = (torch.from_numpy(grid).view(rows, width).to(device) for grid in (ids, positions, texts))
    return Packed(*grids, *(torch.from_numpy(a.astype(np.int64)).to(device) for a in (first, tokens.lengths)))


def recurring(count: int, share: int = 12, least: int = 1) -> int:
    """A count, rounded up to one that recurs from batch to batch: by at most a `share`th of it, or to `least`s.

    Matrix libraries build their kernels for each shape that they meet, which takes longer than to run them.

    >>> [recurring(n) for n in (5, 47, 105, 112, 113)]
    [5, 48, 112, 112, 120]
    """
    step = max(least, 1 << max(0, (count // share).bit_length() - 1))
    return -step * (-count // step)


def first_fit(lengths: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Where each text begins in the flattened rows, and the number of rows.

    The longest text goes first, each into the fullest row that still holds it (best-fit decreasing).

    >>> first_fit(np.array([3, 2, 4]), 5)
    (array([5, 8, 0]), 2)
    """
    first = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # rows by their free places
    rows = 0
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        free = next((space for space in range(length, width) if open_rows[space]), width)
        if free < width:
            row = open_rows[free].pop()
        else:
            row, rows = rows, rows + 1
        first[text] = row * width + width - free
        open_rows[free - length].append(row)
    return first, rows


def attention(qkv: Float[Tensor, "R T W3"], heads: int, packed: Packed, dropout: float = 0.0) -> Float[Tensor, "R T W"]:
    """Softmax attention, scaled by 1/√d, of packed texts, each to itself only.

    `qkv` holds queries, keys and values side by side, W wide each, of `heads` heads of width d = W / heads.
    """
    if qkv.device.type == "cpu":
        # The library's fused attention is made for long rows: on short ones its backward takes most of a step.
        return _Attention.apply(qkv, heads, packed.mask(qkv.dtype), dropout)  # type: ignore[no-any-return]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=packed.together, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √d) v within each text, dropout on the weights; few passes over the weights, few tensors kept."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, qkv: Tensor, heads: int, mask: Tensor, dropout: float
    ) -> Tensor:
        parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = parts
        scores = torch.add(mask, q @ k.transpose(2, 3), alpha=q.shape[-1] ** -0.5)
        weights = torch.softmax(scores, dim=-1)
        keep = keep_mask(weights.shape, dropout, weights.dtype) if dropout else weights.new_empty(0)
        kept = drop(weights, keep, dropout) if dropout else weights
        ctx.save_for_backward(parts, weights, kept, keep)
        ctx.dropout = dropout  # type: ignore[attr-defined]
        mixed: Tensor = (kept @ v).transpose(1, 2).flatten(2)
        return mixed

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts, weights, kept, keep = ctx.saved_tensors  # type: ignore[attr-defined]
        q, k, v = parts
        mixed = gradients[0].unflatten(-1, (q.shape[1], -1)).transpose(1, 2).contiguous()
        to_weights = mixed @ v.transpose(2, 3)
        if ctx.dropout:  # type: ignore[attr-defined]
            to_weights = drop(to_weights, keep, ctx.dropout)  # type: ignore[attr-defined]
        scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(q.shape[-1] ** -0.5)
        found = torch.stack([scores @ k, scores.transpose(2, 3) @ q, kept.transpose(2, 3) @ mixed])
        return found.permute(1, 3, 0, 2, 4).flatten(2), None, None, None


def pool(hidden: Float[Tensor, "R T W"], packed: Packed, how: str) -> Float[Tensor, "N W"]:
    """One float32 vector per text (float64 of float64): its first token, its last, or the mean of all."""
    flat = hidden.flatten(0, 1)
    if how == "mean":
        flat = wide(flat)
        # Gaps add to a row of their own, which is left out.
        total = flat.new_zeros(len(packed.first) + 1, flat.shape[1])
        total = total.index_add(0, packed.texts.flatten() + 1, flat)[1:]
        return total / packed.lengths[:, None]
    return wide(flat[packed.first if how == "first" else packed.first + packed.lengths - 1])
