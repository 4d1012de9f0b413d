"""Runs in sentence-transformers, loaded without code of ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library = pytest.importorskip("sentence_transformers", reason="needs the extra sentence-transformers")

import litune
from litune.errors import ExportError
from litune.interop.export import export
from litune.interop.samples import TEXTS, pictures

from .conftest import MakeRun


@pytest.mark.parametrize(
    ("image", "settings"),
    [
        ("timm:resnet10t?size=64&init=random", {"pooling": "mean", "image_map": "whiten"}),
        ("timm:test_vit?init=random", {"pooling": "first", "image_head": "linear", "dim": 24}),
        ("timm:test_vit?size=64&init=random", {"pooling": "last"}),
    ],
)
def test_texts_and_pictures(make_run: MakeRun, image: str, settings: dict[str, Any]) -> None:
    run = make_run(image=image, **settings)
    about = export(run, to="sentence-transformers", out=run / "x")
    model, loaded = litune.load(run, device="cpu"), library.SentenceTransformer(about["folder"], device="cpu")
    np.testing.assert_allclose(loaded.encode(list(TEXTS)), model.encode_text(TEXTS).numpy(), atol=1e-5)
    np.testing.assert_allclose(loaded.encode(pictures()), model.encode_image(pictures()).numpy(), atol=1e-5)
    assert "SentenceTransformer(" in (Path(about["folder"]) / "README.md").read_text()
    assert not list(Path(about["folder"]).rglob("*.py"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"text": "vit:Ti"}, "takes hf: text towers, not vit"), ({"text_head": "mlp"}, "no text head of several layers")],
)
def test_what_it_has_not(make_run: MakeRun, settings: dict[str, Any], message: str) -> None:
    run = make_run(**settings)
    with pytest.raises(ExportError, match=message):
        export(run, to="sentence-transformers", out=run / "x")
    assert not (run / "x").exists()
