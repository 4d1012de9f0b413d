"""Contrastive losses: pure functions of features and the scale.

The matrix of scores is never held as a whole. The forward pass computes the loss and the gradients alike, chunk by
chunk of its rows, and the backward pass only multiplies.

Matrix products are what a large batch costs. Where it is one chunk, both softmaxes read the same scores. Where it is
more, a column is whole only when all chunks were seen: so scores are computed twice, first for what the softmaxes
divide by, then for the gradients. With locked images these are three products of B × B × D (one direction after the
other would take four: scores and the texts' gradient for each), and four where images have a gradient too (not six).

On several ranks (see `litune.distributed`) each holds some rows of the global batch, and all call a loss alike. Each
gets the loss of the global batch, and gradients that are to be *summed* over ranks, not averaged: the sum of a
parameter's gradients is the gradient of that loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from litune import distributed
from litune.devices import send

Negatives = Literal["global", "local"]


@dataclass(frozen=True)
class Ids:
    """Who is not whose negative: pairs of the same image id, or of the same text id. Ids are 0 or more."""

    images: Int[Tensor, " B"]
    texts: Int[Tensor, " B"]


@dataclass(frozen=True)
class MoreImages:
    """M images besides the batch's, with their ids and those of their texts, at most K each (−1 fills up).

    Of several ranks each brings its own, with one K for all.
    """

    features: Float[Tensor, "M D"]
    images: Int[Tensor, " M"]
    texts: Int[Tensor, "M K"]


def softmax_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    scale: Float[Tensor, ""],
    *,
    image_to_text: float = 0.5,
    ids: Ids | None = None,
    more_images: MoreImages | None = None,
    chunk: int = 1024,
    negatives: Negatives = "global",
) -> Float[Tensor, ""]:
    """The mean of image→text and text→image cross-entropy over the batch; row i of both is a pair.

    With s = scale · images @ textsᵀ and λ = `image_to_text`, the loss is
    −mean_i [λ · log softmax(s_i·)_i + (1 − λ) · log softmax(s_·i)_i]
    (LiT, arXiv 2111.07991, equation 1, and CLIP, arXiv 2103.00020, with λ = ½; ConVIRT, arXiv 2010.00747, with any).
    Features are expected normalised.

    Where rows i ≠ j have an id in common, s_ij and s_ji are left out of the sums in both softmaxes. `more_images` are
    further candidates of every text, in the text→image softmax only; with `ids`, text i does not see those of its
    image's id or with its own id among their texts. With local negatives, a softmax is over the rows of one rank; the
    mean is over all.

    The arithmetic is float32, or float64 where features are. Raises `ValueError` for shapes that don't fit, a λ
    outside 0 to 1, and more images that require a gradient: they get none.
    """
    _check(images, texts, (scale,), ids, chunk, negatives)
    if not 0 <= image_to_text <= 1:
        raise ValueError(f"image_to_text is {image_to_text}: it is a weight from 0 to 1")
    if more_images is not None:
        _check_more(more_images, images)
    batch = _Batch(images, ids, negatives)

    def compute(needed: tuple[bool, ...], images: Tensor, texts: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        if batch.alone and more_images is None and 0 < len(images) <= chunk:
            return _softmax_both_ways(images, texts, image_to_text, batch, needed)
        if 0 < image_to_text < 1:
            return _softmax_in_chunks(images, texts, image_to_text, batch, chunk, needed, more_images)
        if image_to_text == 1:
            value, to_images, to_texts = _one_way(images, texts, _cross_entropy, batch, chunk, needed)
        else:
            value, to_texts, to_images = _one_way(
                texts, images, _cross_entropy, batch, chunk, needed[::-1], more_images
            )
        return value, [to_images, to_texts]

    images, texts = _promote(images, texts)
    # The scale rides on the texts, whose gradient is needed anyway: a locked image side stays without one.
    return _with_gradients(compute, images, scale * texts) / batch.size


def sigmoid_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    ids: Ids | None = None,
    chunk: int = 1024,
    negatives: Negatives = "global",
) -> Float[Tensor, ""]:
    """The binary cross-entropy of every image with every text, summed, over the number of pairs (SigLIP).

    With s = scale · images @ textsᵀ + bias, the loss is −1/B · Σ_ij log σ(z_ij · s_ij), where z_ij is 1 for a pair,
    i = j, and −1 for all others (arXiv 2303.15343). Features are expected normalised. Where
    rows i ≠ j have an id in common, s_ij and s_ji are left out of the sum; with local negatives, so is what is of
    two ranks.

    The arithmetic is float32, or float64 where features are. Raises `ValueError` for shapes that don't fit.
    """
    _check(images, texts, (scale, bias), ids, chunk, negatives)
    batch = _Batch(images, ids, negatives)

    def compute(
        needed: tuple[bool, ...], images: Tensor, texts: Tensor, bias: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        to_bias = torch.zeros_like(bias)
        # Texts query: locked images are the candidates then, and nothing is left to sum over ranks.
        value, to_texts, to_images = _one_way(
            texts, images, partial(_binary, bias=bias, to_bias=to_bias), batch, chunk, (needed[1], needed[0])
        )
        return value, [to_images, to_texts, to_bias]

    images, texts = _promote(images, texts)
    return _with_gradients(compute, images, scale * texts, bias.to(images.dtype)) / batch.size


class _Batch:
    """The batch that this rank's rows are part of; with local negatives, or one rank, they are all there is to see."""

    def __init__(self, rows: Tensor, ids: Ids | None, negatives: Negatives) -> None:
        counts = distributed.row_counts(rows)
        self.size = sum(counts)
        if self.size == 0:
            raise ValueError("the batch is empty: a contrastive loss needs pairs")
        self.alone = negatives == "local" or len(counts) == 1
        self.counts = [len(rows)] if self.alone else counts
        self.first = 0 if self.alone else sum(counts[: distributed.rank()])
        self.ids = None
        if ids is not None:
            self.ids = self.gather(send(torch.stack([ids.images, ids.texts], dim=1), rows.device))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [N …] of the whole batch, out of this rank's [n …]."""
        return rows if self.alone else distributed.gather_rows(rows, self.counts)

    def sum_own(self, gradient: Tensor) -> Tensor:
        """The sum over ranks of gradients [N D], of which this rank gets its own rows [n D]."""
        return gradient if self.alone else distributed.sum_own_rows(gradient, self.counts)

    def with_more(self, images: Tensor, more: MoreImages) -> tuple[Tensor, Tensor | None]:
        """The batch's images [N D] followed by further ones, as [N+M D], and the ids [N+M 1+K] of them all."""
        features = more.features.to(images)
        counts = [len(features)] if self.alone else distributed.row_counts(features)

        def gather(rows: Tensor) -> Tensor:
            return rows if self.alone else distributed.gather_rows(rows, counts)

        images = torch.cat([images, gather(features)])
        if self.ids is None:
            return images, None
        more_ids = gather(send(torch.cat([more.images[:, None], more.texts], dim=1), images.device))
        captions_short = more_ids.shape[1] - self.ids.shape[1]
        return images, torch.cat([F.pad(self.ids, (0, captions_short), value=-1), more_ids])

    def logsumexp(self, columns: Tensor) -> Tensor:
        """The logarithm of the sum over ranks of the exponentials of these [N]."""
        if self.alone:
            return columns
        return distributed.gather_rows(columns[None], [1] * len(self.counts)).logsumexp(dim=0)

    def excluded(self, own: Tensor, candidate_ids: Tensor) -> Bool[Tensor, "c N"]:
        """Which candidates are not negatives of the batch's rows `own` [c], nor the row's own pair."""
        assert self.ids is not None
        image, text = self.ids[own].T.unsqueeze(-1)
        same: Tensor = image == candidate_ids[:, 0]
        for caption in candidate_ids[:, 1:].T:
            same |= text == caption
        same[torch.arange(len(own), device=own.device), own] = False
        return same


def _one_way(
    queries: Tensor,
    others: Tensor,
    row_loss: Callable[[Tensor, Tensor], Tensor],
    batch: _Batch,
    chunk: int,
    needed: tuple[bool, ...],
    more: MoreImages | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of this rank's queries [n D] against all others, and the gradients [n D] of both, if needed.

    `row_loss(scores [c N], own [c])` returns the sum of the rows' losses, row i's pair being in column `own[i]`, and
    turns the scores into their gradient in place.
    """
    value = queries.new_zeros(())
    candidates, candidate_ids = batch.gather(others), batch.ids
    to_queries = torch.empty_like(queries) if needed[0] else None
    to_candidates = torch.zeros_like(candidates) if needed[1] else None
    if more is not None:
        candidates, candidate_ids = batch.with_more(candidates, more)
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        own = torch.arange(len(rows), device=rows.device) + batch.first + start
        scores = rows @ candidates.T
        if candidate_ids is not None:
            scores.masked_fill_(batch.excluded(own, candidate_ids), -torch.inf)
        value += row_loss(scores, own)
        if to_queries is not None:
            torch.mm(scores, candidates, out=to_queries[start : start + chunk])
        if to_candidates is not None:
            to_candidates.addmm_(scores[:, : len(to_candidates)].T, rows)
    return value, to_queries, None if to_candidates is None else batch.sum_own(to_candidates)


def _softmax_both_ways(
    images: Tensor, texts: Tensor, image_to_text: float, batch: _Batch, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of a batch that is one chunk: both directions read the same scores [B B]."""
    own = torch.arange(len(images), device=images.device)
    scores = images @ texts.T
    if batch.ids is not None:
        scores.masked_fill_(batch.excluded(own, batch.ids), -torch.inf)
    back = scores.T.clone()
    value = image_to_text * _cross_entropy(scores, own) + (1 - image_to_text) * _cross_entropy(back, own)
    scores.mul_(image_to_text).add_(back.T, alpha=1 - image_to_text)
    return value, [scores @ texts if needed[0] else None, scores.T @ images if needed[1] else None]


def _softmax_in_chunks(
    images: Tensor,
    texts: Tensor,
    image_to_text: float,
    batch: _Batch,
    chunk: int,
    needed: tuple[bool, ...],
    more: MoreImages | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of a batch of any size, on any number of ranks.

    Rows of scores are this rank's texts, a chunk at a time, columns the images of all ranks. So of locked images, the
    ranks exchange features and one number per column, but no gradients.
    """
    candidates, candidate_ids = batch.gather(images), batch.ids
    size = len(candidates)
    if more is not None:
        candidates, candidate_ids = batch.with_more(candidates, more)

    def scored(start: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """A chunk of texts [c D], where in its scores the pairs are, the scores [c N+M]."""
        rows = texts[start : start + chunk]
        place = torch.arange(len(rows), device=rows.device)
        own = place + (batch.first + start)
        scores = rows @ candidates.T
        if candidate_ids is not None:
            scores.masked_fill_(batch.excluded(own, candidate_ids), -torch.inf)
        return rows, (place, own), scores

    starts = range(0, len(texts), chunk)
    value = texts.new_zeros(())
    over_images = []  # what a text's softmax divides by, as a logarithm: per chunk [c]
    over_texts = texts.new_full((size,), -torch.inf)  # and an image's [N]
    for start in starts:
        _, pairs, scores = scored(start)
        over_images.append(scores.logsumexp(dim=1))
        over_texts = torch.logaddexp(over_texts, scores[:, :size].logsumexp(dim=0))
        value += (1 - image_to_text) * over_images[-1].sum() - scores[pairs].sum()
    over_texts = batch.logsumexp(over_texts)
    value += image_to_text * over_texts[batch.first : batch.first + len(texts)].sum()

    to_images = torch.zeros_like(candidates[:size]) if needed[0] else None
    to_texts = torch.empty_like(texts) if needed[1] else None
    for start, over in zip(starts if any(needed) else (), over_images, strict=False):
        rows, pairs, scores = scored(start)
        back = (scores[:, :size] - over_texts).exp_()
        gradient = scores.sub_(over[:, None]).exp_()
        # Weights in the exponents would round what is one, and leave a lone pair a gradient.
        gradient[:, :size].lerp_(back, image_to_text)
        gradient[:, size:] *= 1 - image_to_text
        gradient[pairs] -= 1
        if to_texts is not None:
            torch.mm(gradient, candidates, out=to_texts[start : start + chunk])
        if to_images is not None:
            to_images.addmm_(gradient[:, :size].T, rows)
    return value, [None if to_images is None else batch.sum_own(to_images), to_texts]


def _cross_entropy(scores: Tensor, own: Tensor) -> Tensor:
    """Σ_i −log softmax(scores_i)_own(i); the scores [c N] become their gradient, softmax(scores) − one-hot(own)."""
    pairs = (torch.arange(len(own), device=own.device), own)
    scores -= scores.amax(dim=1, keepdim=True)
    right = scores[pairs]
    sums = scores.exp_().sum(dim=1, keepdim=True)
    scores /= sums
    scores[pairs] -= 1
    return (sums.squeeze(1).log() - right).sum()


def _binary(scores: Tensor, own: Tensor, bias: Tensor, to_bias: Tensor) -> Tensor:
    """Σ_ij −log σ(z_ij · (scores_ij + bias)); the scores [c N] become their gradient, whose sum is added to `to_bias`.

    z_ij is 1 in column own(i) and −1 elsewhere.
    """
    pairs = (torch.arange(len(own), device=own.device), own)
    scores += bias
    scores[pairs] *= -1  # now every term is −log σ(−score), with the gradient σ(score)
    value = -F.logsigmoid(-scores).sum()
    scores.sigmoid_()
    scores[pairs] *= -1
    to_bias += scores.sum()
    return value


Compute = Callable[..., tuple[Tensor, list[Tensor | None]]]


def _with_gradients(compute: Compute, *inputs: Tensor) -> Tensor:
    """The sum over ranks of what `compute(needed, *inputs)` returns, with the gradients that it returns along."""
    needed = tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):
        return cast(Tensor, _WithGradients.apply(partial(compute, needed), *inputs))


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients were computed together with it: backward only scales them."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: Tensor) -> Tensor:
        value, gradients = compute(*inputs)
        ctx.save_for_backward(*gradients)
        distributed.sum_([value])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else outer * gradient for gradient in ctx.saved_tensors)


def _promote(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 where one is."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    return images.to(dtype), texts.to(dtype)


def _check(
    images: Tensor, texts: Tensor, scalars: tuple[Tensor, ...], ids: Ids | None, chunk: int, negatives: str
) -> None:
    """Raise `ValueError` for what no loss can use."""
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(f"images {list(images.shape)} and texts {list(texts.shape)} must be of one shape [B, D]")
    if any(scalar.ndim for scalar in scalars):
        raise ValueError(f"scale and bias must have no dimension, got {[list(s.shape) for s in scalars]}")
    if ids is not None and not ids.images.shape == ids.texts.shape == images.shape[:1]:
        found = f"{list(ids.images.shape)} and {list(ids.texts.shape)}"
        raise ValueError(f"ids have {found} images and texts: both must be [{len(images)}], as the pairs")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it is a number of rows, 1 or more")
    if negatives not in ("global", "local"):
        raise ValueError(f"negatives are {negatives!r}: they are 'global' or 'local'")


def _check_more(more: MoreImages, images: Tensor) -> None:
    """Raise `ValueError` for more images that can't be candidates beside `images`."""
    m, width = len(more.features), images.shape[1]
    if more.features.shape != (m, width) or more.images.shape != (m,) or more.texts.ndim != 2 or len(more.texts) != m:
        raise ValueError(
            f"more_images has features {list(more.features.shape)}, images {list(more.images.shape)} and texts "
            f"{list(more.texts.shape)}: they must be [M, {width}], [M] and [M, K]"
        )
    if more.features.requires_grad:
        raise ValueError("more_images.features requires a gradient and would get none: detach it")
