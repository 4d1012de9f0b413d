"""The check of a GPU runs on a processor, at its smallest; a part that fails costs that part alone."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from tests.forked import quick_python

ROOT = Path(__file__).parent.parent
PARTS = ("right", "fast:tune-bert", "fast:embed-vit-b", "fast:search", "fast:open_clip")
"""All but those that do the same with another tower."""


def test_runs_on_a_processor() -> None:
    command = [
        quick_python(),
        str(ROOT / "benchmarks" / "gpu_check.py"),
        "--quick",
        "--patience",
        "10",
        "--parts",
        *PARTS,
    ]
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "LITUNE_COMPILE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=variables)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, found["failed"]
    assert found["ran_on"] == "cpu"
    assert found["device"]["cards"] == 0
    assert found["failed"] == []
    parts = found["parts"]
    assert len(parts) == 7
    for one in parts.values():
        assert one["status"] == "ok" or (one["status"] == "skipped" and one["reason"])
        assert one["seconds"] > 0
    assert parts["fast:open_clip"]["status"] == "ok" or "pip install" in parts["fast:open_clip"]["reason"]

    assert parts["right:towers"]["difference_softmax_gradient_float32"] == 0
    assert parts["right:towers"]["difference_softmax_gradient_bfloat16"] > 0
    assert parts["right:run"]["same_seed_same_bytes"] is parts["right:run"]["resumed_same_bytes"] is True
    assert parts["right:ranks"]["difference_run_two_ranks"] < 1e-5
    for figures in (parts["fast:tune-bert"][size] for size in ("32", "64")):
        assert figures["pairs_per_second"] > 0
        assert 11 < figures["tokens_per_caption"] < 13
        assert figures["share_of_matmul"] == pytest.approx(
            figures["teraflops"] / parts["fast:tune-bert"]["matmul_teraflops"]
        )
    assert parts["fast:embed-vit-b"]["share_of_bare"] > 0
    assert parts["fast:embed-vit-b"]["files"] == 16
    assert parts["fast:search"]["same_as_processor"] == 1


@pytest.fixture
def bad_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that go wrong in every way."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad_parts.py").write_text(
        "import os, subprocess, sys, time\n"
        "from bench_gpu_task import SkippedError\n"
        "def crash(task): task.add(first=1); os._exit(3)\n"
        "def hang(task):\n"
        "    inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    task.add(pid=inner.pid); time.sleep(60)\n"
        "def error(task): raise ValueError('no such thing')\n"
        "def wrong(task): task.check('value', float('nan'), 1.0); task.check('other', 0.5, 1.0)\n"
        "def skip(task): raise SkippedError('not installed')\n"
        "def good(task): task.add(value=7); task.require('so', True)\n"
    )


@pytest.mark.usefixtures("bad_parts")
def test_parts_survive_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check
    from bench_gpu_task import SMALL, Task

    names = ("crash", "hang", "error", "wrong", "skip", "good")
    seconds = {name: 5.0 if name == "hang" else 60.0 for name in names}
    parts = {name: gpu_check.Part("bad_parts", name, seconds[name]) for name in names}
    monkeypatch.setattr(gpu_check, "PARTS", gpu_check.PARTS | parts)
    found = gpu_check.check(names, Task(SMALL, "cpu", tmp_path), time.monotonic() + 300)
    assert {name: one["status"] for name, one in found.items()} == {
        "crash": "failed",
        "hang": "failed",
        "error": "failed",
        "wrong": "failed",
        "skip": "skipped",
        "good": "ok",
    }
    assert found["crash"]["first"] == 1  # what came before the crash is there
    assert found["crash"]["reason"] == "its process ended with 3"
    assert found["hang"]["reason"] == "it was not done after 5 s"
    assert not Path(f"/proc/{found['hang']['pid']}/fd").exists() or _is_zombie(found["hang"]["pid"])
    assert found["error"]["reason"] == "ValueError: no such thing"
    assert found["wrong"]["reason"] == "value is nan, at most 1 is right"
    assert found["skip"]["reason"] == "not installed"
    assert (found["good"]["value"], found["good"]["so"], found["good"]["reason"]) == (7, True, None)
    late = gpu_check.check(["good"], Task(SMALL, "cpu", tmp_path), time.monotonic())
    assert (late["good"]["status"], late["good"]["reason"]) == ("skipped", "no time was left")


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and nothing has asked how."""
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_operations_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted product by product for one text of 5 tokens and one of 2, in a tower of 2 layers."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import torch
    from bench_gpu_fast import flops_per_text
    from bench_gpu_task import Shape
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig, BertModel

    shape = Shape(layers=2, width=8, mlp=24, heads=2)
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config._attn_implementation = "eager"
    model = BertModel(config, add_pooling_layer=False)
    counted = 0
    for length in (5, 2):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, length, dtype=torch.long)).last_hidden_state.sum().backward()
        counted += counter.get_total_flops()
    assert flops_per_text(model, torch.tensor([5.0, 2.0]), shape) == counted / 2
