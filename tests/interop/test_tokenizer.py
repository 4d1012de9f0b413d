"""A run's tokenizer as transformers loads it: the same ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from litune.errors import ExportError
from litune.interop.samples import TEXTS
from litune.interop.tokenizer import save_tokenizer
from litune.text.tokenizers import Layout, Tokenizer, find_tokenizer, train_tokenizer, wordpiece

MORE = (*TEXTS, "", "a [SEP] in a text", "one two three four five six seven")


def words() -> tokenizers.Tokenizer:
    names = ["<s>", "</s>", "<pad>", "<unk>", *["one", "two", "three", "four", "five", "six", "seven", "eight"]]
    found = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return found


@pytest.mark.parametrize("layout", ["bert", "sticky_eos", "own"])
def test_the_same_ids(layout: Layout, tiny_bert: Path, tmp_path: Path) -> None:
    backends = {
        "bert": find_tokenizer(str(tiny_bert)),
        "sticky_eos": train_tokenizer(TEXTS, 100),
        "own": words(),
    }
    ours = Tokenizer(backends[layout], layout, 6)
    save_tokenizer(tmp_path, ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    found = theirs(list(MORE), padding=True, truncation=True, return_tensors="np")
    tokens = ours(MORE)
    for row, (ids, mask) in enumerate(zip(found["input_ids"], found["attention_mask"], strict=True)):
        mine = tokens.take(np.array([row])).ids
        if layout == "sticky_eos":  # every text is of the full length, padded with the end token
            np.testing.assert_array_equal(ids, mine)
        else:
            np.testing.assert_array_equal(ids[mask == 1], mine)


def test_special_tokens_that_are_spelled_out(tmp_path: Path) -> None:
    """In the tokenizer of the released models they are punctuation and letters; so they are when transformers reads."""
    letters = "abcdefghijklmnopqrstuvwxyz[]"
    pieces = ["[PAD]", "[UNK]", "[CLS]", *letters, *(f"##{c}" for c in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    ours = Tokenizer(wordpiece(tmp_path / "vocab.txt"), "bert", 16)
    save_tokenizer(tmp_path, ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a [CLS] b", "[PAD]", "x[cls]"):
        assert theirs(text, truncation=True)["input_ids"] == ours([text]).ids.tolist()
        assert ours([text]).ids.tolist().count(2) == 1


def test_a_frame_that_rules_cannot_say(tmp_path: Path) -> None:
    """Without an end token of its own a cut text keeps its last piece, which no truncation does."""
    with pytest.raises(ExportError, match="can't cut or frame texts as the run does"):
        save_tokenizer(tmp_path, Tokenizer(train_tokenizer(TEXTS, 100), "own", 6))
