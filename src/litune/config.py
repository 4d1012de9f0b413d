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
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, ParamSpec, TypeVar, cast, get_args, get_origin, get_type_hints

from tyro.conf import Positional, UseAppendAction, arg

from litune.errors import ConfigError
from litune.schedules import parse_duration, parse_unlock

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class EmbedConfig:
    """Encode every image once, with a locked image tower, into a feature store.

    An interrupted run goes on where it was with the same command.
    """

    pairs: Annotated[Positional[Path], arg(metavar="PAIRS")]
    """Where the pairs are: a folder of images with a table of captions in it or beside it, the table itself
    (.csv, .tsv, .jsonl, .parquet), a tree with one folder per class, or a folder of images without captions."""
    image_tower: str
    """The image tower: efficientnet-lite0, timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME/TAG, onnx:FILE,
    python:MODULE:FUNCTION, or run:RUN (the image tower that a run has trained)."""
    out: Path
    """The feature store to write (a folder)."""
    images: Path | None = None
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
    split: tuple[str, ...] = ()
    """Take only the images of these splits."""
    lang: tuple[str, ...] = ()
    """Take only the captions in these languages."""
    batch_size: int = 32
    """Images that pass through the tower at once."""
    workers: int = 0
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
    shard_size: int = 16384
    """Images after which a file of the store is closed (at the end of a batch). Files are also closed every few
    seconds, so that an interruption costs seconds of work."""
    max_damaged: float = 0.01
    """Stop when more than this share of the images or captions can't be used."""
    overwrite: bool = False
    """Remove a store that is already at --out."""
    device: Device = "auto"
    """Where the tower runs."""

    def __post_init__(self) -> None:
        _choices(self)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("workers", self.workers, 0)
        _at_least("shard-size", self.shard_size, 1)
        _share("max-damaged", self.max_damaged)


@dataclass(frozen=True)
class TuneConfig:
    """Teach a text tower to read a locked image tower, from the features in a store.

    Writes a run folder: the model, its tokenizer, metrics.jsonl and where everything came from. An
    interrupted run goes on from its last checkpoint with the same command.
    """

    store: Annotated[Positional[Path], arg(metavar="STORE")]
    """A feature store that `litune embed` wrote, or a folder that clip-retrieval wrote."""
    text_tower: str
    """The text tower: minilm, use-m3 (always locked), hf:NAME_OR_FOLDER (pre-trained), hf:NAME_OR_FOLDER?init=random
    (the same architecture from scratch), vit:Ti, S, B, L, H, g (from scratch), or run:RUN (that of a run, with its
    tokenizer and those of its heads that fit)."""
    out: Path
    """The run folder to write."""

    # Pairs
    split: str = "train"
    """Tune on the pairs of this split, where the store has splits."""
    val_split: str = "val"
    """Evaluate on the pairs of this split as tuning goes, where the store has splits; otherwise a held-out
    part of the pairs is used (see --holdout)."""
    holdout: float = 0.05
    """The share of the images held out for evaluation where the store has no splits (at most 1,000 images);
    0: none."""
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
    image_head: Literal["auto", "none", "linear", "mlp", "gated"] = "auto"
    """A head on the image side, tuned. none keeps a locked tower's own feature space; auto is none on a locked tower
    and linear on an unlocked one; gated is an MLP whose hidden values are gated (SwiGLU)."""
    text_head: Literal["none", "linear", "mlp", "gated"] = "linear"
    """The head of the text side."""
    dim: int | None = None
    """The shared dimension; by default the width of the side that has no head, else the image tower's."""
    image_map: Literal["none", "center", "whiten"] = "center"
    """A fixed linear map of a locked tower's features before they are normalised, estimated once on the tuning
    images and saved with the run: subtract their mean (features of a CNN after its last ReLU are all positive, so
    that every cosine starts high), or also even out their variances. none: the tower's features as they are, as in
    the paper, and as for every unlocked tower."""
    shrinkage: float = 5.0
    """How far whitening holds back: this many times the mean variance is added to every direction's variance."""
    tokenizer: str | None = None
    """For vit: towers, a tokenizer.json, a SentencePiece .model or a folder that has one; by default one is trained on
    the captions."""
    vocab_size: int = 32000
    """The size of a freshly trained tokenizer, at most."""
    max_tokens: int = 16
    """Tokens of a caption that are read, at most."""
    pooling: Literal["auto", "first", "mean", "last"] = "auto"
    """How the text tower's tokens become one vector: the first token (BERT), their mean, or the last token;
    auto: what the tower itself declares, else the first token (vit: the last)."""
    dropout: float | None = None
    """Dropout in the text tower; by default what its own configuration says."""

    # Loss
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """The contrastive loss: cross-entropy both ways over the batch, or SigLIP's binary one over all its pairs."""
    image_to_text: float = 0.5
    """The weight λ of the image→text direction of the softmax loss; text→image has 1 − λ."""
    logit_scale: float | None = None
    """The temperature's start, the logarithm of the scale: by default that of a run whose text tower is tuned on
    (--text-tower run:RUN), else ln 10 as in the paper."""
    logit_bias: float = -10.0
    """The start of the sigmoid loss's bias."""
    negatives: Literal["global", "local"] = "global"
    """With several processes, contrast each pair with those of all processes, or of its own alone."""
    mask_duplicates: bool = True
    """Equal captions, and several captions of one image, are not each other's negatives."""
    image_negatives: int = 0
    """Further images, drawn anew for each step from outside the batch, among which every text must find its own:
    stored features cost no encoding. More than there are: all. For a locked image tower without a head."""

    # How long, and how
    duration: str | None = None
    """How long to tune: 10epochs, 2000steps, 30kpairs; by default 10 epochs, at least 30k and at most 4M pairs."""
    batch_size: int = 256
    """Pairs in a batch, over all processes; each is contrasted with all others."""
    micro_batch: int | None = None
    """Pairs that pass through a tower at once; by default 512 on CPUs, 4096 on GPUs. A larger batch is encoded
    twice (gradient caching): the same gradient, in a micro-batch's memory."""
    shard: bool = False
    """Share the text tower's weights, gradients and optimizer states among the processes (FSDP2): for towers of which
    one device can't hold all of these. The same result; every step lends weights to and fro."""
    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    """adamw; adafactor as in "Scaling Vision Transformers"; lion, with about a tenth of adamw's learning rate."""
    learning_rate: float = 1e-3
    """The peak learning rate."""
    head_rate: float = 1.0
    """The learning rate of the heads, as a multiple of --learning-rate. On a thousand pairs, a lower rate with
    --head-rate 10 overfits less."""
    temperature_rate: float = 30.0
    """The learning rate of the temperature and bias, as a multiple of --learning-rate; 1 in the paper's long runs,
    but in some hundred steps the temperature could not leave its start."""
    rates: tuple[str, ...] = ()
    """Learning rates by name, as PATTERN=MULTIPLE: text.*=0.1, image.*blocks.11.*=0.01; 0 locks. The first pattern
    that matches a parameter's name (* ? [0-5]) counts. Names begin with text., text_head., image. or image_head."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of the weight matrices. It follows the schedule but is not multiplied by the
    learning rate (PyTorch's AdamW would need --weight-decay / --learning-rate)."""
    beta1: float = 0.9
    """The decay of the momentum."""
    beta2: float | None = None
    """The decay of the second moment; by default 0.999, for lion 0.99."""
    clip_norm: float = 1.0
    """Clip the gradient to this global norm."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """The learning rate after its warm-up: a cosine to zero, constant, or the reciprocal square root."""
    warmup: str = "5%"
    """How long the learning rate rises: 5%, 500steps, 1epochs, 10kpairs."""
    cooldown: str = "0%"
    """How long it falls linearly to zero at the end, for constant and rsqrt."""
    timescale: str = "10ksteps"
    """The time after which rsqrt has fallen to 1/√2."""

    # The image tower from pixels
    image_rate: float = 1.0
    """The learning rate of an unlocked image tower, as a multiple of --learning-rate."""
    unlock: str = "always"
    """When an unlocked image tower is tuned: always, after:50% (locked until then), ramp:50% (a sigmoid ramp of its
    rate), cycles:4 (locked and unlocked by turns)."""
    augment: Literal["inception", "none"] = "inception"
    """Of the pictures of an unlocked image tower: random parts of them (the Inception crop), or all of each."""
    flip: bool = False
    """Mirror half of the pictures. Captions that speak of left and right become wrong."""
    gradient_checkpointing: bool = False
    """Keep few activations of an unlocked image tower for the backward pass and compute the others again."""
    workers: int = 0
    """Threads that decode pictures; 0: one per processor core."""
    max_damaged: float = 0.01
    """Stop when more than this share of the pictures can't be read."""

    # The run
    precision: Precision = "auto"
    """Arithmetic of the towers; auto: bfloat16 on processors with AMX or AVX512-bf16 and on GPUs. Losses and
    parameters are float32."""
    evaluations: int = 3
    """How often the held-out pairs are evaluated during tuning, spread evenly. The best model so far is kept in
    best/ in the run folder."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints: what an interruption can cost."""
    tensorboard: bool = False
    """Also write what is logged for TensorBoard, into the run folder."""
    seed: int = 0
    """The seed of everything random. The same seed gives the same weights, bit for bit, on one machine."""
    overwrite: bool = False
    """Remove a run that is already at --out."""
    device: Device = "auto"
    """Where the towers are tuned."""

    def __post_init__(self) -> None:
        _choices(self)
        for name, value, least in (
            ("batch-size", self.batch_size, 2),
            ("max-tokens", self.max_tokens, 2),
            ("vocab-size", self.vocab_size, 8),
            ("evaluations", self.evaluations, 0),
            ("image-negatives", self.image_negatives, 0),
            ("workers", self.workers, 0),
            ("micro-batch", 1 if self.micro_batch is None else self.micro_batch, 1),
            ("dim", 1 if self.dim is None else self.dim, 1),
        ):
            _at_least(name, value, least)
        if self.shard and self.optimizer == "adafactor":
            raise ConfigError("--optimizer adafactor needs whole matrices: with --shard use adamw or lion")
        for name, number in (("learning-rate", self.learning_rate), ("clip-norm", self.clip_norm)):
            if not number > 0:
                raise ConfigError(f"--{name} is {number}, it must be positive")
        for name in (
            "weight_decay",
            "shrinkage",
            "checkpoint_seconds",
            "head_rate",
            "temperature_rate",
            "image_rate",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, it must not be negative")
        for name, share in (("image-to-text", self.image_to_text), ("max-damaged", self.max_damaged)):
            _share(name, share)
        for name, number in (("holdout", self.holdout), ("beta1", self.beta1), ("beta2", self.beta2 or 0.0)):
            if not 0 <= number < 1:
                raise ConfigError(f"--{name} is {number}, it must be at least 0 and less than 1")
        if self.dropout is not None:
            _share("dropout", self.dropout)
        if self.duration is not None:
            parse_duration(self.duration, "duration", run_length=True)
        for name in ("warmup", "cooldown", "timescale"):
            parse_duration(getattr(self, name), name)
        parse_unlock(self.unlock, "unlock")
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
    def locked(self) -> bool:
        """Whether the image tower is locked: tuning reads stored features."""
        return self.locking is None or self.locking[0] == "L"

    def _refuse_pixel_settings(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("image_tower", "image_rate", "unlock", "augment", "flip", "gradient_checkpointing"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for an unlocked image tower: the locked one's features are stored; "
                    "unlock it with --locking UU"
                )


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
class EvalConfig:
    """Measure a run: retrieval on a store's pairs, zero-shot classification on a tree of class folders."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    store: Path | None = None
    """A feature store whose pairs are retrieved."""
    split: str | None = None
    """Evaluate the pairs of this split; by default, of the whole store."""
    lang: tuple[str, ...] = ()
    """Use only captions in these languages."""
    classes: Path | None = None
    """A tree with one folder of images per class, classified zero-shot (also a store made from such a tree)."""
    templates: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A template that puts a class name into a sentence, as in "a photo of a {}."; repeat for several, or give
    a text file with one per line. By default the bare name and "a photo of a {}."."""
    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    json: Path | None = None
    """Write the results here."""
    max_damaged: float = 0.01
    """Stop when more than this share of the images can't be read."""
    device: Device = "auto"
    """Where the towers run."""

    def __post_init__(self) -> None:
        _choices(self)
        if self.store is None and self.classes is None:
            raise ConfigError("nothing to evaluate: give --store for retrieval, --classes for classification, or both")
        _share("max-damaged", self.max_damaged)


@dataclass(frozen=True)
class ClassifyConfig:
    """Classify images with any labels, without training data for them."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")]
    """The images."""
    labels: tuple[str, ...]
    """The labels to choose from."""
    templates: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A template that puts a label into a sentence, as in "a photo of a {}."; repeat for several, or give a text
    file with one per line. By default the bare label and "a photo of a {}."."""
    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    json: Path | None = None
    """Write the probabilities here."""
    device: Device = "auto"
    """Where the towers run."""

    def __post_init__(self) -> None:
        _choices(self)
        if not self.images:
            raise ConfigError("no image was given")
        if not self.labels:
            raise ConfigError("no label was given: give two or more after --labels")


@dataclass(frozen=True)
class SearchConfig:
    """Find the images of a feature store that match a text."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    store: Annotated[Positional[Path], arg(metavar="STORE")]
    """The feature store to search."""
    query: Annotated[Positional[str], arg(metavar="QUERY")]
    """What to look for, in free form."""
    top: int = 5
    """How many images to show."""
    sheet: Path | None = None
    """Draw the found images into this PNG."""
    json: Path | None = None
    """Write the found images here."""
    overwrite: bool = False
    """Replace a --sheet or --json file that is already there."""
    device: Device = "auto"
    """Where the text tower runs."""

    def __post_init__(self) -> None:
        _choices(self)
        _at_least("top", self.top, 1)
        if not self.query.strip():
            raise ConfigError("the query is empty: say what to look for")


@dataclass(frozen=True)
class ImportConfig:
    """Make a run of one of the released LiT checkpoints (LiT-B16B, B16B_2, L16L, L16S, L16Ti).

    Which one it is, its shapes tell. The run has its own image tower: embed with --image-tower run:RUN.
    """

    checkpoint: Annotated[Positional[Path], arg(metavar="FILE")]
    """The .npz file."""
    vocab: Path
    """The vocabulary that was released with it: a WordPiece .txt (B16B, B16B_2, L16L) or a SentencePiece .model
    (L16S, L16Ti)."""
    out: Path
    """The run folder to write."""
    max_tokens: int | None = None
    """Tokens of a text that are read, at most; by default 16, as these models were tuned."""
    overwrite: bool = False
    """Remove a run that is already at --out."""

    def __post_init__(self) -> None:
        _at_least("max-tokens", 2 if self.max_tokens is None else self.max_tokens, 2)


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole way on real data in minutes, on a CPU: render emoji, embed, tune, evaluate, search.

    All data and weights come with the extra `quickstart`: EfficientNet-Lite0 (locked), MiniLM (tuned) and
    OpenMoji pictures with their names.
    """

    out: Path = Path("litune-quickstart")
    """The folder to write. A second run reuses the pictures and features that are there."""
    seed: int = 0
    """The seed of everything random."""


@dataclass(frozen=True)
class CompareConfig:
    """Tune a table of settings, each with several seeds, evaluate every run, and print means and spreads.

    An interrupted comparison goes on where it was with the same command; what is finished is reused.
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A TOML file: the settings of all rows in [base], a [[row]] for each line of the table or a [grid] of values,
    seeds, and what is measured in [eval]."""
    out: Path
    """The folder to write: one run folder per row and seed, table.md and results.json."""
    overwrite: bool = False
    """Tune a row again whose settings are others than those of its run in --out."""


@dataclass(frozen=True)
class InspectConfig:
    """Say what a tower, a run, a feature store or a released checkpoint is.

    Parameters per part, what is locked, widths, preprocessing, pooling, fingerprint. With --text-tower, also what
    tuning the pair would train, store and need in memory.
    """

    what: Annotated[Positional[str], arg(metavar="WHAT")]
    """The spec of an image or text tower, a run folder, a feature store, or an .npz file of the released models."""
    text_tower: str | None = None
    """The text tower to tune on this image tower or store."""
    images: int | None = None
    """How many images there would be; by default those of the store."""
    batch_size: int = 256
    """Pairs in a batch."""
    max_tokens: int = 16
    """Tokens of a caption."""
    json: Path | None = None
    """Also write it to this file."""

    def __post_init__(self) -> None:
        _at_least("batch-size", self.batch_size, 2)
        _at_least("max-tokens", self.max_tokens, 2)
        if self.images is not None:
            _at_least("images", self.images, 1)


@dataclass(frozen=True)
class ExportConfig:
    """Write a run for another library, load the result with that library, and compare its features with the run's.

    Where a library can't express a run exactly, one line says why; nothing approximate is written.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    to: Literal["onnx", "open_clip", "hf", "sentence-transformers", "npz"]
    """What to write: both towers as ONNX; a folder for open_clip; one for transformers' VisionTextDualEncoderModel; one
    for sentence-transformers, whose encode takes texts and pictures; a .npz file like the released LiT checkpoints."""
    out: Path | None = None
    """The folder to write; by default the run's name with the target's behind it, beside the run."""
    int8: bool = False
    """With onnx: also write the text tower in 8-bit integers, and what that costs."""
    store: Path | None = None
    """With --int8: measure the cost in recall@k on the pairs of this feature store."""
    split: str | None = None
    """With --store: on the pairs of this split; by default, of the whole store."""
    image_tower: str | None = None
    """The image tower, where the run does not name one that can be loaded."""
    overwrite: bool = False
    """Remove an export that is already at --out."""

    def __post_init__(self) -> None:
        _choices(self)
        if self.int8 and self.to != "onnx":
            raise ConfigError(f"--int8 is for --to onnx, not for {self.to}")
        if self.store is not None and not self.int8:
            raise ConfigError("--store measures what --int8 costs: give both, or neither")
        if self.split is not None and self.store is None:
            raise ConfigError("--split is of a --store: give both, or neither")


@dataclass(frozen=True)
class PushConfig:
    """Upload a run folder, or an export of one, to a repository on the Hugging Face Hub."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder, or a folder that litune export wrote."""
    repo: Annotated[Positional[str], arg(metavar="REPO")]
    """The repository, as NAME or OWNER/NAME; made if it is not there."""
    private: bool = False
    """Make the repository private."""
    endpoint: str | None = None
    """The address of another hub; by default that of HF_ENDPOINT, or huggingface.co."""


@dataclass(frozen=True)
class ReadingConfig:
    """How pairs are read: the same settings, with the same meaning, as those of `EmbedConfig`."""

    pairs: Annotated[Positional[Path], arg(metavar="PAIRS")]
    """The pairs: whatever litune embed reads, or a feature store."""
    images: Path | None = None
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
    workers: int = 0
    """Threads that read images; 0: one per processor core."""
    max_damaged: float = 0.01
    """Stop when more than this share of the images or captions can't be used."""

    def __post_init__(self) -> None:
        _choices(self)
        _at_least("workers", self.workers, 0)
        _share("max-damaged", self.max_damaged)


@dataclass(frozen=True, kw_only=True)
class FilterConfig(ReadingConfig):
    """Keep the pairs that pass rules on images, captions and their agreement.

    Rules that are set work in the order of the options below; each sees what those before it have left, and the report
    counts what it dropped, with examples. An image whose captions are all dropped is dropped.
    """

    out: Path
    """The table of kept pairs to write (.parquet, .jsonl or .csv: litune embed reads it); or, where PAIRS is a feature
    store, a folder: the store of what is kept."""
    dropped: Path | None = None
    """Also list what was dropped, with the rule that did it (.parquet, .jsonl or .csv)."""
    report: Path | None = None
    """Also write the counts and examples as JSON."""
    preset: Literal["yfcc", "align", "lit"] | None = None
    """A published set of rules: yfcc (titles, descriptions and tags as in the LiT paper), align (ALIGN's on images and
    texts), lit (ALIGN's on images, hardly any on texts). Further options add to it or replace its values."""

    # Images
    min_side: int | None = None
    """The image's shorter side has at least this many pixels."""
    max_aspect: float | None = None
    """The longer side is at most this many times the shorter one."""
    max_captions: int | None = None
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
    min_chars: int | None = None
    """A caption has at least this many characters."""
    max_chars: int | None = None
    """A caption has at most this many characters."""
    min_words: int | None = None
    """A caption has at least this many words; a Chinese or Japanese character is a word."""
    max_words: int | None = None
    """A caption has at most this many words."""
    min_letters: float | None = None
    """At least this share of a caption's characters, spaces aside, are letters."""
    max_repeats: int | None = None
    """At most this many images have the caption (case and spaces aside); all such captions are dropped otherwise."""
    vocabulary: int | None = None
    """Every word and pair of neighbouring words of a caption is among this many most frequent ones of all captions."""
    languages: tuple[str, ...] = ()
    """The caption is in one of these languages (en, de, zh, …), as identified from its letters (extra data)."""
    min_certainty: float = 0.0
    """The identified language has at least this probability, among all that are known."""
    agree: Path | None = None
    """A run that scores how well caption and image agree; PAIRS is a feature store of its image tower."""
    min_agreement: float | None = None
    """The cosine of caption and image under --agree is at least this."""

    seed: int = 0
    """Seeds the order of tags."""
    overwrite: bool = False
    """Replace files that are there, or a store at --out."""
    device: Device = "auto"
    """Where the run of --agree runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_side", "max_captions", "min_chars", "max_chars", "min_words", "max_words", "max_repeats"):
            value = getattr(self, name)
            if value is not None:
                _at_least(name.replace("_", "-"), value, 1)
        for name in ("min_letters", "min_certainty"):
            if getattr(self, name) is not None:
                _share(name.replace("_", "-"), getattr(self, name))
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
    against: tuple[Path, ...] = ()
    """Sets whose images must not be among the pairs: feature stores, or whatever litune embed reads."""
    within: bool = True
    """Also keep only one image of those that are duplicates of each other."""
    image_tower: str | None = None
    """The image tower of the features, for sets that are no feature stores (see litune embed); by default that of the
    first store given."""
    neighbours: int = 4
    """Candidates of each image: so many nearest ones by features in each set."""
    min_cosine: float = 0.5
    """Candidates have at least this cosine (of features less their mean)."""
    min_match: float = 0.75
    """Duplicates have at least this agreement of their aligned pixels, from 0 to 1."""
    examples: int = 200
    """Pairs of pictures shown in report.html, at most."""
    overwrite: bool = False
    """Replace the report and the kept pairs at --out; features that are there are used again."""
    device: Device = "auto"
    """Where the image tower runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("neighbours", self.neighbours, 1)
        _at_least("examples", self.examples, 0)
        _share("min-match", self.min_match)
        if not self.against and not self.within:
            raise ConfigError("nothing to compare: give --against SET, or leave out --no-within")


@dataclass(frozen=True, kw_only=True)
class OverviewConfig(ReadingConfig):
    """See what is in a set of pairs: counts, languages, lengths, sizes, repeats, damage, tokens.

    Prints it; with --out also writes it as JSON and as one HTML page that needs nothing else.
    """

    out: Path | None = None
    """A folder to write overview.json and overview.html into."""
    sample: int = 0
    """Open this many images, drawn at random; 0: all. Captions are counted all the same."""
    verify: bool = False
    """Decode every opened image to its end; by default only headers are read."""
    tokenizer: str = "minilm"
    """The text tower (see litune tune) whose tokens are counted, or none."""
    max_tokens: int = 16
    """Tokens of a caption that tuning would read."""
    pictures: int = 48
    """Pictures on the contact sheet of the page."""
    seed: int = 0
    """Seeds what is drawn."""
    overwrite: bool = False
    """Replace what is at --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("sample", self.sample, 0)
        _at_least("pictures", self.pictures, 0)
        _at_least("max-tokens", self.max_tokens, 2)


def _choices(config: Any) -> None:
    """Check settings of few choices, as the command line does, for those who call from Python."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)!r}, it must be one of {choices}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{name} is {value}, it must be at least {least}")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"--{name} is {value}, it must be between 0 and 1")


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, paths as strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


Settings = ParamSpec("Settings")
Config = TypeVar("Config")
Result = TypeVar("Result")


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
        hints = {field.name: str(field.type) for field in dataclasses.fields(cast(Any, self.config))}
        for name, value in bound.arguments.items():
            if "Path" in hints[name] and isinstance(value, str):
                bound.arguments[name] = (Path(value),) if "tuple" in hints[name] else Path(value)
            elif "tuple" in hints[name] and isinstance(value, str):
                bound.arguments[name] = (value,)
            elif "tuple" in hints[name]:
                bound.arguments[name] = tuple(Path(v) if "Path" in hints[name] else v for v in value)
        return self.run(self.config(*bound.args, **bound.kwargs), **more)


def command(
    config: Callable[Settings, Config],
) -> Callable[[Callable[..., Result]], Command[Settings, Config, Result]]:
    """Make a function of a config callable with the config's settings."""

    def wrap(function: Callable[..., Result]) -> Command[Settings, Config, Result]:
        return Command(cast(type[Config], config), function)

    return wrap
