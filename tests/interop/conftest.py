"""Tiny runs of several architectures, random weights, written as `litune tune` writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch

from litune.config import TuneConfig, to_json
from litune.files import write_json
from litune.image.registry import load_image_tower, weights_hash
from litune.interop.samples import TEXTS
from litune.model.build import output_width
from litune.model.heads import make_head
from litune.model.lit import LiT
from litune.model.run_folder import CONFIG, save_model
from litune.text.registry import VIT_SIZES, make_text_tower, parse_text_spec, text_layout
from litune.text.tokenizers import Tokenizer, find_tokenizer, train_tokenizer

MakeRun = Callable[..., Path]
_resolve = timm.data.resolve_model_data_config


def _cropping(crop_pct: float, model: Any) -> dict[str, Any]:
    return _resolve(model) | {"crop_pct": crop_pct}


@pytest.fixture
def make_run(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Writes a run folder: towers, pooling, heads and image map as asked."""
    return run_maker(tiny_bert, tmp_path, monkeypatch)


def run_maker(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """`make_run` in a folder of one's own."""
    monkeypatch.setitem(VIT_SIZES, "Ti", (32, 2, 64, 4))

    def make(
        name: str = "run",
        *,
        image: str = "timm:resnet10t?size=64&init=random",
        text: str | None = None,
        pooling: str = "auto",
        image_map: str = "center",
        image_head: str = "none",
        text_head: str = "linear",
        dim: int | None = None,
        bias: float | None = None,
        crop_pct: float | None = None,
    ) -> Path:
        torch.manual_seed(0)
        spec = parse_text_spec(text or f"hf:{tiny_bert}")
        backend = find_tokenizer(spec.tokenizer) if spec.tokenizer else train_tokenizer(TEXTS, 120)
        tokenizer = Tokenizer(backend, text_layout(spec), 16)
        text_tower = make_text_tower(spec, vocab_size=tokenizer.vocab_size, max_tokens=16, pooling=pooling)
        if crop_pct is not None:
            monkeypatch.setattr(timm.data, "resolve_model_data_config", partial(_cropping, crop_pct))
        tower = load_image_tower(image)
        width = output_width(tower)
        dim = dim or width
        model = LiT(
            text_tower,
            make_head(text_head, text_tower.width, dim),
            make_head(image_head, width, dim),
            tokenizer,
            image_width=width,
            dim=dim,
            logit_scale=2.0,
            logit_bias=bias,
            image_map=image_map,
            image_provenance=tower.provenance | {"weights": weights_hash(tower)},
            image=tower,
        )
        with torch.no_grad():
            for parameter in model.parameters():  # biases and gains other than at their start
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if image_map != "none":
                model.center.copy_(torch.randn(width) * 0.1)
            if model.whitening is not None:
                model.whitening.add_(torch.randn(width, width), alpha=0.05)
        model.image_provenance = tower.provenance | {"weights": weights_hash(tower)}
        out = tmp_path / name
        out.mkdir()
        config: dict[str, Any] = to_json(TuneConfig(store=tmp_path / "store", text_tower=spec.spec, out=out))
        write_json(out / CONFIG, config)
        manifest = {"complete": True, "text_tower": spec.spec, "steps": 3, "pairs_seen": 18, "seed": 0}
        save_model(out, model.eval(), manifest)
        return out

    return make
