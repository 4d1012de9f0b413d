"""transformers vision towers against the library's own calls, on tiny models of random weights in folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from litune.errors import TowerError
from litune.image.registry import load_image_tower


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(spec: str) -> Tensor:
    tower = load_image_tower(spec)
    return tower.encode(torch.from_numpy(np.stack([tower.preprocess(picture())])))


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 8,
}


def first_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def pooler(output: Any) -> Tensor:
    return output.pooler_output.flatten(1)


Recommended = Callable[[Any], Tensor]
FAMILIES: dict[str, tuple[str, dict[str, Any], Recommended]] = {
    # family: (model, the settings of a tiny one, what of its output its documentation recommends)
    "ViT": ("ViTModel", {**VIT, "hidden_dropout_prob": 0.5}, first_token),
    "DINOv2": ("Dinov2Model", {**VIT, "drop_path_rate": 0.5}, pooler),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", VIT, pooler),
    "DINOv3 ViT": ("DINOv3ViTModel", {**VIT, "num_register_tokens": 2}, pooler),
    "DINOv3 ConvNeXt": ("DINOv3ConvNextModel", STAGES, pooler),
    "BEiT, mean of the patches": ("BeitModel", {**VIT, "use_mean_pooling": True}, pooler),
    "BEiT, first token": ("BeitModel", {**VIT, "use_mean_pooling": False}, pooler),
    "ConvNeXt": ("ConvNextModel", {**STAGES, "drop_path_rate": 0.5}, pooler),
    "ConvNeXt V2": ("ConvNextV2Model", STAGES, pooler),
    "Swin": ("SwinModel", SWIN, pooler),
    "Swin V2": ("Swinv2Model", SWIN, pooler),
    "ResNet": ("ResNetModel", {"embedding_size": 8, **STAGES}, pooler),
    "BiT": ("BitModel", {"embedding_size": 8, **STAGES, "num_groups": 4}, pooler),
    "CLIP, vision half": ("CLIPVisionModelWithProjection", {**VIT, "projection_dim": 12}, lambda o: o.image_embeds),
    "SigLIP, vision half": ("SiglipVisionModel", VIT, pooler),
}


def save_processor(folder: Path) -> Any:
    """A processor with settings of its own, as towers have."""
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 36}, crop_size=32, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.25]
    )
    processor.save_pretrained(folder)
    return transformers.AutoImageProcessor.from_pretrained(folder)


def drawn(model: Any) -> Any:
    """The model with no weight left at its start: tokens, biases, norms and statistics are drawn too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=generator))
            assert not name.endswith("running_var") or (value > 0).all()
    return model.eval()


def make(family: str, folder: Path) -> tuple[Any, Recommended]:
    name, settings, recommended = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = drawn(kind(kind.config_class(**settings)))
    model.save_pretrained(folder)
    return model, recommended


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_librarys_recommended_call(family: str, tmp_path: Path) -> None:
    model, recommended = make(family, tmp_path)
    processor = save_processor(tmp_path)
    with torch.no_grad():
        expected = recommended(model(**processor(images=picture(), return_tensors="pt")))
    found = encode(f"hf:{tmp_path}")
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["BEiT, mean of the patches", "ResNet", "SigLIP, vision half", "CLIP, vision half"])
def test_a_part_that_is_missing_is_an_error(family: str, tmp_path: Path) -> None:
    """The poolers and heads among them: they are never drawn at random and then locked."""
    make(family, tmp_path)
    save_processor(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    last = {"ResNet": "encoder.stages.3.layers.0.layer.1.normalization.weight"}.get(family)
    last = last or next(name for name in whole if "pool" in name or "head" in name or "projection.weight" in name)
    save_file({k: v for k, v in whole.items() if k != last}, file, {"format": "pt"})
    with pytest.raises(TowerError, match=f"{tmp_path} lacks 1 of the tower's weights, '{last}'") as error:
        load_image_tower(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)


def test_a_vits_unused_pooler_may_be_there_or_not(tmp_path: Path) -> None:
    settings = transformers.ViTConfig(**VIT)
    model = drawn(transformers.ViTModel(settings))
    model.save_pretrained(tmp_path / "with")
    bare = transformers.ViTModel(settings, add_pooling_layer=False)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pooler")})
    bare.save_pretrained(tmp_path / "without")
    transformers.ViTForImageClassification(settings).save_pretrained(tmp_path / "classifier")
    for folder in tmp_path.iterdir():
        save_processor(folder)
    assert torch.equal(encode(f"hf:{tmp_path / 'with'}"), encode(f"hf:{tmp_path / 'without'}"))
    assert load_image_tower(f"hf:{tmp_path / 'classifier'}").provenance["pooling"] == "first token"


def test_a_masked_autoencoder_sees_the_whole_picture(tmp_path: Path) -> None:
    """MAE's encoder is a ViT: with nothing masked, of the same weights the features are the ViT's, on every call."""
    settings = VIT | {"decoder_num_attention_heads": 2, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    pretrained = drawn(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**settings)))
    pretrained.save_pretrained(tmp_path)
    processor = save_processor(tmp_path)
    vit = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()
    mae = {k.removeprefix("vit."): v for k, v in pretrained.state_dict().items() if k.startswith("vit.")}
    vit.load_state_dict(mae)
    with torch.no_grad():
        expected = vit(**processor(images=picture(), return_tensors="pt")).last_hidden_state[:, 0]
    tower = load_image_tower(f"hf:{tmp_path}")
    pixels = torch.from_numpy(np.stack([tower.preprocess(picture())] * 2))
    found = tower.encode(pixels)
    assert (found - expected).norm() < 1e-5 * found.norm()
    assert torch.equal(tower.encode(pixels), found)


def test_clip_gives_its_vision_half(tmp_path: Path) -> None:
    """Out of a two-tower folder, projected as `get_image_features` does it, or not."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=12)
    model = drawn(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    processor = save_processor(tmp_path)
    with torch.no_grad():
        inputs = processor(images=picture(), return_tensors="pt")
        projected = model.get_image_features(**inputs)
        projected = getattr(projected, "pooler_output", projected)
        before = model.vision_model(**inputs).pooler_output
    found = encode(f"hf:{tmp_path}")
    assert found.shape == (1, 12)
    assert (found - projected).norm() < 1e-5 * projected.norm()
    found = encode(f"hf:{tmp_path}?projection=no")
    assert found.shape == (1, 32)
    assert (found - before).norm() < 1e-5 * before.norm()
    assert not any("text" in name for name, _ in load_image_tower(f"hf:{tmp_path}").named_parameters())


def test_clip_without_its_projection(tmp_path: Path) -> None:
    model = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)))
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(TowerError, match=r"'visual_projection.weight' first; \?projection=no does without it"):
        load_image_tower(f"hf:{tmp_path}")
    assert encode(f"hf:{tmp_path}?projection=no").shape == (1, 32)


@pytest.mark.parametrize("head", [True, False])
def test_siglip_gives_its_vision_half(head: bool, tmp_path: Path) -> None:
    """Pooled by its attention head, as `get_image_features` does it."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VIT | {"vision_use_head": head})
    model = drawn(transformers.SiglipModel(config))
    model.save_pretrained(tmp_path)
    processor = save_processor(tmp_path)
    if not head:
        with pytest.raises(TowerError, match="no attention head to pool with"):
            load_image_tower(f"hf:{tmp_path}")
        return
    with torch.no_grad():
        expected = model.get_image_features(**processor(images=picture(), return_tensors="pt"))
    expected = getattr(expected, "pooler_output", expected)
    found = encode(f"hf:{tmp_path}")
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_random_weights(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=12)
    config.save_pretrained(tmp_path)
    save_processor(tmp_path)
    torch.manual_seed(0)
    one = encode(f"hf:{tmp_path}?init=random")
    torch.manual_seed(0)
    assert torch.equal(encode(f"hf:{tmp_path}?init=random"), one)


def test_folders_that_are_no_tower(tmp_path: Path) -> None:
    def fails(folder: Path, message: str, query: str = "") -> None:
        with pytest.raises(TowerError, match=message) as error:
            load_image_tower(f"hf:{folder}{query}")
        assert "\n" not in str(error.value)

    make("ViT", tmp_path / "vit")
    fails(tmp_path / "vit", "can't be loaded")  # it has no processor
    save_processor(tmp_path / "vit")
    fails(tmp_path / "vit", "projection=no: it is yes or no, and for CLIP models only", "?projection=no")
    config = transformers.ViTConfig(**(VIT | {"hidden_size": 64}))
    config.save_pretrained(tmp_path / "vit")
    fails(tmp_path / "vit", "shape|size|mismatch")
    transformers.CLIPSegConfig().save_pretrained(tmp_path / "seg")
    fails(tmp_path / "seg", "does not read the vision half of clipseg models")
    transformers.PoolFormerModel(transformers.PoolFormerConfig(**STAGES)).save_pretrained(tmp_path / "unpooled")
    save_processor(tmp_path / "unpooled")
    fails(tmp_path / "unpooled", "does not know how poolformer pools")  # its parts are called so, but none pools
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    fails(tmp_path / "text", "can't be loaded")
    (tmp_path / "vit" / "config.json").write_text("{}")
    fails(tmp_path / "vit", "can't be loaded")


def test_a_processor_that_disagrees_with_its_model(tmp_path: Path) -> None:
    """Another size, or other channels, than the model takes: said before any picture is read."""
    make("ViT", tmp_path)
    save_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}))
    with pytest.raises(TowerError, match=r"preprocessor_config.json gives pixels 3×48×48, which its model does not"):
        load_image_tower(f"hf:{tmp_path}")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    make("ViT", tmp_path)
    save_processor(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(TowerError, match=r"weights that are not finite, in '"):
        load_image_tower(f"hf:{tmp_path}")


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    make("ViT", tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TowerError, match=r"model.safetensors is a pointer of Git LFS"):
        load_image_tower(f"hf:{tmp_path}")
