"""litune against the original implementations, by files that these wrote.

scripts/make_golden.py made them with tensorflow 2.21.0, tensorflow_text 2.21.1, optax 0.2.8, jax 0.10.2 and flax
0.12.8, and by big_vision's own text (each file says by which); what was asked of them is in cases.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.golden.cases import (
    CASES,
    NAMES,
    SHAPES,
    STEPS,
    TEMPLATES,
    TEXTS,
    WARMUP,
    WIDTHS,
    gradient,
    picture,
    shots_data,
    small_release,
    start,
    sums,
    token_ids,
)
from tests.interop.released import Reference, write
from torch import nn

from litune.evaluation import probes
from litune.image.pictures import resize_tensorflow
from litune.interop import web
from litune.interop.official import Checkpoint, read_model
from litune.interop.tokenizer import plain_tokenizer
from litune.model.lit import LiT
from litune.prompts import write_prompts
from litune.schedules import rate_share
from litune.text.sentencepiece import SentencePiece
from litune.text.tokenizers import Tokenizer, Tokens, wordpiece
from litune.tuning.optim import make_optimizer, parameter_groups, set_rate

HERE = Path(__file__).parent


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


@pytest.fixture
def released_wordpiece(tmp_path: Path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(golden("wordpiece.json")["vocabulary"]) + "\n", encoding="utf-8")
    return Tokenizer(wordpiece(tmp_path / "vocab.txt"), "bert", 512)


def rows_of(tokens: Tokens) -> list[list[int]]:
    return [row.tolist() for row in np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])]


def test_wordpiece(released_wordpiece: Tokenizer) -> None:
    """tensorflow_text's BertTokenizer, with which the released models were trained, on many scripts."""
    expected = [[2, *ids] for ids in golden("wordpiece.json")["ids"]]
    for text, ids, theirs in zip(TEXTS, rows_of(released_wordpiece(TEXTS)), expected, strict=True):
        assert ids == theirs, ascii(text)


def test_wordpiece_in_the_exports(released_wordpiece: Tokenizer) -> None:
    """The tokenizer.json that is exported, in Python and in the page's JavaScript."""
    expected = [[2, *ids] for ids in golden("wordpiece.json")["ids"]]
    exported = plain_tokenizer(released_wordpiece)
    exported.no_padding()
    assert [one.ids for one in exported.encode_batch(TEXTS)] == expected
    config = json.loads(exported.to_str())
    web.check_tokenizer(config)
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    assert web.browser_ids(Path(str(resources.files("litune") / "interop" / "web")), config, TEXTS) == expected


def test_pieces() -> None:
    """tensorflow_text's SentencepieceTokenizer, also where two segmentations are equally probable ("...")."""
    library = pytest.importorskip("sentencepiece", reason="SentencePiece models need the extra sentencepiece")
    if tuple(int(n) for n in library.__version__.split(".")[:3]) >= (0, 2, 2):
        pytest.skip("sentencepiece 0.2.2 and later decide ties otherwise; the extra sentencepiece asks for older ones")
    made = golden("pieces.json")
    tokenizer = Tokenizer(SentencePiece(base64.b64decode(made["model"])), "sticky_eos", made["max_tokens"])
    assert rows_of(tokenizer(made["texts"])) == made["ids"]


def prompts_by_big_vision() -> list[str]:
    """As its evaluator joins them: what stands before the template's {}, the name, what stands behind it."""
    made = golden("prompts.json")
    ends = [template.split("{}") for template in made["templates"]]
    return [f"{before}{name}{after}" for name in made["names"] for before, after in ends]


def test_prompts() -> None:
    """Class names in templates, both canonicalised by big_vision's zero-shot evaluator."""
    assert write_prompts(NAMES, TEMPLATES) == prompts_by_big_vision()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_prompts_in_the_browser(tmp_path: Path) -> None:
    """The same prompts by the exported page's JavaScript."""
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(str(resources.files("litune") / "interop" / "web" / "prompts.js"), tmp_path)
    (tmp_path / "run.js").write_text(
        'import fs from "node:fs"; import { writePrompts } from "./prompts.js";\n'
        "const { names, templates } = JSON.parse(fs.readFileSync(0));\n"
        "console.log(JSON.stringify(writePrompts(names, templates)));"
    )
    asked = json.dumps({"names": NAMES, "templates": TEMPLATES})
    ran = subprocess.run(["node", "run.js"], cwd=tmp_path, input=asked, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == prompts_by_big_vision()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}x{case[1]}to{case[2]}")
def test_resize(case: tuple[int, int, int]) -> None:
    """tf.image.resize and tf.cast, bit for bit."""
    height, width, size = case
    scaled = resize_tensorflow(Image.fromarray(picture(height, width)), (size, size)).transpose(1, 2, 0)
    digest = hashlib.sha256(np.ascontiguousarray(scaled).tobytes()).hexdigest()
    assert digest == golden("resize.json")["sha256"][f"{height}x{width}to{size}"]


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor"])
def test_optimizers(kind: str) -> None:
    """optax's parts in big_vision's order: clipping, the optimizer, the rate, weight decay, the schedule."""
    parameters = {name: nn.Parameter(torch.tensor(start(name))) for name in SHAPES}
    groups = parameter_groups(parameters.items(), learning_rate=0.01, weight_decay=0.02)
    assert {n for group in groups if group["weight_decay"] for n in group["names"]} == {
        name for name in SHAPES if name.startswith("kernel")
    }
    optimizer = make_optimizer(kind, groups)
    for step in range(STEPS):
        set_rate(optimizer, rate_share(step, STEPS, warmup=WARMUP))
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient(name, step))
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
    for name, theirs in golden("optimizers.json")["moved"][kind].items():
        moved = parameters[name].detach().numpy() - start(name)
        # A sign (Lion) or a bfloat16 (Adafactor) may now and then round the other way.
        np.testing.assert_allclose(sums(moved), theirs, atol=2e-5 * np.abs(moved).mean() + 1e-7, err_msg=name)


@pytest.mark.parametrize("width", WIDTHS)
def test_few_shots(width: int) -> None:
    """big_vision's few-shot evaluator: the same draws of three seeds, and the same accuracies."""
    found = probes.ridge(*shots_data(width), shots=10)
    assert found["by_seed"] == pytest.approx(golden("few_shots.json")["accuracy"][str(width)], abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "pieces"])
def test_released_layout(kind: str, tmp_path: Path) -> None:
    """Features of a small file by flax.linen's layers; the NumPy reference of the other tests agrees with them."""
    values, facts = small_release(kind)
    theirs = {side: np.array(found) for side, found in golden("released.json")["features"][kind].items()}
    ids = token_ids(kind)
    pictures = [picture(*one) for one in facts["pictures"]]
    reference = Reference(values, size=16)
    assert np.abs(reference.image(pictures) - theirs["images"]).max() < 1e-6
    assert np.abs(reference.text(ids) - theirs["texts"]).max() < 1e-6
    model = released_model(write(tmp_path / "LiT.npz", values), tmp_path)
    images = model.encode_image([Image.fromarray(one) for one in pictures]).numpy()
    lengths = (ids != 0).sum(1)
    with torch.no_grad():
        texts = model.text_features(Tokens(ids[ids != 0], lengths)).numpy()
    assert np.abs(images - theirs["images"]).max() < 1e-5
    assert np.abs(texts - theirs["texts"]).max() < 1e-5


def released_model(file: Path, folder: Path) -> LiT:
    (folder / "vocab.txt").write_text("[PAD]\n</s>\n[UNK]\n[CLS]\n", encoding="utf-8")
    return read_model(Checkpoint(file), Tokenizer(wordpiece(folder / "vocab.txt"), "bert", 8))
