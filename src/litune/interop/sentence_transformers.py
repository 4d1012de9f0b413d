"""A run as a folder that `sentence_transformers.SentenceTransformer(FOLDER)` loads; `encode` takes texts and pictures.

It consists of the library's own modules: a router by modality, and on each side a transformer, a dense layer and the
normalisation. The folder contains no code.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from litune.errors import ExportError, MissingExtraError
from litune.files import write_text
from litune.interop.fold import Affine, image_affine, text_affine
from litune.interop.hf import save_vision
from litune.interop.samples import compare
from litune.interop.tokenizer import save_tokenizer
from litune.model.card import card
from litune.model.lit import LiT
from litune.text.registry import HfTextTower
from litune.towers.quiet import quiet_transformers

_POOLINGS = {"first": "cls", "mean": "mean", "last": "lasttoken"}
TARGET = "sentence-transformers"


def export_sentence_transformers(model: LiT, run: Path, folder: Path) -> dict[str, Any]:
    """Write the folder and a model card; returns the largest differences from the run's features.

    Supported are hf: text towers and timm: and hf: image towers, with linear heads or none. Raises `ExportError` for
    others, or where features differ; `MissingExtraError` without the package.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library warns about its own imports
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.base.modules import Router
    except ImportError:
        raise MissingExtraError("the export to sentence-transformers", TARGET, TARGET) from None
    with tempfile.TemporaryDirectory() as parts, quiet_transformers():
        sides = {"text": _text_side(model, Path(parts) / "text"), "image": _image_side(model, Path(parts) / "image")}
        SentenceTransformer(modules=[Router(sides, default_route="text")], device="cpu").save(
            str(folder), create_model_card=False
        )
    with quiet_transformers():
        loaded = SentenceTransformer(str(folder), device="cpu")

    def images(pictures: list[Image.Image]) -> Float[Tensor, "B D"]:
        return _encode(loaded, pictures)

    def texts(batch: Sequence[str]) -> Float[Tensor, "N D"]:
        return _encode(loaded, list(batch))

    differences = compare(TARGET, model, images=images, texts=texts)
    write_text(folder / "README.md", card(run, library=TARGET, use=_use(folder.name)))
    return {"largest_difference": differences}


def _encode(loaded: Any, inputs: Sequence[Any]) -> Tensor:
    features: Tensor = loaded.encode(inputs, convert_to_tensor=True, show_progress_bar=False)
    return features


def _use(name: str) -> str:
    return (
        "```python\nfrom PIL import Image\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("{name}")\n'
        'images = model.encode([Image.open("photo.jpg").convert("RGB")])  # the processor takes RGB alone\n'
        'texts = model.encode(["a dog", "a bicycle"])\n'
        "scores = images @ texts.T  # cosines: all features have length one\n```"
    )


def _text_side(model: LiT, folder: Path) -> list[Any]:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    tower = model.text
    if not isinstance(tower, HfTextTower):
        kind = tower.architecture.get("kind")
        raise ExportError(f"{TARGET} takes hf: text towers, not {kind}: export to onnx instead")
    tower.model.save_pretrained(folder)
    save_tokenizer(folder, model.tokenizer)
    body = Transformer(str(folder), max_seq_length=model.tokenizer.max_tokens)
    return [body, Pooling(tower.width, _POOLINGS[tower.pooling]), *_projection(text_affine(model, TARGET))]


def _image_side(model: LiT, folder: Path) -> list[Any]:
    from sentence_transformers.base.modules import Transformer

    affine = image_affine(model, TARGET)
    save_vision(model.load_image_tower(), folder, TARGET)
    pooled = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
    body = Transformer(str(folder), modality_config=pooled, module_output_name="sentence_embedding")
    return [body, *_projection(affine)]


def _projection(affine: Affine) -> list[Any]:
    from sentence_transformers.base.modules import Dense, Normalize

    weight, bias = (part.float() for part in affine)
    dense = Dense(weight.shape[1], weight.shape[0], True, None, weight.contiguous(), bias)
    return [dense, Normalize()]
