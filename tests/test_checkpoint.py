"""Tensors on disk: as they were, and each once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from litune.checkpoint import Unfilled, load_tensors, save_tensors


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    table = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "encoder.table": table,
        "shared": table,
        "row": table[0],
        "equal": table.clone(),
        "none": torch.empty(0),
        "nothing": torch.empty(0),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": 3})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["encoder.table", "equal", "none", "nothing", "row"]
    found, facts = load_tensors(tmp_path / "a.safetensors")
    assert facts == {"step": 3}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name


def test_a_t5_run_has_its_token_table_once(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    save_tensors(tmp_path / "t5.safetensors", model.state_dict(), {})
    with safe_open(tmp_path / "t5.safetensors", framework="pt") as file:
        assert sum("embed_tokens" in name or "shared" in name for name in file.keys()) == 1  # noqa: SIM118
    again = T5EncoderModel(model.config)
    again.load_state_dict(load_tensors(tmp_path / "t5.safetensors")[0], strict=True)
    assert torch.equal(again.shared.weight, model.shared.weight)


@pytest.mark.parametrize("kind", ["vit", "bert", "image"])
def test_unfilled_towers_draw_nothing_and_are_the_same_when_filled(kind: str) -> None:
    """All that is no weight (tables of positions, masks, settings) is computed as ever: outputs are equal."""
    from litune.data.tokenizers import Tokens
    from litune.towers.image import load_image_tower
    from litune.towers.packing import pack
    from litune.towers.text import build_text_tower

    bert = {"model_type": "bert", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = {"kind": "vit", "size": "Ti", "vocab_size": 50, "max_tokens": 4, "pooling": "last"}

    def build() -> torch.nn.Module:
        if kind == "image":
            return load_image_tower("timm:vit_tiny_patch16_224?init=random&size=32")
        return build_text_tower(vit if kind == "vit" else {"kind": "hf", "config": bert, "pooling": "first"}).eval()

    def features(tower: torch.nn.Module) -> torch.Tensor:
        if kind == "image":
            return tower(torch.ones(1, 3, 32, 32, dtype=torch.uint8))
        tokens = Tokens(torch.tensor([5, 6, 7, 1]).numpy(), torch.tensor([4]).numpy())
        return tower(pack(tokens, torch.device("cpu")))

    before = torch.get_rng_state()
    with Unfilled():
        empty = build()
    assert torch.equal(torch.get_rng_state(), before)
    drawn = build()
    assert not torch.equal(torch.get_rng_state(), before)
    empty.load_state_dict(drawn.state_dict())
    with torch.no_grad():
        assert torch.equal(features(empty), features(drawn))
    assert [name for name, _ in empty.named_buffers()] == [name for name, _ in drawn.named_buffers()]
