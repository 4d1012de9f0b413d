"""A run of tuning: set up, then the loop over steps, and what makes it safe to interrupt."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from litune import distributed
from litune.config import TuneConfig, parse_rates
from litune.devices import deterministic, keep_freed_memory, pick_bfloat16, processor_cores, send, sent, tf32_products
from litune.errors import ConfigError, RunError
from litune.files import replace_folder
from litune.image.registry import is_convolutional
from litune.model.lit import LiT
from litune.model.run_folder import MANIFEST, STATE, save_model
from litune.progress import Task, say, track
from litune.schedules import parse_duration, parse_unlock, rate_share
from litune.sharding import Shards, drop_states, is_shared
from litune.store.captions import TOKENIZED_MOST, LaterTokens, tokenize
from litune.store.selection import Selection, source_names
from litune.text.packing import Rows
from litune.text.tokenizers import Tokens
from litune.text.vectors import KeptTexts
from litune.towers.locking import lock, train_unlocked
from litune.tuning.batching import default_duration, evaluation_steps, make_batches
from litune.tuning.gradient_cache import still_statistics
from litune.tuning.held_out import HeldOut
from litune.tuning.inputs import Inputs, Micro, Preparation, on_device
from litune.tuning.interrupt import after_the_step
from litune.tuning.log import OnLog, RunLog, board_writer
from litune.tuning.memory import ON_CPU, choose_micro, halved
from litune.tuning.optim import make_optimizer, parameter_groups, rate_of, set_rate
from litune.tuning.pixels import PixelLoader
from litune.tuning.state import BEST, Checkpoints, Progress, manifest
from litune.tuning.step import NEVER, Reading, Step, describe_bad

KEPT_MOST = 2**32
"""The most bytes of a locked text tower's vectors that are kept: beyond, texts are encoded anew in each step."""
LOG_LINES = 1000
SAMPLE = 10_000
"""The captions whose lengths stand for all, where they are not tokenised before the first step."""
SKIPPED_MOST = 10
"""Steps in a row that may be skipped since they are not finite: more is no accident."""


@dataclass(frozen=True)
class Unread:
    """A step's figures that are not read yet, with what goes into their line."""

    reading: Reading
    done: dict[str, Any]
    epoch: int
    rate: float


class Tuning:
    """One run: its pairs, its model and optimizer, and the loop over steps.

    Nothing random has state: a step's batch, its dropout and its pictures' crops follow from the seed and the step's
    number, so a run that was interrupted ends with the same bytes as one that was not.
    """

    def __init__(
        self,
        config: TuneConfig,
        train: Selection,
        val: Selection | None,
        model: LiT,
        device: torch.device,
        on_log: OnLog | None = None,
    ) -> None:
        self.config, self.store, self.train, self.val, self.model = config, train.store, train, val, model
        self.device, self.bfloat16, self.on_log = device, pick_bfloat16(config.precision, device), on_log
        if device.type == "cpu":
            keep_freed_memory()
        # Libraries may draw and round otherwise on each machine: all ranks begin with what rank 0 has.
        distributed.broadcast_([t for t in (*model.parameters(), *model.buffers()) if not is_shared(t)])
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
        # Convolutions go backward in bfloat16 at half of float32's speed on CPUs.
        slow = config.precision == "auto" and device.type == "cpu"
        self.image_bfloat16 = self.bfloat16 and not (slow and is_convolutional(model.image))
        if config.tensorboard:
            board_writer()  # what is missing is better said before anything is written
        self.shards: Shards | None = None
        self.tuned_parameters = 0
        """How many numbers the optimizer moves, on all ranks."""
        self.optimizer = self._make_optimizer()
        self.prepare = Preparation(
            config,
            train,
            self.batches,
            model,
            self.tokens,
            device,
            bfloat16=self.bfloat16,
            shared=self.shards is not None,
        )
        self.take = Step(
            config,
            model,
            self.optimizer,
            self.shards,
            device,
            bfloat16=self.bfloat16,
            image_bfloat16=self.image_bfloat16,
        )
        self.micro = Micro(config.micro_batch or ON_CPU.texts, config.image_micro_batch or ON_CPU.images)
        self.evaluate_at = evaluation_steps(self.steps, config.evaluations) if val else set()
        self.progress = Progress()
        self.skipped_in_a_row = 0
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
        # Of more captions, most tokens are in some. With --shard all rows of the table are shared alike.
        if isinstance(self.tokens, Tokens) and not config.shard:
            model.text.tune_only(np.unique(self.tokens.ids))
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        if model.text.shared:
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
        shared = self.shared
        for name, parameter in self.model.named_parameters():
            yield name, shared.get(name, parameter)

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        """The parameters that the ranks share, by name, of each this rank's rows."""
        return {f"text.{name}": own for name, own in self.shards.own.items()} if self.shards else {}

    @property
    def takes_part(self) -> bool:
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
        tokens = self.tokens if isinstance(self.tokens, Tokens) else self._sample(SAMPLE)
        cut = float((tokens.lengths >= self.model.tokenizer.max_tokens).mean())
        if self.model.tokenizer.layout != "sticky_eos" and cut > 0.2:
            say(f"{cut:.0%} of the captions fill --max-tokens {self.config.max_tokens} and may be cut short")

    def fit(self) -> None:
        """Take every step that is left, then write the finished run."""
        train_unlocked(self.model)
        self._keep_texts()
        if self.progress.step == 0:
            self.micro = self._choose_micro()
        done = self.progress.step
        with (
            RunLog(self.config, done, self.on_log) as log,
            track("tuning", "pairs", self.steps * self.size, done * self.size) as task,
            after_the_step() as interrupted,
            closing(Checkpoints(self)) as checkpoints,
            deterministic(self.device, strict=not self.model.image_tuned and self._packs()),
            tf32_products(self.device, self.bfloat16),
        ):
            if self.device.type == "cuda" and self.shards is None:
                self._compile()  # in here, since what is compiled is compiled for these two settings
            self._take_steps(log, task, interrupted, checkpoints)
        self.finish()
        if interrupted():  # in the last step: the run is whole, what was to follow it is not to begin
            raise KeyboardInterrupt

    def _take_steps(self, log: RunLog, task: Task, interrupted: Callable[[], bool], checkpoints: Checkpoints) -> None:
        """The loop over steps: log, evaluate and write checkpoints as they come due."""
        began, before, saved = time.monotonic(), self.progress.seconds, time.monotonic()
        unread: Unread | None = None
        for inputs in self.inputs(self.progress.step):
            reading = self._step_in_memory(inputs)
            self.progress.step = step = inputs.step + 1
            self.progress.seconds = before + time.monotonic() - began
            task.advance(self.size)
            # On a GPU the step before has ended by now, and this one has begun: nothing waits long.
            self._log(log, task, unread)
            unread = Unread(reading, self._done(), inputs.batch.epoch, task.rate) if reading else None
            evaluating = step in self.evaluate_at
            due = time.monotonic() - saved >= self.config.checkpoint_seconds and step < self.steps
            due = distributed.broadcast_object(due) if self.shards else due
            stopping = interrupted() and step < self.steps
            if self.device.type == "cpu" or evaluating or due or stopping or step == self.steps:
                self._log(log, task, unread)
                unread = None
            if evaluating:
                self._evaluate_and_log(log)
            if due or stopping:
                checkpoints.save()
                saved = time.monotonic()
            if stopping:
                checkpoints.wait()
                raise KeyboardInterrupt
        checkpoints.wait()

    def _log(self, log: RunLog, task: Task, unread: Unread | None) -> None:
        """Wait for what a step has left, check it and write its line."""
        if unread is None:
            return
        facts = unread.reading.facts()
        first_bad = int(facts.pop("first_bad"))
        if first_bad != NEVER:
            self._not_finite(first_bad, facts["loss"], facts["gradient_norm"])
        task.note = f"loss {facts['loss']:.3f}" + self._recall_note()
        if self.log_due(unread.reading.step):
            log.write(unread.done | facts | {"epoch": unread.epoch, "pairs_per_second": round(unread.rate, 1)})

    def _evaluate_and_log(self, log: RunLog) -> None:
        self.check()
        if self.takes_part:
            log.write(self._done() | {"val": self.evaluate()} | self.evaluate_sources())
            self._keep_best()

    def _step_in_memory(self, inputs: Inputs) -> Reading | None:
        """The step; where the GPU's memory runs out, it is taken again in smaller micro-batches."""
        while True:
            if inputs.micro != self.micro:
                inputs = next(iter(self.inputs(inputs.step)))
            try:
                return self.step(inputs)
            except torch.OutOfMemoryError:
                pass  # its traceback holds the tensors: first it has to go
            self.micro = halved(self.micro, self.take.at, self.size)
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _sample(self, count: int) -> Tokens:
        """The tokens of captions from everywhere."""
        return self.tokens.take(np.linspace(0, self.train.offsets[-1] - 1, count).astype(np.int64))

    def _packs(self) -> bool:
        """Whether litune runs the text tower's layers itself, and not an architecture that it doesn't know inside."""
        return isinstance(self.model.text.pack(self.tokens.take(np.zeros(1, int)), self.device), Rows)

    def _compile(self) -> None:
        """Compile the text tower's layers, where it pays in this run."""
        rows = min(self.micro.texts, -(-self.size // distributed.world_size()))
        tokens = self._sample(rows)
        packed = self.model.text.pack(tokens, self.device, bfloat16=self.bfloat16).to(self.device)
        total = self.steps * rows * float(tokens.lengths.mean())
        self.model.text.compile_layers(packed, total, bfloat16=self.bfloat16)

    def _choose_micro(self) -> Micro:
        """How much passes through the towers at once; on a GPU it is measured, and said."""
        if self.device.type != "cuda":
            return self.micro
        rows = -(-self.size // distributed.world_size())
        sample, model = self._sample(rows), self.model

        def texts(count: int) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                return model.text_features(sample.take(np.arange(count)))

        def images(count: int) -> Tensor:
            assert model.image is not None
            blank = np.asarray(model.image.preprocess(Image.new("RGB", (64, 64))))
            pixels = send(torch.from_numpy(np.stack([blank] * count)), self.device)
            return model.image_features(model.image(pixels, bfloat16=self.image_bfloat16))

        reserved = sum(8 * p.numel() for group in self.optimizer.param_groups for p in group["params"])
        with still_statistics([model]):
            found = choose_micro(self.config, rows, texts, images if model.image_tuned else None, reserved)
        self.model.zero_grad()
        torch.cuda.empty_cache()
        if found.texts < rows:
            say(f"{found.texts:,} texts pass the tower at once (--micro-batch), twice each: gradient caching")
        return found

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

        self.prepare.kept_texts = KeptTexts(tokens.lengths[first], captions.indices.to_numpy(), encode)

    def inputs(self, done: int) -> Generator[Inputs]:
        """The rank's inputs of the steps from `done` on, with pictures where the image tower is tuned."""
        wholes = zip(range(done, self.steps), self.batches.from_step(done, self.steps), strict=True)
        if not self.model.image_tuned:
            yield from on_device((self.prepare(step, whole, self.micro) for step, whole in wholes), self.device)
            return
        known, again = itertools.tee(wholes)
        own = (whole.take(self.prepare.own[distributed.rank()]) for _, whole in again)
        loader = self._pixels(self.train, augment=True)
        for (step, whole), (batch, pixels) in zip(known, loader.from_batches(own), strict=False):
            yield sent(self.prepare(step, whole, self.micro, batch, pixels), self.device)

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

    def step(self, inputs: Inputs) -> Reading | None:
        """One step of the optimizer; returns what is logged, if the step is logged and was taken.

        Raises `RunError` where loss or gradient are not finite: no step is taken with them. (A GPU has taken it by the
        time that it is known; then nothing of the model is written any more, see `check`.)
        """
        share = self.rate_share(inputs.step)
        image_share = self.unlock.share(inputs.step, self.steps, batch_size=self.size, images=len(self.train))
        set_rate(self.optimizer, share, image_share)
        take, number = self.take, inputs.step + 1
        loss, images, texts, more_images = take.gradients(inputs, images_tuned=image_share > 0)
        sources: dict[str, Any] = {}
        if len(self.sources) > 1 and self.log_due(number):
            found = take.source_losses(inputs, self.batches.starts, images.features, texts.features, more_images)
            sources = {"sources": {n: one for n, one in zip(self.sources, found, strict=True) if one["pairs"]}}
        tuned, norm = take.sum_gradients()
        if not take.finite(inputs.step, loss, norm):
            self._not_finite(inputs.step, loss.item(), norm.item())
            self.optimizer.zero_grad()
            return None
        self.skipped_in_a_row = 0
        take.update(tuned, norm)
        if not self.log_due(number) and number not in self.evaluate_at:
            return None
        values = {"loss": loss, "scale": self.model.scale, "gradient_norm": norm}
        if self.model.logit_bias is not None:
            values["bias"] = self.model.logit_bias
        values["first_bad"] = take.first_bad
        return Reading(number, values, {"learning_rate": self.config.learning_rate * share} | sources)

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        """Skip a step, if that is asked for and does not happen again and again; else stop with its step and keys."""
        images = next(self.batches.from_step(step, step + 1)).images
        keys = ", ".join(self.train.keys[i] for i in images[:3])
        what = f"{describe_bad(step, loss, norm)} (images {keys}, …)"
        self.skipped_in_a_row += 1
        if self.config.not_finite == "skip" and self.skipped_in_a_row <= SKIPPED_MOST:
            say(f"{what}: the step is skipped")
            return
        raise RunError(
            f"{what}: lower --learning-rate, or try --precision float32, in another --out; the last checkpoint "
            f"stays in {self.config.out}"
        )

    def check(self) -> None:
        """Wait for the device, and raise `RunError` if any step so far was not finite: before anything is written."""
        first = int(self.take.first_bad)
        if first != NEVER:
            self._not_finite(first, math.nan, math.nan)

    def evaluate(self) -> dict[str, Any]:
        """Retrieval on the held-out pairs (at most 1,000 images), in tuning's own precision."""
        assert self.val is not None
        self.last_evaluation = self._held_out()(self.val)
        return self.last_evaluation

    def _held_out(self) -> HeldOut:
        return HeldOut(
            self.model,
            self.device,
            partial(self._pixels, augment=False),
            bfloat16=self.bfloat16,
            image_bfloat16=self.image_bfloat16,
            image_micro=self.micro.images,
            shared=self.shards is not None,
        )

    def evaluate_sources(self) -> dict[str, dict[str, Any]]:
        """The same on the held-out pairs of each source by itself, where there are several."""
        assert self.val is not None
        if len(self.sources) == 1:
            return {}
        places = {one.store.path: name for name, one in zip(self.sources, self.train.sources, strict=True)}
        found = {places[one.store.path]: {"val": self._held_out()(one)} for one in self.val.sources}
        recalls = {name: one["val"]["text_to_image"]["recall@10"] for name, one in found.items()}
        say(
            f"step {self.progress.step:,}{self._recall_note()}: "
            + ", ".join(f"{n} {r:.1%}" for n, r in recalls.items())
        )
        return {"sources": found}

    def _keep_best(self) -> None:
        """Keep the model as a run folder of its own where it is better on the held-out pairs than ever before."""
        assert self.last_evaluation is not None
        recall = self.last_evaluation["text_to_image"]["recall@10"]
        if recall <= self.progress.best:
            return
        self.progress.best = recall
        best, new = self.config.out / BEST, self.config.out / f"{BEST}.tmp"
        if distributed.is_main():
            new.mkdir()
        save_model(new, self.model, manifest(self) | {"best_at_step": self.progress.step})
        if distributed.is_main():
            replace_folder(new, best, last=MANIFEST)

    def _recall_note(self) -> str:
        if self.last_evaluation is None:
            return ""
        return f" · held-out T→I R@10 {self.last_evaluation['text_to_image']['recall@10']:.1%}"

    def _done(self) -> dict[str, Any]:
        step = self.progress.step
        return {"step": step, "pairs": step * self.size, "seconds": round(self.progress.seconds, 2)}

    def finish(self) -> None:
        """Write the finished run and drop the checkpoint."""
        self.check()
        self.model.eval()
        if self.takes_part:
            save_model(self.config.out, self.model, manifest(self))
        if distributed.is_main():
            (self.config.out / STATE).unlink(missing_ok=True)
            drop_states(self.config.out)
        distributed.barrier()
        say(f"wrote {self.config.out}" + self._recall_note())


def _steps(text: str, name: str, total: int | None = None, *, size: int, images: int) -> int:
    return parse_duration(text, name).steps(batch_size=size, images=images, total=total)


def _example(named: dict[str, Any]) -> str:
    names = list(named)
    return ", ".join(names[:: max(1, len(names) // 3)][:3])
