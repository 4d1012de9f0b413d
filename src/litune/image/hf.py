"""transformers vision models as image towers, with the preprocessing of their own image processor.

Pooling depends on the family: a ViT's first token after the final normalisation (its pooler is a tanh layer that
pre-training does not train), CLIP's projected features, SigLIP's attention head, the model's own pooler for all
others. Of two-tower models only the vision half is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from litune.errors import TowerError
from litune.image.features import OUTPUT, POOLED, Layered, Part
from litune.image.pictures import cut_thin
from litune.image.tower import ImageTower, weights_hash
from litune.towers.quiet import quiet_transformers
from litune.towers.specs import no_more, random_asked, reason
from litune.towers.weights import check_finite, check_pointers

FIRST_TOKEN = {"vit", "deit", "vit_msn", "vit_mae", "dinov2", "dinov2_with_registers", "dinov3_vit"}
"""Families whose features are the first token's."""
CLIP = {"clip", "clip_vision_model"}
SIGLIP = {"siglip", "siglip_vision_model"}
TOKENS = FIRST_TOKEN | CLIP | SIGLIP
"""Families whose tokens and layers can be had."""
OWN_POOLER = {"convnext", "convnextv2", "levit", *CLIP, *SIGLIP}
"""Families that pool without a module named `pooler`."""


class HfPreprocess:
    """A transformers image processor as a preprocessing function: picture to float32 [3, H, W]."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The values that the model takes, normalised."""
        values = self.processor(images=cut_thin(image), return_tensors="np")["pixel_values"]
        return np.asarray(values[0], dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        """The settings, as recorded in a store's fingerprint."""
        settings = json.loads(self.processor.to_json_string())
        return {k: v for k, v in sorted(settings.items()) if v is not None}


class HfNetwork(Layered, nn.Module):
    """A transformers vision model's features: its pooled output, or of its tokens and layers.

    `pooling` says how the model pools (see `hf_pooling`). Tokens and layers are those of the families TOKENS, whose
    layers are the blocks of a ViT.
    """

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, W] of preprocessed pictures [B, 3, H, W]."""
        if self.parts != POOLED:
            return self.features(pixels)
        output = self._run(pixels)
        if self.pooling == "projection":
            projected: Tensor = output.image_embeds
            return projected
        if self.pooling == "pooler":
            return torch.flatten(output.pooler_output, 1)
        hidden: Tensor = output.last_hidden_state
        return hidden[:, 0]

    def _run(self, pixels: Tensor, **settings: Any) -> Any:
        if self.kind == "vit_mae":
            # It masks the patches with the largest noise, none with mask_ratio 0; rising noise keeps them in order.
            patches = self.model.embeddings.patch_embeddings.num_patches
            settings["noise"] = torch.arange(patches, device=pixels.device, dtype=torch.float32).expand(len(pixels), -1)
        return self.model(pixel_values=pixels, **settings)

    @property
    def kind(self) -> str:
        """The family, as the library names it."""
        return str(self.model.config.model_type)

    @property
    def depth(self) -> int:
        """The number of the ViT's blocks; 0 of other families."""
        return int(self.model.config.num_hidden_layers) if self.kind in TOKENS else 0

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.kind in TOKENS - SIGLIP

    def select(self, spec: str, parts: tuple[Part, ...]) -> None:
        """Give these parts from now on. Raises `TowerError` where the model's family is none of TOKENS."""
        if self.kind not in TOKENS:
            raise TowerError(f"{spec!r} gives no tokens and no outputs of its layers ({self.kind}): use its timm twin")
        super().select(spec, parts)

    def outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Tokens [B, N, W], the last norm applied."""
        output = self._run(pixels, output_hidden_states=True)
        inner = getattr(self.model, "vision_model", self.model)
        norm = next(getattr(inner, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(inner, name))
        last = norm(output.last_hidden_state) if self.kind in CLIP else output.last_hidden_state
        hidden = output.hidden_states  # the embeddings, then each block's
        return {layer: last if layer in (OUTPUT, self.depth) else norm(hidden[layer]) for layer in layers}

    def pooled(self, output: Tensor, layer: int) -> Tensor:
        """As the model pools."""
        pooled = output[:, 0]
        if self.kind in SIGLIP:
            pooled = getattr(self.model, "vision_model", self.model).head(output)
        elif self.pooling == "projection":
            pooled = self.model.visual_projection(pooled)
        return pooled

    def mean(self, output: Tensor, layer: int) -> Tensor:
        """The mean over the patches, without class token and registers."""
        before = {"deit": 2} | dict.fromkeys(SIGLIP, 0)
        return output[:, before.get(self.kind, 1) + getattr(self.model.config, "num_register_tokens", 0) :].mean(1)


def hf_tower(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """The tower of `hf:NAME_OR_FOLDER`; `?projection=no` gives CLIP's features before its projection."""
    from transformers import AutoConfig, AutoImageProcessor

    random = random_asked(spec, options)
    projected = options.pop("projection", "yes")
    no_more(spec, options, ["init", "projection"])
    check_pointers(Path(name))
    try:
        config = AutoConfig.from_pretrained(name)
        kind = config.model_type
        if projected not in ("yes", "no") or (projected == "no" and kind not in CLIP):
            raise TowerError(f"{spec!r} has projection={projected}: it is yes or no, and for CLIP models only")
        model_class, config, extra = _vision_half(name, config, projected == "yes")
        with quiet_transformers():
            if random:
                make = getattr(model_class, "from_config", None) or model_class._from_config
                model, report = make(config, dtype=torch.float32, **extra), None
            else:
                model, report = model_class.from_pretrained(
                    name, config=config, output_loading_info=True, dtype=torch.float32, **extra
                )
            processor = AutoImageProcessor.from_pretrained(name)
    except TowerError:
        raise
    except Exception as why:
        raise TowerError(reason(f"the image tower {spec!r} can't be loaded", why)) from why
    if report is not None:
        _check_complete(name, report, kind)
        check_finite(spec, model)
    pooling = hf_pooling(model, kind)
    preprocess = HfPreprocess(processor)
    network = HfNetwork(model.eval(), pooling)
    _check_processor(name, preprocess, network)
    return ImageTower(
        spec,
        network,
        preprocess,
        description=preprocess.describe(),
        weights=weights_hash(model),
        pooling=pooling,
    )


def _check_processor(name: str, preprocess: HfPreprocess, network: HfNetwork) -> None:
    """Raise `TowerError` where the model does not take what its own processor gives."""
    pixels = torch.from_numpy(preprocess(Image.new("RGB", (64, 64))))[None]
    try:
        with torch.inference_mode():
            network(pixels)
    except Exception as why:
        given = "×".join(map(str, pixels.shape[1:]))
        raise TowerError(
            reason(f"{name}: its preprocessor_config.json gives pixels {given}, which its model does not take", why)
        ) from None


def _vision_half(name: str, config: Any, projected: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The class, config and further arguments to load a vision model, or the vision half of a two-tower model."""
    import transformers

    kind = config.model_type
    if kind in CLIP:
        vision = getattr(config, "vision_config", config)
        vision.projection_dim = config.projection_dim  # the weights have the size of the two-tower config
        return transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel, vision, {}
    if kind in SIGLIP:
        return transformers.SiglipVisionModel, getattr(config, "vision_config", config), {}
    if hasattr(config, "vision_config") or kind.startswith("siglip2"):
        raise TowerError(
            f"litune does not read the vision half of {kind} models ({name}), only of clip and siglip: "
            "use its timm twin, or python:"
        )
    if kind == "vit_mae":
        config.mask_ratio = 0.0
    # No pooler for models whose CLS token is used: a missing one would be initialised at random.
    extra = {"add_pooling_layer": False} if kind in ("vit", "deit") else {}
    return transformers.AutoModel, config, extra


def _check_complete(name: str, report: dict[str, Any], kind: str) -> None:
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if mismatched:
        raise TowerError(f"{name} has weights of other shapes than its config says, {mismatched[0]!r} first")
    missing = sorted(report["missing_keys"])
    if missing:
        hint = "; ?projection=no does without it" if kind in CLIP and missing == ["visual_projection.weight"] else ""
        raise TowerError(f"{name} lacks {len(missing)} of the tower's weights, {missing[0]!r} first{hint}")


def hf_pooling(model: Any, kind: str) -> str:
    """How the features of a model of this kind are pooled: projection, pooler or first token."""
    if kind in FIRST_TOKEN:
        return "first token"
    if type(model).__name__.endswith("WithProjection"):
        return "projection"
    if kind in SIGLIP and not getattr(model.config, "vision_use_head", True):
        raise TowerError("this SigLIP model has no attention head to pool with (vision_use_head)")
    pools = kind in OWN_POOLER or any(hasattr(model, part) for part in ("pooler", "pool"))
    if not pools:
        raise TowerError(f"litune does not know how {kind} pools its features yet: use its timm twin, or python:")
    return "pooler"
