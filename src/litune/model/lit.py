"""LiT: a locked image tower (which may be absent), a text tower, their heads, and the temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from litune.devices import send
from litune.errors import DataError, TowerError
from litune.image.pictures import open_rgb
from litune.image.registry import ImageTower
from litune.model.hubs import Bank
from litune.pairs.reference import read_bytes
from litune.prompts import read_templates, write_prompts
from litune.text.packing import Packed
from litune.text.registry import TextTower
from litune.text.tokenizers import Tokenizer, Tokens
from litune.vectors import class_vectors, normalize, wide

Picture = str | Path | Image.Image


class LiT(nn.Module):
    """A locked image tower that can be read by a text tower.

    Everything that needs only text or stored features works without the image tower; it is loaded when a
    picture is to be encoded. An image tower that is given, as for an unlocked setting, is part of the model: its
    weights are tuned and kept with it. Features that come out are float32 and of length one. The sigmoid loss has a
    bias as well as a scale.
    """

    center: Tensor
    whitening: Tensor | None

    def __init__(
        self,
        text: TextTower,
        text_head: nn.Module,
        image_head: nn.Module,
        tokenizer: Tokenizer,
        *,
        image_width: int,
        dim: int,
        logit_scale: float,
        logit_bias: float | None = None,
        image_map: str = "none",
        image_provenance: dict[str, Any] | None = None,
        image: ImageTower | None = None,
    ) -> None:
        super().__init__()
        self.text, self.text_head, self.image_head = text, text_head, image_head
        self.tokenizer, self.image_width, self.dim = tokenizer, image_width, dim
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))
        self.image_map = image_map
        self.register_buffer("center", torch.zeros(image_width))
        self.register_buffer("whitening", torch.eye(image_width) if image_map == "whiten" else None)
        self.image_provenance = image_provenance
        self.image, self.image_tuned = image, image is not None
        self.find_image_tower: Callable[[], ImageTower] | None = None
        self.origin: dict[str, Any] | None = None
        """Of an imported model, what its file has beside the weights, to be written back as it was."""
        self.bank: Bank | None = None
        """Of a run that ranks with the hub correction, the bank by which hubs are told (see `litune.model.hubs`)."""

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor on the scores, exp(logit_scale)."""
        return self.logit_scale.exp()

    def text_features(self, texts: Tokens | Packed) -> Float[Tensor, "N D"]:
        """Features of N tokenised texts, with gradients where they are on.

        Packed texts must be on the model's device, and packed for autocast as it is.
        """
        device = self.logit_scale.device
        if isinstance(texts, Tokens):
            texts = self.text.pack(texts, device, bfloat16=torch.is_autocast_enabled(device.type)).to(device)
        return self.features_of_texts(self.text(texts))

    def features_of_texts(self, raw: Float[Tensor, "N W"]) -> Float[Tensor, "N D"]:
        """Features of raw text tower output: through the head, normalised."""
        return normalize(wide(self.text_head(raw)))

    def image_features(self, raw: Float[Tensor, "B W"], dropout: float = 0.0) -> Float[Tensor, "B D"]:
        """Features of raw image tower output: through the fixed map and the head, normalised.

        `dropout` is the share of the centered values that are dropped, while tuning.
        """
        mapped = F.dropout(wide(raw) - self.center, dropout) if dropout else wide(raw) - self.center
        if self.whitening is not None:
            mapped = mapped @ self.whitening
        return normalize(wide(self.image_head(mapped)))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str] | str, batch_size: int = 256) -> Float[Tensor, "N D"]:
        """Features of N texts, on the CPU. Each distinct text is encoded once."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"a text is {text!r}, expected a string")
        distinct = list(dict.fromkeys(texts))
        # Texts of similar length share a batch.
        distinct.sort(key=len)
        # All stay on the model's device until the last is there: a GPU never waits for the next batch to be packed.
        found = torch.empty(len(distinct), self.dim, device=self.logit_scale.device)
        with _evaluating(self):
            for start in range(0, len(distinct), batch_size):
                batch = distinct[start : start + batch_size]
                found[start : start + len(batch)] = self.text_features(self.tokenizer(batch))
        position = {text: i for i, text in enumerate(distinct)}
        return found.cpu()[[position[text] for text in texts]]

    @torch.no_grad()
    def encode_features(self, raw: np.ndarray | Tensor) -> Float[Tensor, "B D"]:
        """Features of raw image tower output, as a feature store holds it, on the CPU."""
        return self.map_features(raw).cpu()

    @torch.no_grad()
    def map_features(self, raw: np.ndarray | Tensor) -> Float[Tensor, "B D"]:
        """What `encode_features` gives, on the model's device."""
        values = torch.as_tensor(raw)
        if values.ndim != 2 or values.shape[1] != self.image_width:
            raise DataError(f"features have the shape {tuple(values.shape)}, expected [images, {self.image_width}]")
        device = self.logit_scale.device
        if device.type != "cpu" and values.dtype == torch.float64:  # which Apple's MPS does not have
            values = values.float()
        return self.image_features(send(values, device))

    @torch.no_grad()
    def encode_image(self, images: Sequence[Picture] | Picture, batch_size: int = 32) -> Float[Tensor, "B D"]:
        """Features of B pictures (paths or PIL images), on the CPU.

        Raises `DataError` for a picture that can't be read, `TowerError` where the image tower can't be loaded
        or is not the one of the run.
        """
        images = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        tower = self.load_image_tower()
        found = torch.empty(len(images), self.dim, device=self.logit_scale.device)
        for start in range(0, len(images), batch_size):
            # While a GPU encodes a batch, the next one is read.
            pixels = [tower.preprocess(_open(i)) for i in images[start : start + batch_size]]
            found[start : start + len(pixels)] = self.map_features(tower.encode(torch.from_numpy(np.stack(pixels))))
        return found.cpu()

    def load_image_tower(self) -> ImageTower:
        """The image tower, loaded on first use."""
        if self.image is None:
            if self.find_image_tower is None:
                raise TowerError(
                    "the run does not know its image tower (its store came without one): name it with --image-tower, "
                    "or image_tower= in litune.load"
                )
            self.image = self.find_image_tower().to(self.logit_scale.device)
        return self.image

    def zero_shot(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> ZeroShot:
        """A classifier for C classes out of their names alone (see `ZeroShot`)."""
        return ZeroShot(self, class_names, read_templates(templates))


def scoring_device(model: object) -> torch.device:
    """Where features are compared: on the GPU that the model is on, else on the processor."""
    device = model.logit_scale.device if isinstance(model, LiT) else torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cpu")


class ZeroShot:
    """A zero-shot classifier: one weight vector per class.

    Names and templates are canonicalised (`_` to space, no punctuation but a name's commas, lower case) and names put
    into every template; each text's feature is normalised, the mean over templates is normalised again (CLIP, arXiv
    2103.00020; LiT, section 4).
    """

    def __init__(self, model: LiT, class_names: Sequence[str], templates: Sequence[str]) -> None:
        if not class_names:
            raise DataError("zero-shot classification needs at least one class name")
        self.model, self.class_names, self.templates = model, list(class_names), list(templates)
        texts = write_prompts(self.class_names, self.templates)
        self.weights: Float[Tensor, "C D"] = class_vectors(model.encode_text(texts), len(self.class_names))

    def scores(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """Cosine similarities of image features with the classes."""
        return features @ self.weights.to(features.device).T

    def probabilities(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """The softmax of the scaled scores."""
        return (self.model.scale.detach().cpu() * self.scores(features)).softmax(dim=-1)

    def __call__(self, images: Sequence[Picture] | Picture) -> Float[Tensor, "B C"]:
        """Probabilities of the classes for B pictures."""
        return self.probabilities(self.model.encode_image(images))


class _evaluating:  # noqa: N801
    """Evaluation mode inside a `with`; after it every part is in its earlier mode, so that locked ones stay in eval."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, [part for part in model.modules() if part.training]

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for part in self.training:
            part.training = True


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return open_rgb(read_bytes(image))
    except OSError as why:
        raise DataError(f"{image} can't be read: {why.strerror or why}") from None
    except DataError as why:
        raise DataError(f"{image} can't be read: {why}") from None
