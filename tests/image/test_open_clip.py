"""open_clip towers against the library's own `encode_image` and transform, on tiny models of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from litune.errors import MissingExtraError, TowerError
from litune.image.registry import load_image_tower

TEXT = {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
SIZES: dict[str, dict[str, Any]] = {
    "litune-vit": {"embed_dim": 12, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}},
    "litune-resnet": {"embed_dim": 12, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}},
    "litune-timm": {
        "embed_dim": 12,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
    },
}


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def open_clip(tmp_path: Path) -> Iterator[Any]:
    library = pytest.importorskip("open_clip", reason="needs the extra open_clip")
    for name, settings in SIZES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(settings | {"text_cfg": TEXT}))
        library.add_model_config(tmp_path / f"{name}.json")
    yield library
    for name in SIZES:
        library.factory._MODEL_CONFIGS.pop(name)
        library.factory._MODEL_CONFIG_PATHS.remove(tmp_path / f"{name}.json")


@pytest.mark.parametrize("name", SIZES)
def test_features_are_encode_image(name: str, open_clip: Any, tmp_path: Path) -> None:
    """Projected, before normalisation, on the library's inference transform."""
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        expected = model.eval().encode_image(transform(picture())[None])
    tower = load_image_tower(f"open_clip:{name}?checkpoint={tmp_path / 'weights.pt'}")
    found = tower.encode(torch.from_numpy(np.stack([tower.preprocess(picture())])))
    assert found.shape == (1, 12)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not any("token_embedding" in key for key, _ in tower.named_parameters())
    assert tower.provenance["preprocess"]["size"] in (32, [32, 32])
    json.dumps(tower.provenance)


def test_random_weights_follow_the_seed(open_clip: Any) -> None:
    def weights(seed: int) -> str:
        torch.manual_seed(seed)
        return str(load_image_tower("open_clip:litune-vit?init=random").provenance["weights"])

    assert weights(0) == weights(0) != weights(1)


def test_gradient_checkpointing(open_clip: Any) -> None:
    load_image_tower("open_clip:litune-vit?init=random", locked=False).set_gradient_checkpointing(True)


def test_bad_specs(open_clip: Any, tmp_path: Path) -> None:
    model = open_clip.create_model("litune-vit")
    file = tmp_path / "weights.pt"

    def fails(spec: str, message: str) -> None:
        with pytest.raises(TowerError, match=message) as error:
            load_image_tower(spec)
        assert "\n" not in str(error.value)

    fails("open_clip:ViT-B-33", "open_clip has no model 'ViT-B-33': perhaps you meant 'ViT-B-32'")
    fails("open_clip:litune-vit", r"does not name weights: write open_clip:litune-vit/TAG \(there are none\)")
    fails("open_clip:litune-vit?checkpoint=/nowhere", "the checkpoint /nowhere .* does not exist")
    fails("open_clip:litune-vit?chekpoint=/nowhere", "unknown option 'chekpoint'")
    fails("open_clip:litune-vit/nosuchtag", "can't be loaded")
    short = {k: v for k, v in model.state_dict().items() if k != "visual.proj"}
    torch.save(short, file)
    fails(f"open_clip:litune-vit?checkpoint={file}", "can't be loaded: .*visual.proj")
    file.write_bytes(b"nothing")
    fails(f"open_clip:litune-vit?checkpoint={file}", "can't be loaded")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'open_clip_torch'.*litune\[open-clip\]"):
        load_image_tower("open_clip:ViT-B-32/openai")
