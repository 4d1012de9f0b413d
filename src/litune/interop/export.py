"""Run → the files of another library, verified by loading them with that library."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from litune.config import ExportConfig, command
from litune.errors import RunError
from litune.files import clear_output, read_json, write_json
from litune.model.lit import LiT
from litune.model.run_folder import MANIFEST, TOKENIZER, check_store, load
from litune.progress import say
from litune.store.store import FeatureStore

ABOUT = "litune.json"
"""The file that describes an export; `complete` once its features have been compared."""

Target = Callable[[LiT, ExportConfig, Path], dict[str, Any]]


@command(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a run for another library, load the result with it, and compare the features with the run's.

    Returns what litune.json in the folder says. Raises `ExportError` where the target can't express the run or the
    features differ by more than 1e-5 (then nothing is left behind), `OutputExistsError` where something is there.
    """
    model = load(config.run, image_tower=config.image_tower, device="cpu")
    beside = config.run if config.run.name not in ("", "..") else config.run.resolve()
    out = config.out or beside.with_name(f"{beside.name}-{config.to}")
    clear_output(out, (out / ABOUT).is_file(), "export", config.overwrite)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "litune": version("litune"),
        "to": config.to,
        "run": str(config.run),
        "dim": model.dim,
        "scale": float(model.scale.detach()),
        "bias": None if model.logit_bias is None else float(model.logit_bias.detach()),
        "text_tower": read_json(config.run / MANIFEST, RunError).get("text_tower"),
        "image_tower": (model.image_provenance or {}).get("spec"),
        "max_tokens": model.tokenizer.max_tokens,
    }
    write_json(out / ABOUT, {"complete": False, **about})
    try:
        report = TARGETS[config.to](model, config, out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    about = {"complete": True, **about, **report, "folder": str(out)}
    write_json(out / ABOUT, about)
    rounded = " (texts: before they are rounded to int8)" if "int8" in report else ""
    say(f"wrote {out}: {_verdict(report['largest_difference'])}{rounded}")
    return about


def _verdict(differences: dict[str, float]) -> str:
    sides = ", ".join(f"{side} {value:.1e}" for side, value in differences.items())
    return f"loaded again, the features' largest difference is {sides}"


def _onnx(model: LiT, config: ExportConfig, out: Path) -> dict[str, Any]:
    from litune.interop.onnx import export_onnx

    store = None
    if config.store is not None:
        store = FeatureStore(config.store)
        check_store(config.run, model, store.made_with)
    return export_onnx(model, out, int8=config.int8, store=store, split=config.split)


def _web(model: LiT, config: ExportConfig, out: Path) -> dict[str, Any]:
    from litune.interop.web import export_web

    assert config.images is not None
    store = FeatureStore(config.images)
    check_store(config.run, model, store.made_with)
    return export_web(
        model,
        out,
        store,
        name=config.run.resolve().name,
        text_tower=read_json(config.run / MANIFEST, RunError).get("text_tower"),
        split=config.split,
        int8=config.int8,
        with_image_tower=config.with_image_tower,
        runtime=config.onnxruntime_web,
    )


def _open_clip(model: LiT, config: ExportConfig, out: Path) -> dict[str, Any]:
    from litune.interop.open_clip import export_open_clip

    return export_open_clip(model, out)


def _hf(model: LiT, config: ExportConfig, out: Path) -> dict[str, Any]:
    from litune.interop.hf import export_hf

    return export_hf(model, config.run, out)


def _sentence_transformers(model: LiT, config: ExportConfig, out: Path) -> dict[str, Any]:
    from litune.interop.sentence_transformers import export_sentence_transformers

    return export_sentence_transformers(model, config.run, out)


def _npz(model: LiT, config: ExportConfig, out: Path) -> dict[str, Any]:
    from litune.interop.official import Checkpoint, export_npz, read_model
    from litune.interop.samples import compare

    file = out / "model.npz"
    export_npz(model, file)
    model.tokenizer.save(out / TOKENIZER)
    again = read_model(Checkpoint(file), model.tokenizer).eval()
    return {"largest_difference": compare("npz", model, images=again.encode_image, texts=again.encode_text)}


TARGETS: dict[str, Target] = {
    "npz": _npz,
    "onnx": _onnx,
    "web": _web,
    "open_clip": _open_clip,
    "hf": _hf,
    "sentence-transformers": _sentence_transformers,
}
