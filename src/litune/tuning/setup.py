"""A run before its first step: its tokens and its length, what moves and at which rate, what is said and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from litune import distributed
from litune.config import TuneConfig, parse_rates
from litune.devices import send
from litune.errors import ConfigError
from litune.model.build import TEMPERATURE_RATE, peak_rate
from litune.model.lit import LiT
from litune.progress import say
from litune.schedules import parse_duration, rate_share
from litune.sharding import Shards
from litune.store.captions import TOKENIZED_MOST, LaterTokens, tokenize
from litune.store.selection import Selection
from litune.text.packing import Rows
from litune.text.tokenizers import Tokenizer, Tokens
from litune.towers.locking import lock
from litune.tuning.batching import default_duration
from litune.tuning.gradient_cache import still_statistics
from litune.tuning.inputs import KeptTexts, Micro
from litune.tuning.memory import choose_micro
from litune.tuning.optim import make_optimizer, parameter_groups, rate_of
from litune.tuning.start import text_vectors

if TYPE_CHECKING:
    from litune.tuning.run import Tuning

FEW = 1000
"""Images below which tuning adds nothing to the fit that it starts from (docs/fit.md has the table)."""
SAMPLE = 10_000
"""The captions whose lengths stand for all, where they are not tokenised before the first step."""


def tokens_of(train: Selection, tokenizer: Tokenizer) -> Tokens | LaterTokens:
    """The tokens of all captions; of more than TOKENIZED_MOST, each batch is tokenised ahead of its step."""
    captions = int(train.offsets[-1])
    return tokenize(tokenizer, train, captions) if captions <= TOKENIZED_MOST else LaterTokens(tokenizer, train)


def batch_size(config: TuneConfig, images: int) -> int:
    """The pairs of a batch: an image is in it once. Raises `ConfigError` where there is not one for each rank."""
    size = min(config.batch_size, images)
    if size < distributed.world_size():
        raise ConfigError(f"a batch of {size} pairs can't be shared by {distributed.world_size()} processes")
    return size


def schedule(config: TuneConfig, size: int, images: int, captions: int | None) -> tuple[int, Callable[[int], float]]:
    """How many steps a run takes, and each step's share of the learning rate; from a fit the `captions` count."""

    def count(text: str, name: str, total: int | None = None) -> int:
        return parse_duration(text, name).steps(batch_size=size, images=images, total=total)

    steps = max(1, count(config.duration or default_duration(images, captions), "duration"))
    return steps, partial(
        rate_share,
        steps=steps,
        warmup=count(config.warmup, "warmup", steps),
        decay=config.schedule,
        timescale=max(1, count(config.timescale, "timescale", steps)),
        cooldown=count(config.cooldown, "cooldown", steps),
    )


@dataclass(frozen=True)
class Tuned:
    """What moves in a run."""

    optimizer: torch.optim.Optimizer
    parameters: int
    """How many numbers the optimizer moves, on all ranks."""
    shards: Shards | None
    """The ranks' parts of a text tower that they share."""
    own_rows: dict[str, nn.Parameter]
    """The parameters that the ranks share, by name, of each this rank's rows."""


def choose_tuned(config: TuneConfig, model: LiT, tokens: Tokens | LaterTokens) -> Tuned:
    """Lock what is to be locked, leave tokens that no caption has out, and group the rest.

    Raises `ConfigError` where nothing is left to tune, or --rates names what is not there.
    """
    if config.locking is not None and config.locking[1] == "L":
        lock(model.text)
    named = dict(model.named_parameters())
    rates = rates_of(config, named)
    for name, parameter in named.items():
        if rate_of(name, rates) == 0:
            parameter.requires_grad_(False)
    # Of more captions, most tokens are in some. With --shard all rows of the table are shared alike.
    if isinstance(tokens, Tokens) and not config.shard:
        model.text.tune_only(np.unique(tokens.ids))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shards = Shards(model.text) if model.text.shared else None
    own_rows = {f"text.{name}": rows for name, rows in shards.own.items()} if shards else {}
    groups = parameter_groups(
        ((name, own_rows.get(name, parameter)) for name, parameter in model.named_parameters()),
        learning_rate=peak_rate(config),
        weight_decay=config.weight_decay,
        rates=rates,
    )
    names = [name for group in groups for name in group["names"]]
    if all(name.startswith("logit_") for name in names):
        raise ConfigError("everything is locked: leave a tower or a head to tune")
    optimizer = make_optimizer(config.optimizer, groups, beta1=config.beta1, beta2=config.beta2)
    return Tuned(optimizer, sum(sizes[name] for name in names), shards, own_rows)


def rates_of(config: TuneConfig, named: dict[str, nn.Parameter]) -> list[tuple[str, float]]:
    """Patterns of parameters' names with their factors on the learning rate; the first that matches counts."""
    rates = parse_rates(config.rates)
    for pattern, _ in rates:
        if not any(rate_of(name, [(pattern, 0.0)]) == 0 for name in named):
            names = list(named)
            examples = ", ".join(names[:: max(1, len(names) // 3)][:3])
            raise ConfigError(f"--rates: no parameter's name matches {pattern!r}; names are as {examples}")
    return [
        *rates,
        ("image.*", config.image_rate),
        ("text_head.*", config.head_rate),
        ("image_head.*", config.head_rate),
        ("logit_*", TEMPERATURE_RATE if config.temperature_rate is None else config.temperature_rate),
    ]


def announce(run: Tuning) -> None:
    """Say what is about to happen."""
    config, train, model = run.config, run.train, run.model
    held = f", {len(run.val):,} images held out" if run.val else ", nothing held out"
    ranks = distributed.world_size()
    say(
        f"tuning {config.text_tower} ({run.tuned.parameters / 1e6:.1f}M parameters, "
        f"{'bfloat16' if run.bfloat16 else 'float32'} on {f'{ranks} × ' if ranks > 1 else ''}{run.device.type}) "
        f"on {len(train):,} images with {train.offsets[-1]:,} captions{held}; "
        f"{run.steps:,} steps of {run.size:,} pairs"
    )
    if model.image_tuned:
        assert model.image is not None
        say(f"training the image tower {model.image.spec} from pictures")
    if run.fit_settings is not None and len(train) < FEW:
        say(f"{len(train):,} images are few: `litune fit` alone is about as good, in seconds")
    if run.size < config.batch_size:
        say(f"batches are of {run.size:,} pairs, not {config.batch_size:,}: an image is in a batch once")
    if len(run.sources) > 1:
        for name, source in zip(run.sources, train.sources, strict=True):
            say(f"  {name}: {len(source):,} images with {source.offsets[-1]:,} captions")
        say(f"mixed {' '.join(config.mix)}; an epoch is {run.batches.per_epoch:,} batches")
    tokens = run.tokens if isinstance(run.tokens, Tokens) else sample_of(run, SAMPLE)
    cut = float((tokens.lengths >= model.tokenizer.max_tokens).mean())
    if model.tokenizer.layout != "sticky_eos" and cut > 0.2:
        say(f"{cut:.0%} of the captions fill --max-tokens {model.tokenizer.max_tokens} and may be cut short")


def sample_of(run: Tuning, count: int) -> Tokens:
    """The tokens of captions from everywhere."""
    return run.tokens.take(np.linspace(0, run.train.offsets[-1] - 1, count).astype(np.int64))


def runs_layers(run: Tuning) -> bool:
    """Whether litune runs the text tower's layers itself, and not an architecture that it doesn't know inside."""
    return isinstance(run.model.text.pack(run.tokens.take(np.zeros(1, int)), run.device), Rows)


def measure_micro(run: Tuning) -> Micro:
    """How much passes through the towers at once; on a GPU it is measured, and said."""
    if run.device.type != "cuda":
        return run.micro
    rows = -(-run.size // distributed.world_size())
    sample, model = sample_of(run, rows), run.model

    def texts(count: int) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
            return model.text_features(sample.take(np.arange(count)))

    def images(count: int) -> Tensor:
        assert model.image is not None
        blank = np.asarray(model.image.preprocess(Image.new("RGB", (64, 64))))
        pixels = send(torch.from_numpy(np.stack([blank] * count)), run.device)
        return model.image_features(model.image(pixels, bfloat16=run.image_bfloat16))

    reserved = sum(8 * p.numel() for group in run.optimizer.param_groups for p in group["params"])
    with still_statistics([model]):
        micro = choose_micro(run.config, rows, texts, images if model.image_tuned else None, reserved)
    model.zero_grad()
    torch.cuda.empty_cache()
    if micro.texts < rows:
        say(f"{micro.texts:,} texts pass the tower at once (--micro-batch), twice each: gradient caching")
    return micro


def kept_texts(run: Tuning) -> KeptTexts | None:
    """Every caption's vector, kept in the stores, where the text tower is locked and all may be drawn."""
    locked = not any(parameter.requires_grad for parameter in run.model.text.parameters())
    if not locked or run.steps * run.size < run.train.offsets[-1]:
        return None
    encode = partial(text_vectors, run.model, run.train, run.bfloat16)
    if distributed.world_size() > 1:
        distributed.from_main(lambda: encode() and None)  # which the other ranks then read
    return encode().of_captions
