"""Feature store → run: a text tower learns to read the locked image tower (LiT, arXiv 2111.07991)."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litune.checkpoint import (
    CONFIG,
    MANIFEST,
    METRICS,
    STATE,
    load,
    load_tensors,
    model_state,
    save_model,
    save_tensors,
)
from litune.config import TuneConfig, command, to_json
from litune.data.batches import Batch, Batches
from litune.data.tokenizers import Tokenizer, find_tokenizer, train_tokenizer
from litune.devices import pick_bfloat16, pick_device
from litune.errors import ConfigError, OutputExistsError, RunError
from litune.evaluation.retrieval import retrieval
from litune.features import FeatureStore, Selection, library_versions
from litune.files import clear_output, read_json, sweep_temporaries, write_json, write_text
from litune.losses import softmax_loss
from litune.model import LiT
from litune.optim import make_adamw, parameter_groups, set_rate, warmup_cosine
from litune.progress import say, track
from litune.towers.heads import make_head
from litune.towers.text import TextSpec, make_text_tower, parse_text_spec, text_layout

HOLDOUT_MOST, EVALUATE_MOST = 1000, 1000
LOG_LINES = 1000


@command(TuneConfig)
def tune(config: TuneConfig) -> LiT:
    """Tune a text tower on a feature store's pairs, write a run folder, and return the model.

    Goes on with an unfinished run of the same config. Raises `StoreError`, `TowerError` or `ConfigError` for
    what can't be used, `OutputExistsError` where the run at `config.out` is finished, `RunError` where it has
    another config or the loss stops being finite.
    """
    store = FeatureStore(config.store)
    spec = parse_text_spec(config.text_tower)
    train, val = choose_pairs(store, config)
    goes_on = can_go_on(config)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer(spec, config, train.captions)
    model = make_model(store, spec, tokenizer, train, config).to(device)
    run = Tuning(config, store, train, val, model, device)
    if not goes_on:
        prepare_run(config)
    run.announce()
    if goes_on:
        run.go_on()
    run.fit()
    return load(config.out, device=config.device)


def choose_pairs(store: FeatureStore, config: TuneConfig) -> tuple[Selection, Selection | None]:
    """The pairs to tune on and, where there are any, the held-out ones."""
    if "split" in store.metadata.column_names:
        splits = set(store.metadata["split"].to_pylist())
        pairs = store.select(config.split, config.lang)
        if config.val_split in splits and config.val_split != config.split:
            return _enough(pairs), store.select(config.val_split, config.lang)
        if config.val_split != TuneConfig.val_split:
            store.select(config.val_split, config.lang)  # says which splits there are
            raise ConfigError(f"--split and --val-split are both {config.split!r}: evaluate on pairs not tuned on")
    else:
        pairs = store.select(lang=config.lang)
    held_out = min(HOLDOUT_MOST, round(config.holdout * len(pairs)))
    if held_out < 2:
        return _enough(pairs), None
    # By the seed of the store's order alone: another run's seed holds out the same images.
    order = np.random.default_rng(0).permutation(len(pairs))
    return _enough(pairs.subset(np.sort(order[held_out:]))), pairs.subset(np.sort(order[:held_out]))


def _enough(pairs: Selection) -> Selection:
    if len(pairs) < 2:
        raise ConfigError(f"{pairs.store.path} has {len(pairs)} image to tune on: contrastive tuning needs two or more")
    return pairs


def can_go_on(config: TuneConfig) -> bool:
    """Whether an unfinished run of the same config is at the output; raises where something else is in the way.

    Writes nothing: whatever else is wrong with the settings is found before a byte is touched.
    """
    out = config.out
    before = _config_at(out)
    finished = (out / MANIFEST).exists()
    if before is not None and not finished and not changed_settings(before, to_json(config)):
        return True  # also with --overwrite: the same command goes on
    if before is not None and not config.overwrite:
        if finished:
            raise OutputExistsError(f"{out} holds a finished run: choose another --out, or give --overwrite")
        sides = "; ".join(
            f"{k} was {before.get(k)!r}, is {v!r}" for k, v in changed_settings(before, to_json(config)).items()
        )
        raise RunError(
            f"{out} holds an unfinished run of another config ({sides}): give the same, choose another --out, "
            "or give --overwrite"
        )
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        clear_output(out, False, "run", config.overwrite)
    return False


def prepare_run(config: TuneConfig) -> None:
    """Make way for a new run and write its config."""
    clear_output(config.out, _config_at(config.out) is not None, "run", config.overwrite)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / CONFIG, to_json(config))


def _config_at(out: Path) -> dict[str, Any] | None:
    """The config of the run at `out`; None where there is no run of litune (other tools write a config.json too)."""
    if not (out / CONFIG).is_file():
        return None
    found = read_json(out / CONFIG, RunError)
    return found if {"store", "text_tower", "pairs_seen"} <= found.keys() else None


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of `now` that are others in `before`, but for those that leave the result as it is."""
    neutral = ("overwrite", "out", "checkpoint_seconds")
    return {k: v for k, v in now.items() if before.get(k) != v and k not in neutral}


def make_tokenizer(spec: TextSpec, config: TuneConfig, captions: Sequence[str]) -> Tokenizer:
    """The text tower's own tokenizer, the one asked for, or one trained on the captions."""
    if config.tokenizer and spec.pretrained:
        raise ConfigError(f"--tokenizer is for towers from scratch: {spec.spec} was trained with its own")
    where = config.tokenizer or spec.tokenizer
    backend = find_tokenizer(where) if where else train_tokenizer(captions, config.vocab_size)
    return Tokenizer(backend, text_layout(spec), config.max_tokens)


def make_model(store: FeatureStore, spec: TextSpec, tokenizer: Tokenizer, train: Selection, config: TuneConfig) -> LiT:
    """The model to tune: the text tower, a linear head with bias, and the image side's fixed or tuned map."""
    text = make_text_tower(
        spec,
        vocab_size=tokenizer.vocab_size,
        max_tokens=config.max_tokens,
        pooling=config.pooling,
        dropout=config.dropout,
    )
    dim = config.dim or store.width
    model = LiT(
        text,
        make_head("linear", text.width, dim),
        make_head(config.image_head, store.width, dim),
        tokenizer,
        image_width=store.width,
        dim=dim,
        logit_scale=config.logit_scale,
        image_map=config.image_map,
        image_provenance=store.tower,
    )
    if config.image_map != "none":
        mean, covariance = moments(train)
        model.center.copy_(torch.from_numpy(mean))
        if model.whitening is not None:
            model.whitening.copy_(torch.from_numpy(whitening(covariance, config.shrinkage)))
    return model


def moments(pairs: Selection) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D] and covariance [D, D] of the images' raw features, summed in float64 block by block."""
    width = pairs.store.width
    total, products = np.zeros(width), np.zeros((width, width))
    for block in pairs.store.blocks(pairs.rows):
        values = block.astype(np.float64)
        total += values.sum(axis=0)
        products += values.T @ values
    mean = total / len(pairs)
    return mean, products / len(pairs) - np.outer(mean, mean)


def whitening(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    """The symmetric matrix W [D, D] with W (C + s·I) W = I, where s is `shrinkage` times the mean variance.

    Directions whose variance is far above s come out with variance one; those far below keep their shares, so that
    noise is not blown up (ZCA whitening with ridge shrinkage).
    """
    variances, directions = np.linalg.eigh(covariance)
    floor = shrinkage * max(float(variances.mean()), 1e-12) + 1e-12
    inverse_roots = 1 / np.sqrt(np.maximum(variances, 0) + floor)
    found: np.ndarray = (directions * inverse_roots) @ directions.T
    return found


@dataclass
class Progress:
    """How far a run is; kept in every checkpoint."""

    step: int = 0
    seconds: float = 0.0


class Tuning:
    """One run: its pairs, its model and optimizer, and the loop over steps.

    Nothing random has state: a step's batch and its dropout follow from the seed and the step's number, so a run
    that was interrupted ends with the same bytes as one that was not.
    """

    def __init__(
        self,
        config: TuneConfig,
        store: FeatureStore,
        train: Selection,
        val: Selection | None,
        model: LiT,
        device: torch.device,
    ) -> None:
        self.config, self.store, self.train, self.val, self.model = config, store, train, val, model
        self.device, self.bfloat16 = device, pick_bfloat16(config.precision, device)
        self.tokens = model.tokenizer(train.captions)
        first = np.concatenate([[0], np.cumsum(train.counts)])
        self.size = min(config.batch_size, len(train))
        self.batches = Batches(first, self.size, config.seed)
        self.pairs_seen = config.pairs_seen or default_pairs_seen(len(train))
        self.steps = max(1, round(self.pairs_seen / self.size))
        self.warmup = round(config.warmup * self.steps)
        self.optimizer = make_adamw(
            parameter_groups(
                model.named_parameters(),
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                rates={
                    "text_head.": config.head_rate,
                    "image_head.": config.head_rate,
                    "logit_scale": config.temperature_rate,
                },
            ),
            config.beta2,
        )
        self.evaluate_at = evaluation_steps(self.steps, config.evaluations) if val else set()
        self.progress = Progress()
        self.last_evaluation: dict[str, Any] | None = None

    def announce(self) -> None:
        """Say what is about to happen."""
        tuned = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        held = f", {len(self.val):,} images held out" if self.val else ", nothing held out"
        say(
            f"tuning {self.config.text_tower} ({tuned / 1e6:.1f}M parameters, "
            f"{'bfloat16' if self.bfloat16 else 'float32'} on {self.device.type}) on {len(self.train):,} images with "
            f"{self.train.counts.sum():,} captions{held}; {self.steps:,} steps of {self.size:,} pairs"
        )
        cut = float((self.tokens.lengths >= self.model.tokenizer.max_tokens).mean())
        if self.model.tokenizer.layout != "sticky_eos" and cut > 0.2:
            say(f"{cut:.0%} of the captions fill --max-tokens {self.config.max_tokens} and may be cut short")

    def fit(self) -> None:
        """Take every step that is left, then write the finished run."""
        self.model.train()
        began, before = time.monotonic(), self.progress.seconds
        saved = time.monotonic()
        log_every = max(1, self.steps // LOG_LINES)
        done = self.progress.step
        with (
            open(self.config.out / METRICS, "a" if done else "w", encoding="utf-8") as metrics,
            track("tuning", "pairs", self.steps * self.size, done * self.size) as task,
        ):
            for batch in self.batches.from_step(done, self.steps):
                facts = self.step(batch)
                self.progress.step += 1
                self.progress.seconds = before + time.monotonic() - began
                task.advance(self.size)
                step = self.progress.step
                task.note = f"loss {facts['loss']:.3f}" + self._recall_note()
                if step % log_every == 0 or step == self.steps:
                    facts |= {"epoch": batch.epoch, "pairs_per_second": round(task.rate, 1)}
                    self._log(metrics, facts)
                if step in self.evaluate_at:
                    self._log(metrics, {"val": self.evaluate()})
                if time.monotonic() - saved >= self.config.checkpoint_seconds and step < self.steps:
                    self.save_state()
                    saved = time.monotonic()
        self.finish()

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimizer; returns what is logged."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.progress.step)  # this step's dropout
        share = warmup_cosine(self.progress.step, self.steps, self.warmup)
        set_rate(self.optimizer, share)
        raw = torch.from_numpy(self.train.features(batch.images)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            texts = self.model.text_features(self.tokens.take(batch.captions))
        loss = softmax_loss(self.model.image_features(raw), texts, self.model.scale)
        if not math.isfinite(loss.item()):
            keys = ", ".join(self.train.keys[i] for i in batch.images[:3])
            raise RunError(
                f"the loss is {loss.item()} at step {self.progress.step} (images {keys}, …): lower --learning-rate, or "
                f"try --precision float32, in another --out; the last checkpoint stays in {self.config.out}"
            )
        loss.backward()
        tuned = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(tuned, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": loss.item(),
            "scale": self.model.scale.item(),
            "gradient_norm": norm.item(),
            "learning_rate": self.config.learning_rate * share,
        }

    def evaluate(self) -> dict[str, Any]:
        """Retrieval on the held-out pairs (at most 1,000 images), in tuning's own precision."""
        assert self.val is not None
        val = self.val
        if len(val) > EVALUATE_MOST:
            val = val.subset(np.linspace(0, len(val) - 1, EVALUATE_MOST).round().astype(int))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            texts = self.model.encode_text(val.captions)
        images = self.model.encode_features(val.features())
        found = retrieval(images, texts, torch.from_numpy(val.owner))
        self.last_evaluation = found
        return found

    def _recall_note(self) -> str:
        if self.last_evaluation is None:
            return ""
        return f" · held-out T→I R@10 {self.last_evaluation['text_to_image']['recall@10']:.1%}"

    def _log(self, metrics: Any, facts: dict[str, Any]) -> None:
        done = {"step": self.progress.step, "pairs": self.progress.step * self.size}
        metrics.write(json.dumps(done | {"seconds": round(self.progress.seconds, 2)} | facts) + "\n")
        metrics.flush()

    def save_state(self) -> None:
        """Write what is needed to go on from this step."""
        tensors = {f"model.{k}": v for k, v in model_state(self.model).items()}
        for name, parameter in self._named_tuned():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().cpu()
        facts = dataclasses.asdict(self.progress) | {"last_evaluation": self.last_evaluation, "about": self.about()}
        save_tensors(self.config.out / STATE, tensors, facts)

    def about(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        facts = {
            "steps": self.steps,
            "images": len(self.train),
            "captions": int(self.train.counts.sum()),
            "tower": self.store.tower,
            "pairs": self.store.manifest.get("pairs"),
        }
        return dict(json.loads(json.dumps(facts)))

    def go_on(self) -> None:
        """Take up the last checkpoint, if there is one; lines logged after it are dropped."""
        sweep_temporaries(self.config.out)
        if not (self.config.out / STATE).exists():
            return
        tensors, facts = load_tensors(self.config.out / STATE)
        if facts["about"] != self.about():
            differing = [k for k, v in self.about().items() if facts["about"].get(k) != v]
            raise RunError(
                f"{self.config.out} was begun on another store ({', '.join(differing)} differ from {self.config.store} "
                "as it is now): give --overwrite, or another --out"
            )
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in self._named_tuned():
            prefix = f"optimizer.{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
        self.progress = Progress(facts["step"], facts["seconds"])
        self.last_evaluation = facts["last_evaluation"]
        file = self.config.out / METRICS
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [line for line in lines if _logged_step(line) <= self.progress.step]
        write_text(file, "".join(line + "\n" for line in kept))
        say(f"going on with {self.config.out} from step {self.progress.step:,} of {self.steps:,}")

    def _named_tuned(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def finish(self) -> None:
        """Write the finished run and drop the checkpoint."""
        self.model.eval()
        out = self.config.out
        save_model(out, self.model, self.manifest())
        (out / STATE).unlink(missing_ok=True)
        say(f"wrote {out}" + self._recall_note())

    def manifest(self) -> dict[str, Any]:
        """Where everything in the run came from."""
        return {
            "complete": True,
            "text_tower": self.config.text_tower,
            "store": {
                "path": str(self.config.store),
                "images": len(self.store),
                "tower": self.store.tower,
                "pairs": self.store.manifest.get("pairs"),
            },
            "tuned_on": {
                "split": self.config.split if "split" in self.store.metadata.column_names else None,
                "images": len(self.train),
                "captions": int(self.train.counts.sum()),
                "held_out_images": len(self.val) if self.val else 0,
            },
            "steps": self.steps,
            "batch_size": self.size,
            "pairs_seen": self.steps * self.size,
            "seconds": round(self.progress.seconds, 1),
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "seed": self.config.seed,
            "libraries": library_versions(),
            "held_out": self.last_evaluation,
        }


def default_pairs_seen(images: int) -> int:
    """How long to tune where nothing is asked: 10 epochs, at least 30,000 pairs and at most 4 million."""
    return min(4_000_000, max(30_000, 10 * images))


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the held-out pairs are evaluated: spread evenly, the last step among them."""
    return {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 1 << 62  # a line that a kill cut short
