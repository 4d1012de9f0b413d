"""A text tower that two ranks share is the same tower, and neither rank ever holds it whole."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.test_ranks import check_runs, place, torchrun  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_held import Held

from litune import distributed
from litune.config import TuneConfig
from litune.model import build
from litune.sharding import own_part, own_rows, whole_tensor
from litune.text.registry import TextTower, make_text_tower, parse_text_spec
from litune.text.tokenizers import Tokens
from litune.tuning.run import Tuning
from litune.tuning.state import Checkpoints
from litune.tuning.tune import tune

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "lang": ["en"], "duration": "28pairs", "batch_size": 7, "evaluations": 2, "learning_rate": 1e-3,
    "precision": "float32", "device": "cpu", "shard": True, "max_tokens": 8,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "vit": {"text_tower": "vit:Ti", "gradient_checkpointing": True, "micro_batch": 2, "checkpoint_seconds": 0.0},
    # Called once for each length of its texts, of which the ranks have different numbers.
    "t5": {"text_tower": "hf:t5", "optimizer": "lion", "learning_rate": 1e-4},
    "further": {"text_tower": "run:two/t5"},
}
TOWERS = ("vit:Ti", "hf:bert", "hf:bert?init=random", "hf:t5", "hf:modern?init=random")
LAYERS = 12


def work(out: str) -> dict[str, Any]:
    """What is done alike by one process and by each of two."""
    torch.set_num_threads(1)
    for name, settings in RUNS.items():
        tune(**{"store": "store", **COMMON, **settings, "out": f"{out}/{name}"})
    return {}


def shared_tower(spec: str, **settings: Any) -> TextTower:
    parsed = parse_text_spec(spec)
    make = partial(make_text_tower, vocab_size=73, max_tokens=8)
    config = TuneConfig(Path("store"), spec, Path("out"), device="cpu", **settings)
    return build.shared_text_tower(parsed, make, config, None, CPU)


def same_weights(spec: str) -> bool:
    """Whether the rank's rows, and the random numbers that come next, are those of a tower that is not shared."""
    found = []
    for make in (
        partial(make_text_tower, parse_text_spec(spec), vocab_size=73, max_tokens=8),
        partial(shared_tower, spec),
    ):
        torch.manual_seed(5)
        found.append((make(), torch.rand(())))
    (whole, one), (shared, other) = found
    names = [name for name, _ in whole.named_parameters()]
    rows = {name: own_part(shared.get_parameter(name)) for name in names}
    return bool(one == other) and all(
        torch.equal(rows[name], (value := whole.get_parameter(name))[own_rows(len(value))]) for name in names
    )


def bfloat16_differs() -> float:
    """By how much features and gradients differ from those without sharing, relative to their norms, at the worst."""
    from litune.sharding import share
    from litune.text.rows import DrawnRows, without_weights

    make = partial(make_text_tower, parse_text_spec("hf:bert?init=random"), vocab_size=73, max_tokens=8, dropout=0.0)
    tokens = Tokens(np.arange(40), np.full(5, 8))
    torch.manual_seed(5)
    whole = make()
    torch.manual_seed(5)
    drawn = DrawnRows()
    with without_weights(drawn):
        shared = make()
    share(shared, [shared.token_table(), *shared.layers], drawn.rows, CPU, bfloat16=True)
    found = []
    for tower in (whole, shared):
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(tower.pack(tokens, CPU, bfloat16=True))
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        # A softmax does not see what all keys have in common: its gradient is rounding.
        named = ((n, p.grad) for n, p in tower.named_parameters() if p.grad is not None and not n.endswith("key.bias"))
        gradients = {name: whole_tensor(gradient) for name, gradient in named}
        found.append(gradients | {"features": features.detach()})
    return max(float((found[1][name] - one).norm() / one.norm()) for name, one in found[0].items())


def memory() -> dict[str, Any]:
    """Of every phase of a run, the most that a rank held beyond what it had before, as a share of the whole tower."""
    grown: dict[str, list[int]] = {}

    def watch(owner: Any, name: str) -> Callable[[], None]:
        function = getattr(owner, name)

        def watched(*args: Any) -> Any:
            with Held() as held:
                found = function(*args)
            grown.setdefault(name, []).append(held.most)
            return found

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, function)

    places = [(build, "shared_text_tower"), (Tuning, "step"), (Tuning, "_evaluate_and_log"), (Checkpoints, "save")]
    restore = [watch(owner, name) for owner, name in (*places, (Tuning, "finish"))]
    settings = {**COMMON, "batch_size": 4, "duration": "12pairs", "gradient_checkpointing": True}
    model = tune("store", text_tower="hf:large?init=random", out="two/large", checkpoint_seconds=0, **settings)
    for undo in restore:
        undo()
    whole = 4 * sum(parameter.numel() for parameter in model.text.parameters())
    shares = {name: [round(one / whole, 3) for one in found] for name, found in grown.items()}
    own = 4 * sum(own_part(parameter).numel() for parameter in model.text.parameters())
    return shares | {"own": own / whole}


def of_two() -> dict[str, Any]:
    """What only ranks do."""
    accelerator = torch._C._get_accelerator
    torch._C._get_accelerator = lambda *_: torch.device(
        "cuda"
    )  # as on a machine with a GPU, where --device cpu is asked for
    try:
        same = {spec: same_weights(spec) for spec in TOWERS}
    finally:
        torch._C._get_accelerator = accelerator
    table = shared_tower("hf:bert").token_table().weight
    gathered = whole_tensor(table)
    return {
        "same": same,
        "rows": [len(own_part(table)), len(gathered)],
        "bfloat16": bfloat16_differs(),
        "memory": memory(),
    }


@pytest.fixture
def towers(place: Path) -> Path:  # noqa: F811
    """Beside the others: a T5, a ModernBERT and a larger BERT, all with the tiny tokenizer."""
    from transformers import BertConfig, ModernBertConfig, T5Config, T5EncoderModel

    torch.manual_seed(0)
    wide = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 73}
    specials = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    configs = {
        "large": BertConfig(**wide, num_hidden_layers=LAYERS, max_position_embeddings=32),
        "modern": ModernBertConfig(**small, vocab_size=73, **specials),
    }
    t5 = T5Config(vocab_size=73, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    T5EncoderModel(t5).save_pretrained(place / "t5")
    for name, config in configs.items():
        config.save_pretrained(place / name)
    for name in ("t5", *configs):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(place / "bert" / file, place / name)
    return place


def test_two_ranks_share_a_tower(towers: Path) -> None:
    process = torchrun(__file__, cwd=towers)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Warning" not in said
    work("one")
    for name in RUNS:
        assert said.count(f"wrote two/{name}") == 1
        check_runs(towers / "one" / name, towers / "two" / name)
    for rank in range(2):
        found = json.loads((towers / f"rank-{rank}.json").read_text())
        assert found["same"] == dict.fromkeys(TOWERS, True)
        assert found["rows"] == [[37, 36][rank], 73]
        assert found["bfloat16"] < 0.05
        check_memory(found["memory"])


def check_memory(shares: dict[str, Any]) -> None:
    """A rank holds its half, and of the twelve layers two at once, one with its gradient."""
    layer = 1 / LAYERS
    assert shares["own"] == pytest.approx(0.5, abs=0.01)
    assert max(shares["shared_text_tower"]) < 0.5 + layer
    first, *others = shares["step"]
    assert first < 3 * 0.5 + 3 * layer  # gradients, and the moments of Adam
    assert max(others) < 0.5 + 3 * layer
    for phase in ("_evaluate_and_log", "save", "finish"):
        assert max(shares[phase]) < 2.5 * layer, phase


if __name__ == "__main__":
    distributed.start("cpu")
    found = of_two() | work("two")
    Path(f"rank-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.stop()
