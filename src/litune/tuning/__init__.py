"""The tuning loop: batches → features → loss → one step of the optimizer, and what makes it safe to interrupt."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from litune import distributed
from litune.checkpoint import STATE, load_tensors, model_state, save_model, save_tensors
from litune.config import TuneConfig, parse_mix, parse_rates
from litune.data.batches import Batch, Batches, Field
from litune.data.pixels import PixelLoader
from litune.data.text_shards import shards
from litune.data.texts import TOKENIZED_MOST, LaterTokens, first_of_equal, hash_texts, tokenize
from litune.data.tokenizers import Tokens
from litune.devices import keep_freed_memory, pick_bfloat16, processor_cores
from litune.errors import ConfigError, RunError, StoreError
from litune.evaluation.retrieval import retrieval
from litune.features import FeatureStore, Selection, library_versions
from litune.files import read_json, sweep_temporaries
from litune.gradient_cache import Encoded, Part
from litune.interop.card import write_card
from litune.losses import Ids, MoreImages, sigmoid_loss, softmax_loss
from litune.mixture import source_names
from litune.model import LiT
from litune.optim import make_optimizer, parameter_groups, rate_of, set_rate, stepping
from litune.pair_losses import pair_losses
from litune.progress import say, track
from litune.run_log import OnLog, RunLog, board_writer, drop_lines_after
from litune.schedules import parse_duration, parse_unlock, rate_share
from litune.sharding import FACTS, Shards, drop_states, find_state, is_shared, load_state, save_state
from litune.towers.image import is_convolutional, weights_hash
from litune.towers.kept import KeptTexts
from litune.towers.locking import lock, train_unlocked

EVALUATE_MOST = 1000
KEPT_MOST = 2**32
"""The most bytes of a locked text tower's vectors that are kept: beyond, texts are encoded anew in each step."""
LOG_LINES = 1000
SAMPLE = 10_000
"""The captions whose lengths stand for all, where they are not tokenised before the first step."""
BEST = "best"
SCORES = 2**26
"""The most scores that a loss holds at once: 256 MB of float32."""

T = TypeVar("T")


@dataclass
class Progress:
    """How far a run is; kept in every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    """The best held-out text→image recall@10 so far."""


class Tuning:
    """One run: its pairs, its model and optimizer, and the loop over steps.

    Nothing random has state: a step's batch, its dropout and its pictures' crops follow from the seed and the step's
    number, so a run that was interrupted ends with the same bytes as one that was not.
    """

    def __init__(
        self,
        config: TuneConfig,
        store: FeatureStore,
        train: Selection,
        val: Selection | None,
        model: LiT,
        device: torch.device,
        on_log: OnLog | None = None,
    ) -> None:
        self.config, self.store, self.train, self.val, self.model = config, store, train, val, model
        self.device, self.bfloat16, self.on_log = device, pick_bfloat16(config.precision, device), on_log
        if device.type == "cpu":
            keep_freed_memory()
        captions = int(train.offsets[-1])
        self.tokens: Tokens | LaterTokens = (
            tokenize(model.tokenizer, train, captions)
            if captions <= TOKENIZED_MOST
            else LaterTokens(model.tokenizer, train)
        )
        self.size = min(config.batch_size, len(train))
        if self.size < distributed.world_size():
            raise ConfigError(f"a batch of {self.size} pairs can't be shared by {distributed.world_size()} processes")
        self.sources = source_names([one.store for one in train.sources])
        self.batches = make_batches(train, config, self.size)
        count = partial(_steps, size=self.size, images=len(train))
        self.steps = max(1, count(config.duration or default_duration(len(train)), "duration"))
        self.rate_share = partial(
            rate_share,
            steps=self.steps,
            warmup=count(config.warmup, "warmup", self.steps),
            decay=config.schedule,
            timescale=max(1, count(config.timescale, "timescale", self.steps)),
            cooldown=count(config.cooldown, "cooldown", self.steps),
        )
        self.unlock = parse_unlock(config.unlock, "unlock")
        self.text_micro = config.micro_batch or (512 if device.type == "cpu" else 4096)
        self.image_micro = config.micro_batch or (64 if device.type == "cpu" else 256)
        # Convolutions go backward in bfloat16 at half of float32's speed on CPUs.
        slow = config.precision == "auto" and device.type == "cpu"
        self.image_bfloat16 = self.bfloat16 and not (slow and is_convolutional(model.image))
        self.image_ids = image_ids(train) if config.mask_duplicates else None
        self.most_captions = int(train.counts.max()) if config.image_negatives else 0
        if config.tensorboard:
            board_writer()  # what is missing is better said before anything is written
        self.shards: Shards | None = None
        self.tuned_parameters = 0
        """How many numbers the optimizer moves, on all ranks."""
        self.optimizer = self._make_optimizer()
        self.kept_texts: KeptTexts | None = None
        self.evaluate_at = evaluation_steps(self.steps, config.evaluations) if val else set()
        self.progress = Progress()
        self.last_evaluation: dict[str, Any] | None = None

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Lock what is to be locked, leave tokens that no caption has out, and group the rest."""
        config, model = self.config, self.model
        if config.locking is not None and config.locking[1] == "L":
            lock(model.text)
        rates = parse_rates(config.rates)
        named = dict(model.named_parameters())
        for pattern, _ in rates:
            if not any(rate_of(name, [(pattern, 0.0)]) == 0 for name in named):
                raise ConfigError(f"--rates: no parameter's name matches {pattern!r}; names are as {_example(named)}")
        rates += [
            ("image.*", config.image_rate),
            ("text_head.*", config.head_rate),
            ("image_head.*", config.head_rate),
            ("logit_*", config.temperature_rate),
        ]
        for name, parameter in named.items():
            if rate_of(name, rates) == 0:
                parameter.requires_grad_(False)
        # Of more captions, most tokens are in some. With --shard all rows are shared alike.
        if isinstance(self.tokens, Tokens) and not config.shard:
            model.text.tune_only(np.unique(self.tokens.ids))
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        if any(is_shared(parameter) for parameter in model.text.parameters()):
            self.shards = Shards(model.text)
        groups = parameter_groups(
            self._named_parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            rates=rates,
        )
        if not any(not name.startswith("logit_") for group in groups for name in group["names"]):
            raise ConfigError("everything is locked: leave a tower or a head to tune")
        self.tuned_parameters = sum(sizes[name] for group in groups for name in group["names"])
        return make_optimizer(config.optimizer, groups, beta1=config.beta1, beta2=config.beta2)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by name; of those that the ranks share, this one's rows."""
        shared = self._shared
        for name, parameter in self.model.named_parameters():
            yield name, shared.get(name, parameter)

    @property
    def _shared(self) -> dict[str, nn.Parameter]:
        """The parameters that the ranks share, by name, of each this rank's rows."""
        return {f"text.{name}": own for name, own in self.shards.own.items()} if self.shards else {}

    @property
    def _takes_part(self) -> bool:
        """Whether this rank evaluates and writes: rank 0, and where a tower is shared, all together."""
        return distributed.is_main() or self.shards is not None

    def announce(self) -> None:
        """Say what is about to happen."""
        held = f", {len(self.val):,} images held out" if self.val else ", nothing held out"
        ranks = distributed.world_size()
        say(
            f"tuning {self.config.text_tower} ({self.tuned_parameters / 1e6:.1f}M parameters, "
            f"{'bfloat16' if self.bfloat16 else 'float32'} on {f'{ranks} × ' if ranks > 1 else ''}{self.device.type}) "
            f"on {len(self.train):,} images with {self.train.offsets[-1]:,} captions{held}; "
            f"{self.steps:,} steps of {self.size:,} pairs"
        )
        if self.model.image_tuned:
            assert self.model.image is not None
            say(f"training the image tower {self.model.image.spec} from pictures")
        if self.size < self.config.batch_size:
            say(f"batches are of {self.size:,} pairs, not {self.config.batch_size:,}: an image is in a batch once")
        if len(self.sources) > 1:
            for name, one in zip(self.sources, self.train.sources, strict=True):
                say(f"  {name}: {len(one):,} images with {one.offsets[-1]:,} captions")
            say(f"mixed {' '.join(self.config.mix)}; an epoch is {self.batches.per_epoch:,} batches")
        tokens = self.tokens
        if not isinstance(tokens, Tokens):
            tokens = tokens.take(np.linspace(0, self.train.offsets[-1] - 1, SAMPLE).astype(np.int64))
        cut = float((tokens.lengths >= self.model.tokenizer.max_tokens).mean())
        if self.model.tokenizer.layout != "sticky_eos" and cut > 0.2:
            say(f"{cut:.0%} of the captions fill --max-tokens {self.config.max_tokens} and may be cut short")

    def fit(self) -> None:
        """Take every step that is left, then write the finished run."""
        train_unlocked(self.model)
        began, before = time.monotonic(), self.progress.seconds
        self._keep_texts()
        saved = time.monotonic()
        done = self.progress.step
        with (
            RunLog(self.config, done, self.on_log) as log,
            track("tuning", "pairs", self.steps * self.size, done * self.size) as task,
            after_the_step() as interrupted,
        ):
            for batch, pixels in self._coming(done):
                facts = self.step(batch, pixels)
                self.progress.step += 1
                self.progress.seconds = before + time.monotonic() - began
                task.advance(self.size)
                step = self.progress.step
                task.note = f"loss {facts['loss']:.3f}" + self._recall_note()
                if self.log_due(step):
                    log.write(self._done() | facts | {"epoch": batch.epoch, "pairs_per_second": round(task.rate, 1)})
                if step in self.evaluate_at and self._takes_part:
                    log.write(self._done() | {"val": self.evaluate()} | self.evaluate_sources())
                    self._keep_best()
                due = time.monotonic() - saved >= self.config.checkpoint_seconds and step < self.steps
                if distributed.broadcast_object(due) if self.shards else due:
                    self.save_state()
                    saved = time.monotonic()
                if interrupted() and step < self.steps:
                    self.save_state()
                    raise KeyboardInterrupt
        self.finish()
        if interrupted():  # in the last step: the run is whole, what was to follow it is not to begin
            raise KeyboardInterrupt

    def log_due(self, step: int) -> bool:
        """Whether this step, counted from 1, is logged; where sources take turns, a turn of each follows the other."""
        turn = step // len(self.sources) if self.batches.mix == "alternate" else step
        return turn % max(1, self.steps // LOG_LINES) == 0 or step == self.steps

    def _keep_texts(self) -> None:
        """Encode every caption once, where the text tower is locked, there is room, and all are likely to be drawn."""
        model, tokens = self.model, self.tokens
        locked = not any(parameter.requires_grad for parameter in model.text.parameters())
        if not locked or not isinstance(tokens, Tokens):
            return
        captions = self.train.caption_array.dictionary_encode()
        if self.steps * self.size < len(captions) or 4 * len(captions.dictionary) * model.text.width > KEPT_MOST:
            return
        _, first = np.unique(captions.indices.to_numpy(), return_index=True)

        def encode(rows: np.ndarray) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                packed = model.text.pack(tokens.take(first[rows]), self.device, bfloat16=self.bfloat16)
                vectors: Tensor = model.text(packed.to(self.device))
            return vectors

        self.kept_texts = KeptTexts(tokens.lengths[first], captions.indices.to_numpy(), encode, self.device)

    def _coming(self, done: int) -> Iterator[tuple[Batch, np.ndarray | None]]:
        """The rank's part of the batches from step `done` on, with pictures where the image tower is tuned."""
        ranks, rank = distributed.world_size(), distributed.rank()
        own = np.array_split(np.arange(self.size), ranks)[rank]
        batches = (batch.take(own) for batch in self.batches.from_step(done, self.steps))
        if not self.model.image_tuned:
            return ahead((self._read(batch), None) for batch in batches)
        loader = self._pixels(self.train, augment=True)
        return loader.from_batches(batches)

    def _read(self, batch: Batch) -> Batch:
        """A batch whose features are in memory, its captions tokenised where they were not before the first step."""
        self.train.touch(batch.images)
        if isinstance(self.tokens, Tokens):
            return batch
        return dataclasses.replace(batch, tokens=self.tokens.take(batch.all_captions))

    def _pixels(self, pairs: Selection, *, augment: bool) -> PixelLoader:
        assert self.model.image is not None
        workers = self.config.workers or processor_cores()
        return PixelLoader(
            pairs.image_files,
            self.model.image.preprocess,
            augment=self.config.augment if augment else "none",
            flip=self.config.flip and augment,
            seed=self.config.seed,
            workers=workers,
            ahead=max(2 * self.size // distributed.world_size(), 4 * workers),
            max_damaged=self.config.max_damaged,
        )

    def step(self, batch: Batch, pixels: np.ndarray | None = None) -> dict[str, Any]:
        """One step of the optimizer; returns what is logged."""
        share = self.rate_share(self.progress.step)
        image_share = self.unlock.share(self.progress.step, self.steps, batch_size=self.size, images=len(self.train))
        set_rate(self.optimizer, share, image_share)
        images = self._encode_images(batch, pixels, tuned=image_share > 0)
        texts = self._encode_texts(batch.all_captions, batch.tokens)
        more_images = self._more_images(batch)
        loss = self._loss(batch, images.features, texts.features, more_images)
        value = loss.item()
        if not math.isfinite(value):
            keys = ", ".join(self.train.keys[i] for i in batch.images[:3])
            raise RunError(
                f"the loss is {value} at step {self.progress.step} (images {keys}, …): lower --learning-rate, or "
                f"try --precision float32, in another --out; the last checkpoint stays in {self.config.out}"
            )
        due = len(self.sources) > 1 and self.log_due(self.progress.step + 1)
        of_sources = self._source_losses(batch, images.features, texts.features, more_images) if due else {}
        loss.backward()
        texts.backward()
        images.backward()
        if self.shards:
            self.shards.take_gradients()
        tuned = stepping(self.optimizer)
        norm = self._sum_gradients(tuned)
        if not norm <= self.config.clip_norm:  # else it would be a pass over all gradients, times one
            nn.utils.clip_grads_with_norm_(tuned, self.config.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        facts: dict[str, Any] = {
            "loss": value,
            "scale": self.model.scale.item(),
            "gradient_norm": norm.item(),
            "learning_rate": self.config.learning_rate * share,
        }
        if self.model.logit_bias is not None:
            facts["bias"] = self.model.logit_bias.item()
        return facts | ({"sources": of_sources} if due else {})

    def _encode_texts(self, captions: np.ndarray, tokens: Tokens | None = None) -> Encoded:
        """Features [n, D] of these captions, whose tokens may have been made ahead."""

        def part(rows: np.ndarray, seed: int) -> Tensor:
            torch.manual_seed(seed)  # dropout, the same in both passes
            encoded = rows if len(rows) or not self.shards else np.zeros(1, dtype=int)  # all ranks run a shared tower
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                if self.kept_texts is not None:
                    return self.model.features_of_texts(self.kept_texts(encoded))
                if tokens is not None and len(tokens):
                    return self.model.text_features(tokens.take(encoded))[: len(rows)]
                return self.model.text_features(self.tokens.take(encoded))[: len(rows)]

        rows = captions if tokens is None else np.arange(len(tokens))
        parts = self._parts(rows, self.text_micro, part, stream=0, alike=self.shards is not None)
        return Encoded(parts, [self.model.text, self.model.text_head])

    def _encode_images(self, batch: Batch, pixels: np.ndarray | None, *, tuned: bool) -> Encoded:
        """Features [b, D] of the batch's images, from the store or, with an unlocked tower, from their pixels."""
        model = self.model
        if pixels is None:

            def stored(rows: np.ndarray, seed: int) -> Tensor:
                torch.manual_seed(seed)
                return model.image_features(torch.from_numpy(self.train.features(rows)).to(self.device))

            return Encoded(self._parts(batch.images, 8 * self.text_micro, stored, stream=1), [model.image_head])
        tower = model.image
        assert tower is not None
        if tower.training != tuned:
            tower.train(tuned)  # locked for now: no dropout, batch norm's statistics stand still

        def from_pixels(rows: np.ndarray, seed: int) -> Tensor:
            torch.manual_seed(seed)
            with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
                raw = tower(torch.from_numpy(pixels[rows]), bfloat16=self.image_bfloat16)
            return model.image_features(raw)

        parts = self._parts(np.arange(len(pixels)), self.image_micro, from_pixels, stream=1)
        return Encoded(parts, [model.image_head, tower] if tuned else [model.image_head])

    def _parts(
        self,
        rows: np.ndarray,
        micro: int,
        encode: Callable[[np.ndarray, int], Tensor],
        *,
        stream: int,
        alike: bool = False,
    ) -> list[Part]:
        """Micro-batches of at most `micro` rows, each with a seed of its own, from the run's seed and the step.

        `alike`: as many on every rank, so that some may be empty.
        """
        count = max(1, -(-len(rows) // micro))
        if alike:
            count = max(distributed.gather_objects(count))
        parts = np.array_split(rows, count)  # of like size: no part is a lone picture
        seeds = np.random.SeedSequence(
            [self.config.seed, self.progress.step, stream, distributed.rank()]
        ).generate_state(len(parts), np.uint64)
        return [partial(encode, part, int(seed >> 1)) for part, seed in zip(parts, seeds, strict=True)]

    def _loss(self, batch: Batch, images: Tensor, texts: Tensor, more_images: MoreImages | None) -> Tensor:
        """The losses of the text fields, summed."""
        config, model = self.config, self.model
        total = torch.zeros((), device=self.device)
        for others, own, there, captions in self._of_fields(batch, images, texts):
            rows = distributed.sum_counts(len(there))
            if rows == 0:
                continue  # no image of the batch has this field
            ids = self._ids(batch.images[there], captions)
            chunk = max(64, SCORES // (rows + config.image_negatives))
            if model.logit_bias is not None:
                total = total + sigmoid_loss(
                    others, own, model.scale, model.logit_bias, ids=ids, chunk=chunk, negatives=config.negatives
                )
                continue
            total = total + softmax_loss(
                others,
                own,
                model.scale,
                image_to_text=config.image_to_text,
                ids=ids,
                more_images=more_images,
                chunk=chunk,
                negatives=config.negatives,
            )
        return total

    def _of_fields(
        self, batch: Batch, images: Tensor, texts: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, np.ndarray, np.ndarray]]:
        """For each text field: features of the images that have it and of their texts; which they are; the captions."""
        begin = 0
        for captions in batch.captions:
            there = np.flatnonzero(captions >= 0)
            own = texts[begin : begin + len(there)]
            begin += len(there)
            others = images if len(there) == len(captions) else images[torch.from_numpy(there).to(self.device)]
            yield others, own, there, captions[there]

    def _source_losses(
        self, batch: Batch, images: Tensor, texts: Tensor, more_images: MoreImages | None
    ) -> dict[str, dict[str, float]]:
        """For each source that is in the global batch, its number of pairs and the mean of their losses.

        Each pair has its loss in the whole batch: the mean of all, weighted by the numbers of pairs, is the batch's
        loss. Text fields are summed, each the mean over those pairs that have it.
        """
        config, model = self.config, self.model
        source = np.searchsorted(self.batches.starts, batch.images, "right") - 1
        most = len(self.sources)
        losses = torch.zeros(most, dtype=torch.float64)
        for others, own, there, captions in self._of_fields(batch, images, texts):
            rows = distributed.sum_counts(len(there))
            if rows == 0:
                continue
            found = pair_losses(
                others.detach().float(),
                own.detach().float(),
                model.scale.detach(),
                bias=None if model.logit_bias is None else model.logit_bias.detach(),
                image_to_text=config.image_to_text,
                ids=self._ids(batch.images[there], captions),
                more_images=more_images,
                chunk=max(64, SCORES // (rows + config.image_negatives)),
                negatives=config.negatives,
            )
            sums = np.bincount(source[there], weights=found.double().cpu().numpy(), minlength=most)
            both = torch.from_numpy(np.stack([sums, np.bincount(source[there], minlength=most)]))
            distributed.sum_([both])
            losses += both[0] / both[1].clamp(min=1)
        pairs = torch.from_numpy(np.bincount(source, minlength=most))
        distributed.sum_([pairs])
        return {
            name: {"pairs": int(count), "loss": float(loss)}
            for name, count, loss in zip(self.sources, pairs, losses, strict=True)
            if count
        }

    def _ids(self, images: np.ndarray, captions: np.ndarray) -> Ids | None:
        if not self.config.mask_duplicates:
            return None
        texts = hash_texts(self.train.take_captions(captions))
        return Ids(torch.from_numpy(self._image_ids(images)), torch.from_numpy(texts))

    def _image_ids(self, images: np.ndarray) -> np.ndarray:
        return images if self.image_ids is None else self.image_ids[images]

    def _more_images(self, batch: Batch) -> MoreImages | None:
        """Images from outside the batch, drawn for this step alone; each rank brings its share."""
        wanted = min(self.config.image_negatives, len(self.train) - self.size)
        if wanted <= 0:
            return None
        whole = distributed.gather_rows(torch.from_numpy(batch.images)[:, None].to(self.device)).cpu().numpy()
        random = np.random.default_rng([self.config.seed, self.progress.step, 2])
        # As many more as the batch has, so that enough are left without its own; a step costs what it draws.
        drawn = random.choice(len(self.train), wanted + len(whole), replace=False)
        drawn = drawn[~np.isin(drawn, whole)][:wanted]
        drawn = np.array_split(drawn, distributed.world_size())[distributed.rank()]
        with torch.no_grad():
            features = self.model.image_features(torch.from_numpy(self.train.features(drawn)).to(self.device))
        first = self.train.offsets[drawn].astype(np.int64)
        counts = self.train.offsets[drawn + 1] - first
        place = np.arange(self.most_captions)
        there = place < counts[:, None]
        texts = np.full(there.shape, -1)
        if self.config.mask_duplicates:
            texts[there] = hash_texts(self.train.take_captions((first[:, None] + place)[there]))
        return MoreImages(features, torch.from_numpy(self._image_ids(drawn)), torch.from_numpy(texts))

    def _sum_gradients(self, tuned: list[nn.Parameter]) -> Tensor:
        """Add up every rank's share of the gradients; what no rank has a gradient for stays without.

        Returns the norm of them all. Those of shared parameters are summed before; each rank has a part of them.
        """
        shared = set(self._shared.values())
        own = [p for p in tuned if p in shared]
        everywhere = [p for p in tuned if p not in shared]
        if distributed.world_size() > 1:
            having = torch.tensor([p.grad is not None for p in everywhere], dtype=torch.int64)
            distributed.sum_([having])
            for parameter, ranks in zip(everywhere, having.tolist(), strict=True):
                if ranks and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            distributed.sum_([p.grad for p in everywhere if p.grad is not None])
        norm = nn.utils.get_total_norm([p.grad for p in everywhere if p.grad is not None])
        if not shared:
            return norm
        square = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square()
        distributed.sum_([square])
        return (norm.square() + square).sqrt()

    def evaluate(self) -> dict[str, Any]:
        """Retrieval on the held-out pairs (at most 1,000 images), in tuning's own precision."""
        assert self.val is not None
        self.last_evaluation = self._evaluate(self.val)
        return self.last_evaluation

    def evaluate_sources(self) -> dict[str, dict[str, Any]]:
        """The same on the held-out pairs of each source by itself, where there are several."""
        assert self.val is not None
        if len(self.sources) == 1:
            return {}
        places = {one.store.path: name for name, one in zip(self.sources, self.train.sources, strict=True)}
        found = {places[one.store.path]: {"val": self._evaluate(one)} for one in self.val.sources}
        recalls = {name: one["val"]["text_to_image"]["recall@10"] for name, one in found.items()}
        say(
            f"step {self.progress.step:,}{self._recall_note()}: "
            + ", ".join(f"{n} {r:.1%}" for n, r in recalls.items())
        )
        return {"sources": found}

    def _evaluate(self, val: Selection) -> dict[str, Any]:
        if len(val) > EVALUATE_MOST:
            val = val.subset(np.linspace(0, len(val) - 1, EVALUATE_MOST).round().astype(int))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            texts = self.model.encode_text(val.captions)
        measure = partial(self._retrieval, val, texts)
        return distributed.from_main(measure) if self.shards else measure()

    def _retrieval(self, val: Selection, texts: Tensor) -> dict[str, Any]:
        """Retrieval among held-out pairs, given the features of their texts."""
        images, kept = self._held_out_images(val)
        # An image that several stores hold out is one image: it would tie with itself.
        first = image_ids(val) if len(val.sources) > 1 else None
        if first is not None:
            once = first[kept] == kept
            images, kept = images[torch.from_numpy(once)], kept[once]
        owner = np.full(len(val), -1)
        owner[kept] = np.arange(len(kept))
        owner = owner if first is None else owner[first]
        there = owner[val.owner] >= 0
        return retrieval(images, texts[torch.from_numpy(there)], torch.from_numpy(owner[val.owner][there]))

    def _held_out_images(self, val: Selection) -> tuple[Tensor, np.ndarray]:
        """Features of the held-out images, and the positions of those that could be read."""
        if not self.model.image_tuned:
            return self.model.encode_features(val.features()), np.arange(len(val))
        tower = self.model.image
        assert tower is not None
        was = tower.training
        tower.eval()
        parts, kept = [], []
        for positions, pixels in self._pixels(val, augment=False).in_order(self.image_micro):
            raw = tower.encode(torch.from_numpy(pixels), bfloat16=self.image_bfloat16)
            parts.append(self.model.encode_features(raw))
            kept.append(positions)
        tower.train(was)
        return torch.cat(parts), np.concatenate(kept)

    def _keep_best(self) -> None:
        """Keep the model as a run folder of its own where it is better on the held-out pairs than ever before."""
        assert self.last_evaluation is not None
        recall = self.last_evaluation["text_to_image"]["recall@10"]
        if recall <= self.progress.best:
            return
        self.progress.best = recall
        best, new = self.config.out / BEST, self.config.out / f"{BEST}.tmp"
        if distributed.is_main():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
        save_model(new, self.model, self.manifest() | {"best_at_step": self.progress.step})
        if distributed.is_main():
            shutil.rmtree(best, ignore_errors=True)
            new.rename(best)

    def _recall_note(self) -> str:
        if self.last_evaluation is None:
            return ""
        return f" · held-out T→I R@10 {self.last_evaluation['text_to_image']['recall@10']:.1%}"

    def _done(self) -> dict[str, Any]:
        step = self.progress.step
        return {"step": step, "pairs": step * self.size, "seconds": round(self.progress.seconds, 2)}

    def save_state(self) -> None:
        """Write what is needed to go on from this step."""
        if not self._takes_part:
            return
        facts = dataclasses.asdict(self.progress) | {
            "last_evaluation": self.last_evaluation,
            "about": self.about(),
            "ranks": distributed.world_size(),
        }
        tensors = self._model_tensors()
        for name, parameter in self._named_tuned():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = self._as_shared(name, torch.as_tensor(value).detach())
        if self.config.shard:
            save_state(self.config.out, tensors, facts)
        else:
            save_tensors(self.config.out / STATE, tensors, facts)

    def _model_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": value for name, value in model_state(self.model).items()}

    def _as_shared(self, name: str, state: Tensor) -> Tensor:
        """A tensor of the optimizer's state: of a parameter that the ranks share, the rows of all ranks as one."""
        if name not in self._shared or state.ndim == 0:
            return state
        assert self.shards is not None
        return self.shards.shared(name.removeprefix("text."), state)

    def about(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        facts = {
            "steps": self.steps,
            "images": len(self.train),
            "captions": int(self.train.offsets[-1]),
            "tower": self.store.tower,
            "pairs": self.store.manifest.get("pairs"),
        }
        if len(self.sources) > 1 or self.config.texts:
            facts["sources"] = [
                [str(one.store.path), len(one), int(one.offsets[-1]), one.store.manifest.get("pairs")]
                for one in self.train.sources
            ]
            facts["texts"] = [[f.name, f.stat().st_size] for path in self.config.texts for f in shards(path)]
        return dict(json.loads(json.dumps(facts)))

    def go_on(self) -> None:
        """Take up the last checkpoint, if there is one; lines logged after it are dropped."""
        if distributed.is_main():
            sweep_temporaries(self.config.out)
        distributed.barrier()
        shared = distributed.from_main(partial(find_state, self.config.out))
        if shared is not None:
            facts = read_json(shared / FACTS, RunError)
        elif (self.config.out / STATE).exists():
            tensors, facts = load_tensors(self.config.out / STATE)
        else:
            return
        if facts["about"] != self.about():
            differing = [k for k, v in self.about().items() if facts["about"].get(k) != v]
            raise RunError(
                f"{self.config.out} was begun on another store ({', '.join(differing)} differ from {self.config.store} "
                "as it is now): give --overwrite, or another --out"
            )
        if shared is not None:
            load_state(shared, self._tensors_to_fill)
        else:
            self._take_up(tensors)
        self.progress = Progress(facts["step"], facts["seconds"], facts["best"])
        self.last_evaluation = facts["last_evaluation"]
        if distributed.is_main():
            drop_lines_after(self.config.out, self.progress.step)
        say(f"going on with {self.config.out} from step {self.progress.step:,} of {self.steps:,}")
        if facts["ranks"] != distributed.world_size():
            say(
                f"begun on {facts['ranks']} processes, now on {distributed.world_size()}: the batches and the loss are "
                "the same, dropout draws other random numbers, sums are rounded in another order"
            )

    def _take_up(self, tensors: dict[str, Tensor]) -> None:
        """Fill the model and the optimizer's state from what `save_state` wrote."""
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in self._named_tuned():
            prefix = f"optimizer.{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}

    def _tensors_to_fill(self, there: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the model, and of the optimizer a new state, of what is `there` in a shared state."""
        tensors = self._model_tensors()
        for name, parameter in self._named_tuned():
            prefix = f"optimizer.{name}."
            for key, like in ((key, like) for key, like in there.items() if key.startswith(prefix)):
                shape = parameter.shape if like.ndim else like.shape  # of shared parameters, this rank's rows
                state = torch.zeros(shape, dtype=like.dtype, device=parameter.device)
                self.optimizer.state[parameter][key.removeprefix(prefix)] = state
                tensors[key] = self._as_shared(name, state)
        return tensors

    def _named_tuned(self) -> list[tuple[str, Tensor]]:
        return [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]

    def finish(self) -> None:
        """Write the finished run and drop the checkpoint."""
        self.model.eval()
        if self._takes_part:
            save_model(self.config.out, self.model, self.manifest())
        if distributed.is_main():
            (self.config.out / STATE).unlink(missing_ok=True)
            drop_states(self.config.out)
            write_card(self.config.out)
        distributed.barrier()
        say(f"wrote {self.config.out}" + self._recall_note())

    def manifest(self) -> dict[str, Any]:
        """Where everything in the run came from."""
        if self.model.image_tuned:
            assert self.model.image is not None
            weights = weights_hash(self.model.image)
            self.model.image_provenance = self.model.image.provenance | {"weights": weights}
        done = self.progress.step
        return {
            "complete": True,
            "text_tower": self.config.text_tower,
            "locking": self.config.locking,
            "store": {
                "path": str(self.config.store),
                "images": len(self.store),
                "tower": self.store.tower,
                "pairs": self.store.manifest.get("pairs"),
            },
            **({"sources": self._describe_sources()} if len(self.sources) > 1 else {}),
            "tuned_on": {
                "split": self.config.split if self.store.splits else None,
                "images": len(self.train),
                "captions": int(self.train.offsets[-1]),
                "held_out_images": len(self.val) if self.val else 0,
            },
            "tuned_parameters": self.tuned_parameters,
            "steps": done,
            "batch_size": self.size,
            "pairs_seen": done * self.size,
            "seconds": round(self.progress.seconds, 1),
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "ranks": distributed.world_size(),
            "seed": self.config.seed,
            "libraries": library_versions(),
            "held_out": self.last_evaluation,
        }

    def _describe_sources(self) -> dict[str, dict[str, Any]]:
        """Where the images of each source came from."""
        return {
            name: {
                "path": str(one.store.path),
                "images": len(one),
                "captions": int(one.offsets[-1]),
                "pairs": one.store.manifest.get("pairs"),
            }
            for name, one in zip(self.sources, self.train.sources, strict=True)
        }


@contextmanager
def after_the_step() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed, so that a step can be finished and kept; pressed twice, it stops at once.

    Of several processes each is stopped on its own, and in threads there are no signals: there, as ever.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        os.write(2, b"\nfinishing this step; Ctrl-C again stops at once\n")  # print can be what was interrupted

    ours = threading.current_thread() is threading.main_thread() and distributed.world_size() == 1
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_batches(train: Selection, config: TuneConfig, size: int) -> Batches:
    """The batches of a run. Raises `ConfigError` where a store has fewer images than a batch takes of it."""
    sources = [len(one) for one in train.sources]
    mix = parse_mix(config.mix, len(sources)) if len(sources) > 1 else "proportional"
    if mix != "proportional":
        shares = [1.0] * len(sources) if mix == "alternate" else [float(weight / sum(mix)) for weight in mix]
        for one, share in zip(train.sources, shares, strict=True):
            if (wanted := math.ceil(share * size)) > len(one):
                raise ConfigError(
                    f"{one.store.path} has {len(one):,} images to tune on, fewer than the {wanted:,} that a batch "
                    "takes of it: lower --batch-size or its weight in --mix"
                )
    fields = text_fields(train, config.fields)
    return Batches(len(train), fields, size, config.seed, config.shuffle, sources, mix, train.read_ahead)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is in use."""
    items = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def text_fields(train: Selection, names: tuple[str, ...]) -> list[Field]:
    """The captions of each of the named text fields; all captions as one field where none is named."""
    if not names:
        return [Field(train.offsets, None)]
    found = []
    for name in names:
        captions = train.of_field(name)
        if not len(captions):
            raise StoreError(f"no image of {train.store.path} that is tuned on has the text field {name!r}")
        found.append(Field(np.searchsorted(captions, train.offsets), captions))
    return found


def image_ids(train: Selection) -> np.ndarray | None:
    """Numbers [N] that are equal for equal image files: the position of the first; None where no two are equal."""
    hashes = train.image_hashes()
    return None if hashes is None else first_of_equal(hashes)


def default_duration(images: int) -> str:
    """How long to tune where nothing is asked: 10 epochs, at least 30,000 pairs and at most 4 million."""
    return f"{min(4_000_000, max(30_000, 10 * images))}pairs"


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the held-out pairs are evaluated: spread evenly, the last step among them."""
    return {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}


def _steps(text: str, name: str, total: int | None = None, *, size: int, images: int) -> int:
    return parse_duration(text, name).steps(batch_size=size, images=images, total=total)


def _example(named: dict[str, Any]) -> str:
    names = list(named)
    return ", ".join(names[:: max(1, len(names) // 3)][:3])
