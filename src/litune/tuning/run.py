"""A run of tuning: the loop over steps, and what makes it safe to interrupt."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from litune import distributed
from litune.config import TuneConfig
from litune.devices import deterministic, keep_freed_memory, pick_bfloat16, processor_cores, sent, tf32_products
from litune.errors import RunError
from litune.files import replace_folder
from litune.image.registry import is_convolutional
from litune.model.build import peak_rate
from litune.model.lit import LiT
from litune.model.run_folder import MANIFEST, STATE, save_model
from litune.progress import Task, say, track
from litune.schedules import parse_unlock
from litune.sharding import drop_states, is_shared
from litune.store.selection import Selection, source_names
from litune.towers.locking import train_unlocked
from litune.tuning.batching import evaluation_steps, make_batches
from litune.tuning.held_out import HeldOut, held_out_part
from litune.tuning.hubs import tuned_bank
from litune.tuning.inputs import Inputs, Micro, Preparation, on_device
from litune.tuning.interrupt import after_the_step
from litune.tuning.log import OnLog, RunLog, board_writer
from litune.tuning.memory import ON_CPU, halved
from litune.tuning.optim import set_rate
from litune.tuning.pixels import PixelLoader
from litune.tuning.setup import (
    batch_size,
    choose_tuned,
    kept_texts,
    measure_micro,
    runs_layers,
    schedule,
    tokens_of,
)
from litune.tuning.state import BEST, Checkpoints, Progress, manifest
from litune.tuning.step import NEVER, Reading, Step, describe_bad

LOG_LINES = 1000
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
        *,
        fit: dict[str, Any] | None = None,
    ) -> None:
        """`fit`: where its heads begin with those of a fit, the settings that were chosen for it."""
        self.config, self.store, self.train, self.val, self.model = config, train.store, train, val, model
        self.device, self.bfloat16, self.on_log = device, pick_bfloat16(config.precision, device), on_log
        if device.type == "cpu":
            keep_freed_memory()
        # Libraries may draw and round otherwise on each machine: all ranks begin with what rank 0 has.
        distributed.broadcast_([t for t in (*model.parameters(), *model.buffers()) if not is_shared(t)])
        self.tokens, self.fit_settings = tokens_of(train, model.tokenizer), fit
        self.size = batch_size(config, len(train))
        self.sources = source_names([source.store for source in train.sources])
        self.batches = make_batches(train, config, self.size)
        self.steps, self.rate_share = schedule(
            config, self.size, len(train), None if fit is None else int(train.offsets[-1])
        )
        self.unlock = parse_unlock(config.unlock, "unlock")
        # Convolutions go backward in bfloat16 at half of float32's speed on CPUs.
        slow = config.precision == "auto" and device.type == "cpu"
        self.image_bfloat16 = self.bfloat16 and not (slow and is_convolutional(model.image))
        if config.tensorboard:
            board_writer()  # what is missing is better said before anything is written
        self.tuned = choose_tuned(config, model, self.tokens)
        self.optimizer, self.shards = self.tuned.optimizer, self.tuned.shards
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
        self.val_texts: torch.Tensor | None = None
        """Features of the held-out captions at the last evaluation, which follows the last step where there is any."""

    @property
    def takes_part(self) -> bool:
        """Whether this rank evaluates and writes: rank 0, and where a tower is shared, all together."""
        return distributed.is_main() or self.shards is not None

    def fit(self) -> None:
        """Take every step that is left, then write the finished run."""
        train_unlocked(self.model)
        self.prepare.kept_texts = kept_texts(self)
        if self.progress.step == 0:
            self.micro = measure_micro(self)
        done = self.progress.step
        with (
            RunLog(self.config, done, self.on_log) as log,
            track("tuning", "pairs", self.steps * self.size, done * self.size) as task,
            after_the_step() as interrupted,
            closing(Checkpoints(self)) as checkpoints,
            deterministic(self.device, strict=not self.model.image_tuned and runs_layers(self)),
            tf32_products(self.device, self.bfloat16),
        ):
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

    def log_due(self, step: int) -> bool:
        """Whether this step, counted from 1, is logged; where sources take turns, a turn of each follows the other."""
        turn = step // len(self.sources) if self.batches.mix == "alternate" else step
        return turn % max(1, self.steps // LOG_LINES) == 0 or step == self.steps

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
        return Reading(number, values, {"learning_rate": peak_rate(self.config) * share} | sources)

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
        held_out = self.held_out()
        self.val_texts = held_out.texts(held_out_part(self.val).captions)
        self.last_evaluation = held_out(self.val, self.val_texts)
        return self.last_evaluation

    def held_out(self) -> HeldOut:
        """What evaluates the model as it is now."""
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
        found = {places[one.store.path]: {"val": self.held_out()(one)} for one in self.val.sources}
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
            save_model(self.config.out, self.model, manifest(self) | tuned_bank(self))
        if distributed.is_main():
            (self.config.out / STATE).unlink(missing_ok=True)
            drop_states(self.config.out)
        distributed.barrier()
        say(f"wrote {self.config.out}" + self._recall_note())
