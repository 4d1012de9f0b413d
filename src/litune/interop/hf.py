"""A run as a folder that transformers' VisionTextDualEncoderModel and its processor load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from litune.errors import ExportError
from litune.files import read_json, write_json, write_text
from litune.image.pictures import ImageTransform, timm_settings
from litune.image.registry import ImageTower
from litune.interop.fold import image_affine, last_norm, text_affine, without_bias
from litune.interop.open_clip import check_own_features, last_layer_norm, timm_model, timm_name
from litune.interop.samples import compare, pictures, target_length
from litune.interop.tokenizer import save_tokenizer
from litune.model.card import card
from litune.model.lit import LiT
from litune.text.bert import BERT_LIKE
from litune.text.registry import HfTextTower
from litune.towers.quiet import quiet_transformers

TARGET = "transformers' VisionTextDualEncoderModel"
# The poolers of these have a configurable activation.
_VIT_POOLERS = ("vit", "deit")


def export_hf(model: LiT, run: Path, folder: Path) -> dict[str, Any]:
    """Write model, processor and model card; returns the largest differences from the run's features, and notes.

    The library projects both towers' `pooler_output` by matrices without bias: supported are towers that end in a
    LayerNorm, and texts pooled by their first token. Raises `ExportError` for others, or where features differ.
    """
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

    tower = model.load_image_tower()
    text, text_state, text_projection = _text(model)
    vision, vision_state, visual_projection = _vision(model, tower)
    config = VisionTextDualEncoderConfig(vision_config=vision, text_config=text, projection_dim=model.dim)
    state = {f"vision_model.{name}": value for name, value in vision_state.items()}
    state |= {f"text_model.{name}": value for name, value in text_state.items()}
    state |= {
        "visual_projection.weight": visual_projection.float(),
        "text_projection.weight": text_projection.float(),
        "logit_scale": model.logit_scale.detach(),
    }
    with quiet_transformers():
        network = VisionTextDualEncoderModel(config).eval()
        network.load_state_dict(state, strict=True)
        network.save_pretrained(folder)
    save_tokenizer(folder, model.tokenizer)
    _save_processor(tower, folder)
    with quiet_transformers():
        loaded = VisionTextDualEncoderModel.from_pretrained(folder).eval()
        processor = VisionTextDualEncoderProcessor.from_pretrained(folder)

    @torch.no_grad()
    def images(batch: list[Image.Image]) -> Float[Tensor, "B D"]:
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"]
        return target_length(loaded.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def texts(batch: Sequence[str]) -> Float[Tensor, "N D"]:
        tokens = processor(text=list(batch), padding=True, truncation=True, return_tensors="pt")
        return target_length(loaded.get_text_features(**tokens).pooler_output)

    differences = compare("hf", model, images=images, texts=texts)
    write_text(folder / "README.md", card(run, library="transformers", use=_use(folder.name)))
    notes = ["load it in float32 or bfloat16: in float16 the text projection overflows"]
    if model.logit_bias is not None:
        notes.append(f"{TARGET} has no bias on its scores: add `bias` of litune.json to them for sigmoids")
    return {"largest_difference": differences, "notes": notes}


def _use(name: str) -> str:
    return (
        "```python\nfrom transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor\n\n"
        f'model = VisionTextDualEncoderModel.from_pretrained("{name}")\n'
        f'processor = VisionTextDualEncoderProcessor.from_pretrained("{name}")\n'
        'inputs = processor(text=["a dog", "a bicycle"], images=[image], padding=True, truncation=True, '
        'return_tensors="pt")\nprobabilities = model(**inputs).logits_per_image.softmax(1)\n```'
    )


def save_vision(tower: ImageTower, folder: Path, target: str) -> None:
    """Write an image tower as a folder that transformers' AutoModel and AutoImageProcessor load.

    Raises `ExportError`, on behalf of `target`, for a tower that is not timm: or hf:.
    """
    network = _wrapped(tower, target) if isinstance(tower.preprocess, ImageTransform) else _pooling(tower, target)
    network.save_pretrained(folder)
    _save_processor(tower, folder)


def _vision(model: LiT, tower: ImageTower) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Config, weights and projection of the image side."""
    affine = image_affine(model, TARGET)
    transformed = isinstance(tower.preprocess, ImageTransform)
    network = _wrapped(tower, TARGET) if transformed else _pooling(tower, TARGET)
    config = network.config
    if getattr(config, "hidden_size", None) != model.image_width:
        raise ExportError(
            f"{TARGET} doesn't read the width of {config.model_type} image towers: export to onnx instead"
        )
    pixels = torch.from_numpy(np.stack([tower.preprocess(p) for p in pictures()[:2]]))
    if tower.normalize:
        pixels = (pixels.float() - tower.get_buffer("mean")) / tower.get_buffer("std")
    norm = last_norm(network, model.image_width, lambda: network(pixel_values=pixels).pooler_output.flatten(1))
    weight = affine[0] if not affine[1].abs().max() > 0 else None if norm is None else without_bias(norm, affine)
    if weight is None:
        raise ExportError(
            f"{TARGET} projects without a bias, and {tower.spec} doesn't end in a LayerNorm that could stand in for it "
            "(the run's centre or head needs one): export to onnx or open_clip, or tune with --image-map none"
        )
    return config, {name: value.clone() for name, value in network.state_dict().items()}, weight


def _wrapped(tower: ImageTower, target: str) -> Any:
    """A copy of a timm tower inside transformers' wrapper."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    model = timm_model(tower, target)
    transform = tower.preprocess
    assert isinstance(transform, ImageTransform)
    size_args = {"img_size": list(transform.size)} if hasattr(model, "set_input_size") else None
    config = TimmWrapperConfig(architecture=timm_name(model), model_args=size_args)
    config.hidden_size = model.num_features
    with quiet_transformers():
        wrapper = TimmWrapperModel(config).eval()
    wrapper.timm_model.load_state_dict(model.state_dict(), strict=True)
    return wrapper


def _pooling(tower: ImageTower, target: str) -> Any:
    """A copy of a transformers tower whose pooler gives the run's pooled features."""
    from transformers import AutoModel

    check_own_features(tower, target)
    model: Any = getattr(tower.network, "model", None)
    if getattr(model, "config", None) is None:
        raise ExportError(f"{target} takes timm: and hf: image towers, not {tower.spec}: export to onnx instead")
    config = model.config.__class__.from_dict(model.config.to_dict())
    if getattr(tower.network, "pooling", "") == "first token" and config.model_type in _VIT_POOLERS:
        config.pooler_act, config.pooler_output_size = "linear", config.hidden_size
    with quiet_transformers():
        network = AutoModel.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = network.load_state_dict(model.state_dict(), strict=False)
    if config.model_type in _VIT_POOLERS and hasattr(network, "pooler"):
        with torch.no_grad():
            nn.init.eye_(network.pooler.dense.weight)
            nn.init.zeros_(network.pooler.dense.bias)
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing or unexpected or not _gives_pooled(network, tower):
        raise ExportError(f"{target} pools {config.model_type} in another way than the run: export to onnx instead")
    return network


def _gives_pooled(model: Any, tower: ImageTower) -> bool:
    pixels = torch.from_numpy(np.stack([tower.preprocess(pictures()[0])]))
    with torch.no_grad():
        return getattr(model(pixel_values=pixels), "pooler_output", None) is not None


def _text(model: LiT) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Config, weights and projection of the text side.

    The library's BERT pools by tanh(dense(first token)). With weights so small that tanh(x) = x in float32, that is the
    first token itself times a power of two, which the projection undoes.
    """
    from transformers import AutoModel

    tower = model.text
    if not isinstance(tower, HfTextTower) or tower.model.config.model_type not in BERT_LIKE:
        kind = tower.model.config.model_type if isinstance(tower, HfTextTower) else tower.architecture.get("kind")
        raise ExportError(f"{TARGET} can express the text towers {', '.join(sorted(BERT_LIKE))}, not {kind}: "
                          "export to onnx instead")  # fmt: skip
    if tower.pooling != "first":
        raise ExportError(
            f"{TARGET} pools texts by their first token, the run by {tower.pooling!r}: export to onnx, open_clip or "
            "sentence-transformers, or tune with --pooling first"
        )
    config = tower.model.config.__class__.from_dict(tower.model.config.to_dict())
    with quiet_transformers():
        network = AutoModel.from_config(config, dtype=torch.float32).eval()
    network.load_state_dict(tower.model.state_dict(), strict=False)
    norm = last_layer_norm(network)
    weight = without_bias(norm, text_affine(model, TARGET))
    # |LayerNorm's output| ≤ √width · |gain| + |bias|; tanh(x) differs from x by the share x² / 3 < 2⁻²⁵ where x < 2⁻¹².
    gain, shift = (float(p.detach().abs().max()) for p in (norm.weight, norm.bias))
    bound = math.sqrt(tower.width) * gain + shift
    small = 2.0 ** (-12 - math.ceil(math.log2(bound)))
    with torch.no_grad():
        network.pooler.dense.weight.copy_(small * torch.eye(tower.width))
        network.pooler.dense.bias.zero_()
    return config, {name: value.clone() for name, value in network.state_dict().items()}, weight / small


def _save_processor(tower: ImageTower, folder: Path) -> None:
    if not isinstance(tower.preprocess, ImageTransform):
        processor: Any = getattr(tower.preprocess, "processor", None)
        processor.save_pretrained(folder)
        return
    # The wrapper's processor reads timm's settings from config.json; its own file only names its class.
    about = read_json(folder / "config.json", ExportError)
    about["architecture"] = timm_name(timm_model(tower, TARGET))
    about["image_processor_type"] = "TimmWrapperImageProcessor"
    about["pretrained_cfg"] = timm_settings(tower.preprocess)
    write_json(folder / "config.json", about)
    write_json(folder / "preprocessor_config.json", {"image_processor_type": about["image_processor_type"]})
