"""ONNX models as image towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litune.devices import processor_cores
from litune.errors import MissingExtraError, TowerError
from litune.files import read_text, sha256_file
from litune.image.pictures import ImageTransform
from litune.image.tower import ImageTower
from litune.towers.specs import no_more, parse_size, reason


class _OnnxNetwork:
    """An ONNX model run by ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.input = session.get_inputs()[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        # A model exported with a fixed batch size needs exactly that size: the last batch is padded.
        fixed = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(pixels)
        output = self.session.get_outputs()[0].name
        parts = []
        for part in pixels.split(fixed):
            full = torch.cat([part, part[-1:].expand(fixed - len(part), *part.shape[1:])])
            values = self.session.run([output], {self.input.name: full.contiguous().cpu().numpy()})[0]
            parts.append(torch.from_numpy(values)[: len(part)])
        features = torch.cat(parts)
        return features.flatten(1) if features.ndim == 4 and features.shape[2:] == (1, 1) else features


def onnx_tower(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """The tower of `onnx:FILE`, with the preprocessing in its options or in a JSON file beside it."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("an onnx: tower", "onnxruntime", "onnx") from None
    file = Path(name)
    if not file.is_file():
        raise TowerError(f"{file} does not exist: give the path of an ONNX file after onnx:")
    try:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = processor_cores()
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as why:
        raise TowerError(reason(f"{file} can't be loaded by ONNX Runtime", why)) from why
    transform = _onnx_transform(spec, file, options)
    taken = session.get_inputs()[0].shape
    if len(taken) == 4 and any(
        isinstance(n, int) and n != size for n, size in zip(taken[2:], transform.size, strict=True)
    ):
        raise TowerError(
            f"{spec!r} can't take pictures of {transform.size[0]}×{transform.size[1]} pixels: its input is {taken}"
        )
    return ImageTower(
        spec,
        _OnnxNetwork(session),
        transform,
        description=transform.describe(),
        weights=sha256_file(file),
        pooling="model output",
    )


def _onnx_transform(spec: str, file: Path, options: dict[str, str]) -> ImageTransform:
    """The preprocessing in the spec's options, else in FILE.json or preprocessor_config.json beside the model."""
    known = ["size", "mean", "std", "crop_pct", "crop_mode", "interpolation"]
    for beside in (file.with_suffix(".json"), file.parent / "preprocessor_config.json"):
        if options.keys() <= {"size"} and beside.is_file():
            settings = json.loads(read_text(beside))
            options = {
                k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in settings.items()
            } | options
            break
    if "size" not in options or "mean" not in options or "std" not in options:
        raise TowerError(
            f"{spec!r} does not say its preprocessing: add ?size=224&mean=0.5,0.5,0.5&std=0.5,0.5,0.5 "
            f"(also {', '.join(known[3:])}), or put the same into {file.with_suffix('.json').name} beside it"
        )
    no_more(spec, {k: v for k, v in options.items() if k not in known}, known)
    try:
        mean, std = ([float(v) for v in options[k].split(",")] for k in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("mean and std need three numbers each")
        return ImageTransform(
            size=parse_size(options["size"]),
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            crop_pct=float(options.get("crop_pct", 1.0)),
            crop_mode=options.get("crop_mode", "center"),  # type: ignore[arg-type]
            interpolation=options.get("interpolation", "bicubic"),
        )
    except ValueError as why:
        raise TowerError(f"the preprocessing of {spec!r} can't be read: {why}") from None
