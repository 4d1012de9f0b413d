"""Runs in open_clip, loaded by its own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_transform

open_clip = pytest.importorskip("open_clip", reason="the export to open_clip needs the extra open-clip")

import litune
from litune.errors import ExportError
from litune.interop import open_clip as target
from litune.interop.export import export
from litune.interop.samples import TEXTS, pictures

from .conftest import MakeRun


def features(folder: str, texts: tuple[str, ...] = TEXTS) -> tuple[torch.Tensor, torch.Tensor]:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(p) for p in pictures()]), normalize=True)
        return images, model.encode_text(tokenizer(list(texts)), normalize=True)


@pytest.mark.parametrize(
    ("text", "pooling", "settings"),
    [
        # The text tower's width is 32: a bias of more dimensions is no sum of the projection's columns.
        (None, "mean", {"image_map": "whiten", "dim": 48, "image_head": "linear"}),
        (None, "first", {"image_head": "linear", "dim": 16, "bias": -9.0}),
        ("vit:Ti", "last", {"image_map": "none"}),
    ],
)
def test_the_same_features(make_run: MakeRun, text: str | None, pooling: str, settings: dict[str, Any]) -> None:
    image = "timm:test_vit?init=random"  # its own transform has a crop share of 1 after the line below
    run = make_run(text=text, pooling=pooling, image=image, crop_pct=1.0, **settings)
    about = export(run, to="open_clip", out=run / "x")
    assert len(about["notes"]) == 1, "the pictures are prepared by open_clip's own transform"
    images, texts = features(about["folder"])
    model = litune.load(run, device="cpu")
    np.testing.assert_allclose(images.numpy(), model.encode_image(pictures()).numpy(), atol=1e-5)
    np.testing.assert_allclose(texts.numpy(), model.encode_text(TEXTS).numpy(), atol=1e-5)
    loaded = open_clip.create_model_and_transforms(f"local-dir:{about['folder']}")[0]
    assert loaded.logit_scale.exp().item() == pytest.approx(about["scale"])
    assert (None if loaded.logit_bias is None else loaded.logit_bias.item()) == settings.get("bias")


def test_a_crop_that_it_has_not(make_run: MakeRun) -> None:
    """A CNN with a crop share: equal features of equal pixels, and a note with the transform to use."""
    run = make_run()
    about = export(run, to="open_clip", out=run / "x")
    assert "timm.data.create_transform" in about["notes"][1]
    transform = create_transform(**json.loads((run / "x" / "litune.json").read_text())["timm_transform"])
    loaded = open_clip.create_model_and_transforms(f"local-dir:{run / 'x'}")[0].eval()
    with torch.no_grad():
        found = loaded.encode_image(torch.stack([transform(p) for p in pictures()]), normalize=True)
    np.testing.assert_allclose(
        found.numpy(), litune.load(run, device="cpu").encode_image(pictures()).numpy(), atol=1e-5
    )
    config = json.loads((run / "x" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_proj_bias"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_head": "mlp"}, "no text head of several layers"),
        ({"image_head": "mlp"}, "no image head of several layers"),
        ({"pooling": "last"}, "no pooling 'last'"),
        ({"image": "timm:test_vit?size=64&init=random"}, "for pictures of 160×160 pixels"),
        (
            {"image": "timm:resnet10t?init=random&features=pooled+layers:4&size=64"},
            "can't express the features of timm:res",
        ),
        ({"image": "timm:resnet10t?init=random&features=views:2&size=64"}, "can't express the features of timm:res"),
    ],
)
def test_what_it_has_not(make_run: MakeRun, settings: dict[str, Any], message: str) -> None:
    run = make_run(**settings)
    with pytest.raises(ExportError, match=message):
        export(run, to="open_clip", out=run / "x")
    assert not (run / "x").exists()


def test_other_text_towers(make_run: MakeRun, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path / "distil"
    config = DistilBertConfig(vocab_size=200, dim=32, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    DistilBertModel(config).save_pretrained(folder)
    for file in tiny_bert.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    run = make_run(text=f"hf:{folder}")
    with pytest.raises(ExportError, match="not distilbert"):
        export(run, to="open_clip", out=run / "x")


def test_wrong_features_leave_nothing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, affine = make_run(), target.image_affine

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = affine(*args)
        return weight, bias + 0.01

    monkeypatch.setattr(target, "image_affine", wrong)
    with pytest.raises(ExportError, match="features of images in the open_clip export differ from the run's by"):
        export(run, to="open_clip", out=run / "x")
    assert not (run / "x").exists()
