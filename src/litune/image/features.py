"""What a locked tower's features are: its own pooled output, or other parts of its network; and of which pictures.

    FEATURES = PART+PART…      parts are concatenated, in this order
    pooled | cls | mean        as the tower pools; its class token; the mean of its patches or places
    layers:6,12                the same as pooled:6,12: of what these blocks give, counted from 1
    cls:6,12 | mean:6,12       the class token, or the mean, of what these blocks give
    views:5                    averaged over so many views of a picture (see `Views`)
    size:320 | size:320,256    pictures of another size, height and width in pixels

They are a property of the tower: its spec carries them (`?features=cls+mean`), its pooling and its preprocessing name
them, so that whatever loads the tower by its spec encodes pictures the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from litune.errors import TowerError, nearest
from litune.image.pictures import VIEWS, Views
from litune.image.tower import ImageTower
from litune.towers.specs import reason

POOLINGS = ("pooled", "cls", "mean")
WORDS = (*POOLINGS, "layers", "views", "size")
OUTPUT = 0
"""The number of the layer that stands for the tower's output."""


@dataclass(frozen=True)
class Part:
    """One vector of a picture: how it is pooled, and of which layer's output, counted from 1."""

    pooling: str
    layer: int = OUTPUT


POOLED = (Part("pooled"),)


@dataclass(frozen=True)
class Features:
    """What a tower's features are: these parts, concatenated, and averaged over views of a picture."""

    parts: tuple[Part, ...] = POOLED
    views: int = 1
    size: str | None = None
    """The size of the pictures as a spec has it, where it is not the tower's own."""


def parse_features(text: str) -> Features:
    """The features that a text as `cls+mean+views:2` names. Raises `TowerError` for one that can't be read."""
    parts: list[Part] = []
    settings: dict[str, str] = {}
    for term in text.split("+"):
        word, colon, value = term.partition(":")
        if word not in WORDS:
            raise TowerError(f"the features {text!r} have the unknown part {term!r}: {nearest(word, WORDS)}")
        if word in ("views", "size"):
            if word in settings:
                raise TowerError(f"the features {text!r} name {word} twice")
            settings[word] = value
        elif word == "layers" or colon:
            parts += [Part(word.replace("layers", "pooled"), layer) for layer in _layers(text, value)]
        else:
            parts.append(Part(word))
    if len(set(parts)) < len(parts):
        raise TowerError(f"the features {text!r} name a part twice")
    views = settings.get("views", "1")
    if views not in map(str, VIEWS):
        raise TowerError(f"the features {text!r} have views:{views}, it is one of {', '.join(map(str, VIEWS))}")
    return Features(tuple(parts) or POOLED, int(views), settings.get("size"))


def _layers(text: str, value: str) -> list[int]:
    numbers = value.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise TowerError(f"the features {text!r} name the layers {value!r}: numbers from 1, as in layers:6,12")
    return [int(number) for number in numbers]


def featured_spec(spec: str, features: str) -> str:
    """The spec of an image tower with these features. Raises `TowerError` where it names some already."""
    if parse_features(features) == Features():
        return spec
    if "features=" in spec.partition("?")[2]:
        raise TowerError(f"{spec!r} names features already: leave out --features, or take them out of the spec")
    return f"{spec}{'&' if '?' in spec else '?'}features={features}"


class Layered:
    """A network whose features can be put together from the outputs of its layers; a mixin.

    An output is tokens [B, N, W], class token and registers first, or a map [B, W, H', W'].
    """

    parts: tuple[Part, ...] = POOLED

    @property
    def depth(self) -> int:
        """The number of layers whose outputs can be had."""
        raise NotImplementedError

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        raise NotImplementedError

    def outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The outputs of these layers, by their numbers, normalised as the last one is where there is a norm."""
        raise NotImplementedError

    def pooled(self, output: Tensor, layer: int) -> Float[Tensor, "B W"]:
        """A layer's output, pooled as the tower pools."""
        raise NotImplementedError

    def mean(self, output: Tensor, layer: int) -> Float[Tensor, "B W"]:
        """The mean of the patches of a layer's output."""
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Float[Tensor, "B D"]:
        """The selected parts of normalised pictures [B, 3, H, W], concatenated."""
        outputs = self.outputs(pixels, sorted({part.layer for part in self.parts}))
        return torch.cat([self._part(outputs[part.layer], part) for part in self.parts], dim=1)

    def _part(self, output: Tensor, part: Part) -> Tensor:
        if part.pooling == "cls":
            return output[:, 0]
        pool = self.mean if part.pooling == "mean" else self.pooled
        return pool(output, part.layer)

    def select(self, spec: str, parts: tuple[Part, ...]) -> None:
        """Give these parts from now on. Raises `TowerError` where the network, named by its spec, has no such part."""
        beyond = max(part.layer for part in parts)
        if beyond > self.depth:
            known = f"has {self.depth} layers" if self.depth else "gives no outputs of its layers"
            raise TowerError(f"{spec!r} {known}: there is no layer {beyond}")
        if not self.has_class_token and any(part.pooling == "cls" for part in parts):
            raise TowerError(f"{spec!r} can't have the feature cls, it has no class token: take pooled, mean or layers")
        self.parts = parts


def with_features(tower: ImageTower, features: Features) -> ImageTower:
    """The tower with these features instead of its own; its size must be the one that is wanted already.

    Raises `TowerError` where it has no such parts.
    """
    known: dict[str, Any] = tower.provenance
    pooling = known["pooling"]
    if features.parts != POOLED:
        if not isinstance(tower.network, Layered):
            raise TowerError(
                f"{tower.spec!r} gives nothing but its output: cls, mean and layers are for timm:, hf:, vit: and "
                "packaged towers, only views: is for all"
            )
        tower.network.select(tower.spec, features.parts)
        pooling = "+".join(_named(part, getattr(tower.network, "own_pooling", pooling)) for part in features.parts)
    views = {} if features.views == 1 else {"views": features.views}
    featured = ImageTower(
        tower.spec,
        tower.network,
        Views(tower.preprocess, features.views) if views else tower.preprocess,
        description=known["preprocess"] | views,
        weights=known["weights"],
        pooling=pooling,
    )
    try:
        featured.encode(torch.from_numpy(featured.preprocess(Image.new("RGB", (64, 64))))[None])
    except TowerError:
        raise
    except Exception as why:  # a network whose layers are not what others of its library have
        raise TowerError(reason(f"{tower.spec!r} can't have these features", why)) from why
    return featured


def has_own_features(tower: ImageTower) -> bool:
    """Whether the features are what the tower pools itself, of one view of a picture."""
    return tower.views == 1 and getattr(tower.network, "parts", POOLED) == POOLED


def _named(part: Part, own: str) -> str:
    pooling = own if part.pooling == "pooled" else part.pooling
    return f"{pooling}:{part.layer}" if part.layer else pooling
