"""Runs in transformers' VisionTextDualEncoderModel, loaded by its own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import litune
from litune.errors import ExportError
from litune.interop.export import export
from litune.interop.samples import TEXTS, pictures

from .conftest import MakeRun

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(params=["vit", "dinov2"])
def hf_tower(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(1)
    if request.param == "vit":
        network = ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL), add_pooling_layer=False)
    else:
        network = Dinov2Model(Dinov2Config(image_size=32, patch_size=8, **SMALL))
    return _saved(network, tmp_path / request.param)


def _saved(network: Any, folder: Path) -> str:
    network.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"hf:{folder}"


def check(run: Path, folder: str) -> None:
    model = litune.load(run, device="cpu")
    loaded = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(folder)
    inputs = processor(text=list(TEXTS), images=pictures(), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = loaded(**inputs)
    images, texts = model.encode_image(pictures()), model.encode_text(TEXTS)
    np.testing.assert_allclose(found.image_embeds.numpy(), images.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.text_embeds.numpy(), texts.numpy(), atol=1e-5)
    scores = model.scale.detach() * images @ texts.T
    np.testing.assert_allclose(found.logits_per_image.numpy(), scores.numpy(), atol=1e-4)


# More and fewer dimensions than either tower is wide.
@pytest.mark.parametrize("settings", [{"image_map": "whiten", "image_head": "linear", "dim": 48}, {"dim": 32}])
def test_transformers_towers(make_run: MakeRun, hf_tower: str, settings: dict[str, Any]) -> None:
    run = make_run(image=hf_tower, pooling="first", **settings)
    about = export(run, to="hf", out=run / "x")
    check(run, about["folder"])
    assert "VisionTextDualEncoderModel.from_pretrained" in (run / "x" / "README.md").read_text()


@pytest.mark.parametrize(
    ("image", "image_map"),
    [("timm:test_vit?size=64&init=random", "center"), ("timm:resnet10t?size=64&init=random", "none")],
)
def test_timm_towers(make_run: MakeRun, image: str, image_map: str) -> None:
    run = make_run(image=image, pooling="first", image_map=image_map)
    check(run, export(run, to="hf", out=run / "x")["folder"])


def test_what_it_has_not(make_run: MakeRun, tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    resnet = _saved(ResNetModel(ResNetConfig(**sizes)), tmp_path / "resnet")
    for number, (settings, message) in enumerate(
        [
            ({"pooling": "mean"}, "by their first token, the run by 'mean'"),
            ({"text": "vit:Ti"}, "not vit"),
            ({"pooling": "first"}, "doesn't end in a LayerNorm"),
            ({"pooling": "first", "text_head": "mlp", "image_map": "none"}, "no text head of several layers"),
            ({"pooling": "first", "image": resnet}, "doesn't read the width of resnet"),
        ]
    ):
        run = make_run(f"run{number}", **settings)
        with pytest.raises(ExportError, match=message):
            export(run, to="hf", out=run / "x")
        assert not (run / "x").exists()
