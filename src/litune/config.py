"""One frozen dataclass per command: every setting, its default and its help, in one place.

The command line is generated from these classes (a field's docstring is its `--help`), a run saves its
config whole, and each command is a Python function with the same name and the same settings. Nothing here
imports torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, ParamSpec, TypeVar, cast

from litune.errors import ConfigError
from litune.schedules import parse_duration, parse_unlock
from litune.settings import (
    A_FILE,
    AN_ADDRESS,
    BELOW_ONE,
    COSINE,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    WITHIN_ONE,
    Place,
    Repeated,
    at_least,
    at_most,
    check,
    settings_of,
)

Settings = ParamSpec("Settings")
Config = TypeVar("Config")
Result = TypeVar("Result")

Device = Literal["auto", "cpu", "cuda", "mps"]
# A path, a URL or a pattern: as it was given, since a Path would make one slash of the two in s3://.
Address = Annotated[str | Path, AN_ADDRESS]
Precision = Literal["auto", "float32", "bfloat16"]
Natural = Annotated[int, at_least(0)]
Count = Annotated[int, at_least(1)]
Tokens = Annotated[int, at_least(2)]
Share = Annotated[float, SHARE]
BelowOne = Annotated[float, BELOW_ONE]
Cosine = Annotated[float, COSINE]
Positive = Annotated[float, POSITIVE]
Finite = Annotated[float, FINITE]
Rate = Annotated[float, NOT_NEGATIVE, FINITE]
Limit = Annotated[float, POSITIVE, FINITE]
NewFile = Annotated[Path, A_FILE]


class Checked:
    """What all configs are: every setting is within the bounds that stand beside it."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EmbedConfig(Checked):
    """Encode every image once, with a locked image tower, into a feature store.

    An interrupted run goes on where it was with the same command.
    """

    pairs: Annotated[Address, Place("PAIRS")]
    """What to embed: a folder of images with a table of captions in it or beside it; the table itself (.csv, .tsv,
    .jsonl, .parquet); a tree with one folder per class; a folder of images, with .txt files beside them or without
    captions; webdataset shards ('shards/{00000..00099}.tar'); Parquet or Arrow files with pictures in them; COCO's,
    Karpathy's or Flickr's captions; or a URL of one of these (s3://, hf://). Also a feature store or a saved dataset
    of Hugging Face's, on this machine."""
    image_tower: str
    """The image tower: efficientnet-lite0, timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME/TAG, onnx:FILE,
    python:MODULE:FUNCTION, or run:RUN (the image tower that a run has trained)."""
    out: Path
    """The feature store to write (a folder)."""
    features: str = "pooled"
    """What the features are. pooled: as the tower pools; cls: its class token; mean: the mean of its patches;
    layers:6,12 (also cls:6,12, mean:6,12): the pooled outputs of these blocks, counted from 1. Several are
    concatenated: cls+mean. +views:2 (5, 10) averages over mirror images and crops, +size:320 takes pictures of that
    size. From then on they are the tower's: whatever uses the store encodes pictures the same way."""
    images: Address | None = None
    """The folder that the table's image paths are relative to, if litune should not look for it."""
    image_column: str | None = None
    """The table's column of image paths; by default the first of image, image_path, file_name, filename, …"""
    caption_column: tuple[str, ...] = ()
    """The table's column of captions; by default the first of caption, captions, text, title, … Give several
    (title description tags) to keep each as a text field of its own (see the fields of litune tune)."""
    split_column: str = "split"
    """The table's column of splits (train, val, …), if it has one."""
    lang_column: str = "lang"
    """The table's column of languages, if it has one."""
    keep: tuple[str, ...] = ()
    """Further columns, or keys of the metadata beside each picture, to keep in the store; url is kept in any case."""
    split: tuple[str, ...] = ()
    """Take only the images of these splits."""
    lang: tuple[str, ...] = ()
    """Take only the captions in these languages."""
    batch_size: Count | None = None
    """Images that pass through the tower at once; by default 32, and on a CUDA GPU as many as fit its memory and are
    fast, tried before the first ones."""
    workers: Natural = 0
    """Threads that decode images; 0: one per processor core."""
    runtime: Literal["auto", "torch", "onnxruntime", "openvino", "compile"] = "auto"
    """What runs the tower. auto takes the fastest that is installed and whose features agree with torch's in float32
    (mean cosine at least 0.9999), tried once per tower and machine on the first images; with fewer than 512 images,
    torch."""
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Arithmetic of the tower. auto: float32, or bfloat16 where that is faster and agrees. int8 is faster still on
    many processors and less exact; it needs --runtime onnxruntime."""
    store_dtype: Literal["float16", "float32"] = "float16"
    """How features are stored."""
    shard_size: Count = 16384
    """Images in a file of the store, at most: it is closed at the end of a batch, also every few seconds, so that an
    interruption costs seconds of work."""
    max_damaged: Share = 0.01
    """Stop when more than this share of the images or captions, from 0 to 1, can't be used."""
    overwrite: bool = False
    """Remove a store that is already at --out."""
    device: Device = "auto"
    """Where the tower runs."""


@dataclass(frozen=True)
class FetchConfig(Checked):
    """Fetch the images of a list of URLs into webdataset shards, with img2dataset.

    Ends with a report of what could not be had. An interrupted run goes on with the same command.
    """

    urls: Annotated[Address, Place("URLS")]
    """The list: a table (.parquet, .csv, .tsv, .jsonl) with a column of URLs, or a .txt file with one on each line."""
    out: Path
    """The folder to write shards to, which litune embed reads; the report is in its folder fetch/."""
    url_column: str = "url"
    """The table's column of URLs."""
    caption_column: str | None = None
    """The table's column of captions; by default the first of caption, captions, text, title, …, if there is one."""
    keep: tuple[str, ...] = ()
    """Further columns to keep beside each image."""
    image_size: Natural = 384
    """Pixels of the short side: larger images are made so small; 0 keeps every image as it came."""
    threads: Count = 64
    """Downloads at the same time, in each process."""
    processes: Natural = 0
    """Processes; 0: one per processor core."""
    timeout: Positive = 10.0
    """Seconds until a server must answer."""
    seconds: Positive = 60.0
    """Seconds that one image may take."""
    most_bytes: Count = 50_000_000
    """Bytes that one image may have."""
    retries: Natural = 1
    """Further tries for each image."""
    shard_size: Annotated[int, at_least(2)] = 10000
    """URLs in a shard: what an interruption can cost in each process."""
    python: Path | None = None
    """The Python of another environment that img2dataset is installed in; by default litune's own."""
    overwrite: bool = False
    """Remove what was fetched to --out before."""


@dataclass(frozen=True)
class TuneConfig(Checked):
    """Teach a text tower to read a locked image tower, from the features in a store.

    Writes a run folder: the model, its tokenizer, metrics.jsonl and where everything came from. An
    interrupted run goes on from its last checkpoint with the same command.
    """

    store: Annotated[Path, Place("STORE")]
    """A feature store that `litune embed` wrote, or a folder that clip-retrieval wrote."""
    text_tower: str
    """The text tower: minilm, use-m3 (always locked), hf:NAME_OR_FOLDER (pre-trained), hf:NAME_OR_FOLDER?init=random
    (the same architecture from scratch), vit:Ti, S, B, L, H, g (from scratch), or run:RUN (that of a run, with its
    tokenizer and those of its heads that fit)."""
    out: Path
    """The run folder to write."""
    more_stores: Annotated[tuple[Path, ...], Place("STORE...")] = ()
    """Further feature stores of the same image tower, to tune on all of them (see --mix)."""

    # Pairs
    mix: tuple[str, ...] = ("proportional",)
    """How several stores share the batches: proportional (all images in one order, each once an epoch), alternate
    (whole batches of one store each, in turns), or a weight for each store: its share of every batch."""
    texts: tuple[Path, ...] = ()
    """Captions that stand in for those of the stores: Parquet or Arrow files, or folders of them, with the columns
    caption and key (an image's name in the store) or row, and, where wanted, store, lang and field."""
    shuffle: Literal["full", "window"] = "full"
    """The order of the images in an epoch: full, in which every order is as likely; window keeps what is read within
    some hundred steps in few places of the disk, for stores that are much larger than the memory."""
    split: str = "train"
    """Tune on the pairs of this split, where the store has splits."""
    val_split: str = "val"
    """Evaluate on the pairs of this split as tuning goes, where the store has splits; otherwise a held-out
    part of the pairs is used (see --holdout)."""
    holdout: BelowOne = 0.05
    """The share of the images, from 0 to 1, held out for evaluation where the store has no splits (at most 1,000
    images); 0: none."""
    exclude_held_out: bool = False
    """Don't tune on images whose files are held out too (equal bytes, in one store or in several)."""
    lang: tuple[str, ...] = ()
    """Use only captions in these languages."""
    fields: tuple[str, ...] = ()
    """Text fields (title, description, tags, as embedded with several --caption-column) whose losses are summed, one
    caption of each per image and step; by default one caption of any."""

    # Towers and heads
    locking: str | None = None
    """Two letters, image tower first: L locked, U unlocked from its pre-trained weights, u unlocked from scratch.
    LU and Lu tune on stored features; Uu, UU, uU and uu train the image tower from the store's image files; with
    uL, UL or LL the text tower is locked and only its head is tuned. By default LU, or Lu for a text tower from
    scratch."""
    image_tower: str | None = None
    """The image tower to train where it is unlocked (efficientnet-lite0, timm:NAME, hf:NAME_OR_FOLDER, or from scratch
    vit:B/16; ?size=96 for smaller pictures); by default that of the store."""
    start: Literal["auto", "fit", "random"] = "auto"
    """Where heads begin: fit, with the weights that `litune fit` gives them, which needs a pre-trained text tower, a
    locked image tower and linear heads; or random, as in the paper. auto: fit where it can be."""
    image_head: Literal["auto", "none", "linear", "mlp", "gated"] = "auto"
    """A head on the image side, tuned. none keeps a locked tower's own feature space; auto is none on a locked tower
    and linear on an unlocked one and with --start fit; gated is an MLP whose hidden values are gated (SwiGLU)."""
    text_head: Literal["none", "linear", "mlp", "gated"] = "linear"
    """The head of the text side."""
    dim: Count | None = None
    """The shared dimension; by default the width of the side that has no head, else the image tower's."""
    image_map: Literal["none", "center", "whiten"] = "center"
    """A fixed linear map of a locked tower's features before they are normalised, estimated once on the tuning
    images and saved with the run: subtract their mean (features of a CNN after its last ReLU are all positive, so
    that every cosine starts high), or also even out their variances. none: the tower's features as they are, as in
    the paper, and as for every unlocked tower."""
    shrinkage: Rate = 5.0
    """How far whitening holds back: this many times the mean variance is added to every direction's variance."""
    tokenizer: str | None = None
    """For vit: towers, a tokenizer.json, a SentencePiece .model or a folder that has one; by default one is trained on
    the captions."""
    vocab_size: Annotated[int, at_least(8)] = 32000
    """The size of a freshly trained tokenizer, at most."""
    max_tokens: Tokens | None = None
    """Tokens of a caption that are read, at most: by default 16, as in the paper, from a fit 32."""
    pooling: Literal["auto", "first", "mean", "last"] = "auto"
    """How the text tower's tokens become one vector: the first token (BERT), their mean, or the last token;
    auto: what the tower itself declares, else the first token (vit: the last)."""
    dropout: Share | None = None
    """Dropout in the text tower; by default what its own configuration says."""
    feature_dropout: BelowOne | None = None
    """Dropout on the stored image features, once they are centered: by default none, from a fit 0.3, which keeps the
    heads that it begins with from overfitting."""

    # Loss
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """The contrastive loss: cross-entropy both ways over the batch, or SigLIP's binary one over all its pairs."""
    image_to_text: Share = 0.5
    """The weight λ of the image→text direction of the softmax loss; text→image has 1 − λ."""
    logit_scale: Finite | None = None
    """The temperature's start, the logarithm of the scale: by default that of a run whose text tower is tuned on
    (--text-tower run:RUN), else ln 10 as in the paper."""
    logit_bias: Finite = -10.0
    """The start of the sigmoid loss's bias."""
    negatives: Literal["global", "local"] = "global"
    """With several processes, contrast each pair with those of all processes, or of its own alone."""
    mask_duplicates: bool = True
    """Leave equal captions, and several captions of one image, out of each other's negatives."""
    image_negatives: Natural = 0
    """Further images from outside the batch, drawn anew for each step, among which every text must find its own:
    their features are stored, so they cost no encoding. More than there are: all; 0: none. For a locked image tower
    without a head."""

    # How long, and how
    duration: str | None = None
    """How long to tune: 10epochs, 2000steps, 30kpairs; by default 10 epochs, at least 30k and at most 4M pairs; from
    a fit 10 epochs of the images or 2 of the captions, whichever is more, and at most 4M pairs."""
    batch_size: Annotated[int, at_least(2)] = 256
    """Pairs in a batch, over all processes; each is contrasted with all others."""
    micro_batch: Count | None = None
    """Texts that pass through their tower at once; by default 512 on CPUs, on GPUs as many as fit. A larger batch is
    encoded twice (gradient caching): the same gradient, in a micro-batch's memory."""
    image_micro_batch: Count | None = None
    """The same for the pictures of an unlocked image tower; by default 64 on CPUs, on GPUs as many as fit."""
    gradient_checkpointing: bool = False
    """Keep few activations of the text tower, and of an unlocked image tower, for the backward pass and compute the
    others again: the same gradient in less memory, a third more time."""
    shard: bool = False
    """Share the text tower's weights, gradients and optimizer states among the processes (FSDP2), none of which ever
    holds the whole tower: for towers of which one device can't hold all of these. The result is the same, steps take
    longer."""
    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    """adamw; adafactor as in "Scaling Vision Transformers"; lion, with about a tenth of adamw's learning rate."""
    learning_rate: Limit | None = None
    """The peak learning rate: by default 1e-3, from a fit 5e-4."""
    head_rate: Rate = 1.0
    """The learning rate of the heads, as a multiple of --learning-rate. On a thousand pairs, a lower rate with
    --head-rate 10 overfits less."""
    temperature_rate: Rate | None = None
    """The learning rate of the temperature and bias, as a multiple of --learning-rate: by default 30, since in some
    hundred steps the temperature could not leave its start else, from a fit, which has chosen it, 3; 1 in the paper."""
    rates: tuple[str, ...] = ()
    """Learning rates by name, as PATTERN=MULTIPLE: text.*=0.1, image.*blocks.11.*=0.01; 0 locks. The first pattern
    that matches a parameter's name (* ? [0-5]) counts. Names begin with text., text_head., image. or image_head."""
    weight_decay: Rate = 1e-4
    """Decoupled weight decay of the weight matrices. It follows the schedule but is not multiplied by the
    learning rate (PyTorch's AdamW would need --weight-decay / --learning-rate)."""
    beta1: BelowOne = 0.9
    """The decay of the momentum."""
    beta2: BelowOne | None = None
    """The decay of the second moment; by default 0.999, for lion 0.99."""
    clip_norm: Positive = 1.0
    """Clip the gradient to this global norm."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: stop with its number, or skip it (10 in a row stop the run; a GPU
    is waited for in every step, to know it in time)."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """The learning rate after its warm-up: a cosine to zero, constant, or the reciprocal square root."""
    warmup: str = "5%"
    """How long the learning rate rises: 5%, 500steps, 1epochs, 10kpairs."""
    cooldown: str = "0%"
    """How long it falls linearly to zero at the end, for constant and rsqrt."""
    timescale: str = "10ksteps"
    """The time after which rsqrt has fallen to 1/√2."""

    # The image tower from pixels
    image_rate: Rate = 1.0
    """The learning rate of an unlocked image tower, as a multiple of --learning-rate."""
    unlock: str = "always"
    """When an unlocked image tower is tuned: always, after:50% (locked until then), ramp:50% (a sigmoid ramp of its
    rate), cycles:4 (locked and unlocked by turns)."""
    augment: Literal["inception", "none"] = "inception"
    """Of the pictures of an unlocked image tower: random parts of them (the Inception crop), or all of each."""
    flip: bool = False
    """Mirror half of the pictures. Captions that speak of left and right become wrong."""
    workers: Natural = 0
    """Threads that decode pictures; 0: one per processor core."""
    max_damaged: Share = 0.01
    """Stop when more than this share, from 0 to 1, of the pictures can't be read or of the --texts belongs to no
    image."""

    # The run
    precision: Precision = "auto"
    """Arithmetic of the towers; auto: bfloat16 on processors with AMX or AVX512-bf16 and on GPUs. Losses and
    parameters are float32."""
    evaluations: Natural = 3
    """How often the held-out pairs are evaluated during tuning, spread evenly. The best model so far is kept in
    best/ in the run folder."""
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE] = 60.0
    """Seconds between checkpoints: what an interruption can cost."""
    tensorboard: bool = False
    """Also write what is logged for TensorBoard, into the run folder."""
    seed: Natural = 0
    """The seed of everything random. The same seed gives the same weights, bit for bit, on one machine."""
    overwrite: bool = False
    """Remove a run that is already at --out."""
    device: Device = "auto"
    """Where the towers are tuned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard and self.optimizer == "adafactor":
            raise ConfigError("--optimizer adafactor needs whole matrices: with --shard use adamw or lion")
        if self.duration is not None:
            parse_duration(self.duration, "duration", run_length=True)
        for name in ("warmup", "cooldown", "timescale"):
            parse_duration(getattr(self, name), name)
        parse_unlock(self.unlock, "unlock")
        parse_mix(self.mix, 1 + len(self.more_stores))
        parse_rates(self.rates)
        if self.locking is not None and not re.fullmatch("[LUu]{2}", self.locking):
            raise ConfigError(
                f"--locking is {self.locking!r}: write two letters, the image tower's first, each L (locked), "
                "U (unlocked, pre-trained) or u (unlocked, from scratch)"
            )
        if self.locked:
            self._refuse_pixel_settings()
        elif self.image_negatives:
            raise ConfigError("--image-negatives needs a locked image tower: of others no features are stored")
        if self.image_negatives and (self.image_head not in ("auto", "none") or self.loss != "softmax"):
            raise ConfigError("--image-negatives is for the softmax loss without an image head")

    @property
    def stores(self) -> tuple[Path, ...]:
        """All feature stores to tune on."""
        return (self.store, *self.more_stores)

    @property
    def locked(self) -> bool:
        """Whether the image tower is locked: tuning reads stored features."""
        return self.locking is None or self.locking[0] == "L"

    def _refuse_pixel_settings(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("image_tower", "image_rate", "unlock", "augment", "flip"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for an unlocked image tower: the locked one's features are stored; "
                    "unlock it with --locking UU"
                )


@dataclass(frozen=True)
class FitConfig(Checked):
    """Fit linear heads in closed form, in seconds: both towers are locked, every caption is encoded once.

    Writes an ordinary run. The captions' vectors are kept in the store's folder for later fits, and for litune tune
    --start fit, with the same text tower.
    """

    store: Annotated[Path, Place("STORE")]
    """A feature store that `litune embed` wrote, or a folder that clip-retrieval wrote."""
    text_tower: str
    """The pre-trained text tower: minilm, use-m3, hf:NAME_OR_FOLDER, or run:RUN (that of a run)."""
    out: Path
    """The run folder to write."""
    more_stores: Annotated[tuple[Path, ...], Place("STORE...")] = ()
    """Further feature stores of the same image tower, to fit to all of them."""
    method: Literal["cca", "ridge", "procrustes"] = "cca"
    """cca: canonical correlations, with directions weighted by them; ridge: a regression of image features on texts,
    which leaves the image tower's space as it is; procrustes: rotations alone."""
    dim: Count | None = None
    """The shared dimension, at most the width of the narrower tower (the default); with ridge the image tower's."""
    image_shrinkage: Limit | None = None
    """What is added to the variance of every direction of the image features, as a multiple of their mean variance; by
    default chosen on held-out pairs."""
    text_shrinkage: Limit | None = None
    """The same for the texts' vectors."""
    texts: tuple[Path, ...] = ()
    """Captions that stand in for those of the stores (see litune tune)."""
    split: str = "train"
    """Fit to the pairs of this split, where the store has splits."""
    val_split: str = "val"
    """Evaluate on the pairs of this split, where the store has splits; otherwise on a held-out part (see --holdout)."""
    holdout: BelowOne = 0.05
    """The share of the images, from 0 to 1, held out for evaluation where the store has no splits (at most 1,000
    images); 0: none."""
    exclude_held_out: bool = False
    """Don't fit to images whose files are held out too (equal bytes, in one store or in several)."""
    lang: tuple[str, ...] = ()
    """Use only captions in these languages."""
    fields: tuple[str, ...] = ()
    """Use only captions of these text fields."""
    max_tokens: Tokens = 32
    """Tokens of a caption that are read, at most."""
    pooling: Literal["auto", "first", "mean", "last"] = "auto"
    """How the text tower's tokens become one vector (see litune tune)."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """The loss that the run is to be tuned with later: sigmoid runs have a bias beside the temperature."""
    precision: Precision = "auto"
    """Arithmetic of the text tower; auto: bfloat16 on processors with AMX or AVX512-bf16 and on GPUs."""
    seed: Natural = 0
    """The seed of which pairs settings are chosen on."""
    overwrite: bool = False
    """Remove a run that is already at --out."""
    device: Device = "auto"
    """Where the text tower runs."""

    @property
    def stores(self) -> tuple[Path, ...]:
        """All feature stores to fit to."""
        return (self.store, *self.more_stores)


def parse_mix(mix: Sequence[str], stores: int) -> Literal["proportional", "alternate"] | tuple[Fraction, ...]:
    """How stores are mixed: by a name, or by a weight for each.

    Raises `ConfigError` for what is neither.
    """
    if tuple(mix) in (("proportional",), ("alternate",)):
        return cast(Literal["proportional", "alternate"], mix[0])
    try:
        weights = tuple(Fraction(one) for one in mix)
    except (ValueError, ZeroDivisionError):
        weights = ()
    if not weights or min(weights) <= 0:
        raise ConfigError(
            f"--mix is {' '.join(mix)!r}: write proportional, alternate, or positive weights, as in 0.7 0.3"
        )
    if len(weights) != stores:
        raise ConfigError(f"--mix is {' '.join(mix)!r}: give a weight for each of the {stores} stores")
    return weights


def parse_rates(rates: Sequence[str]) -> list[tuple[str, float]]:
    """Patterns of parameter names with their learning rate's multiple, out of PATTERN=MULTIPLE.

    Raises `ConfigError` for one that can't be read.
    """
    found = []
    for text in rates:
        pattern, equals, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = -1.0
        if not equals or not pattern or not 0 <= rate < float("inf"):
            raise ConfigError(f"--rates: {text!r} can't be read: write PATTERN=MULTIPLE, as in text.*=0.1")
        found.append((pattern, rate))
    return found


@dataclass(frozen=True)
class EvalConfig(Checked):
    """Measure runs: on the field's evaluation sets or your own, on a store's pairs, on a tree of class folders."""

    run: Annotated[Path, Place("RUN")]
    """The run folder."""
    others: Annotated[tuple[Path, ...], Place("RUN...")] = ()
    """Further runs, to compare with it."""
    store: Path | None = None
    """A feature store whose pairs are retrieved."""
    split: str | None = None
    """Evaluate the pairs of this split; by default, of the whole store."""
    lang: tuple[str, ...] = ()
    """Use only captions in these languages."""
    by_lang: bool = False
    """Also one row per language of the captions."""
    hub_correction: bool = True
    """Also measure retrieval with the hub correction (CSLS), in rows of its own, where the run has it on."""
    classes: Path | None = None
    """A tree with one folder of images per class, classified zero-shot (also a store made from such a tree)."""
    templates: Annotated[tuple[str, ...], Repeated()] = ()
    """A template that puts a class name into a sentence, as in "a photo of a {}."; repeat for several, or give
    a text file with one per line. By default the bare name and "a photo of a {}.", for --tasks the --template-set."""

    # Evaluation sets
    tasks: tuple[str, ...] = ()
    """Evaluation sets: names (imagenet1k, coco, …), NAME:LANG, groups (imagenet, vtab, vtab-natural, vtab-specialized,
    vtab-structured, retrieval), YAML files that describe your own, or available: all that are in --data."""
    data: Path | None = None
    """The folder with the evaluation sets, each under its name. Nothing is downloaded."""
    features: Path | None = None
    """Where the features of sets and of --classes are kept, once per set and image tower; by default in the user's
    cache."""
    template_set: Literal["lit", "clip", "short", "bare"] = "lit"
    """The templates of --tasks: clip takes the set's own (80 for ImageNet), lit these and the bare name, as the LiT
    paper; short eight for all sets; bare the name alone."""
    canonical: bool = True
    """Write class names and templates in lower case and without punctuation, as big_vision does."""
    text_precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the text tower for --tasks. bfloat16 is faster where the processor has units for it, and moves a
    few images of a thousand."""
    kshot: Natural = 0
    """Also learn a ridge regression on the image features from this many training images per class; 0: none."""
    probes: bool = False
    """Also learn a linear probe and nearest neighbours on the image features from the set's training images."""
    calibration: bool = True
    """Measure how far the probabilities of --tasks can be believed."""
    contamination: bool = True
    """Look for the images of --tasks in the stores that the run was tuned on, where they are still there."""
    out: Path | None = None
    """A folder for the reports on --tasks and --store: tables, intervals, what was confused with what."""
    overwrite: bool = False
    """Replace the reports that are already in --out, and a --json file that is already there."""

    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    json: NewFile | None = None
    """Also write the results to this file, as JSON."""
    max_damaged: Share = 0.01
    """Stop when more than this share of the images, from 0 to 1, can't be read."""
    device: Device = "auto"
    """Where the towers run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store is None and self.classes is None and not self.tasks:
            raise ConfigError(
                "nothing to evaluate: give --store for retrieval, --classes for classification, or --tasks"
            )
        if self.out is not None and self.classes is not None:
            raise ConfigError("--out reports on --tasks and --store: give the folder of --classes as a task in YAML")
        if self.out is not None and self.store is None and not self.tasks:
            raise ConfigError("--out reports on --tasks and --store: give one of both")


@dataclass(frozen=True)
class ClassifyConfig(Checked):
    """Classify images with any labels, without training data for them."""

    run: Annotated[Path, Place("RUN")]
    """The run folder."""
    images: Annotated[tuple[Address, ...], Place("IMAGE...")]
    """The images: files, URLs, or whatever litune embed reads."""
    labels: tuple[str, ...]
    """The labels to choose from; or a text file (.txt) with one per line."""
    templates: Annotated[tuple[str, ...], Repeated()] = ()
    """A template that puts a label into a sentence, as in "a photo of a {}."; repeat for several, or give a text
    file with one per line. By default the bare label and "a photo of a {}."."""
    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    json: NewFile | None = None
    """Also write the probabilities to this file, as JSON."""
    overwrite: bool = False
    """Replace a --json file that is already there."""
    device: Device = "auto"
    """Where the towers run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise ConfigError("no image was given: name one or more behind the run")
        if not self.labels:
            raise ConfigError("no label was given: give two or more after --labels")
        if not all(label.strip() for label in self.labels):
            raise ConfigError("a label of --labels is empty: leave it out")


@dataclass(frozen=True)
class SearchConfig(Checked):
    """Find the images of a feature store that match a text, a picture, or both together."""

    run: Annotated[Path, Place("RUN")]
    """The run folder."""
    store: Annotated[Path, Place("STORE")]
    """The feature store to search."""
    query: Annotated[str, Place("QUERY")] = ""
    """What to look for, in free form; may be left out where --image is given."""
    image: Address | None = None
    """Look for what is like this picture, or with a text beside it, like both: "like this, but at night"."""
    text_weight: Finite = 1.0
    """The weight of the text in a search for both; a negative one means less like it."""
    image_weight: Finite = 1.0
    """The weight of the picture in a search for both."""
    top: Count = 5
    """How many images to show."""
    where: tuple[str, ...] = ()
    """Search only images that meet these conditions on the store's columns: split=val "width>=640" "captions~dog".
    Operators are = != < <= > >= and ~ (contains)."""
    captions: bool = False
    """Find captions instead of images."""
    index: Literal["auto", "exact", "approximate"] = "auto"
    """exact looks at every image; approximate looks into the nearest cells of an index, which is built and kept in the
    store's folder where there is none (extra search); auto: approximate where one was built and there are more than
    200,000 images."""
    hub_correction: bool = True
    """Rank with the hub correction (CSLS) where the run has it on; scores are shown as cosines all the same."""
    sheet: NewFile | None = None
    """Also draw the found images into this file, a PNG."""
    json: NewFile | None = None
    """Also write what was found to this file, as JSON."""
    overwrite: bool = False
    """Replace a --sheet or --json file that is already there."""
    image_tower: str | None = None
    """The image tower for --image, where the run does not name one that can be loaded."""
    device: Device = "auto"
    """Where the towers run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.query.strip() and self.image is None:
            raise ConfigError("the query is empty: say what to look for, or give --image")
        if self.captions and self.sheet is not None:
            raise ConfigError("--sheet draws images, --captions finds texts: leave one of them out")


@dataclass(frozen=True)
class ServeConfig(Checked):
    """Serve a run over HTTP: encoding, matching, classification and search as a JSON API, and a page in the browser.

    Ctrl-C or SIGTERM stops it after the requests that are running.
    """

    run: Annotated[Path, Place("RUN")]
    """The run folder."""
    images: Path | None = None
    """The feature store whose images are searched, classified and shown."""
    host: str = "127.0.0.1"
    """The address to listen on. The default is reachable from this machine alone."""
    port: Annotated[int, at_least(0), at_most(65535)] = 8000
    """The port to listen on; 0: any free one, which is printed."""
    token: str | None = None
    """Ask every request of the API for this bearer token; by default that in LITUNE_TOKEN, which other users of the
    machine can't see in a list of processes."""
    allow_host: tuple[str, ...] = ()
    """Further names that requests may address the server by. On a loopback address localhost and the address are
    taken, so that no web page can reach it by a name of its own; on other addresses every name is, unless some are
    given here."""
    index: Literal["auto", "exact", "approximate"] = "auto"
    """How --images is searched, as with litune search; approximate needs an index that was built."""
    hub_correction: bool = True
    """Rank with the hub correction (CSLS) where the run has it on; scores are shown as cosines all the same."""
    batch: Count = 64
    """Texts or pictures that are encoded at once, at most."""
    batch_ms: Rate = 2.0
    """Milliseconds that a request waits, at most, for others to be encoded with."""
    queue: Count = 1024
    """Texts, pictures and searches that may wait; beyond it requests are answered with 429."""
    upload_mb: Limit = 32.0
    """The largest upload, in megabytes."""
    pixels_m: Limit = 50.0
    """The largest picture, in millions of pixels."""
    body_seconds: Limit = 20.0
    """Seconds that a request may take to arrive."""
    cache_mb: Limit = 64.0
    """Megabytes of features of texts that are kept, and as much for thumbnails."""
    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    threads: Natural = 0
    """Threads that the towers compute with; 0: as torch chooses."""
    device: Device = "auto"
    """Where the towers run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]{8,}", self.token):
            raise ConfigError("--token must have at least 8 characters, visible ASCII ones: it is sent in a header")


@dataclass(frozen=True)
class ImportConfig(Checked):
    """Make a run of one of the released LiT checkpoints (LiT-B16B, B16B_2, L16L, L16S, L16Ti).

    Which one it is, its shapes tell. The run has its own image tower: embed with --image-tower run:RUN.
    """

    checkpoint: Annotated[Path, Place("FILE")]
    """The .npz file."""
    vocab: Path
    """The vocabulary that was released with it: a WordPiece .txt (B16B, B16B_2, L16L) or a SentencePiece .model
    (L16S, L16Ti)."""
    out: Path
    """The run folder to write."""
    max_tokens: Tokens | None = None
    """Tokens of a text that are read, at most; by default 16, as these models were tuned."""
    overwrite: bool = False
    """Remove a run that is already at --out."""


@dataclass(frozen=True)
class QuickstartConfig(Checked):
    """The whole way on real data in minutes, on a CPU: render emoji, embed, tune, evaluate, search.

    All data and weights come with the extra `quickstart`: EfficientNet-Lite0 (locked), MiniLM (tuned) and
    OpenMoji pictures with their names.
    """

    out: Path = Path("litune-quickstart")
    """The folder to write. A second run reuses the pictures and features that are there."""
    seed: Natural = 0
    """The seed of everything random."""


@dataclass(frozen=True)
class CompareConfig(Checked):
    """Tune a table of settings, each with several seeds, evaluate every run, and print means and spreads.

    An interrupted comparison goes on where it was with the same command; what is finished is reused.
    """

    file: Annotated[Path, Place("FILE")]
    """A TOML file: the settings of all rows in [base], a [[row]] for each line of the table or a [grid] of values,
    seeds, and what is measured in [eval]."""
    out: Path
    """The folder to write: one run folder per row and seed, table.md and results.json."""
    overwrite: bool = False
    """Tune a row again whose settings are others than those of its run in --out."""


@dataclass(frozen=True)
class InspectConfig(Checked):
    """Say what a tower, a run, a feature store or a released checkpoint is.

    Parameters per part, what is locked, widths, preprocessing, pooling, fingerprint. With --text-tower, also what
    tuning the pair would train, store and need in memory.
    """

    what: Annotated[str, Place("WHAT")]
    """The spec of an image or text tower, a run folder, a feature store, or an .npz file of the released models."""
    text_tower: str | None = None
    """The text tower to tune on this image tower or store."""
    images: Count | None = None
    """How many images there would be; by default those of the store."""
    batch_size: Annotated[int, at_least(2)] = 256
    """Pairs in a batch."""
    max_tokens: Tokens = 16
    """Tokens of a caption."""
    json: NewFile | None = None
    """Also write it to this file, as JSON."""
    overwrite: bool = False
    """Replace a --json file that is already there."""


@dataclass(frozen=True)
class ProbeConfig(Checked):
    """Say how promising a locked image tower is for a set of pairs, before anything is tuned.

    Compares its features with those of a frozen text tower: do images and captions have the same neighbours, does a
    linear map read them, do a few example pairs suffice to match others; and what storing and tuning would take. Give
    the stores of several towers to rank them, or pairs and --features to compare features of one tower on a sample.
    """

    stores: Annotated[tuple[Address, ...], Place("STORE...")]
    """The feature stores, of the same pairs if they are to be compared. With --features, pairs as litune embed takes
    them, or a store whose pictures are still there."""
    features: tuple[str, ...] = ()
    """Embed a sample of the pairs with each of these features (see litune embed) and compare them with the first, as in
    --features pooled cls+mean views:2."""
    image_tower: str | None = None
    """The image tower that --features are of; of a feature store by default its own."""
    text_tower: str = "minilm"
    """The frozen text tower: minilm, use-m3 or hf:NAME_OR_FOLDER."""
    split: str = "train"
    """Learn from the pairs of this split, where a store has splits."""
    val_split: str = "val"
    """Measure on the pairs of this split, where a store has splits; otherwise on a held-out part."""
    holdout: Annotated[float, WITHIN_ONE] = 0.05
    """The share of the images held out where a store has no splits: the same images as litune tune holds out."""
    lang: tuple[str, ...] = ()
    """Use only captions in these languages."""
    train_images: Annotated[int, at_least(50)] | None = None
    """Images to learn from, at most, drawn by the seed; by default 2000, and 600 with --features."""
    val_images: Annotated[int, at_least(20)] | None = None
    """Images to measure on, at most, drawn by the seed; by default 500, and 300 with --features."""
    max_tokens: Tokens = 16
    """Tokens of a caption that are read, at most."""
    seed: Natural = 0
    """The seed of what is drawn."""
    json: NewFile | None = None
    """Also write everything to this file, as JSON."""
    overwrite: bool = False
    """Replace a --json file that is already there."""
    device: Device = "auto"
    """Where the text tower runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stores:
            raise ConfigError("no feature store was given: name one or more")
        if self.features and len(self.stores) > 1:
            raise ConfigError("--features are compared on one set of pairs: name one, not several stores")
        if self.image_tower is not None and not self.features:
            raise ConfigError("--image-tower is for --features, stores know their towers: leave it out")

    @property
    def images(self) -> tuple[int, int]:
        """How many images to learn from and to measure on, at most."""
        train, val = (600, 300) if self.features else (2000, 500)
        return self.train_images or train, self.val_images or val


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Write a run for another library, load the result with that library, and compare its features with the run's.

    Where a library can't express a run exactly, one line says why; nothing approximate is written.
    """

    run: Annotated[Path, Place("RUN")]
    """The run folder."""
    to: Literal["onnx", "web", "open_clip", "hf", "sentence-transformers", "npz"]
    """What to write: both towers as ONNX; a page that runs in the browser alone; a folder for open_clip; one for
    transformers' VisionTextDualEncoderModel; one for sentence-transformers, whose encode takes texts and pictures; a
    .npz file like the released LiT checkpoints."""
    out: Path | None = None
    """The folder to write; by default the run's name with the target's behind it, beside the run."""
    int8: bool = False
    """With onnx: also write the text tower in 8-bit integers, and what that costs. With web: in these alone."""
    store: Path | None = None
    """With --int8: measure the cost in recall@k on the pairs of this feature store."""
    split: str | None = None
    """With --store: on the pairs of this split; by default, of the whole store. With --images: the images of it."""
    images: Path | None = None
    """With web: the feature store whose images the page shows."""
    with_image_tower: bool = False
    """With web: take the image tower along, so that the page reads pictures of its user's own."""
    onnxruntime_web: Path | None = None
    """With web: a folder with the npm package onnxruntime-web; by default npm brings it."""
    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    overwrite: bool = False
    """Remove an export that is already at --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8 and self.to not in ("onnx", "web"):
            raise ConfigError(f"--int8 is for --to onnx and web, not for {self.to}")
        if self.store is not None and not (self.int8 and self.to == "onnx"):
            raise ConfigError("--store measures what --int8 costs with --to onnx: give both, or neither")
        if self.split is not None and self.store is None and self.images is None:
            raise ConfigError("--split is of a --store or of --images: give both, or neither")
        if self.to == "web" and self.images is None:
            raise ConfigError("--to web shows the images of a feature store: name it with --images")
        for name in ("images", "with_image_tower", "onnxruntime_web"):
            if self.to != "web" and getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for --to web, not for {self.to}")


@dataclass(frozen=True)
class PushConfig(Checked):
    """Upload a run folder, or an export of one, to a repository on the Hugging Face Hub."""

    run: Annotated[Path, Place("RUN")]
    """The run folder, or a folder that litune export wrote."""
    repo: Annotated[str, Place("REPO")]
    """The repository, as NAME or OWNER/NAME; made if it is not there."""
    private: bool = False
    """Make the repository private."""
    endpoint: str | None = None
    """The address of another hub; by default that of HF_ENDPOINT, or huggingface.co."""


@dataclass(frozen=True)
class ReadingConfig(Checked):
    """How pairs are read: the same settings, with the same meaning, as those of `EmbedConfig`."""

    pairs: Annotated[Address, Place("PAIRS")]
    """The pairs: whatever litune embed reads, or a feature store."""
    images: Address | None = None
    """The folder that the table's image paths are relative to, if litune should not look for it."""
    image_column: str | None = None
    """The table's column of image paths; by default the first of image, image_path, file_name, filename, …"""
    caption_column: tuple[str, ...] = ()
    """The table's column of captions; by default the first of caption, captions, text, title, … Several are kept as
    text fields of their own."""
    split_column: str = "split"
    """The table's column of splits (train, val, …), if it has one."""
    lang_column: str = "lang"
    """The table's column of languages, if it has one."""
    split: tuple[str, ...] = ()
    """Take only the images of these splits."""
    lang: tuple[str, ...] = ()
    """Take only the captions in these languages."""
    workers: Natural = 0
    """Threads that read images; 0: one per processor core."""
    max_damaged: Share = 0.01
    """Stop when more than this share of the images or captions, from 0 to 1, can't be used."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig(ReadingConfig):
    """Keep the pairs that pass rules on images, captions and their agreement.

    Rules that are set work in the order of the options below; each sees what those before it have left, and the report
    counts what it dropped, with examples. An image whose captions are all dropped is dropped.
    """

    out: Path
    """The table of kept pairs to write (.parquet, .jsonl or .csv: litune embed reads it); or, where PAIRS is a feature
    store, a folder: the store of what is kept."""
    dropped: NewFile | None = None
    """Also list what was dropped, with the rule that did it (.parquet, .jsonl or .csv)."""
    report: NewFile | None = None
    """Also write the counts and examples as JSON."""
    preset: Literal["yfcc", "align", "lit"] | None = None
    """A published set of rules: yfcc (titles, descriptions and tags as in the LiT paper), align (ALIGN's on images and
    texts), lit (ALIGN's on images, hardly any on texts). Further options add to it or replace its values."""

    # Images
    min_side: Count | None = None
    """The image's shorter side has at least this many pixels."""
    max_aspect: Annotated[float, at_least(1)] | None = None
    """The longer side is at most this many times the shorter one."""
    max_captions: Count | None = None
    """The image has at most this many captions."""

    # Captions
    titles: Literal["keep", "yfcc"] | None = None
    """yfcc: drop titles that start with DSC, IMG or Picture, are just "image", or are more than half digits."""
    title_field: str = "title"
    """The text field (see --caption-column) that --titles is about."""
    tags: Literal["keep", "shuffle"] | None = None
    """shuffle: write a list of tags as a text, in an order drawn for each image."""
    tags_field: str = "tags"
    """The text field that --tags is about."""
    boilerplate: Literal["keep", "drop"] | None = None
    """drop: drop what says nothing of the image: names of files, cameras' numbers, addresses, "untitled", numbers."""
    min_chars: Count | None = None
    """A caption has at least this many characters."""
    max_chars: Count | None = None
    """A caption has at most this many characters."""
    min_words: Count | None = None
    """A caption has at least this many words; a Chinese or Japanese character is a word."""
    max_words: Count | None = None
    """A caption has at most this many words."""
    min_letters: Share | None = None
    """At least this share of a caption's characters, spaces aside, are letters."""
    max_repeats: Count | None = None
    """At most this many images have the caption (case and spaces aside); all such captions are dropped otherwise."""
    vocabulary: Count | None = None
    """Every word and pair of neighbouring words of a caption is among this many most frequent ones of all captions."""
    languages: tuple[str, ...] = ()
    """The caption is in one of these languages (en, de, zh, …), as identified from its letters (extra data)."""
    min_certainty: Share = 0.0
    """The identified language has at least this probability, among all that are known."""
    agree: Path | None = None
    """A run that scores how well caption and image agree; PAIRS is a feature store of its image tower."""
    min_agreement: Cosine | None = None
    """The cosine of caption and image under --agree is at least this."""

    seed: Natural = 0
    """Seeds the order of tags."""
    overwrite: bool = False
    """Replace files that are there, or a store at --out."""
    device: Device = "auto"
    """Where the run of --agree runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.agree is None) != (self.min_agreement is None):
            raise ConfigError("--agree names the run and --min-agreement the least cosine: give both, or neither")
        if self.min_certainty and not self.languages:
            raise ConfigError("--min-certainty is of the identified language: give --languages as well")


@dataclass(frozen=True, kw_only=True)
class DedupConfig(ReadingConfig):
    """Remove near-duplicates: of evaluation images, and within the pairs.

    Candidates are found by the features of an image tower; a pair of images counts as duplicates when their pixels
    agree after they were aligned. An interrupted run goes on where it was with the same command.
    """

    out: Path
    """The folder to write: kept.parquet (litune embed reads it), removed.jsonl, report.json, report.html; where PAIRS
    is a feature store, also store/, the store of what is kept."""
    against: tuple[Address, ...] = ()
    """Sets whose images must not be among the pairs: feature stores, or whatever litune embed reads."""
    within: bool = True
    """Also keep only one image of those that are duplicates of each other."""
    image_tower: str | None = None
    """The image tower of the features, for sets that are no feature stores (see litune embed); by default that of the
    first store given."""
    neighbours: Count = 4
    """Candidates of each image: so many nearest ones by features in each set."""
    min_cosine: Cosine = 0.5
    """Candidates have at least this cosine (of features less their mean)."""
    min_match: Share = 0.75
    """Duplicates have at least this agreement of their aligned pixels, from 0 to 1."""
    examples: Natural = 200
    """Pairs of pictures shown in report.html, at most."""
    overwrite: bool = False
    """Replace the report and the kept pairs at --out; features that are there are used again."""
    device: Device = "auto"
    """Where the image tower runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.against and not self.within:
            raise ConfigError("nothing to compare: give --against SET, or leave out --no-within")


@dataclass(frozen=True, kw_only=True)
class OverviewConfig(ReadingConfig):
    """See what is in a set of pairs: counts, languages, lengths, sizes, repeats, damage, tokens.

    Prints it; with --out also writes it as JSON and as one HTML page that needs nothing else.
    """

    out: Path | None = None
    """A folder to write overview.json and overview.html into."""
    sample: Natural = 0
    """Open this many images, drawn at random; 0: all. Captions are counted all the same."""
    verify: bool = False
    """Decode every opened image to its end; by default only headers are read."""
    tokenizer: str = "minilm"
    """The text tower (see litune tune) whose tokens are counted, or none."""
    max_tokens: Tokens = 16
    """Tokens of a caption that tuning would read."""
    pictures: Natural = 48
    """Pictures on the contact sheet of the page."""
    seed: Natural = 0
    """Seeds what is drawn."""
    overwrite: bool = False
    """Replace what is at --out."""


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, paths as strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def from_json(config: type[Config], values: dict[str, Any]) -> Config:
    """The config that `to_json` was given; settings that it does not have any more are left out.

    Raises `ConfigError` for a value that can't be read, and `TypeError` where one is missing.
    """
    known = [setting for setting in settings_of(config) if setting.name in values]
    return config(**{setting.name: setting.read(values[setting.name], setting.words) for setting in known})


class Command(Generic[Settings, Config, Result]):
    """A command as a Python function: called with the settings of its config, or with `run(config)`."""

    def __init__(self, config: type[Config], function: Callable[..., Result]) -> None:
        self.config, self.run = config, function
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__
        self.__signature__ = inspect.signature(config)
        self._more = list(inspect.signature(function).parameters)[1:]

    def __call__(self, *args: Settings.args, **kwargs: Settings.kwargs) -> Result:
        """Run the command with these settings; strings are taken where a path is expected.

        What the function takes beside its config (a callback, say) is given by name.
        """
        more = {name: kwargs.pop(name) for name in self._more if name in kwargs}
        bound = self.__signature__.bind(*args, **kwargs)
        for setting in settings_of(self.config):
            if setting.name in bound.arguments:
                bound.arguments[setting.name] = setting.read(bound.arguments[setting.name], setting.words)
        return self.run(self.config(*bound.args, **bound.kwargs), **more)


def command(
    config: Callable[Settings, Config],
) -> Callable[[Callable[..., Result]], Command[Settings, Config, Result]]:
    """Make a function of a config callable with the config's settings."""

    def wrap(function: Callable[..., Result]) -> Command[Settings, Config, Result]:
        return Command(cast(type[Config], config), function)

    return wrap
