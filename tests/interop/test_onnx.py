"""Runs in ONNX Runtime, and the documented way to use them without litune."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="the export to ONNX needs the extra export")
ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is of the extra export")
import tokenizers
from tests.conftest import random_store

import litune
from litune.errors import ConfigError, ExportError, OutputExistsError
from litune.evaluation.retrieval import retrieval
from litune.interop import onnx as onnx_export
from litune.interop.export import export
from litune.interop.samples import TEXTS, pictures

from .conftest import MakeRun

GUIDE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.parametrize(
    ("text", "pooling", "image", "settings"),
    [
        (
            None,
            "last",
            "timm:test_vit?init=random",
            {"text_head": "gated", "image_head": "mlp", "dim": 24, "bias": -10.0},
        ),
        ("vit:Ti", "last", "timm:resnet10t?size=64&init=random", {"image_map": "none"}),
        (None, "auto", "timm:test_vit?init=random&features=cls+layers:2,6+views:5+size:64", {}),
    ],
)
def test_any_batch_and_length(
    make_run: MakeRun, text: str | None, pooling: str, image: str, settings: dict[str, object]
) -> None:
    run = make_run(text=text, pooling=pooling, image=image, **settings)
    about = export(run, to="onnx", out=run / "x")
    assert about["bias"] == settings.get("bias")
    model = litune.load(run, device="cpu")
    session = ort.InferenceSession(run / "x" / "text.onnx")
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "x" / "tokenizer.json"))
    for texts in (TEXTS[:1], TEXTS[2:5], TEXTS):
        encoded = tokenizer.encode_batch(list(texts))
        feed = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
        feed = {i.name: np.array(feed[i.name]) for i in session.get_inputs()}
        found = session.run(None, feed)[0]
        np.testing.assert_allclose(found, model.encode_text(texts).numpy(), atol=1e-5)
    tower, session = model.load_image_tower(), ort.InferenceSession(run / "x" / "image.onnx")
    pixels = np.stack([tower.preprocess(p) for p in pictures()]).astype(np.float32)
    for count in (1, 3):
        found = session.run(None, {"pixels": pixels[:count]})[0]
        np.testing.assert_allclose(found, model.encode_image(pictures()[:count]).numpy(), atol=1e-5)


def test_the_documented_way(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the how-to, as it stands there: ONNX Runtime, tokenizers, Pillow and NumPy alone."""
    run = make_run("my-run", pooling="mean", image_map="whiten")
    assert export(run, to="onnx")["folder"] == str(tmp_path / "my-run-onnx")
    pictures()[2].save(tmp_path / "a.png")
    recipe = next(b for b in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "onnxruntime" in b)
    assert "litune" not in re.findall(r"import (\w+)", recipe)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(recipe, "recipe", "exec"), names)
    model = litune.load(run, device="cpu")
    labels = ["a dog", "a bicycle"]
    expected = model.zero_shot(labels, ["{}"])([tmp_path / "a.png"])
    np.testing.assert_allclose(names["probabilities"], expected.numpy(), atol=1e-5)

    # What is there is not overwritten unasked, and what litune did not write never.
    with pytest.raises(OutputExistsError, match="already holds"):
        export(run, to="onnx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputExistsError, match="not empty and not"):
        export(run, to="onnx", out=tmp_path / "mine", overwrite=True)

    # 8-bit integers, with their cost.
    folder, store = tmp_path / "my-run-onnx", random_store(tmp_path / "s", 6, 512, captions=2)
    onnx_export.quantize_text(folder)
    cost = onnx_export.int8_cost(model, folder, store, None)
    assert cost["bytes"]["text.int8.onnx"] < cost["bytes"]["text.onnx"]
    assert (cost["images"], cost["captions"]) == (6, 12)
    exact = retrieval(
        model.encode_features(store.features(range(6))),
        model.encode_text(store.select().captions),
        torch.arange(6).repeat_interleave(2),
    )
    assert cost["recall"]["float32"]["text_to_image"] == exact["text_to_image"]
    assert set(cost["recall"]["int8"]["image_to_text"]) == {"recall@1", "recall@5", "recall@10"}
    assert 0.9 < onnx_export.int8_cost(model, folder, None, None)["cosine"]["least"] < 1


def test_settings() -> None:
    with pytest.raises(ConfigError, match="--int8 is for --to onnx"):
        export("run", to="hf", int8=True)
    with pytest.raises(ConfigError, match="give both"):
        export("run", to="onnx", store="s")


def test_towers_that_are_no_modules(store: litune.FeatureStore, tune_config: object) -> None:
    from litune.tuning.tune import tune

    tune.run(tune_config)
    run = tune_config.out  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="python:colortower:make is no torch module"):
        export(run, to="onnx", out=run / "x")
    assert not (run / "x").exists()
