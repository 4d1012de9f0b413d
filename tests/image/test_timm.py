"""timm towers against timm's own calls, and checkpoints in every layout in which towers are published."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from litune.errors import TowerError
from litune.image.registry import load_image_tower


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(spec: str) -> torch.Tensor:
    tower = load_image_tower(spec)
    return tower.encode(torch.from_numpy(np.stack([tower.preprocess(picture())])))


def moved(model: nn.Module) -> nn.Module:
    """The model with no weight left at its start: tokens, biases and norms are drawn too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


FAMILIES = {  # model: (size, pooling as timm names it)
    "test_vit": (64, "token"),
    "test_vit2": (64, "avg"),
    "test_vit3": (64, "map"),
    "vit_tiny_patch16_224": (64, "token"),
    "vit_small_patch14_dinov2": (56, "token"),
    "vit_small_patch14_reg4_dinov2": (56, "token"),
    "deit_tiny_distilled_patch16_224": (64, "token"),
    "resnetv2_50x1_bit": (64, "avg"),
    "mixer_s32_224": (224, "avg"),
    "test_convnext": (64, "avg"),
    "test_efficientnet": (64, "avg"),
    "test_nfnet": (64, "avg"),
    "swin_tiny_patch4_window7_224": (224, "avg"),
    "mobilenetv4_conv_small": (64, "avg"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_timms_recommended_call(name: str) -> None:
    """What its documentation recommends: `forward_head(forward_features(x), pre_logits=True)` in eval mode."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    size, pooling = FAMILIES[name]
    torch.manual_seed(0)
    tower = load_image_tower(f"timm:{name}?init=random" + (f"&size={size}" if size != 224 else ""))
    # The weights of a whole model, its classifier there.
    model = timm.create_model(name, pretrained=False).eval()
    if hasattr(model, "set_input_size") and size != 224:
        model.set_input_size(img_size=(size, size))
    moved(model)
    own = model.state_dict()
    tower.network.model.load_state_dict({k: own[k] for k in tower.network.model.state_dict()})
    settings = resolve_model_data_config(model) | {"input_size": (3, size, size)}
    pixels = create_transform(**settings, is_training=False)(picture())[None]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    found = tower.encode(torch.from_numpy(np.stack([tower.preprocess(picture())])))
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert tower.provenance["pooling"] == pooling


def vit_archive(model: Any) -> dict[str, np.ndarray]:
    """A ViT's weights as the original release of ViT and AugReg lays them out."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    found = {
        "cls": model.cls_token,
        "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.patch_embed.proj.bias,
        "Transformer/encoder_norm/scale": model.norm.weight,
        "Transformer/encoder_norm/bias": model.norm.bias,
        "pre_logits/kernel": torch.randn(width, width),
        "pre_logits/bias": torch.randn(width),
        "head/kernel": torch.randn(width, 10),
        "head/bias": torch.randn(10),
    }
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}"
        for number, norm in ((0, block.norm1), (2, block.norm2)):
            found[f"{at}/LayerNorm_{number}/scale"] = norm.weight
            found[f"{at}/LayerNorm_{number}/bias"] = norm.bias
        attention = f"{at}/MultiHeadDotProductAttention_1"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            found[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            found[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        found[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, width)
        found[f"{attention}/out/bias"] = block.attn.proj.bias
        for number, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            found[f"{at}/MlpBlock_3/Dense_{number}/kernel"] = layer.weight.T
            found[f"{at}/MlpBlock_3/Dense_{number}/bias"] = layer.bias
    return arrays(found)


def bit_archive(model: Any) -> dict[str, np.ndarray]:
    """A BiT ResNet's weights as its release lays them out."""
    found = {
        "resnet/root_block/standardized_conv2d/kernel": kernel(model.stem.conv),
        "resnet/group_norm/gamma": model.norm.weight,
        "resnet/group_norm/beta": model.norm.bias,
        "resnet/head/conv2d/kernel": torch.randn(1, 1, model.num_features, 10),
        "resnet/head/conv2d/bias": torch.randn(10),
    }
    for i, stage in enumerate(model.stages, 1):
        for j, block in enumerate(stage.blocks, 1):
            at = f"resnet/block{i}/unit{j:02}"
            for letter, number in zip("abc", (1, 2, 3), strict=True):
                norm = getattr(block, f"norm{number}")
                found[f"{at}/{letter}/standardized_conv2d/kernel"] = kernel(getattr(block, f"conv{number}"))
                found[f"{at}/{letter}/group_norm/gamma"] = norm.weight
                found[f"{at}/{letter}/group_norm/beta"] = norm.bias
            if block.downsample is not None:
                found[f"{at}/a/proj/standardized_conv2d/kernel"] = kernel(block.downsample.conv)
    return arrays(found)


def mixer_archive(model: Any) -> dict[str, np.ndarray]:
    """An MLP-Mixer's weights as its release lays them out."""
    found: dict[str, torch.Tensor] = {
        "stem/kernel": kernel(model.stem.proj),
        "stem/bias": model.stem.proj.bias,
        "pre_head_layer_norm/scale": model.norm.weight,
        "pre_head_layer_norm/bias": model.norm.bias,
        "head/kernel": torch.randn(model.num_features, 10),
        "head/bias": torch.randn(10),
    }
    for i, block in enumerate(model.blocks):
        for number, norm in enumerate((block.norm1, block.norm2)):
            found[f"MixerBlock_{i}/LayerNorm_{number}/scale"] = norm.weight
            found[f"MixerBlock_{i}/LayerNorm_{number}/bias"] = norm.bias
        for name, mlp in (("token_mixing", block.mlp_tokens), ("channel_mixing", block.mlp_channels)):
            for number, layer in enumerate((mlp.fc1, mlp.fc2)):
                found[f"MixerBlock_{i}/{name}/Dense_{number}/kernel"] = layer.weight.T
                found[f"MixerBlock_{i}/{name}/Dense_{number}/bias"] = layer.bias
    return arrays(found)


def kernel(convolution: Any) -> torch.Tensor:
    weight: torch.Tensor = convolution.weight.permute(2, 3, 1, 0)
    return weight


def arrays(found: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in found.items()}


ARCHIVES = {
    "vit_tiny_patch16_224": vit_archive,
    "resnetv2_50x1_bit": bit_archive,
    "mixer_s32_224": mixer_archive,
}
LAST = {
    "vit_tiny_patch16_224": "Transformer/encoderblock_11/MlpBlock_3/Dense_1/bias",
    "resnetv2_50x1_bit": "resnet/block4/unit03/c/group_norm/beta",
    "mixer_s32_224": "MixerBlock_7/channel_mixing/Dense_1/bias",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_as_published(name: str, tmp_path: Path) -> None:
    """AugReg, BiT and Mixer: the features are those of the model whose weights were written, none is left out."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = moved(timm.create_model(name, pretrained=False, num_classes=0))
    file = tmp_path / "tower.npz"
    found = ARCHIVES[name](model)
    np.savez(file, **found)
    pixels = create_transform(**resolve_model_data_config(model), is_training=False)(picture())[None]
    with torch.no_grad():
        expected = model(pixels)
    tower = load_image_tower(f"timm:{name}?checkpoint={file}")
    theirs = model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in tower.network.model.state_dict().items())
    assert torch.allclose(encode(f"timm:{name}?checkpoint={file}"), expected, rtol=1e-4, atol=1e-5)
    found.pop(LAST[name])
    np.savez(file, **found)
    with pytest.raises(TowerError, match=f"{file} lacks weights of .*{LAST[name]}") as error:
        load_image_tower(f"timm:{name}?checkpoint={file}")
    assert "\n" not in str(error.value)


def test_archives_of_other_towers(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    found = vit_archive(model)
    deeper = found | {k.replace("block_11", "block_12"): v for k, v in found.items() if "encoderblock_11" in k}
    file = tmp_path / "tower.npz"
    for written, name, message in (
        (deeper, "vit_tiny_patch16_224", "is of another architecture: it has 13 blocks, vit_tiny_patch16_224 has 12"),
        (found, "test_vit", "does not fit test_vit: "),
        (found, "mixer_s32_224", "lacks weights of mixer_s32_224: .*stem/kernel"),
        (found, "test_resnet", r"timm reads no \.npz archives for test_resnet"),
    ):
        np.savez(file, **written)
        with pytest.raises(TowerError, match=message) as error:
            load_image_tower(f"timm:{name}?checkpoint={file}")
        assert "\n" not in str(error.value)


def test_an_archive_with_a_pickle_is_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "tower.npz", **{"embedding/kernel": np.array([Trap()], dtype=object)}, allow_pickle=True)
    with pytest.raises(TowerError, match="allow_pickle=False"):
        load_image_tower(f"timm:test_vit?checkpoint={tmp_path / 'tower.npz'}")
    assert not Trap.sprung


class Trap:
    """Says so when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (spring, ())


def spring() -> None:
    Trap.sprung = True


WRAPPINGS = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights},
    "model": lambda weights: {"model": weights, "args": {"lr": 0.1}},
    "data parallel": lambda weights: {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
    "compiled": lambda weights: {f"_orig_mod.module.{k}": v for k, v in weights.items()},
    "MoCo": lambda weights: {
        "state_dict": {f"module.base_encoder.{k}": v for k, v in weights.items()}
        | {f"module.momentum_encoder.{k}": -v for k, v in weights.items()}
    },
    "DINO": lambda weights: {
        "student": {f"module.backbone.{k}": -v for k, v in weights.items()},
        "teacher": {f"backbone.{k}": v for k, v in weights.items()} | {"head.mlp.0.weight": torch.ones(1)},
    },
    "with a classifier": lambda weights: weights | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_checkpoints(wrapping: str, tmp_path: Path) -> None:
    import timm

    model = moved(timm.create_model("test_vit", pretrained=False, num_classes=0))
    torch.save(WRAPPINGS[wrapping](model.state_dict()), tmp_path / "tower.pth")
    tower = load_image_tower(f"timm:test_vit?checkpoint={tmp_path / 'tower.pth'}")
    theirs = model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in tower.network.model.state_dict().items())


def test_dinov2_as_published(tmp_path: Path) -> None:
    """Its own release names some weights otherwise, has a mask token, and a position for the first token."""
    import timm

    model = moved(timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, num_classes=0, img_size=56))
    own = model.state_dict()
    published = {
        k.replace(".gamma", ".gamma"): v for k, v in own.items() if k not in ("reg_token", "cls_token", "pos_embed")
    }
    published |= {
        "mask_token": torch.zeros(1, 384),
        "register_tokens": own["reg_token"],
        "cls_token": torch.zeros_like(own["cls_token"]),
        "pos_embed": torch.cat([own["cls_token"], own["pos_embed"]], dim=1),
    }
    torch.save(published, tmp_path / "dinov2.pth")
    file = tmp_path / "dinov2.pth"
    tower = load_image_tower(f"timm:vit_small_patch14_reg4_dinov2?checkpoint={file}")
    for name, value in tower.network.model.state_dict().items():
        if name != "pos_embed":  # interpolated to the model's 518 pixels
            assert torch.allclose(value, own[name]), name


def test_bad_checkpoints(tmp_path: Path) -> None:
    import timm

    own = timm.create_model("test_vit", pretrained=False, num_classes=0).state_dict()
    file = tmp_path / "tower.pth"
    shorter = {k: v for k, v in own.items() if k != "blocks.0.norm1.weight"}
    for written, message in (
        (shorter, "lacks 1 of the tower's weights, 'blocks.0.norm1.weight'"),
        (own | {"blocks.0.norm1.weight": torch.ones(7)}, r"another architecture: 'blocks.0.norm1.weight' has .*\(7,\)"),
        (own | {"blocks.99.norm1.weight": torch.ones(64)}, "test_vit has no 'blocks.99.norm1.weight'"),
        ({"model": Trap(), **own}, r"holds more than weights \(pickled objects\): save its state dict as safetensors"),
        ([1, 2], "holds no weights by name"),
        ({"epoch": 1}, "holds no weights by name"),
    ):
        torch.save(written, file)
        with pytest.raises(TowerError, match=message) as error:
            load_image_tower(f"timm:test_vit?checkpoint={file}")
        assert "\n" not in str(error.value)
    for name in ("tower.pth", "tower.safetensors", "tower.npz"):
        (tmp_path / name).write_bytes(b"no checkpoint at all")
        with pytest.raises(TowerError) as error:
            load_image_tower(f"timm:test_vit?checkpoint={tmp_path / name}")
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert not Trap.sprung


def test_published_weights_that_are_incomplete(tmp_path: Path) -> None:
    """Of what the hub gives (here: a folder of the same layout) timm itself only logs what it lacks."""
    import json

    import timm
    from safetensors.torch import save_file

    model = moved(timm.create_model("test_vit", pretrained=False, num_classes=0))
    config = {
        "architecture": "test_vit",
        "num_classes": 10,
        "pretrained_cfg": {
            "input_size": [3, 160, 160],
            "fixed_input_size": True,
            "num_classes": 10,
            "classifier": "head",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = model.state_dict() | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    save_file(weights, tmp_path / "model.safetensors")
    tower = load_image_tower(f"timm:local-dir:{tmp_path}")
    assert torch.equal(tower.network.model.pos_embed, model.pos_embed)
    weights.pop("blocks.3.mlp.fc1.weight")
    save_file(weights, tmp_path / "model.safetensors")
    level = logging.getLogger("timm.models._builder").level
    with pytest.raises(TowerError, match=r"incomplete: Missing keys \(blocks.3.mlp.fc1.weight\)"):
        load_image_tower(f"timm:local-dir:{tmp_path}")
    assert logging.getLogger("timm.models._builder").level == level
