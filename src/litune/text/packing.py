"""Texts without padding: several in one row, each attending to itself alone.

A step should cost what its real tokens cost. Where texts lie follows from their lengths, so all of it is worked out on
the processor (`TextTower.pack`), in a loader thread if need be; a tower's forward pass asks the device for nothing.

There are three layouts. Rows of one width, filled first-fit: every operation of a tower sees a few large, dense
matrices of a recurring shape, on any device and in any precision. One line, the texts one after the other, for
attention that is made for it (`litune.text.fused` on CPUs, on CUDA a flash attention kernel where texts are long).
Groups of one length, for architectures that litune does not know from the inside. All are equal to running each text on
its own, and each batch is laid out by its own lengths: batches of one run may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from litune.devices import sent
from litune.text.dropout import drop, keep_mask
from litune.text.tokenizers import Tokens
from litune.vectors import wide

ROW = 32
"""The least width of a row: two captions of 16 tokens."""
FLASH_FROM = 45
"""The mean number of tokens of a batch's texts from which `flash_attention` is faster than attention over rows.

Its work is in tiles of 64 or 128 tokens, which a short text leaves mostly empty. One layer's attention on 131,072
tokens, 12 heads of 64, bfloat16, dropout 0.1, forward and backward on an NVIDIA H200 (torch 2.11), in ms:

    tokens of a text     12     24     32     48     64    128
    flash_attention    15.1    7.9    6.1    4.3    3.4    2.2
    rows                5.5    5.4    4.8    4.6    4.9    4.2
"""

P = TypeVar("P", bound="Packed")


@dataclass(frozen=True)
class Packed:
    """N texts, laid out as their tower reads them. See `TextTower.pack`."""

    def to(self: P, device: torch.device) -> P:
        """The same texts with all tensors on `device`, sent without waiting."""
        return sent(self, device)


@dataclass(frozen=True)
class Rows(Packed):
    """N texts in R rows of T tokens.

    `ids` and `positions` [R, T] are 0 in the gaps between texts; `texts` [R, T] says which text a token belongs
    to (−1: none). In the flattened rows, text i is the `lengths[i]` tokens from `first[i]` on.

    Off the CPU, where the mean is pooled, `places` [N, L] names each text's tokens in the flattened rows (−1 fills up).
    """

    ids: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    texts: Int[Tensor, "R T"]
    first: Int[Tensor, " N"]
    lengths: Int[Tensor, " N"]
    places: Int[Tensor, "N L"] | None = None

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


@dataclass(frozen=True)
class Line(Rows):
    """N texts in one row, one after the other; the row ends with a gap, for its length to recur.

    `cuts` are where attention begins anew: before each text, at the end of the last, and in the gap after every
    `longest` tokens, with as many entries for every line of this length. No text is longer than `longest`.
    """

    cuts: Int[Tensor, " C"] = dataclasses.field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    longest: int = 0


@dataclass(frozen=True)
class Groups(Packed):
    """N texts by their lengths: `ids` holds the texts of each length L as [n, L]; `order` [N] restores their order."""

    ids: tuple[Int[Tensor, "_ _"], ...]
    order: Int[Tensor, " N"]


def in_rows(tokens: Tokens) -> Rows:
    """N texts in rows of the width that wastes least."""
    narrowest = max(ROW, -16 * (-int(tokens.lengths.max(initial=1)) // 16))
    # A row's gaps cost as much as its tokens, and attention more the wider the row.
    layouts = [(width, *first_fit(tokens.lengths, width)) for width in (narrowest, narrowest + 16)]
    width, first, rows = min(layouts, key=lambda found: found[2] * found[0] * (1 + found[0] / 250))
    return Rows(**_laid_out(tokens, first, recurring(rows), width))


def in_line(tokens: Tokens) -> Line:
    """N texts one after the other."""
    used = int(tokens.lengths.sum())
    first = np.cumsum(tokens.lengths) - tokens.lengths
    total = recurring(used, share=32, least=32)
    # Both are rounded up, so that they recur from batch to batch.
    longest = -16 * (-int(tokens.lengths.max(initial=1)) // 16)
    most_cuts = -(-max(32, total // 32) // longest)
    # A gap that no text of the kernel's covers would be memory that nobody has written.
    gap = np.minimum(total, used + longest * np.arange(most_cuts + 1))
    cuts = torch.from_numpy(np.concatenate([first, gap]).astype(np.int32))
    return Line(**_laid_out(tokens, first, 1, total), cuts=cuts, longest=longest)


def _laid_out(tokens: Tokens, first: np.ndarray, rows: int, width: int) -> dict[str, Any]:
    """The fields that all `Rows` have, for texts that begin at `first` in the flattened rows."""
    ends = np.cumsum(tokens.lengths)
    within = np.arange(len(tokens.ids)) - np.repeat(ends - tokens.lengths, tokens.lengths)
    places = np.repeat(first, tokens.lengths) + within
    ids, positions = np.zeros((2, rows * width), dtype=np.int64)
    texts = np.full(rows * width, -1)
    ids[places], positions[places] = tokens.ids, within
    texts[places] = np.repeat(np.arange(len(tokens)), tokens.lengths)
    grids = {"ids": ids, "positions": positions, "texts": texts}
    numbers = {"first": first.astype(np.int64), "lengths": tokens.lengths.astype(np.int64)}
    found = {name: torch.from_numpy(grid).view(rows, width) for name, grid in grids.items()}
    return found | {name: torch.from_numpy(one) for name, one in numbers.items()}


def by_length(tokens: Tokens) -> Groups:
    """N texts as one rectangle for each of their lengths."""
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    numbers = [np.flatnonzero(tokens.lengths == length) for length in np.unique(tokens.lengths)]
    ids = [tokens.ids[starts[own, None] + np.arange(tokens.lengths[own[0]])].astype(np.int64) for own in numbers]
    order = np.argsort(np.concatenate(numbers)) if numbers else np.zeros(0, dtype=np.int64)
    return Groups(tuple(torch.from_numpy(one) for one in ids), torch.from_numpy(order))


def with_places(rows: Rows) -> Rows:
    """The same with `places`, which pooling the mean needs off the CPU."""
    longest = rows.longest if isinstance(rows, Line) else int(rows.lengths.max()) if len(rows.lengths) else 1
    place = torch.arange(longest)
    there = place < rows.lengths[:, None]
    return dataclasses.replace(rows, places=torch.where(there, rows.first[:, None] + place, -1))


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
    longest_first = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1).tolist()
    ends = np.cumsum(counts[::-1]).tolist()[::-1]
    for length in range(len(counts) - 1, 0, -1):
        texts = longest_first[ends[length] - counts[length] : ends[length]]
        # Rows that are equally full take them by turns, each as many as it holds.
        while len(texts):
            free = next((space for space in range(length, width) if open_rows[space]), width)
            each = free // length
            wanted = -(-len(texts) // each)
            if free < width:
                taken = open_rows[free][: -wanted - 1 : -1]
                del open_rows[free][-wanted:]
            else:
                taken = list(range(rows, rows + wanted))
                rows += wanted
            placed = np.arange(min(len(texts), each * len(taken)))
            first[texts[: len(placed)]] = (
                np.array(taken)[placed // each] * width + width - free + placed % each * length
            )
            texts = texts[len(placed) :]
            filled, rest = divmod(len(placed), each)
            open_rows[free - each * length] += taken[:filled]
            if rest:
                open_rows[free - rest * length].append(taken[filled])
    return first, rows


def through(layers: Iterable[nn.Module], x: Float[Tensor, "R T W"], packed: Rows) -> Float[Tensor, "R T W"]:
    """The hidden states of packed texts after these layers."""
    for layer in layers:
        x = layer(x, packed=packed)
    return x


def attention(qkv: Float[Tensor, "R T W3"], heads: int, packed: Rows, dropout: float = 0.0) -> Float[Tensor, "R T W"]:
    """Softmax attention, scaled by 1/√d, of packed texts, each to itself only.

    `qkv` holds queries, keys and values side by side, W wide each, of `heads` heads of width d = W / heads. A `Line`
    off the CPU takes `flash_attention`, which needs bfloat16 or float16; everything else takes products of whole rows.
    """
    if qkv.device.type == "cpu":
        # The library's fused attention is made for long rows: on short ones its backward takes most of a step.
        return _Attention.apply(qkv, heads, packed.mask(qkv.dtype), dropout)  # type: ignore[no-any-return]
    if isinstance(packed, Line):
        return line_attention(qkv, heads, packed, dropout)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=packed.together, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


def line_attention(qkv: Float[Tensor, "1 T W3"], heads: int, packed: Line, dropout: float) -> Float[Tensor, "1 T W"]:
    """`attention` by `flash_attention`."""
    q, k, v = qkv.squeeze(0).unflatten(-1, (3, heads, -1)).unbind(1)
    return flash_attention(q, k, v, packed.cuts, packed.longest, dropout).flatten(1)[None]


def flash_pays(lengths: Int[np.ndarray, " N"], device: torch.device, head_width: int, dtype: torch.dtype) -> bool:
    """Whether `flash_attention` runs there (see `flash_fits`) and is faster than rows for texts of these lengths."""
    return bool(lengths.sum() >= FLASH_FROM * len(lengths)) and flash_fits(device, head_width, dtype)


def flash_fits(device: torch.device, head_width: int, dtype: torch.dtype) -> bool:
    """Whether `flash_attention` runs there: on CUDA GPUs since Ampere, in 16 bits, where torch was built with it."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_width % 8 == 0
        and head_width <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def flash_attention(
    q: Float[Tensor, "S H d"],
    k: Float[Tensor, "S H d"],
    v: Float[Tensor, "S H d"],
    cuts: Int[Tensor, " C"],
    longest: int,
    dropout: float,
) -> Float[Tensor, "S H d"]:
    """Softmax attention, scaled by 1/√d, within each stretch of tokens from a cut to the next, with its gradient.

    The kernel below torch.nn.attention.varlen and below attention of jagged tensors. The former has no dropout, which
    BERT's attention is tuned with; the latter is the same call with a tensor class around it, in every layer.
    """
    kernel = torch.ops.aten._flash_attention_forward
    found: Tensor = kernel(q, k, v, cuts, cuts, longest, longest, dropout, False, False)[0]
    return found


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


def pool(hidden: Float[Tensor, "R T W"], packed: Rows, how: str) -> Float[Tensor, "N W"]:
    """One float32 vector per text (float64 of float64): its first token, its last, or the mean of all."""
    flat = hidden.flatten(0, 1)
    if how != "mean":
        return wide(flat[packed.first if how == "first" else packed.first + packed.lengths - 1])
    if packed.places is not None:
        total: Tensor = _SumOfTexts.apply(flat, packed.places, packed.texts.flatten())
    else:
        flat = wide(flat)
        # Gaps add to a row of their own, which is left out.
        total = flat.new_zeros(len(packed.first) + 1, flat.shape[1])
        total = total.index_add(0, packed.texts.flatten() + 1, flat)[1:]
    return total / packed.lengths[:, None]


class _SumOfTexts(torch.autograd.Function):
    """The sum of each text's tokens [N, W], wide, by gathers alone, both ways.

    On a GPU `index_add` adds by atomics, in an order that no seed decides.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, flat: Tensor, places: Tensor, texts: Tensor) -> Tensor:
        ctx.save_for_backward(texts)
        ctx.dtype = flat.dtype  # type: ignore[attr-defined]
        found = wide(flat[places.clamp(min=0)])
        return found.masked_fill((places < 0)[:, :, None], 0.0).sum(1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (texts,) = ctx.saved_tensors  # type: ignore[attr-defined]
        to_flat = gradients[0][texts.clamp(min=0)].masked_fill((texts < 0)[:, None], 0.0)
        return to_flat.to(ctx.dtype), None, None  # type: ignore[attr-defined]
