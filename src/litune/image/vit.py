"""The Vision Transformers of LiT's released models, as image towers without pre-trained weights."""

from __future__ import annotations

from functools import partial

from torch import nn

from litune.errors import TowerError
from litune.image.timm import with_timm_config
from litune.image.tower import ImageTower
from litune.towers.specs import no_more, random_asked, size_asked
from litune.towers.vit import check_vit_size, vit_size


def vit_tower(spec: str, name: str, options: dict[str, str]) -> ImageTower:
    """`vit:B/16?init=random`: the official Vision Transformer (size/patch), without pre-trained weights.

    CLS token after the last LayerNorm (epsilon 1e-6), tanh GELU, the preprocessing of LiT's released models.
    """
    from timm.models.vision_transformer import VisionTransformer

    random, size = random_asked(spec, options), size_asked(spec, options) or (224, 224)
    no_more(spec, options, ["init", "size"])
    if not random:
        raise TowerError(f"{spec!r} has no weights of its own: add ?init=random, or name a run that has (run:RUN)")
    size_name, slash, patch = name.partition("/")
    if not slash or not patch.isdecimal() or int(patch) < 1:
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
    config = {
        "input_size": (3, *size),
        "mean": (0.5, 0.5, 0.5),  # value / 127.5 − 1
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "tensorflow",
    }
    return with_timm_config(spec, model, config, None)
