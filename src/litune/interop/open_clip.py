"""A run as a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from litune.errors import ExportError, MissingExtraError
from litune.files import atomic, write_json
from litune.image.features import has_own_features
from litune.image.pictures import ImageTransform, timm_settings
from litune.image.registry import ImageTower
from litune.interop.fold import Affine, image_affine, text_affine, without_bias
from litune.interop.samples import TEXTS, compare, target_length
from litune.interop.tokenizer import check_ids, save_tokenizer
from litune.model.lit import LiT
from litune.text.registry import HfTextTower, VitTextTower

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_HF_KINDS = ("bert", "roberta", "xlm-roberta")
_POOLERS = {"first": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}


def export_open_clip(model: LiT, folder: Path) -> dict[str, Any]:
    """Write config, weights and tokenizer; returns the largest differences, with notes on what differs by design.

    Supported are timm image towers and the text towers bert, roberta, xlm-roberta and vit:, with linear heads or none.
    Raises `ExportError` for others, or where open_clip's features differ; `MissingExtraError` without the package.
    """
    open_clip = _package()
    tower = model.load_image_tower()
    visual, preprocess = _visual(tower)
    config = {
        "model_cfg": {
            "embed_dim": model.dim,
            "custom_text": True,
            **({} if model.logit_bias is None else {"init_logit_bias": float(model.logit_bias.detach())}),
            "vision_cfg": visual,
            "text_cfg": _text_config(model, folder),
        },
        "preprocess_cfg": preprocess,
    }
    save_tokenizer(folder, model.tokenizer)
    write_json(folder / CONFIG, config)
    with atomic(folder / WEIGHTS) as temporary:
        save_file({name: value.clone() for name, value in _weights(model, tower).items()}, temporary)
    with _quiet():
        loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    loaded.eval()
    _check_tokens(model, tokenizer)

    notes = [
        "open_clip's tokenizer mends texts (ftfy, HTML entities) before it reads them; litune takes them as they are"
    ]
    report: dict[str, Any] = {"notes": notes}
    if not _same_pictures(tower):
        from timm.data import create_transform

        assert isinstance(tower.preprocess, ImageTransform)
        report["timm_transform"] = timm_settings(tower.preprocess)
        transform = create_transform(**report["timm_transform"])
        notes.append(
            "open_clip's own transform can't cut pictures as the tower wants them: prepare them with "
            "timm.data.create_transform(**settings), the settings being `timm_transform` in litune.json"
        )

    @torch.no_grad()
    def images(pictures: list[Image.Image]) -> Float[Tensor, "B D"]:
        return target_length(loaded.encode_image(torch.stack([transform(picture) for picture in pictures])))

    @torch.no_grad()
    def texts(batch: Sequence[str]) -> Float[Tensor, "N D"]:
        return target_length(loaded.encode_text(tokenizer(list(batch))))

    return report | {"largest_difference": compare("open_clip", model, images=images, texts=texts)}


def _package() -> Any:
    try:
        with _quiet():
            import open_clip
    except ImportError:
        raise MissingExtraError("the export to open_clip", "open_clip_torch", "open-clip") from None
    return open_clip


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library warns about its own imports
            yield
    finally:
        logging.getLogger().setLevel(level)


def check_own_features(tower: ImageTower, target: str) -> None:
    """Raise `ExportError`, on behalf of `target`, where the features are not what the tower pools itself."""
    if not has_own_features(tower):
        raise ExportError(f"{target} can't express the features of {tower.spec}: export to onnx instead")


def timm_model(tower: ImageTower, target: str) -> Any:
    """The tower's timm model. Raises `ExportError` where it is another kind of tower."""
    model = getattr(tower.network, "model", None)
    check_own_features(tower, target)
    if not hasattr(model, "pretrained_cfg") or not isinstance(tower.preprocess, ImageTransform):
        raise ExportError(f"{target} takes timm image towers, not {tower.spec}: export to onnx instead")
    return model


def timm_name(model: Any) -> str:
    """The architecture name from which timm builds the model."""
    return str(model.pretrained_cfg["architecture"])


def _visual(tower: ImageTower) -> tuple[dict[str, Any], dict[str, Any]]:
    model = timm_model(tower, "open_clip")
    transform = tower.preprocess
    assert isinstance(transform, ImageTransform)
    native = tuple(model.pretrained_cfg["input_size"][1:])
    if hasattr(model, "set_input_size") and transform.size != native:
        raise ExportError(
            f"open_clip makes {timm_name(model)} for pictures of {native[0]}×{native[1]} pixels, {tower.spec} is for "
            f"{transform.size[0]}×{transform.size[1]}: export to onnx instead"
        )
    visual = {
        "image_size": list(transform.size),
        "timm_model_name": timm_name(model),
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": True,
    }
    preprocess = {
        "size": list(transform.size),
        "mode": "RGB",
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": transform.interpolation if transform.interpolation == "bilinear" else "bicubic",
        "resize_mode": "squash" if transform.crop_mode == "squash" else "shortest",
    }
    return visual, preprocess


def _same_pictures(tower: ImageTower) -> bool:
    """Whether open_clip's own transform gives the tower's pixels: it has no crop_pct."""
    t = tower.preprocess
    assert isinstance(t, ImageTransform)
    square = t.size[0] == t.size[1]
    return (
        t.crop_pct == 1.0
        and t.interpolation in ("bilinear", "bicubic")
        and ((t.crop_mode == "center" and square) or t.crop_mode == "squash")
    )


def _text_config(model: LiT, folder: Path) -> dict[str, Any]:
    tower = model.text
    shared = {"context_length": model.tokenizer.max_tokens, "hf_tokenizer_name": str(folder.resolve())}
    if isinstance(tower, VitTextTower):
        _refuse_pooling(tower.pooling, ("first", "last"))
        block: Any = tower.blocks[0]
        return shared | {
            "vocab_size": tower.token_table().num_embeddings,
            "width": tower.width,
            "heads": block.heads,
            "layers": len(tower.blocks),
            "mlp_ratio": block.up.out_features / tower.width,
            "no_causal_mask": True,
            "pool_type": tower.pooling,
            "proj_type": "linear",
            "proj_bias": True,
            "norm_kwargs": {"eps": tower.norm.eps},
            "act_kwargs": {"approximate": "tanh"},
        }
    if not isinstance(tower, HfTextTower) or tower.model.config.model_type not in _HF_KINDS:
        kind = tower.model.config.model_type if isinstance(tower, HfTextTower) else tower.architecture.get("kind")
        raise ExportError(
            f"open_clip takes the text towers {', '.join(_HF_KINDS)} and vit:, not {kind}: export to onnx instead"
        )
    _refuse_pooling(tower.pooling, tuple(_POOLERS))
    tower.model.config.save_pretrained(folder)
    return shared | {
        "hf_model_name": str(folder.resolve()),
        "hf_model_pretrained": False,
        "hf_proj_type": "linear",
        "hf_pooler_type": _POOLERS[tower.pooling],
    }


def _refuse_pooling(pooling: str, known: tuple[str, ...]) -> None:
    if pooling not in known:
        raise ExportError(
            f"open_clip has no pooling {pooling!r} for such a text tower (it has {', '.join(known)}): "
            "export to onnx instead"
        )


def _weights(model: LiT, tower: ImageTower) -> dict[str, Tensor]:
    weight, bias = image_affine(model, "open_clip")
    state = {f"visual.trunk.{name}": value for name, value in timm_model(tower, "open_clip").state_dict().items()}
    state |= {"visual.head.proj.weight": weight.float(), "visual.head.proj.bias": bias.float()}
    state["logit_scale"] = model.logit_scale.detach()
    if model.logit_bias is not None:
        state["logit_bias"] = model.logit_bias.detach()
    text, affine = model.text, text_affine(model, "open_clip")
    state |= _vit_weights(text, affine) if isinstance(text, VitTextTower) else _hf_weights(text, affine)
    return {name: value.detach().contiguous() for name, value in state.items()}


def _hf_weights(tower: Any, affine: Affine) -> dict[str, Tensor]:
    norm = last_layer_norm(tower.model)
    saved = {name: value.clone() for name, value in norm.state_dict().items()}
    weight = without_bias(norm, affine)
    state = {f"text.transformer.{name}": value.clone() for name, value in tower.model.state_dict().items()}
    norm.load_state_dict(saved)
    return state | {"text.proj.weight": weight.float()}


def last_layer_norm(bert: Any) -> Any:
    """The LayerNorm that outputs a BERT-like model's last hidden states."""
    return bert.encoder.layer[-1].output.LayerNorm


def _vit_weights(tower: VitTextTower, affine: Affine) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {
        "token_embedding.weight": tower.token_table().weight,
        "positional_embedding": tower.position_embedding,
        "ln_final.weight": tower.norm.weight,
        "ln_final.bias": tower.norm.bias,
        "text_projection.weight": affine[0].float(),
        "text_projection.bias": affine[1].float(),
    }
    names = {"norm1": "ln_1", "norm2": "ln_2", "out": "attn.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for number, module in enumerate(tower.blocks):
        block: Any = module
        for part in ("weight", "bias"):
            for ours, theirs in names.items():
                state[f"transformer.resblocks.{number}.{theirs}.{part}"] = getattr(getattr(block, ours), part)
            joined = torch.cat([getattr(layer, part) for layer in (block.query, block.key, block.value)])
            state[f"transformer.resblocks.{number}.attn.in_proj_{part}"] = joined
    return {f"text.{name}": value for name, value in state.items()}


def _check_tokens(model: LiT, tokenizer: Any) -> None:
    """Raise `ExportError` where open_clip's tokens of the texts, as it cleans them, are not the run's."""
    cleaned = tuple(tokenizer.clean_fn(text) for text in TEXTS)
    ours = model.tokenizer(cleaned).lengths
    rows = [ids[:n] for ids, n in zip(tokenizer(list(TEXTS)).tolist(), ours, strict=True)]
    check_ids(model.tokenizer, rows, cleaned)
