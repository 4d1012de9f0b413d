"""Tensors on disk: as they were, and each once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from litune.config import TuneConfig
from litune.errors import RunError
from litune.files import read_json, replace_folder
from litune.model.run_folder import MANIFEST, load, load_tensors, save_model, save_tensors
from litune.tuning.tune import tune


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


def test_a_run_that_is_replaced_can_be_read_at_every_moment(tune_config: TuneConfig, tmp_path: Path) -> None:
    """As `best/` while tuning goes on: each model that a reader finds is one that was written, and none is older."""
    model = tune.run(replace(tune_config, duration="2steps", evaluations=0))
    manifest = read_json(tune_config.out / MANIFEST, RunError)
    best, new, seen, done = tmp_path / "best", tmp_path / "best.tmp", [], threading.Event()

    def write(number: int) -> None:
        new.mkdir()
        model.logit_scale.data.fill_(number)
        save_model(new, model, manifest)
        replace_folder(new, best, last=MANIFEST)

    def read() -> None:
        while not done.is_set():
            seen.append(load(best, device="cpu").logit_scale.item())
        seen.append(load(best, device="cpu").logit_scale.item())

    write(0)
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        for number in range(1, 30):
            write(number)
        done.set()
        reader.result()
    assert len(set(seen)) > 2
    assert set(seen) <= set(range(30))
    assert seen == sorted(seen)
    assert seen[-1] == 29


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
