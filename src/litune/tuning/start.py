"""Where tuning starts: heads in closed form, out of the frozen text tower's vectors and the stored image features.

How much each side is shrunk, how directions are weighted and the temperature are chosen on pairs that are held out of
the fit; with these settings, maps are then fitted to all pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from litune.config import TuneConfig
from litune.devices import pick_bfloat16
from litune.errors import ConfigError
from litune.evaluation.retrieval import retrieval
from litune.image.tower import weights_hash
from litune.model.lit import LiT
from litune.progress import say
from litune.store.selection import Selection
from litune.store.text_vectors import TextVectors
from litune.text.registry import TextTower
from litune.text.tokenizers import Tokenizer
from litune.text.vectors import encode_texts
from litune.tuning.closed_form import LinearMaps, Moments, Sums, cca, procrustes, ridge
from litune.vectors import normalize

IMAGE_SHRINKAGES = (0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
TEXT_SHRINKAGES = (0.03, 0.1, 0.3, 1.0, 3.0)
POWERS = ((1.0, 0.0), (1.0, 0.5), (0.75, 0.75), (1.0, 1.0))
"""By which powers of their correlations directions are multiplied, on the images' side and on the texts'."""
FOR_TUNING = ((1.0, 0.0),)
"""The same for a start of tuning: text vectors, which are tuned, begin with all directions alike."""
UNSEEN = (2.0, 0.1, 1.0, 1.0)
"""Where the choice begins: shrinkages and powers."""
FEW = (32.0, 1.0, 1.0, 1.0)
"""What is taken where pairs are too few to choose on."""
SCALES = tuple(float(scale) for scale in np.geomspace(4, 64, 17))
SCALE = 20.0
CHOOSE_SHARE, CHOOSE_MOST, CHOOSE_LEAST = 0.1, 500, 20
"""Of the images, what is held out to choose on."""
FOLDS = 5
"""How often at most, each time others, as long as CHOOSE_MOST are not exceeded."""
TUNE_MOST = 32_768
"""The most captions that a start of tuning is fitted to: further ones change little, and each is encoded for it."""
HEAD_SIZE = 0.05
"""The root mean square of the heads' weights: as features are normalised it is free, but Adam's steps are not."""
BLOCK = 2048
"""Images that are summed up at once."""


@dataclass(frozen=True)
class Options:
    """What is asked of a fit; None: chosen on held-out pairs."""

    method: str = "cca"
    image_shrinkage: float | None = None
    text_shrinkage: float | None = None
    powers: tuple[tuple[float, float], ...] = POWERS
    most: int | None = None
    """Fit to this many captions at most."""


@dataclass(frozen=True)
class Fitted:
    """Maps with the scale of their scores, and what was chosen."""

    maps: LinearMaps
    scale: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Vectors:
    """The pairs of a selection as vectors of both towers, read block by block."""

    pairs: Selection
    texts: list[TextVectors]
    """Of each source of the pairs."""

    def blocks(self, positions: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Image features [B, D], text vectors [N, W] and each image's number of texts, in blocks of the images."""
        pairs = self.pairs if positions is None else self.pairs.subset(positions)
        for source, texts in zip(pairs.sources, self.texts, strict=True):
            for start in range(0, len(source), BLOCK):
                part = source.subset(np.arange(start, min(start + BLOCK, len(source))))
                yield part.features(), texts.take(part.caption_array), part.counts

    def of_captions(self, numbers: Int[np.ndarray, " n"]) -> Float[Tensor, "n W"]:
        """The vectors of the captions with these numbers."""
        starts = np.cumsum([0, *(int(source.offsets[-1]) for source in self.pairs.sources)])
        owner = np.searchsorted(starts, numbers, side="right") - 1
        order = np.argsort(owner, kind="stable")
        parts = [
            texts.take(source.take_captions(numbers[owner == place] - starts[place]))
            for place, (source, texts) in enumerate(zip(self.pairs.sources, self.texts, strict=True))
        ]
        return torch.from_numpy(np.concatenate(parts)[np.argsort(order)])

    def sums(self, positions: np.ndarray) -> Sums:
        """The sums over the images at these positions, of which there is at least one."""
        total: Sums | None = None
        for images, texts, counts in self.blocks(positions):
            if total is None:
                total = Sums(images.shape[1], texts.shape[1])
            total.add(images, texts, counts)
        assert total is not None
        return total


def for_tuning(config: TuneConfig) -> Options:
    """The fit that tuning starts from."""
    method = "ridge" if config.image_head == "none" else "cca"
    return Options(method, powers=FOR_TUNING, most=TUNE_MOST)


def start_heads(model: LiT, train: Selection, config: TuneConfig, options: Options) -> dict[str, Any]:
    """Set the model's heads and temperature from a fit to the pairs; returns what was chosen.

    Raises `ConfigError` for a --dim that a fit can't have, and, with --start fit, where there is nothing to fit.
    """
    model.eval()
    bfloat16 = pick_bfloat16(config.precision, model.logit_scale.device)
    fitted = fit_maps(text_vectors(model, _at_most(train, options.most, config.seed), bfloat16), options, config.seed)
    directions = fitted.maps.text.shape[1]
    if directions == 0:
        nothing = "image features and texts have nothing in common that varies (are they all equal?)"
        if config.start == "fit":
            raise ConfigError(f"{nothing}: there is nothing to fit")
        say(f"{nothing}: heads begin at random")
        return {}
    if config.dim is not None and directions < config.dim:
        raise ConfigError(
            f"--dim {config.dim} is more than the {directions} directions that these pairs and towers have: "
            "give less, or leave it out"
        )
    set_heads(model, fitted.maps)
    if config.logit_scale is None:
        model.logit_scale.data.fill_(math.log(fitted.scale))
    return fitted.facts


def text_vectors(model: LiT, pairs: Selection, bfloat16: bool) -> Vectors:
    """The pairs with the vectors of their texts; those that are not kept yet are encoded."""
    fingerprint = text_fingerprint(model.text, model.tokenizer, bfloat16)
    texts = [TextVectors(source.store.path, fingerprint) for source in pairs.sources]
    for source, vectors in zip(pairs.sources, texts, strict=True):
        vectors.encode(source, partial(encode, model, bfloat16=bfloat16))
    return Vectors(pairs, texts)


def text_fingerprint(text: TextTower, tokenizer: Tokenizer, bfloat16: bool) -> str:
    """What tells one text tower's vectors from another's: weights, architecture, tokens, arithmetic."""
    facts = {
        "weights": weights_hash(text),
        "architecture": text.architecture,
        "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
        "tokens": tokenizer.describe(),
        "bfloat16": bfloat16,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def encode(model: LiT, texts: list[str], *, bfloat16: bool) -> Float[np.ndarray, "N W"]:
    """The text tower's raw float32 vectors of N texts."""
    tokens = model.tokenizer(texts)
    return encode_texts(model.text, tokens, model.logit_scale.device, bfloat16=bfloat16).numpy()


def _at_most(train: Selection, most: int | None, seed: int) -> Selection:
    """The pairs, of more than `most` captions those of images drawn at random."""
    captions = int(train.offsets[-1])
    if most is None or captions <= most:
        return train
    count = max(2, len(train) * most // captions)
    return train.subset(np.sort(np.random.default_rng(seed).permutation(len(train))[:count]))


def fit_maps(vectors: Vectors, options: Options, seed: int) -> Fitted:
    """Maps fitted to all pairs, with settings chosen on parts that are held out while they are chosen."""
    images = len(vectors.pairs)
    count = min(CHOOSE_MOST, int(CHOOSE_SHARE * images))
    order = np.random.default_rng([seed, 1]).permutation(images)
    if count < CHOOSE_LEAST:
        chosen, all_pairs = _settings(options, FEW), Moments(vectors.sums(np.sort(order)))
        return Fitted(_maps(all_pairs, options.method, chosen), SCALE, _facts(options.method, chosen))
    folds = max(1, min(FOLDS, CHOOSE_MOST // count))
    *held_out, rest = (np.sort(part) for part in np.split(order, count * np.arange(1, folds + 1)))
    sums = [vectors.sums(part) for part in (*held_out, rest)]
    trials = []
    for fold, positions in enumerate(held_out):
        others = reduce(operator.add, (part for number, part in enumerate(sums) if number != fold))
        trials.append((Moments(others), HeldOutPairs.of(vectors.blocks(positions))))
    chosen, recall = choose(trials, options)
    scale = float(np.mean([unseen.scale(_maps(moments, options.method, chosen)) for moments, unseen in trials]))
    facts = {"chosen_on_images": folds * count, "recall": round(recall, 4), "scale": round(scale, 2)}
    all_pairs = Moments(reduce(operator.add, sums))
    return Fitted(_maps(all_pairs, options.method, chosen), scale, _facts(options.method, chosen) | facts)


def choose(trials: list[tuple[Moments, HeldOutPairs]], options: Options) -> tuple[Settings, float]:
    """The settings with the highest mean recall on pairs that the moments of each trial don't have, and that recall.

    They are chosen one after the other.
    """

    def tried(settings: Settings) -> tuple[Settings, float]:
        recalls = [unseen.recall(_maps(moments, options.method, settings)) for moments, unseen in trials]
        return settings, float(np.mean(recalls))

    best = tried(_settings(options, UNSEEN))
    for varied in _varied(options):
        best = max([best, *map(tried, varied(best[0]))], key=lambda candidate: candidate[1])
    return best


Settings = tuple[float, float, float, float]
"""Image shrinkage, text shrinkage, and the powers of the correlations on the images' and the texts' side."""


def _settings(options: Options, default: Settings) -> Settings:
    image, text, *powers = default
    image = image if options.image_shrinkage is None else options.image_shrinkage
    text = text if options.text_shrinkage is None else options.text_shrinkage
    image_power, text_power = options.powers[0] if len(options.powers) == 1 else powers
    return image, text, image_power, text_power


def _varied(options: Options) -> Iterator[Callable[[Settings], list[Settings]]]:
    """For each setting that is to be chosen, what to try it with, given all settings."""
    if options.method == "cca" and options.image_shrinkage is None:
        yield lambda now: [(image, *now[1:]) for image in IMAGE_SHRINKAGES if image != now[0]]
    if options.method != "procrustes" and options.text_shrinkage is None:
        yield lambda now: [(now[0], text, *now[2:]) for text in TEXT_SHRINKAGES if text != now[1]]
    if options.method == "cca":
        yield lambda now: [(*now[:2], *powers) for powers in options.powers if powers != now[2:]]


def _maps(moments: Moments, method: str, settings: Settings) -> LinearMaps:
    image, text, image_power, text_power = settings
    if method == "ridge":
        return ridge(moments, text)
    if method == "procrustes":
        return procrustes(moments)
    return cca(moments, image, text).weighted(image_power, text_power)


def _facts(method: str, settings: Settings) -> dict[str, Any]:
    image, text, image_power, text_power = settings
    if method == "procrustes":
        return {"method": method}
    if method == "ridge":
        return {"method": method, "text_shrinkage": text}
    powers = {"image_power": image_power, "text_power": text_power}
    return {"method": method, "image_shrinkage": image, "text_shrinkage": text} | powers


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that settings are chosen on: image features [B, D], text vectors [N, W] and the image of each text."""

    images: Float[np.ndarray, "B D"]
    texts: Float[np.ndarray, "N W"]
    owner: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, blocks: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> HeldOutPairs:
        """All pairs of these blocks."""
        images, texts, counts = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return cls(images, texts, np.repeat(np.arange(len(images)), counts))

    def features(self, maps: LinearMaps) -> tuple[Float[Tensor, "B K"], Float[Tensor, "N K"]]:
        """Both sides in the shared space, of length one."""
        images = self.images - maps.image_mean
        images = images if maps.image is None else images @ maps.image
        texts = (self.texts - maps.text_mean) @ maps.text
        return normalize(torch.from_numpy(images).float()), normalize(torch.from_numpy(texts).float())

    def recall(self, maps: LinearMaps) -> float:
        """The mean of recall@1, 5 and 10, both ways."""
        figures = retrieval(*self.features(maps), torch.from_numpy(self.owner))
        ways = [figures[way] for way in ("text_to_image", "image_to_text")]
        return float(np.mean([way[f"recall@{k}"] for way in ways for k in (1, 5, 10)]))

    def scale(self, maps: LinearMaps) -> float:
        """The factor on the scores with the lowest contrastive loss, of the images and a text of each."""
        images, texts = self.features(maps)
        _, first = np.unique(self.owner, return_index=True)
        scores = texts[torch.from_numpy(first)] @ images.T
        target = torch.arange(len(images))

        def loss(scale: float) -> float:
            both = (
                nn.functional.cross_entropy(scale * scores, target),
                nn.functional.cross_entropy(scale * scores.T, target),
            )
            return float(both[0] + both[1])

        return min(SCALES, key=loss)


@torch.no_grad()
def set_heads(model: LiT, maps: LinearMaps) -> None:
    """Have the model's heads compute the maps, whatever its fixed map of image features, (x − center) @ whitening, is.

    Without an image head, texts are mapped to where that fixed map has their images.
    """
    offset = model.center.cpu().double().numpy() - maps.image_mean
    whitening = None if model.whitening is None else model.whitening.cpu().double().numpy()
    if maps.image is None:
        whitening = np.eye(len(offset)) if whitening is None else whitening
        weights = maps.text @ whitening
        _set(model.text_head, weights, -maps.text_mean @ weights - offset @ whitening)
        return
    _set(model.text_head, maps.text, -maps.text_mean @ maps.text)
    weights = maps.image if whitening is None else np.linalg.solve(whitening, maps.image)
    _set(model.image_head, weights, offset @ maps.image)


def _set(head: nn.Module, weights: np.ndarray, bias: np.ndarray) -> None:
    """The head's weights, of directions that pairs are too few for zeros; of more than it has, the first."""
    assert isinstance(head, nn.Linear)
    weights, bias = weights[:, : head.out_features], bias[: head.out_features]
    size = HEAD_SIZE / max(float(np.sqrt(np.square(weights).mean())), 1e-30)
    head.weight.zero_()
    head.bias.zero_()
    head.weight[: weights.shape[1]] = torch.from_numpy(size * weights.T).float().to(head.weight)
    head.bias[: len(bias)] = torch.from_numpy(size * bias).float().to(head.bias)
