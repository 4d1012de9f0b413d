"""Feature store → run: a text tower learns to read the locked image tower (LiT, arXiv 2111.07991)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from litune import distributed
from litune.config import TuneConfig, command, to_json
from litune.devices import pick_bfloat16, pick_device
from litune.errors import ConfigError, OutputExistsError, RunError, StoreError
from litune.files import clear_output, read_json, write_json
from litune.image.registry import ImageTower, load_image_tower, with_random_weights
from litune.model.card import write_card
from litune.model.heads import make_head
from litune.model.lit import LiT
from litune.model.run_folder import CONFIG, MANIFEST, MODEL, image_tower_finder, load, load_without_text
from litune.progress import say
from litune.sharding import Rows, share
from litune.store.captions import Captions, integers, join_texts
from litune.store.mixture import Mixture, check_one_tower, known_store, source_names
from litune.store.store import FeatureStore, Selection
from litune.store.text_shards import Images, read_texts
from litune.text.registry import USE_M3, TextSpec, TextTower, make_text_tower, parse_text_spec, text_layout
from litune.text.rows import DrawnRows, StoredRows, hf_files, hf_names, without_weights
from litune.text.tokenizers import Tokenizer, find_tokenizer, train_tokenizer
from litune.text.use_m3 import use_tokenizer
from litune.tuning.log import OnLog
from litune.tuning.run import Tuning
from litune.tuning.state import go_on

CPU = torch.device("cpu")
HOLDOUT_MOST = 1000
LOG_10 = math.log(10)
"""The paper's start of the temperature."""


@command(TuneConfig)
def tune(config: TuneConfig, on_log: OnLog | None = None) -> LiT:
    """Tune a text tower on a feature store's pairs, write a run folder, and return the model.

    Goes on with an unfinished run of the same config. `on_log`, from Python, is called with every line of
    metrics.jsonl, as a dict. Under torchrun every process calls it alike; with --shard the model that they return is
    shared by them, and all must run it alike. Raises `StoreError`,
    `TowerError` or `ConfigError` for what can't be used, `OutputExistsError` where the run at `config.out` is
    finished, `OutputBusyError` where another process tunes it, `RunError` where it has another config or the loss stops
    being finite.
    """
    distributed.start(config.device)
    stores = [FeatureStore(path) for path in config.stores]
    check_one_tower(stores)
    store = known_store(stores)
    spec = text_spec(config)
    train, val = choose_mixture(stores, config)
    with distributed.claimed(config.out):
        goes_on = distributed.from_main(lambda: can_go_on(config))
        device = pick_device(config.device)
        torch.manual_seed(config.seed)
        start = started_from(spec, config)
        tokenizer = make_tokenizer(spec, config, train.iterate_captions(), start)
        model = make_model(store, spec, tokenizer, train, config, start, device).to(device)
        run = Tuning(config, store, train, val, model, device, on_log)
        if not goes_on:
            distributed.from_main(lambda: prepare_run(config))
        run.announce()
        if goes_on:
            go_on(run)
        try:
            run.fit()
        finally:
            if distributed.is_main() and (config.out / MANIFEST).exists():
                write_card(config.out)
    if run.shards is not None:
        model.find_image_tower = image_tower_finder(model, None)
        return model
    return load(config.out, device=config.device)


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


def choose_mixture(stores: Sequence[FeatureStore], config: TuneConfig) -> tuple[Selection, Selection | None]:
    """The pairs of all stores to tune on, and the held-out ones."""
    captions: Sequence[Captions | None] = [None] * len(stores)
    if config.texts:
        captions = texts_of(stores, config)
    chosen = [choose_pairs(store, config, texts) for store, texts in zip(stores, captions, strict=True)]
    if len(stores) == 1:
        return keep_apart(*chosen[0], config)
    held_out = [val for _, val in chosen if val is not None]
    if held_out and len(held_out) < len(stores):
        names = ", ".join(str(store.path) for store, (_, val) in zip(stores, chosen, strict=True) if val is None)
        say(f"nothing is held out of {names}: the others alone are evaluated")
    return keep_apart(Mixture([train for train, _ in chosen]), Mixture(held_out) if held_out else None, config)


def keep_apart(train: Selection, val: Selection | None, config: TuneConfig) -> tuple[Selection, Selection | None]:
    """The pairs to tune on without those whose file is held out too, by its hash; or with them, and a word on it."""
    both = train.also_in(val) if val is not None else np.zeros(0, np.int64)
    if not len(both):
        return train, val
    if config.exclude_held_out:
        train = train.subset(np.setdiff1d(np.arange(len(train)), both))
        for one in train.sources:
            _enough(one)
        say(f"{len(both):,} images are left out of tuning: their files are held out too")
        return train, val
    first = next(one for one in train.subset(both[:1]).sources if len(one))
    say(
        f"{len(both):,} of {len(train):,} images to tune on are held out too, as equal files (the first: "
        f"{first.keys[0]} in {first.store.path}): recalls come out too high; leave them out with --exclude-held-out"
    )
    return train, val


def texts_of(stores: Sequence[FeatureStore], config: TuneConfig) -> list[Captions]:
    """The captions of --texts for each of the stores."""
    names = source_names(stores)
    images = [
        Images(tuple({name, store.path.name, str(store.path)}), len(store), partial(_keys, store))
        for name, store in zip(names, stores, strict=True)
    ]
    return read_texts(config.texts, images, config.max_damaged)


def _keys(store: FeatureStore) -> pa.Array:
    column = store.column("key")
    assert column is not None  # every store has one
    return join_texts(column.chunks, column.nbytes)


def choose_pairs(
    store: FeatureStore, config: TuneConfig, captions: Captions | None = None
) -> tuple[Selection, Selection | None]:
    """The pairs to tune on and, where there are any, the held-out ones; with `captions` instead of the store's."""
    select = partial(store.select, lang=config.lang, fields=config.fields, captions=captions)
    if store.splits:
        pairs = select(config.split)
        if config.val_split in store.splits and config.val_split != config.split:
            return _enough(pairs), held_out_split(store, config, captions)
        if config.val_split != TuneConfig.val_split:
            select(config.val_split)  # says which splits there are
            raise ConfigError(f"--split and --val-split are both {config.split!r}: evaluate on pairs not tuned on")
    else:
        pairs = select()
    held_out = min(HOLDOUT_MOST, round(config.holdout * len(pairs)))
    if held_out < 2:
        return _enough(pairs), None
    # By the seed of the store's order alone: another run's seed holds out the same images.
    order = np.random.default_rng(0).permutation(np.arange(len(pairs), dtype=integers(len(pairs))))
    return _enough(pairs.subset(np.sort(order[held_out:]))), pairs.subset(np.sort(order[:held_out]))


def held_out_split(store: FeatureStore, config: TuneConfig, captions: Captions | None) -> Selection | None:
    """The pairs of the split to evaluate on; where `captions` has none for it, with the store's own, if it has any."""
    select = partial(store.select, config.val_split, config.lang, config.fields)
    if captions is None:
        return select()
    try:
        return select(captions=captions)
    except StoreError:
        say(f"{store.path} has no texts of the split {config.val_split!r}: its own captions are evaluated")
    try:
        return select()
    except StoreError as why:
        say(f"{why}: nothing of it is evaluated")
        return None


def _enough(pairs: Selection) -> Selection:
    if len(pairs) < 2:
        images = "1 image" if len(pairs) == 1 else f"{len(pairs)} images"
        raise ConfigError(f"{pairs.store.path} has {images} to tune on: contrastive tuning needs two or more")
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
        sides = "; ".join(both_sides(before, to_json(config)))
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
    return found if {"store", "text_tower", "batch_size"} <= found.keys() else None


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of `now` that are others in `before`, but for those that leave the result as it is."""
    neutral = ("overwrite", "out", "checkpoint_seconds")
    # A setting that an older litune did not have was as it is by default.
    before = to_json(TuneConfig(Path(), "", Path())) | before
    return {k: v for k, v in now.items() if before[k] != v and k not in neutral}


def both_sides(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What each of the `changed_settings` was and is, as clauses for a message."""
    return [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in changed_settings(before, now).items()]


def started_from(spec: TextSpec, config: TuneConfig) -> LiT | None:
    """The run whose text tower is tuned further; None where none is named."""
    if spec.kind != "run":
        return None
    start = load_without_text(spec.name) if shares(spec, config) else load(spec.name, device="cpu")
    if config.pooling not in ("auto", start.text.pooling) or config.dropout is not None:
        raise ConfigError(f"{spec.spec} keeps its pooling and its dropout: leave out --pooling and --dropout")
    if config.max_tokens > start.text.max_positions:
        raise ConfigError(
            f"--max-tokens {config.max_tokens} is more than the {start.text.max_positions} positions of {spec.spec}"
        )
    return start


def make_tokenizer(spec: TextSpec, config: TuneConfig, captions: Iterable[str], start: LiT | None = None) -> Tokenizer:
    """The text tower's own tokenizer (that of the run `start`), the one asked for, or one trained on the captions."""
    if config.tokenizer and spec.pretrained:
        raise ConfigError(f"--tokenizer is for towers from scratch: {spec.spec} was trained with its own")
    if spec.kind == USE_M3:
        return Tokenizer(use_tokenizer(), text_layout(spec), config.max_tokens)
    if start is not None:
        return Tokenizer(start.tokenizer.backend, start.tokenizer.layout, config.max_tokens)
    where = config.tokenizer or spec.tokenizer
    backend = find_tokenizer(where) if where else train_tokenizer(captions, config.vocab_size)
    return Tokenizer(backend, text_layout(spec), config.max_tokens)


def make_model(
    store: FeatureStore,
    spec: TextSpec,
    tokenizer: Tokenizer,
    train: Selection,
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
        max_tokens=config.max_tokens,
        pooling=config.pooling,
        dropout=config.dropout,
    )
    if shares(spec, config):
        text = shared_text_tower(spec, make_text, config, start, device)
    else:
        text = start.text if start is not None else make_text(spec)
    if config.gradient_checkpointing:
        text.set_gradient_checkpointing()
    image = None if config.locked else unlocked_tower(store, config)
    image_width = store.width if image is None else output_width(image)
    image_head = ("none" if config.locked else "linear") if config.image_head == "auto" else config.image_head
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


def unlocked_tower(store: FeatureStore, config: TuneConfig) -> ImageTower:
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


def moments(pairs: Selection, *, covariance: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D] and covariance [D, D] of the images' raw features, summed in float64 block by block.

    Without `covariance`, which costs D times as much as the mean, that is zero.
    """
    width = pairs.store.width
    total, products = np.zeros(width), np.zeros((width, width))
    for block in pairs.blocks():
        values = block.astype(np.float64)
        total += values.sum(axis=0)
        if covariance:
            products += values.T @ values
    mean = total / len(pairs)
    return mean, products / len(pairs) - np.outer(mean, mean) if covariance else products


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
