"""Sample pictures and texts on which every export is compared with its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from litune.errors import ExportError
from litune.model.lit import LiT

TOLERANCE = 1e-5
"""The largest absolute difference in a feature's entries that is accepted, in float32."""

TEXTS = (
    "a photo of a dog",
    "Two RED bicycles, leaning against a wall.",
    "ein Bär",
    "crème brûlée à la carte",
    "北京的冬天",
    "Привет, мир",
    "🦊 in the snow",
    "x",
    "a very long caption that says far more than most text towers ever read of a caption, " * 8,
)


def pictures() -> list[Image.Image]:
    """Noise, a drawing and a gradient, of several sizes."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((240, 320), (97, 64))]
    drawing = Image.new("RGB", (300, 260), "white")
    pen = ImageDraw.Draw(drawing)
    pen.ellipse((40, 30, 200, 190), fill=(220, 40, 40))
    pen.rectangle((150, 120, 290, 250), fill=(30, 90, 200))
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    gradient = Image.fromarray(np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256))] * 2, -1)[..., :3])
    return [*noise, drawing, gradient]


def compare(
    what: str,
    model: LiT,
    *,
    images: Callable[[list[Image.Image]], Float[Tensor, "B D"]] | None = None,
    texts: Callable[[Sequence[str]], Float[Tensor, "N D"]] | None = None,
) -> dict[str, float]:
    """The largest differences between the run's features and the export's, per side.

    Raises `ExportError` where one exceeds `TOLERANCE`.
    """
    differences = {}
    if images is not None:
        differences["images"] = _difference(model.encode_image(pictures()), images(pictures()))
    if texts is not None:
        differences["texts"] = _difference(model.encode_text(TEXTS), texts(TEXTS))
    for side, difference in differences.items():
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the features of {side} in the {what} export differ from the run's by {difference:.1e}, "
                f"more than {TOLERANCE:.0e}: it was removed; export to onnx instead, or report it"
            )
    return differences


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not theirs.isfinite().all():
        return float("inf")
    return float((ours.double() - theirs.detach().cpu().double()).abs().max())


def target_length(features: Tensor) -> Tensor:
    """Features divided by their length, without an epsilon, as most libraries do."""
    return torch.nn.functional.normalize(features, dim=-1)
