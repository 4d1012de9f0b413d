"""SentencePiece models against the sentencepiece library, on emoji names in many scripts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from litune.errors import MissingExtraError, TowerError
from litune.text.sentencepiece import SentencePiece, convert
from litune.text.tokenizers import Tokenizer, find_tokenizer, load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece models need the extra sentencepiece")

LANGUAGES = ("en", "de", "es", "fr", "ja", "ko", "pt", "it", "fa", "zh", "ru", "tr", "ar")
ODD = [
    "",
    " ",
    "  two  leading and    many   spaces ",
    "tab\tnew\nline\u00a0no-break\u3000wide\u200bzero",
    "ﬁne ½ ㎏ ① Ａｂｃ １２３ ﷺ",
    "e\u0301te\u0301 n\u0303",
    "हिन्दी में பூனை แมวสีดำ",
    "🙂👩\u200d👩\u200d👧 unknown 𓀀𓀁 signs",
    "no_such-punctuation… “quotes” ‘and’ — dashes",
]
# Normalised by longest match; the tokenizers library goes by what is drawn as one letter.
RARE = ["ｶﾞｷﾞｸﾞ", "\u1112\u1161\u11ab", "Ａ\u0301", "</s> <pad> <unk> spelled out"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    emoji = pytest.importorskip("emoji", reason="its names in many languages are the texts (extra quickstart)")
    emoji.config.load_language(list(LANGUAGES))
    names = [found[lang] for found in emoji.EMOJI_DATA.values() for lang in LANGUAGES if lang in found]
    plain = sorted({name.strip(":").replace("_", " ") for name in names})
    return [text for text in plain if len(text) < 60][::8]


def train(texts: list[str], **settings: object) -> bytes:
    out = io.BytesIO()
    options = {
        "vocab_size": 1500, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False,
        "character_coverage": 0.995, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, **(options | settings))
    return out.getvalue()


@pytest.fixture(scope="module")
def unigram(texts: list[str]) -> bytes:
    return train(texts)


def test_ids_are_the_librarys(texts: list[str], unigram: bytes, tmp_path: Path) -> None:
    """Through a run folder's files, laid out with a sticky end token."""
    (tmp_path / "vocab.model").write_bytes(unigram)
    backend = find_tokenizer(str(tmp_path / "vocab.model"))
    assert isinstance(backend, SentencePiece)
    (tmp_path / "run").mkdir()
    Tokenizer(backend, "sticky_eos", 8).save(tmp_path / "run" / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json", "sticky_eos", 8)
    library = sentencepiece.SentencePieceProcessor(model_proto=unigram)
    asked = [*texts, *ODD, *RARE]
    assert len(asked) > 5000
    rows = tokenizer(asked)
    assert rows.lengths.tolist() == [8] * len(asked)
    expected = [ids[:7] + [1] * (8 - len(ids[:7])) for ids in library.encode(asked)]
    assert np.array_equal(rows.ids.reshape(-1, 8), np.array(expected))
    assert tokenizer.vocab_size == library.vocab_size()
    folder = find_tokenizer(str(tmp_path / "run"))
    assert isinstance(folder, SentencePiece), "a folder with both has the model itself"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"byte_fallback": True},
        {"model_type": "bpe"},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc_cf"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_tokenizer_json_agrees(texts: list[str], settings: dict[str, object]) -> None:
    """What other tools read gives the same ids on thousands of texts."""
    model = train(texts, **settings)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    written = tokenizers.Tokenizer.from_str(convert(model, "it").to_str())
    asked = [*texts, *ODD]
    found = [one.ids for one in written.encode_batch_fast(asked, add_special_tokens=False)]
    assert found == library.encode(asked)


def test_other_kinds_are_refused(texts: list[str]) -> None:
    model = train(["a b c d e f g"] * 20, model_type="word", vocab_size=10)
    with pytest.raises(TowerError, match="kind 3: only unigram and BPE"):
        convert(model, "it")


def test_damaged_models(unigram: bytes, tmp_path: Path) -> None:
    for content in (b"", b"no model", unigram[: len(unigram) // 2], json.dumps({"a": 1}).encode()):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(TowerError, match=r"bad.model is no SentencePiece model") as caught:
            find_tokenizer(str(tmp_path / "bad.model"))
        assert "\n" not in str(caught.value)
        with pytest.raises(TowerError, match="no SentencePiece model|kind"):
            convert(content + b"\x0a\xff", "it")


def test_without_the_library(unigram: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtraError, match=r"litune\[sentencepiece\]"):
        SentencePiece(unigram)
