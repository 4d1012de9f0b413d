"""Tensors on disk: as they were, and each once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from litune.checkpoint import load_tensors, save_tensors


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
