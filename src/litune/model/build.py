"""The model to tune, made out of a config: both towers' parts, their heads, the fixed map, the tokenizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from litune import distributed
from litune.config import TuneConfig
from litune.devices import pick_bfloat16
from litune.errors import ConfigError
from litune.image.registry import ImageTower, load_image_tower, with_random_weights
from litune.model.heads import make_head
from litune.model.lit import LiT
from litune.model.run_folder import MODEL, load, load_without_text
from litune.progress import say
from litune.sharding import Rows, share
from litune.text.registry import USE_M3, TextSpec, TextTower, make_text_tower, parse_text_spec, text_layout
from litune.text.rows import DrawnRows, StoredRows, hf_files, hf_names, without_weights
from litune.text.tokenizers import Tokenizer, find_tokenizer, train_tokenizer
from litune.text.use_m3 import use_tokenizer

CPU = torch.device("cpu")
PAPER_TOKENS, FITTED_TOKENS = 16, 32
PAPER_RATE, FITTED_RATE = 1e-3, 5e-4
TEMPERATURE_RATE, FITTED_TEMPERATURE_RATE = 30.0, 3.0
FITTED_FEATURE_DROPOUT = 0.3
LOG_10 = math.log(10)
"""The paper's start of the temperature."""


@runtime_checkable
class Store(Protocol):
    """What a model is told of the feature store that it is tuned on."""

    @property
    def path(self) -> Path:
        """Where it is, for messages."""

    @property
    def width(self) -> int:
        """The width D of its features."""

    @property
    def tower(self) -> dict[str, Any] | None:
        """The provenance of the tower that made them; None where it is unknown."""


@runtime_checkable
class TunedImages(Protocol):
    """The images to tune on, as a `Selection` has them."""

    @property
    def store(self) -> Store:
        """The store that knows their tower."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[np.ndarray]:
        """Their raw features, block by block, [rows, D] each."""


def text_spec(config: TuneConfig) -> TextSpec:
    """The text tower that is asked for, pre-trained or from scratch as --locking says."""
    spec = parse_text_spec(config.text_tower)
    letter = config.locking[1] if config.locking else None
    if spec.kind == USE_M3 and letter not in (None, "L"):
        raise ConfigError(f"--locking {config.locking} wants a text tower to tune, use-m3 is always locked: write LL")
    if letter == "u" and spec.kind == "run":
        raise ConfigError(f"--locking {config.locking} wants a text tower from scratch, {spec.spec} is tuned already")
    if letter == "u":
        return dataclasses.replace(spec, pretrained=False)
    if letter is not None and not spec.pretrained:
        raise ConfigError(
            f"--locking {config.locking} wants a pre-trained text tower, {spec.spec} is from scratch: "
            f"write {config.locking[:1] if config.locking else ''}u"
        )
    return spec


def started_from(spec: TextSpec, config: TuneConfig) -> LiT | None:
    """The run whose text tower is tuned further; None where none is named."""
    if spec.kind != "run":
        return None
    start = load_without_text(spec.name) if shares(spec, config) else load(spec.name, device="cpu")
    if config.pooling not in ("auto", start.text.pooling) or config.dropout is not None:
        raise ConfigError(f"{spec.spec} keeps its pooling and its dropout: leave out --pooling and --dropout")
    if read_tokens(config) > start.text.max_positions:
        raise ConfigError(
            f"--max-tokens {read_tokens(config)} is more than the {start.text.max_positions} positions of {spec.spec}"
        )
    return start


def make_tokenizer(spec: TextSpec, config: TuneConfig, captions: Iterable[str], start: LiT | None = None) -> Tokenizer:
    """The text tower's own tokenizer (that of the run `start`), the one asked for, or one trained on the captions."""
    if config.tokenizer and spec.pretrained:
        raise ConfigError(f"--tokenizer is for towers from scratch: {spec.spec} was trained with its own")
    if spec.kind == USE_M3:
        return Tokenizer(use_tokenizer(), text_layout(spec), read_tokens(config))
    if start is not None:
        return Tokenizer(start.tokenizer.backend, start.tokenizer.layout, read_tokens(config))
    where = config.tokenizer or spec.tokenizer
    backend = find_tokenizer(where) if where else train_tokenizer(captions, config.vocab_size)
    return Tokenizer(backend, text_layout(spec), read_tokens(config))


def starts_fitted(config: TuneConfig, spec: TextSpec) -> bool:
    """Whether tuning starts from a fit. Raises `ConfigError` where that is asked for and can't be."""
    why = _why_not(config, spec)
    if config.start == "fit" and why:
        raise ConfigError(f"--start fit {why}: use --start random")
    return config.start != "random" and not why


def _why_not(config: TuneConfig, spec: TextSpec) -> str | None:
    """Why tuning can't start from a fit; None where it can."""
    if spec.kind == "run" and config.locking != "LL":
        return "is for text towers as they were pre-trained, and a run has its heads already"
    if not spec.pretrained:
        return "needs a text tower that is pre-trained"
    if not config.locked:
        return "needs a locked image tower, whose features are stored"
    if config.text_head != "linear" or config.image_head not in ("auto", "linear", "none"):
        return "makes linear heads: leave out --text-head, and let --image-head be linear or none"
    if config.image_negatives:
        return "gives images a head, which --image-negatives can't have"
    if config.shard:
        return "can't be computed with --shard"
    return None


def with_defaults(config: TuneConfig, spec: TextSpec) -> TuneConfig:
    """The config with what its defaults are for its start: learning rates, a caption's tokens, dropout.

    A fit is not to be unlearned at once, its temperature was chosen, and a frozen tower is to see whole captions.
    """
    fitted = starts_fitted(config, spec)
    defaults: dict[str, Any] = {
        "max_tokens": FITTED_TOKENS if fitted else PAPER_TOKENS,
        "learning_rate": FITTED_RATE if fitted else PAPER_RATE,
        "temperature_rate": FITTED_TEMPERATURE_RATE if fitted else TEMPERATURE_RATE,
        "feature_dropout": FITTED_FEATURE_DROPOUT if fitted else 0.0,
    }
    return dataclasses.replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})


def read_tokens(config: TuneConfig) -> int:
    """How many tokens of a caption are read, at most; the paper's, of a config without `with_defaults`."""
    return config.max_tokens or PAPER_TOKENS


def peak_rate(config: TuneConfig) -> float:
    """The peak learning rate; the paper's, of a config without `with_defaults`."""
    return config.learning_rate or PAPER_RATE


def make_model(
    train: TunedImages,
    spec: TextSpec,
    tokenizer: Tokenizer,
    config: TuneConfig,
    start: LiT | None = None,
    device: torch.device = CPU,
) -> LiT:
    """The model to tune: both towers' parts, their heads, and the fixed map of a locked tower's features.

    The text tower of the run `start`, where there is one, and those of its heads that fit. With --shard the text tower
    is on `device` and shared by the ranks.
    """
    make_text = partial(
        make_text_tower,
        vocab_size=tokenizer.vocab_size,
        max_tokens=read_tokens(config),
        pooling=config.pooling,
        dropout=config.dropout,
    )
    if shares(spec, config):
        text = shared_text_tower(spec, make_text, config, start, device)
    else:
        text = start.text if start is not None else make_text(spec)
    if config.gradient_checkpointing:
        text.set_gradient_checkpointing()
    store = train.store
    image = None if config.locked else unlocked_tower(store, config)
    image_width = store.width if image is None else output_width(image)
    fitted = starts_fitted(config, spec)
    own_space = config.locked and not fitted
    image_head = ("none" if own_space else "linear") if config.image_head == "auto" else config.image_head
    if fitted and image_head == "linear" and config.dim is None:
        dim = fitted_dim(image_width, text.width, len(train))
    else:
        dim = shared_dim(config, image_head, image_width, text.width)
    image_map = config.image_map if config.locked else "none"
    model = LiT(
        text,
        make_head(config.text_head, text.width, dim),
        make_head(image_head, image_width, dim),
        tokenizer,
        image_width=image_width,
        dim=dim,
        logit_scale=_start_of_scale(config, start),
        logit_bias=config.logit_bias if config.loss == "sigmoid" else None,
        image_map=image_map,
        image_provenance=store.tower if image is None else image.provenance,
        image=image,
    )
    if start is not None:
        keep_heads(spec, start, model)
    if image_map != "none":
        mean, covariance = moments(train, covariance=model.whitening is not None)
        model.center.copy_(torch.from_numpy(mean))
        if model.whitening is not None:
            model.whitening.copy_(torch.from_numpy(whitening(covariance, config.shrinkage)))
    return model


def shares(spec: TextSpec, config: TuneConfig) -> bool:
    """Whether the ranks share the text tower, so that none has all of it."""
    return config.shard and distributed.world_size() > 1 and spec.kind != USE_M3


def shared_text_tower(
    spec: TextSpec, make: Callable[[TextSpec], TextTower], config: TuneConfig, start: LiT | None, device: torch.device
) -> TextTower:
    """The text tower of `spec`, or of the run `start`, which is shared by the ranks on `device` and never whole.

    Weights are those of a tower that is not shared: each rank reads its rows, or draws as for the whole tower.
    """
    rows: Rows
    if start is not None:
        tower = start.text
        rows = StoredRows([Path(spec.name) / MODEL], tower, lambda name: [f"text.{name}"])
    elif spec.pretrained:
        with without_weights():
            tower = make(dataclasses.replace(spec, pretrained=False))
        rows = StoredRows(hf_files(spec.name), tower, hf_names(tower))
    else:
        drawn = DrawnRows()
        with without_weights(drawn):
            tower = make(spec)
        rows = drawn.rows
    tower.set_token_table(tower.token_table())  # T5 has two modules with one table: FSDP2 shares modules
    # Layers on the CPU take float32 weights for some of what they do in bfloat16.
    bfloat16 = pick_bfloat16(config.precision, device) and device.type != "cpu"
    share(tower, [tower.token_table(), *tower.layers], rows, device, bfloat16=bfloat16)
    tower.shared = True
    return tower


def _start_of_scale(config: TuneConfig, start: LiT | None) -> float:
    if config.logit_scale is not None:
        return config.logit_scale
    return LOG_10 if start is None else start.logit_scale.item()


def keep_heads(spec: TextSpec, start: LiT, model: LiT) -> None:
    """Go on with those heads of a run that are of the same kind and size as the model's."""
    for name in ("text_head", "image_head"):
        theirs, ours = start.get_submodule(name), model.get_submodule(name)
        shapes, wanted = ({k: v.shape for k, v in head.state_dict().items()} for head in (theirs, ours))
        if shapes and shapes == wanted:
            ours.load_state_dict(theirs.state_dict())
        elif shapes or wanted:
            say(f"the {name.replace('_', ' ')} begins anew: that of {spec.spec} is of another kind or size")


def shared_dim(config: TuneConfig, image_head: str, image_width: int, text_width: int) -> int:
    """The shared dimension: that of the side without a head, which is not to be changed, or what is asked for."""
    fixed = {"image": image_width} if image_head == "none" else {}
    if config.text_head == "none":
        fixed["text"] = text_width
    for side, width in fixed.items():
        if config.dim not in (None, width):
            raise ConfigError(f"--dim {config.dim} needs a head on the {side} side: without one it is {width}")
    if len(set(fixed.values())) > 1:
        raise ConfigError(
            f"without heads the towers' widths must be equal, they are {image_width} (image) and {text_width} (text): "
            "give one side a head"
        )
    return config.dim or next(iter(fixed.values()), image_width)


def fitted_dim(image_width: int, text_width: int, images: int) -> int:
    """The shared dimension of heads that begin with a fit: the directions that so many images can have."""
    return max(1, min(image_width, text_width, images - 1))


def unlocked_tower(store: Store, config: TuneConfig) -> ImageTower:
    """The image tower to train from pixels: pre-trained (U), or with the weights of the seed (u)."""
    assert config.locking is not None
    spec = config.image_tower or (store.tower or {}).get("spec")
    if spec is None:
        raise ConfigError(f"{store.path} does not know its image tower: name the one to train with --image-tower")
    if spec.startswith("run:"):
        raise ConfigError(f"the image tower of a run ({spec}) can't be tuned further: name one with --image-tower")
    if config.locking[0] == "u":
        spec = with_random_weights(spec)
    elif "init=random" in spec:
        raise ConfigError(f"--locking {config.locking} wants a pre-trained image tower, {spec} is from scratch")
    tower = load_image_tower(spec, locked=False)
    if config.gradient_checkpointing:
        tower.set_gradient_checkpointing(True)
    return tower


def output_width(tower: ImageTower) -> int:
    """The width of a tower's features, seen on an empty picture."""
    from PIL import Image

    pixels = torch.from_numpy(np.asarray(tower.preprocess(Image.new("RGB", (64, 64))))[None])
    return int(tower.encode(pixels).shape[1])


def moments(images: TunedImages, *, covariance: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D] and covariance [D, D] of the images' raw features, summed in float64 block by block.

    Without `covariance`, which costs D times as much as the mean, that is zero.
    """
    width = images.store.width
    total, products = np.zeros(width), np.zeros((width, width))
    for block in images.blocks():
        values = block.astype(np.float64)
        total += values.sum(axis=0)
        if covariance:
            products += values.T @ values
    mean = total / len(images)
    return mean, products / len(images) - np.outer(mean, mean) if covariance else products


def whitening(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    """The symmetric matrix W [D, D] with W (C + s·I) W = I, where s is `shrinkage` times the mean variance.

    Directions whose variance is far above s come out with variance one; those far below keep their shares, so that
    noise is not blown up (ZCA whitening with ridge shrinkage).
    """
    variances, directions = np.linalg.eigh(covariance)
    floor = shrinkage * max(float(variances.mean()), 1e-12) + 1e-12
    inverse_roots = 1 / np.sqrt(np.maximum(variances, 0) + floor)
    matrix: np.ndarray = (directions * inverse_roots) @ directions.T
    return matrix
