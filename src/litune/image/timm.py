"""timm models as image towers: the pooled features before the classifier, on the model's own preprocessing.

Checkpoints from files are read as published: PyTorch's and safetensors' with timm's own renaming of foreign layouts,
and the `.npz` archives of AugReg, BiT and MLP-Mixer. No pickled code is run.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litune.errors import TowerError, nearest
from litune.image.features import OUTPUT, POOLED, Layered
from litune.image.pictures import ImageTransform
from litune.image.tower import ImageTower, weights_hash
from litune.towers.specs import no_more, random_asked, reason, size_asked


class TimmNetwork(Layered, nn.Module):
    """A timm model's features before its classifier: pooled, or of its tokens, maps and layers.

    The layers of a ViT are its blocks, those of a convolutional network the levels that timm counts (`feature_info`).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, W] of normalised pictures [B, 3, H, W]."""
        if self.parts != POOLED:
            return self.features(pixels)
        features: Tensor = self.model(pixels)
        return features

    @property
    def depth(self) -> int:
        """The number of layers that timm gives outputs of."""
        return len(self.model.feature_info) if hasattr(self.model, "forward_intermediates") else 0

    @property
    def has_class_token(self) -> bool:
        """Whether the model has a class token, before its other tokens."""
        return getattr(self.model, "cls_token", None) is not None and bool(getattr(self.model, "num_prefix_tokens", 0))

    def outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Tokens [B, N, W], the last norm applied; maps [B, W, H', W'], but for the output as the model has it."""
        inner = [layer for layer in layers if layer != OUTPUT]
        if not inner:
            return {OUTPUT: self.model.forward_features(pixels)}
        settings: dict[str, Any] = {"indices": [layer - 1 for layer in inner], "norm": True}
        if "return_prefix_tokens" in inspect.signature(self.model.forward_intermediates).parameters:
            settings |= {"return_prefix_tokens": True, "output_fmt": "NLC"}
        if OUTPUT in layers:
            last, outputs = self.model.forward_intermediates(pixels, **settings)
            return {OUTPUT: last} | self._joined(inner, outputs)
        settings |= {"stop_early": True, "intermediates_only": True}
        return self._joined(inner, self.model.forward_intermediates(pixels, **settings))

    def _joined(self, layers: Sequence[int], outputs: Sequence[Any]) -> dict[int, Tensor]:
        """The outputs by layer; of tokens it gives the patches and those before them apart."""
        if self.has_class_token and not all(isinstance(output, tuple) for output in outputs):
            raise TowerError(f"{_name(self.model)} has its class token in its last layers alone: leave out layers")
        whole = [torch.cat(output[::-1], dim=1) if isinstance(output, tuple) else output for output in outputs]
        return dict(zip(layers, whole, strict=True))

    def pooled(self, output: Tensor, layer: int) -> Tensor:
        """As the model pools; the mean of a level's map."""
        if layer != OUTPUT and output.ndim == 4:
            return self.mean(output, layer)
        pooled: Tensor = self.model.forward_head(output, pre_logits=True)
        return pooled

    def mean(self, output: Tensor, layer: int) -> Tensor:
        """The mean over the patches, without class token and registers; or over the places of a map."""
        if output.ndim == 3:
            return output[:, getattr(self.model, "num_prefix_tokens", 0) :].mean(1)
        channels_last = layer == OUTPUT and getattr(self.model, "output_fmt", "") == "NHWC"
        return output.mean((1, 2) if channels_last else (2, 3))


def timm_tower(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """The tower of `timm:NAME`, pre-trained, with random weights, or with those of `?checkpoint=FILE`."""
    import timm
    from timm.data import resolve_model_data_config

    checkpoint = options.pop("checkpoint", None)
    random, size = random_asked(spec, options), size_asked(spec, options)
    no_more(spec, options, ["checkpoint", "init", "size"])
    if not name.startswith(("hf_hub:", "hf-hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        raise TowerError(f"timm has no model {name!r}: {nearest(name, timm.list_models())}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise TowerError(f"the checkpoint {checkpoint} of {spec!r} does not exist")
    try:
        with _missing_weights() as missing:
            pretrained = checkpoint is None and not random
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, checkpoint_path="")
        if missing:
            raise TowerError(f"the weights of {spec!r} are incomplete: {missing[0]}")
        if checkpoint is not None:
            load_checkpoint(model, Path(checkpoint))
    except TowerError:
        raise
    except Exception as why:
        raise TowerError(reason(f"the image tower {spec!r} can't be loaded", why)) from why
    return with_timm_config(spec, model, resolve_model_data_config(model), size)


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collects timm's messages about missing weights; for models without a classifier, timm only logs them."""
    messages: list[str] = []

    class KeepMessages(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Missing keys"):
                messages.append(text.partition(" discovered")[0])

    logger, handler = logging.getLogger("timm.models._builder"), KeepMessages()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def load_checkpoint(model: nn.Module, file: Path) -> None:
    """Fill all of a timm model's weights from a file; its classifier and other unused weights are ignored.

    Raises `TowerError` where a weight is missing, has another shape, or belongs to a block that the model lacks, and
    where the file is damaged or holds pickled code.
    """
    if file.suffix.lower() == ".npz":
        _load_npz(model, file)
        return
    weights = _renamed(model, _read_weights(file), file)
    own = model.state_dict()
    for name, value in weights.items():
        if name in own and value.shape != own[name].shape:
            raise TowerError(
                f"{file} is of another architecture: {name!r} has the shape {tuple(value.shape)}, "
                f"{_name(model)} has {tuple(own[name].shape)}"
            )
    missing = [name for name in own if name not in weights]
    if missing:
        raise TowerError(f"{file} lacks {len(missing)} of the tower's weights, {missing[0]!r} first")
    patterns = {re.sub(r"\d+", "#", name) for name in own}
    extra = [name for name in weights if name not in own and re.sub(r"\d+", "#", name) in patterns]
    if extra:
        raise TowerError(f"{file} is of another architecture: {_name(model)} has no {extra[0]!r}")
    model.load_state_dict({name: weights[name] for name in own})


def _name(model: Any) -> str:
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)


def _read_weights(file: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by name, without the dicts and prefixes that training scripts add."""
    from safetensors.torch import load_file

    try:
        if file.suffix.lower() == ".safetensors":
            weights: Any = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise TowerError(
            f"{file} is damaged or holds more than weights (pickled objects): save its state dict as safetensors"
        ) from None
    except Exception as why:
        raise TowerError(reason(f"{file} can't be read as a checkpoint", why)) from None
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict) or not any(isinstance(v, Tensor) for v in weights.values()):
        raise TowerError(f"{file} holds no weights by name: save the model's state dict")
    for prefix in ("_orig_mod.", "module.", "base_encoder.", "backbone."):  # compiled, data-parallel, MoCo, DINO
        if any(name.startswith(prefix) for name in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return dict(weights)


def _renamed(model: nn.Module, weights: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The weights under timm's names and with positions resized to the model, by timm's own filter for checkpoints."""
    rename = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is not None:
        try:
            weights = rename(weights, model)
        except Exception as why:
            raise TowerError(reason(f"{file} does not fit {_name(model)}", why)) from None
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


# The names of blocks in the published .npz archives of ViT, MLP-Mixer and BiT.
_BLOCK = re.compile(r"encoderblock_\d+|MixerBlock_\d+|block\d+/unit\d+")


def _load_npz(model: Any, file: Path) -> None:
    from timm.models.mlp_mixer import MlpMixer

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # parameters that are still NaN afterwards were not in the file
        try:
            with np.load(file, allow_pickle=False) as arrays:
                blocks = {match[0] for name in arrays.files if (match := _BLOCK.search(name))}
                if isinstance(model, MlpMixer):
                    _load_mixer(model, arrays)
            if not isinstance(model, MlpMixer):
                if not hasattr(model, "load_pretrained"):
                    raise TowerError(f"{file}: timm reads no .npz archives for {_name(model)}, only for ViT and BiT")
                model.load_pretrained(str(file))
        except KeyError as why:
            raise TowerError(f"{file} lacks weights of {_name(model)}: {why.args[0]!s}") from None
        except TowerError:
            raise
        except Exception as why:
            raise TowerError(reason(f"{file} does not fit {_name(model)}", why)) from None
    for name, parameter in model.named_parameters():
        if parameter.isnan().any():
            raise TowerError(f"{file} lacks weights of {_name(model)}: {name} is not filled")
    own = len(model.blocks) if hasattr(model, "blocks") else sum(len(stage.blocks) for stage in model.stages)
    if blocks and len(blocks) != own:
        raise TowerError(f"{file} is of another architecture: it has {len(blocks)} blocks, {_name(model)} has {own}")


def _load_mixer(model: Any, arrays: Any) -> None:
    """Load the published archives of MLP-Mixer (arXiv 2105.01601)."""

    def fill(layer: Any, name: str) -> None:
        kernel = torch.from_numpy(arrays[f"{name}/{'scale' if isinstance(layer, nn.LayerNorm) else 'kernel'}"])
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[kernel.ndim]
        for own, value in (
            (layer.weight, kernel.permute(order)),
            (layer.bias, torch.from_numpy(arrays[f"{name}/bias"])),
        ):
            if own.shape != value.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {tuple(own.shape)}")
            own.copy_(value)

    fill(model.stem.proj, "stem")
    for i, block in enumerate(model.blocks):
        fill(block.norm1, f"MixerBlock_{i}/LayerNorm_0")
        fill(block.norm2, f"MixerBlock_{i}/LayerNorm_1")
        for mixing, mlp in (("token_mixing", block.mlp_tokens), ("channel_mixing", block.mlp_channels)):
            fill(mlp.fc1, f"MixerBlock_{i}/{mixing}/Dense_0")
            fill(mlp.fc2, f"MixerBlock_{i}/{mixing}/Dense_1")
    fill(model.norm, "pre_head_layer_norm")


def with_timm_config(spec: str, model: Any, config: dict[str, Any], size: tuple[int, int] | None) -> ImageTower:
    """A timm model as a locked tower with the preprocessing of timm's `config`; `size` overrides the input size."""
    if size is not None:
        _resize_timm(spec, model, size)
    transform = ImageTransform(
        size=size or tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
    )
    return ImageTower(
        spec,
        TimmNetwork(model),
        transform,
        description=transform.describe(),
        weights=weights_hash(model),
        pooling=_timm_pooling(model),
    )


def _resize_timm(spec: str, model: Any, size: tuple[int, int]) -> None:
    """Make a timm model take pictures of this height and width. Raises `TowerError` where it can't."""
    try:
        if hasattr(model, "set_input_size"):  # models with position tables; convolutions take any size
            model.set_input_size(img_size=size)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    except Exception as why:
        raise TowerError(reason(f"{spec!r} can't take pictures of {size[0]}×{size[1]} pixels", why)) from None


def _timm_pooling(model: Any) -> str:
    """How a timm model pools, in a word: avg, token, map and so on."""
    for owner in (model, getattr(model, "head", None)):
        pool: Any = getattr(owner, "global_pool", None)
        if isinstance(pool, str) and pool:
            return pool
        if isinstance(getattr(pool, "pool_type", None), str):
            return str(pool.pool_type)
    return "the model's own"
