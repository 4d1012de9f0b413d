"""Published figures to compare with, in percent as printed.

Sources: LiT (arXiv 2111.07991; v3, and v1 where a name says so), CLIP (2103.00020) and ALIGN (2102.05918) as the LiT
paper cites them. The numbers of images are from the sets' papers; for VTAB's natural sets, from VTAB (1910.04867).
"""

from __future__ import annotations

from typing import Any

from litune.evaluation.result import Result

LIT_G, LIT_G1 = "LiT g/14, private 4B (v3)", "LiT g/14, private 4B (v1)"
LIT_L = "LiT L/16, public CC12M+YFCC"
CLIP, ALIGN = "CLIP", "ALIGN"

_COLUMNS = (
    ("imagenet1k", "accuracy"),
    ("imagenet-v2", "accuracy"),
    ("imagenet-r", "accuracy"),
    ("imagenet-a", "accuracy"),
    ("objectnet", "accuracy"),
    ("imagenet-real", "accuracy"),
    ("vtab-natural", "accuracy"),
    ("coco", "image_to_text recall@1"),
    ("coco", "text_to_image recall@1"),
)
_ROWS: dict[str, tuple[float | None, ...]] = {
    LIT_G: (85.2, 79.8, 94.9, 81.8, 82.5, 88.6, 74.7, 59.3, 41.9),
    LIT_G1: (84.5, 78.7, 93.9, 79.4, 81.1, 88.0, 72.6, None, None),
    LIT_L: (75.7, 66.6, 60.4, 37.8, 54.5, 82.1, 63.1, 48.5, 31.2),
    CLIP: (76.2, 70.1, 88.9, 77.2, 72.3, None, None, None, None),
    ALIGN: (76.4, 70.1, 92.2, 75.8, None, None, None, None, None),
}
SYSTEMS = tuple(_ROWS)

IMAGES = {
    "imagenet1k": 50_000, "imagenet-v2": 10_000, "imagenet-r": 30_000, "imagenet-a": 7_500, "objectnet": 18_574,
    "imagenet-real": 46_837, "coco": 5_000,
    "caltech101": 6_084, "cifar100": 10_000, "dtd": 1_880, "flowers102": 6_149, "pets": 3_669, "sun397": 21_750,
    "svhn": 26_032,
}  # fmt: skip
"""Images in the sets that the published figures were measured on."""
CAPTIONS = {"coco": 25_010}
TEMPLATE_SETS = ("lit", "clip")
"""Template sets comparable with the published figures: the set's own templates, with or without the bare name."""


def published(task: str, lang: str = "") -> dict[str, dict[str, float]]:
    """System → figure → percent for one task; empty for languages other than English.

    >>> published("coco")["LiT L/16, public CC12M+YFCC"]
    {'image_to_text recall@1': 48.5, 'text_to_image recall@1': 31.2}
    """
    systems: dict[str, dict[str, float]] = {}
    for system, values in _ROWS.items():
        for (name, figure), value in zip(_COLUMNS, values, strict=True):
            if name == task and lang in ("", "en") and value is not None:
                systems.setdefault(system, {})[figure] = value
    return systems


def published_shares(task: str, lang: str = "") -> dict[str, dict[str, float]]:
    """The same as shares of one, as litune's own figures are."""
    systems = published(task, lang)
    return {system: {name: round(value / 100, 4) for name, value in row.items()} for system, row in systems.items()}


def mismatch(result: Result) -> str:
    """Why a result is not comparable with the figures published on its set, in a few words; "" where it is.

    Compares the numbers of images and captions, and the templates: a part of a set is easier or harder than all of it.
    """
    protocol: dict[str, Any] = result.protocol
    reasons = []
    for what, own, theirs in (
        ("images", result.images, IMAGES.get(result.task)),
        ("captions", len(result.captions), CAPTIONS.get(result.task)),
    ):
        if theirs is not None and own != theirs:
            reasons.append(f"{own:,} {what} here, {theirs:,} there")
    if protocol.get("template_set", "lit") not in TEMPLATE_SETS:
        reasons.append(f"templates here: {protocol['template_set']}, there: the set's")
    if not protocol.get("canonical_names", True):
        reasons.append("class names not canonicalised here")
    return "; ".join(reasons)


def note(result: Result) -> str:
    """One line that says why a result can't be compared with what was published on its set; "" where it can."""
    differs = mismatch(result) if published(result.task, result.lang) else ""
    return f"not comparable with what was published: {differs}" if differs else ""
