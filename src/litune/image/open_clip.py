"""open_clip's image towers: the features of `encode_image` before normalisation, on the library's own preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from litune.errors import MissingExtraError, TowerError, nearest
from litune.image.pictures import cut_thin
from litune.image.tower import ImageTower, weights_hash
from litune.towers.specs import no_more, random_asked, reason


class OpenClipNetwork(nn.Module):
    """The vision half of an open_clip model."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.model = visual

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, W] of preprocessed pictures [B, 3, H, W]."""
        features = self.model(pixels)
        # CoCa's vision half returns (features, tokens).
        pooled: Tensor = features[0] if isinstance(features, tuple) else features
        return pooled


class OpenClipPreprocess:
    """open_clip's inference transform as a preprocessing function: picture to float32 [3, H, W]."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The values that the model takes, normalised."""
        return np.asarray(self.transform(cut_thin(image)), dtype=np.float32)


def open_clip_tower(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """The tower of `open_clip:MODEL/TAG`, or of `open_clip:MODEL?checkpoint=FILE`."""
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("an open_clip: tower", "open_clip_torch", "open-clip") from None
    checkpoint = options.pop("checkpoint", None)
    random = random_asked(spec, options)
    no_more(spec, options, ["checkpoint", "init"])
    if name.startswith(("hf-hub:", "local-dir:")):
        model_name, tag = name, ""
    else:
        model_name, _, tag = name.partition("/")
        if model_name not in open_clip.list_models():
            raise TowerError(f"open_clip has no model {model_name!r}: {nearest(model_name, open_clip.list_models())}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise TowerError(f"the checkpoint {checkpoint} of {spec!r} does not exist")
    if not (checkpoint or tag or random or model_name != name.partition("/")[0]):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)[:6]) or "none"
        raise TowerError(
            f"{spec!r} does not name weights: write open_clip:{model_name}/TAG (there are {tags}) or ?checkpoint=FILE"
        )
    try:
        model: Any = open_clip.create_model(
            model_name,
            pretrained=checkpoint or tag or None,
            load_weights=not random,
            pretrained_image=False,
            pretrained_text=False,
            require_pretrained=not random,
            weights_only=True,
        )
        settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        transform = open_clip.transform.image_transform_v2(settings, is_train=False)
    except Exception as why:
        raise TowerError(reason(f"the image tower {spec!r} can't be loaded", why)) from why
    description = {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(model.visual.preprocess_cfg.items())}
    return ImageTower(
        spec,
        OpenClipNetwork(model.visual),
        OpenClipPreprocess(transform),
        description=description,
        weights=weights_hash(model.visual),
        pooling="projection",
    )
