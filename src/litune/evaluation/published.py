"""Published figures to stand beside one's own, in percent as printed.

Sources: LiT (arXiv 2111.07991; v3 unless it says v1), CLIP (2103.00020) and ALIGN (2102.05918) as the LiT paper cites
them. Keys are a task's name and figure; a table shows the columns that the user's tasks have.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row: a model, where its figures are printed, and the figures by column."""

    name: str
    source: str
    figures: dict[str, float]


COLUMNS = {
    "imagenet": "ImageNet",
    "imagenet_v2": "ImageNet-v2",
    "imagenet_r": "ImageNet-R",
    "imagenet_a": "ImageNet-A",
    "objectnet": "ObjectNet",
    "imagenet_real": "ImageNet-ReaL",
    "vtab_natural": "VTAB natural (mean of 7)",
    "coco image_to_text": "COCO image→text R@1",
    "coco text_to_image": "COCO text→image R@1",
}
"""Column → what it is called."""

_KEYS = tuple(COLUMNS)
_LIT = "LiT, arXiv 2111.07991"


def _row(name: str, source: str, *figures: float | None) -> Published:
    return Published(name, source, {key: f for key, f in zip(_KEYS, figures, strict=False) if f is not None})


PUBLISHED: tuple[Published, ...] = (
    _row("LiT g/14, private 4B pairs", f"{_LIT} v3", 85.2, 79.8, 94.9, 81.8, 82.5, 88.6, 74.7, 59.3, 41.9),
    _row("LiT g/14, as first published", f"{_LIT} v1", 84.5, 78.7, 93.9, 79.4, 81.1, 88.0, 72.6),
    _row("LiT L/16, public CC12M + YFCC", f"{_LIT} v3", 75.7, 66.6, 60.4, 37.8, 54.5, 82.1, 63.1, 48.5, 31.2),
    _row("CLIP", "arXiv 2103.00020", 76.2, 70.1, 88.9, 77.2, 72.3),
    _row("ALIGN", "arXiv 2102.05918", 76.4, 70.1, 92.2, 75.8),
)

_NAMES = {
    "imagenet": ("imagenet", "imagenet1k", "imagenet-1k", "in1k", "ilsvrc2012"),
    "imagenet_v2": ("imagenetv2", "imagenet-v2"),
    "imagenet_r": ("imagenet-r", "imagenetr"),
    "imagenet_a": ("imagenet-a", "imageneta"),
    "objectnet": ("objectnet",),
    "imagenet_real": ("imagenet-real", "imagenetreal", "real"),
    "vtab_natural": ("vtab-natural",),
    "coco": ("coco", "coco-karpathy", "coco-5k", "mscoco"),
}


def column(task: str, figure: str) -> str | None:
    """The column of a task's figure; None where none is published.

    >>> column("imagenet1k", "accuracy"), column("coco", "text_to_image recall@1"), column("coco", "accuracy")
    ('imagenet', 'coco text_to_image', None)
    """
    name = task.lower().replace("_", "-")
    found = next((key for key, names in _NAMES.items() if name in names), None)
    if found == "coco":
        return f"coco {figure.split()[0]}" if figure.endswith("recall@1") else None
    return found if figure == "accuracy" else None
