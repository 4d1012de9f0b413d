"""A run as two ONNX files for ONNX Runtime, text.onnx and image.onnx, with the tokenizer beside them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from litune.errors import ExportError, MissingExtraError
from litune.evaluation.retrieval import retrieval
from litune.files import atomic, write_json
from litune.image.pictures import ImageTransform, one_view
from litune.image.registry import ImageTower
from litune.interop.plain import PlainImage, PlainText, plain_image, plain_text
from litune.interop.samples import TEXTS, compare
from litune.interop.tokenizer import save_tokenizer
from litune.model.lit import LiT
from litune.store.store import FeatureStore

OPSET = 18


def export_onnx(
    model: LiT, folder: Path, *, int8: bool, store: FeatureStore | None, split: str | None
) -> dict[str, Any]:
    """Write both halves of a run as ONNX; returns the largest differences from the run's features.

    text.onnx takes `input_ids` and `attention_mask` [N, T] (a vit: tower only `input_ids`, of its full length),
    image.onnx takes `pixels` [B, 3, H, W]; both give `features` of length one. `int8` adds text.int8.onnx and
    its cost: recall@k on the pairs of `store` before and after, or the cosines with the float32 features.

    Raises `ExportError` where a half can't be exported or differs, `MissingExtraError` without the packages.
    """
    need_packages()
    text, image = plain_text(model), plain_image(model)
    save_tokenizer(folder, model.tokenizer)
    write_text_half(text, folder / "text.onnx")
    pixels = torch.from_numpy(np.stack([_pixels(model.load_image_tower(), Image.new("RGB", (64, 64), "red"))] * 2))
    write_image_half(image, folder / "image.onnx", pixels)
    tower = model.load_image_tower()
    report: dict[str, Any] = {"image": save_preprocessing(tower, folder)}
    runtime = OnnxHalves(folder, tower)
    report["largest_difference"] = compare("onnx", model, images=runtime.images, texts=runtime.texts)
    if int8:
        quantize_text(folder)
        report["int8"] = int8_cost(model, folder, store, split)
    return report


def need_packages() -> None:
    """Raise `MissingExtraError` unless the packages for the export and its comparison are installed."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(name)
        except ImportError:
            raise MissingExtraError("the export to ONNX", name, "export") from None


def write_text_half(text: PlainText, file: Path) -> None:
    """Write the text half, for any number of texts, of any length unless the tower's is fixed."""
    batch = torch.export.Dim("batch", min=1)
    if text.fixed_length is not None:
        ids = torch.zeros(2, text.fixed_length, dtype=torch.int64)
        _write(text, (ids,), file, ["input_ids"], ({0: batch}, None))
    else:
        tokens = torch.export.Dim("tokens", min=1)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        dynamic = {0: batch, 1: tokens}
        _write(text, (ids, torch.ones_like(ids)), file, ["input_ids", "attention_mask"], (dynamic, dynamic))


def write_image_half(image: PlainImage, file: Path, pixels: Float[Tensor, "B 3 H W"]) -> None:
    """Write the image half, for any number of pictures of the size of `pixels`."""
    _write(image, (pixels,), file, ["pixels"], ({0: torch.export.Dim("batch", min=1)},))


def _write(module: nn.Module, args: tuple[Tensor, ...], file: Path, names: list[str], shapes: Any) -> None:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with atomic(file) as temporary, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns of axes with equal names, and of what it replaces
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            torch.onnx.export(
                module,
                args,
                temporary,
                input_names=names,
                output_names=["features"],
                dynamic_shapes=shapes[: len(args)],
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as why:
        lines = [line.strip() for line in str(why).splitlines() if line.strip()]
        raise ExportError(f"{file.name} can't be written: {lines[0][:200] if lines else type(why).__name__}") from why
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save_preprocessing(tower: ImageTower, folder: Path) -> dict[str, Any]:
    """Write the settings of the preprocessing to `pixels`; returns a description of the pixels."""
    transform, several = one_view(tower.preprocess), f"{tower.views} views of each picture, " if tower.views > 1 else ""
    if isinstance(transform, ImageTransform):
        # The graph normalises: outside it, the mean is 0 and the standard deviation one level of 255.
        described = transform.describe() | {"mean": [0.0] * 3, "std": [1 / 255] * 3}
        write_json(folder / "image.json", described)
        return {"pixels": f"{several}float32 RGB values from 0 to 255, resized and cropped as image.json says"}
    processor = getattr(transform, "processor", None)
    if processor is None:
        return {"pixels": f"what the preprocessing of {tower.spec} gives, as float32"}
    processor.save_pretrained(folder)
    return {"pixels": f"{several}what transformers' image processor of preprocessor_config.json gives"}


def _pixels(tower: ImageTower, image: Image.Image) -> np.ndarray:
    return np.asarray(tower.preprocess(image), dtype=np.float32)


class OnnxHalves:
    """The exported halves in ONNX Runtime; without a tower, the text half alone."""

    def __init__(self, folder: Path, tower: ImageTower | None, text: str = "text.onnx") -> None:
        import onnxruntime

        def session(name: str) -> Any:
            return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])

        self.tower, self.text = tower, session(text)
        self.image = None if tower is None else session("image.onnx")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Features of texts."""
        parts = []
        for start in range(0, len(texts), 64):
            encoded = self.tokenizer.encode_batch(list(texts[start : start + 64]))
            feed = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
            named = {i.name: np.array(feed[i.name], np.int64) for i in self.text.get_inputs()}
            parts.append(torch.from_numpy(self.text.run(["features"], named)[0]))
        return torch.cat(parts)

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "B D"]:
        """Features of pictures."""
        assert self.tower is not None
        assert self.image is not None
        pixels = np.stack([_pixels(self.tower, image) for image in images])
        return torch.from_numpy(self.image.run(["features"], {"pixels": pixels})[0])


def quantize_text(folder: Path) -> None:
    """Write text.int8.onnx: text.onnx with 8-bit weights, and activations quantised dynamically."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(folder / "text.onnx"))
    del model.graph.value_info[:]  # the exporter's shapes of what quantising transposes
    quiet, level = logging.getLogger(), logging.getLogger().level
    with atomic(folder / "text.int8.onnx") as temporary:
        quiet.setLevel(logging.ERROR)  # it recommends a preprocessing step that this model does not need
        try:
            quantize_dynamic(model, temporary, per_channel=True, weight_type=QuantType.QInt8)
        finally:
            quiet.setLevel(level)


def int8_cost(model: LiT, folder: Path, store: FeatureStore | None, split: str | None) -> dict[str, Any]:
    """What 8-bit weights cost: recall@k before and after on the pairs of a store, otherwise cosines."""
    tower = model.load_image_tower()
    full, small = OnnxHalves(folder, tower), OnnxHalves(folder, tower, "text.int8.onnx")
    sizes = {name: (folder / name).stat().st_size for name in ("text.onnx", "text.int8.onnx")}
    if store is None:
        cosines = (full.texts(TEXTS) * small.texts(TEXTS)).sum(1)
        return {"bytes": sizes, "cosine": {"least": float(cosines.min()), "mean": float(cosines.mean())}}
    pairs = store.select(split)
    images, owner = model.encode_features(pairs.features()), torch.from_numpy(pairs.owner)
    recall = {
        name: {way: figures[way] for way in ("text_to_image", "image_to_text")}
        for name, runtime in (("float32", full), ("int8", small))
        for figures in [retrieval(images, runtime.texts(pairs.captions), owner)]
    }
    selection = {"store": str(store.path), "split": split, "images": len(pairs), "captions": len(owner)}
    return {"bytes": sizes, **selection, "recall": recall}
