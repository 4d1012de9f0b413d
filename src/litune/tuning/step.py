"""One step: features → loss → gradients → optimizer.

On a GPU nothing here waits for the card: what is to be logged is read a step late (see `Reading`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litune import distributed
from litune.config import TuneConfig
from litune.devices import receive, send
from litune.model.lit import LiT
from litune.sharding import Shards
from litune.tuning.gradient_cache import Encoded
from litune.tuning.inputs import FieldPairs, Inputs, Piece
from litune.tuning.losses import MoreImages, sigmoid_loss, softmax_loss
from litune.tuning.optim import stepping
from litune.tuning.pair_losses import pair_losses

SCORES = 2**26
"""The most scores that a loss holds at once: 256 MB of float32."""
NEVER = 2**30
"""In the place of a step's number: none. As float32, in which it is read with a step's figures, it is exact."""


class Reading:
    """What a step leaves to be logged, on its way from the device: `facts` waits for it."""

    def __init__(self, step: int, values: dict[str, Tensor], known: dict[str, Any]) -> None:
        self.step, self.names, self.known = step, list(values), known
        self.copied = receive(torch.stack([value.detach().float() for value in values.values()]))

    def facts(self) -> dict[str, Any]:
        """The step's figures by name."""
        return dict(zip(self.names, self.copied().tolist(), strict=True)) | self.known


class Step:
    """How to take a step: the model, its optimizer and the arithmetic."""

    def __init__(
        self,
        config: TuneConfig,
        model: LiT,
        optimizer: torch.optim.Optimizer,
        shards: Shards | None,
        device: torch.device,
        *,
        bfloat16: bool,
        image_bfloat16: bool,
    ) -> None:
        self.config, self.model, self.optimizer, self.shards = config, model, optimizer, shards
        self.device, self.bfloat16, self.image_bfloat16 = device, bfloat16, image_bfloat16
        self.shared = set(shards.own.values()) if shards else set()
        """This rank's rows of what the ranks share."""
        moved = [p for group in optimizer.param_groups for p in group["params"] if p not in self.shared]
        self.sums = distributed.GradientSums(moved)
        self.at = "texts"
        """What it is busy with, to be named where memory ends: texts, images, scores or the optimizer."""
        self.first_bad = torch.tensor(NEVER, device=device)
        """On a GPU: the first step whose loss or gradient was not finite, as far as it has come."""

    def gradients(self, inputs: Inputs, *, images_tuned: bool) -> tuple[Tensor, Encoded, Encoded, MoreImages | None]:
        """Add to all tuned parameters the gradient of the loss; returns the loss and the features that it is of."""
        self.at = "images"
        images = self.encode_images(inputs.images, tuned=images_tuned)
        self.at = "texts"
        texts = self.encode_texts(inputs.texts)
        self.at = "scores"
        more_images = self.more_images(inputs)
        loss = self.loss(inputs, images.features, texts.features, more_images)
        loss.backward()
        self.at = "images"
        images.backward()
        self.at = "texts"
        if self.shards:  # the ranks are busy with the layers that they share until the end
            texts.backward()
            self.shards.take_gradients()
            self.sums.arm()
        else:  # they sum each gradient once it is whole
            texts.backward(self.sums.arm)
        self.at = "optimizer"
        return loss.detach(), images, texts, more_images

    def encode_texts(self, pieces: Sequence[Piece]) -> Encoded:
        """Features [n, D] of the texts."""
        model = self.model

        def encode(piece: Piece) -> Tensor:
            torch.manual_seed(piece.seed)  # dropout, the same in both passes
            read = piece.read
            assert not isinstance(read, np.ndarray)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                features = model.features_of_texts(read) if isinstance(read, Tensor) else model.text_features(read)
            return features[: piece.rows]

        return Encoded([partial(encode, piece) for piece in pieces], [model.text, model.text_head])

    def encode_images(self, pieces: Sequence[Piece], *, tuned: bool) -> Encoded:
        """Features [b, D] of the images, from stored vectors or, with an unlocked tower, from their pixels."""
        model, tower, dropout = self.model, self.model.image, self.config.feature_dropout or 0.0

        def encode(piece: Piece) -> Tensor:
            torch.manual_seed(piece.seed)
            if isinstance(piece.read, Tensor):
                return model.image_features(piece.read, dropout)
            assert tower is not None
            with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
                raw = tower(send(torch.from_numpy(piece.read), self.device), bfloat16=self.image_bfloat16)
            return model.image_features(raw, dropout)

        modules: list[nn.Module] = [model.image_head]
        if not isinstance(pieces[0].read, Tensor):
            assert tower is not None
            if tower.training != tuned:
                tower.train(tuned)  # locked for now: no dropout, batch norm's statistics stand still
            modules += [tower] if tuned else []
        return Encoded([partial(encode, piece) for piece in pieces], modules)

    def more_images(self, inputs: Inputs) -> MoreImages | None:
        """The features of the images from outside the batch."""
        more = inputs.more_images
        if more is None:
            return None
        with torch.no_grad():
            return MoreImages(self.model.image_features(more.features), more.images, more.texts)

    def loss(self, inputs: Inputs, images: Tensor, texts: Tensor, more_images: MoreImages | None) -> Tensor:
        """The losses of the text fields, summed."""
        config, model = self.config, self.model
        total = torch.zeros((), device=self.device)
        for field, others, own in fields_of(inputs, images, texts):
            chunk = max(64, SCORES // (field.total + config.image_negatives))
            if model.logit_bias is not None:
                total = total + sigmoid_loss(
                    others, own, model.scale, model.logit_bias, ids=field.ids, chunk=chunk, negatives=config.negatives
                )
                continue
            total = total + softmax_loss(
                others,
                own,
                model.scale,
                image_to_text=config.image_to_text,
                ids=field.ids,
                more_images=more_images,
                chunk=chunk,
                negatives=config.negatives,
            )
        return total

    def source_losses(
        self, inputs: Inputs, starts: np.ndarray, images: Tensor, texts: Tensor, more_images: MoreImages | None
    ) -> list[dict[str, float]]:
        """For each source, its number of pairs in the global batch and the mean of their losses.

        `starts` says where each source's images begin, and the end. Each pair has its loss in the whole batch: the mean
        of all, weighted by the numbers of pairs, is the batch's loss. Text fields are summed, each the mean over those
        pairs that have it. Waits for the device.
        """
        config, model = self.config, self.model
        source = np.searchsorted(starts, inputs.batch.images, "right") - 1
        most = len(starts) - 1
        losses = torch.zeros(most, dtype=torch.float64)
        for field, others, own in fields_of(inputs, images, texts):
            found = pair_losses(
                others.detach().float(),
                own.detach().float(),
                model.scale.detach(),
                bias=None if model.logit_bias is None else model.logit_bias.detach(),
                image_to_text=config.image_to_text,
                ids=field.ids,
                more_images=more_images,
                chunk=max(64, SCORES // (field.total + config.image_negatives)),
                negatives=config.negatives,
            )
            sums = np.bincount(source[field.there], weights=found.cpu().double().numpy(), minlength=most)
            both = torch.from_numpy(np.stack([sums, np.bincount(source[field.there], minlength=most)]))
            distributed.sum_([both])
            losses += both[0] / both[1].clamp(min=1)
        pairs = torch.from_numpy(np.bincount(source, minlength=most))
        distributed.sum_([pairs])
        return [{"pairs": int(count), "loss": float(loss)} for count, loss in zip(pairs, losses, strict=True)]

    def finite(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether loss and gradient are finite; a GPU is not waited for, it notes the first step where they were not.

        With --not-finite skip it is: to skip a step, its gradient must be known before the weights move.
        """
        good = loss.isfinite() & norm.isfinite()
        if self.device.type == "cpu" or self.config.not_finite == "skip":
            return bool(good)
        noted = self.first_bad.clamp(max=step)
        self.first_bad = torch.where(good, self.first_bad, noted)
        return True

    def update(self, tuned: list[nn.Parameter], norm: Tensor) -> None:
        """Clip the gradients and move the parameters."""
        # Where nothing is to be clipped, a processor spares a pass over all gradients; a GPU would be waited for.
        if norm.device.type != "cpu" or not norm <= self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(tuned, self.config.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sum_gradients(self) -> tuple[list[nn.Parameter], Tensor]:
        """Have every rank's share of the gradients added up; what no rank has a gradient for stays without.

        Returns the parameters that are to move, and the norm of all their gradients. Those of shared parameters are
        summed before; each rank has a part of them.
        """
        self.sums.wait()
        tuned = stepping(self.optimizer)
        own = [p for p in tuned if p in self.shared]
        everywhere = [p for p in tuned if p not in self.shared]
        norm = nn.utils.get_total_norm([p.grad for p in everywhere if p.grad is not None])
        if not self.shared:
            return tuned, norm
        square = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square()
        distributed.sum_([square])
        return tuned, (norm.square() + square).sqrt()


def fields_of(inputs: Inputs, images: Tensor, texts: Tensor) -> Iterator[tuple[FieldPairs, Tensor, Tensor]]:
    """For each text field that the batch has: its pairs, and the features of their images and texts."""
    begin = 0
    for field in inputs.fields:
        own = texts[begin : begin + len(field.there)]
        begin += len(field.there)
        if field.total:
            yield field, images if field.index is None else images[field.index], own


def describe_bad(step: int, loss: float, norm: float) -> str:
    """What is not finite at a step, the loss or its gradient."""
    return (
        f"the gradient's norm is {norm} at step {step}" if math.isfinite(loss) else f"the loss is {loss} at step {step}"
    )
