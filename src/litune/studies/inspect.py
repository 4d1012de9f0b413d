"""What a tower, a run, a store or a released checkpoint is; and of a pair of towers, what tuning would take."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litune.config import InspectConfig, TuneConfig, command
from litune.errors import DataError, TowerError
from litune.files import check_file, write_json
from litune.image.registry import ImageTower
from litune.interop.official import Checkpoint
from litune.model.build import fitted_dim, starts_fitted
from litune.model.heads import make_head
from litune.model.lit import LiT
from litune.model.run_folder import MANIFEST as RUN_MANIFEST
from litune.model.run_folder import METRICS, find_image_tower, load
from litune.store.store import MANIFEST as STORE_MANIFEST
from litune.store.store import FeatureStore
from litune.text.registry import TextTower, make_text_tower, parse_text_spec
from litune.towers.specs import reason

PER_TUNED = 16
"""Bytes that a tuned parameter needs under AdamW: weight, gradient and two moments, each in float32."""


@command(InspectConfig)
def inspect(config: InspectConfig) -> dict[str, Any]:
    """Everything that is known of `config.what`, as plain values.

    Raises `TowerError` for a spec that names no tower, `DataError` for a file or folder that is nothing of litune's,
    `OutputExistsError` where the file of `config.json` is there, and what loading it raises.
    """
    check_file(config.json, "--json", config.overwrite)
    facts = _find(config.what, config.max_tokens)
    if config.text_tower is not None:
        if facts["kind"] not in ("image tower", "feature store"):
            raise DataError(f"--text-tower goes with an image tower or a store; {config.what} is a {facts['kind']}")
        text = _text_tower(config.text_tower, config.max_tokens)
        facts |= {"text_tower": describe_text(config.text_tower, text)}
        facts |= {"tuning": _plan(facts, text, config)}
    if config.json is not None:
        write_json(config.json, facts)
    return facts


def _find(what: str, max_tokens: int) -> dict[str, Any]:
    path = Path(what)
    if path.is_file() and path.suffix == ".npz":
        return describe_npz(path)
    if (path / STORE_MANIFEST).exists() or (path / "img_emb").is_dir():
        return describe_store(FeatureStore(path))
    if (path / RUN_MANIFEST).exists():
        return describe_run(path)
    if path.exists():
        raise DataError(f"{path} is no run, no feature store and no .npz file: give one of these, or a tower's spec")
    if _names_text(what):
        return describe_text(what, _text_tower(what, max_tokens))
    return describe_image(find_image_tower(what))


def _names_text(spec: str) -> bool:
    """Whether a spec names a text tower: those that could be either are told apart by their configuration."""
    head = spec.partition("?")[0]
    if head.startswith("vit:"):
        return "/" not in head
    if head.startswith("hf:"):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(head.removeprefix("hf:"))
        except Exception as why:
            raise TowerError(reason(f"{spec!r} can't be loaded", why)) from None
        return not any(hasattr(config, name) for name in ("vision_config", "image_size", "num_channels"))
    try:
        parse_text_spec(spec)
    except TowerError:
        return False
    return True


def _text_tower(spec: str, max_tokens: int) -> TextTower:
    parsed = parse_text_spec(spec)
    vocab_size = TuneConfig.vocab_size if parsed.kind == "vit" else 0  # others bring their own
    return make_text_tower(parsed, vocab_size=vocab_size, max_tokens=max_tokens)


def describe_image(tower: ImageTower) -> dict[str, Any]:
    """An image tower: parameters per part, width, preprocessing, pooling, fingerprint."""
    network = getattr(tower.network, "model", tower.network)
    return {
        "kind": "image tower",
        "spec": tower.spec,
        "parameters": _parameters(tower),
        "locked": tower.locked,
        "parts": _parts(network) if isinstance(network, nn.Module) else {},
        "width": _width(tower),
        "pooling": tower.provenance["pooling"],
        "preprocess": tower.provenance["preprocess"],
        "fingerprint": tower.provenance["weights"],
    }


def _width(tower: ImageTower) -> int:
    """The width of the features, seen on an empty picture."""
    from PIL import Image

    pixels = torch.as_tensor(tower.preprocess(Image.new("RGB", (256, 256))))[None]
    return int(tower.encode(pixels).shape[1])


def describe_text(spec: str, tower: TextTower) -> dict[str, Any]:
    """A text tower: parameters per part, width, layout of its tokens, pooling."""
    return {
        "kind": "text tower",
        "spec": spec,
        "parameters": _parameters(tower),
        "parts": _parts(getattr(tower, "model", tower)),
        "width": tower.width,
        "pooling": tower.pooling,
        "tokens": tower.layout,
        "max_tokens": tower.max_positions if tower.max_positions < 1 << 30 else "any",
    }


def describe_run(run: Path) -> dict[str, Any]:
    """A run folder: its towers, heads, temperature, and what it reached last."""
    model = load(run, device="cpu")
    image = model.image_provenance or {}
    return {
        "kind": "run",
        "path": str(run),
        "parameters": _parameters(model),
        "parts": _model_parts(model),
        "locked": [
            *([] if model.image_tuned else ["image tower"]),
            *([] if _parameters(model.text) else ["text tower"]),
        ],
        "image_tower": {"spec": image.get("spec"), "width": model.image_width, "in_the_run": model.image_tuned}
        | {name: image.get(name) for name in ("pooling", "preprocess")}
        | {"fingerprint": image.get("weights")},
        "image_map": model.image_map,
        "text_pooling": model.text.pooling,
        "tokens": model.tokenizer.describe() | {"vocabulary": model.tokenizer.vocab_size},
        "dim": model.dim,
        "scale": round(model.scale.item(), 4),
        "bias": None if model.logit_bias is None else round(model.logit_bias.item(), 4),
        "last": _last_metrics(run),
    }


def _model_parts(model: LiT) -> dict[str, int]:
    parts = {"text tower": model.text, "text head": model.text_head, "image head": model.image_head}
    if model.image_tuned and model.image is not None:
        parts["image tower"] = model.image
    return {name: _parameters(part) for name, part in parts.items()}


def _last_metrics(run: Path) -> dict[str, Any] | None:
    """The last held-out evaluation of a run's log."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    evaluations = [json.loads(line) for line in lines if '"val"' in line]
    return evaluations[-1] if evaluations else None


def describe_store(store: FeatureStore) -> dict[str, Any]:
    """A feature store: how many images and captions, of which tower, of which size."""
    manifest = store.manifest
    columns = store.metadata.column_names
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    tower = store.tower or {}
    captions = store.metadata["captions"].to_pylist() if "captions" in columns else []
    return {
        "kind": "feature store",
        "path": str(store.path),
        "images": len(store),
        "captions": sum(len(texts or ()) for texts in captions),
        "splits": store.metadata["split"].unique().to_pylist() if "split" in columns else [],
        "width": store.width,
        "dtype": manifest.get("dtype"),
        "damaged": manifest.get("damaged"),
        "bytes": size,
        "tower": {name: tower.get(name) for name in ("spec", "pooling", "precision", "runtime", "preprocess")}
        | {"fingerprint": tower.get("weights")},
    }


def describe_npz(file: Path) -> dict[str, Any]:
    """One of the released LiT checkpoints: which, and its parameters per part."""
    checkpoint = Checkpoint(file)
    design = checkpoint.design
    parts: dict[str, int] = {}
    for key, shape in checkpoint.shapes.items():
        name = key.removeprefix(design.prefix).removeprefix("/").split("/")[0]
        parts[name] = parts.get(name, 0) + math.prod(shape)
    return {
        "kind": "released checkpoint",
        "path": str(file),
        "parameters": design.parameters,
        "parts": parts,
        "image": asdict(design.image) | {"patch": design.patch, "size": design.image_size, "head": design.image_head},
        "text": asdict(design.text) | {"kind": "BERT" if design.bert else "ViT", "vocabulary": design.vocabulary},
        "dim": design.dim,
    }


def _plan(facts: dict[str, Any], text: TextTower, config: InspectConfig) -> dict[str, Any]:
    """What tuning this pair would train, store and need in memory, with the default heads and AdamW."""
    width = facts["width"]
    images = config.images or facts.get("images")
    assert config.text_tower is not None
    fitted = starts_fitted(TuneConfig(Path(), config.text_tower, Path()), parse_text_spec(config.text_tower))
    dim = fitted_dim(width, text.width, images or width + 1) if fitted else width
    heads = [make_head("linear", text.width, dim), make_head("linear" if fitted else "none", width, dim)]
    tuned = sum(p.numel() for part in (text, *heads) for p in part.parameters()) + 1
    features = 4 * dim * config.batch_size
    return {
        "tuned_parameters": tuned,
        "locked_parameters": facts.get("parameters"),
        "dim": dim,
        "bytes_of_weights_gradients_and_moments": PER_TUNED * tuned,
        "bytes_of_the_batch": 4 * features,  # of both sides, and their gradients
        "bytes_stored_per_image": 2 * width,
        "images": images,
        "bytes_stored": None if images is None else 2 * width * images,
    }


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _parts(module: nn.Module) -> dict[str, int]:
    """Parameters of each part of a module that has any, its own ones first."""
    own = {name: p.numel() for name, p in module.named_parameters(recurse=False)}
    parts = {name: _parameters(part) for name, part in module.named_children()}
    return {name: count for name, count in (own | parts).items() if count}
