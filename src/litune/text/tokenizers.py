"""Tokenizers: captions to tokens in the layout that each family of text towers was trained with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from litune.errors import ConfigError, DataError, RunError, TowerError
from litune.files import atomic, read_text
from litune.text.sentencepiece import SentencePiece, read_sentencepiece
from litune.towers.weights import check_pointers

Layout = Literal["bert", "sticky_eos", "own"]
Backend = tokenizers.Tokenizer | SentencePiece
SENTENCEPIECE = "pieces.model"
"""A SentencePiece model beside the tokenizer.json converted from it; the model is what is used."""


_SPECIAL = re.compile(r"<.*>|\[.*\]|[▁Ġ ]*")
"""How special tokens are spelled, and marks of words alone."""


@dataclass(frozen=True)
class Tokens:
    """N tokenised texts, ragged: `ids` holds the tokens of all texts, concatenated, and `lengths` [N] their counts."""

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """The index of each text's first token in `ids`: [N]."""
        offsets: np.ndarray = np.cumsum(self.lengths) - self.lengths
        return offsets

    def take(self, texts: np.ndarray) -> Tokens:
        """The texts with these indices, in this order."""
        starts = self.starts[texts]
        lengths = self.lengths[texts]
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return Tokens(self.ids[np.repeat(starts, lengths) + within], lengths)


class Tokenizer:
    """A `tokenizers.Tokenizer` or a SentencePiece model with the token layout that a text tower needs.

    - `bert`: [CLS] and at most `max_tokens` − 1 pieces, no [SEP];
    - `sticky_eos`: exactly `max_tokens` tokens, padded with the end token, which is always the last one;
    - `own`: with the special tokens that the tokenizer itself adds, truncated to `max_tokens` (the last one is kept).
    """

    def __init__(self, backend: Backend, layout: Layout, max_tokens: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.layout, self.max_tokens = backend, layout, max_tokens
        if layout == "bert":
            self.first_token, self._first = _special(backend, ("[CLS]", "<s>", "<cls>"))
        if layout == "sticky_eos":
            self.end_token, self._end = _special(backend, ("</s>", "<eos>", "[SEP]", "<|endoftext|>"))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of a token, added ones included."""
        if isinstance(self.backend, SentencePiece):
            return int(self.backend.get_vocab_size())
        return max(self.backend.get_vocab().values(), default=-1) + 1

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenise N texts."""
        own = self.layout == "own"
        encoded: Sequence[Any] = self.backend.encode_batch_fast(list(texts), add_special_tokens=own)
        rows = [self._lay_out(e.ids) for e in encoded]
        lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
        ids = np.fromiter((t for r in rows for t in r), np.int64, int(lengths.sum()))
        return Tokens(ids, lengths)

    def _lay_out(self, ids: list[int]) -> list[int]:
        room = self.max_tokens
        if self.layout == "bert":
            return [self._first, *ids[: room - 1]]
        if self.layout == "sticky_eos":
            return ids[: room - 1] + [self._end] * (room - min(len(ids), room - 1))
        return ids if len(ids) <= room else ids[: room - 1] + ids[-1:]

    def describe(self) -> dict[str, Any]:
        """The settings of the tokenizer, for a run's manifest."""
        return {"layout": self.layout, "max_tokens": self.max_tokens}

    def save(self, file: Path) -> None:
        """Write the tokenizer.json and, for a SentencePiece model, the model beside it."""
        with atomic(file) as temporary:
            temporary.write_text(self.backend.to_str(), encoding="utf-8")
        if isinstance(self.backend, SentencePiece):
            with atomic(file.with_name(SENTENCEPIECE)) as temporary:
                temporary.write_bytes(self.backend.model)


def load_tokenizer(file: Path, layout: Layout, max_tokens: int) -> Tokenizer:
    """The tokenizer of a run folder."""
    if not file.is_file():
        raise RunError(f"{file} is missing: the run folder is incomplete")
    if file.with_name(SENTENCEPIECE).is_file():
        return Tokenizer(read_sentencepiece(file.with_name(SENTENCEPIECE)), layout, max_tokens)
    return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), layout, max_tokens)


def find_tokenizer(where: str) -> Backend:
    """The tokenizer in a tokenizer.json, a SentencePiece .model, a folder with either, or a name on the hub.

    In a folder, litune's pieces.model comes first, then the tokenizer.json, then what transformers can load.
    """
    path = Path(where)
    file = path / "tokenizer.json" if path.is_dir() else path
    if (path / SENTENCEPIECE).is_file():
        return read_sentencepiece(path / SENTENCEPIECE)
    if path.suffix == ".model" and path.is_file():
        return read_sentencepiece(path)
    check_pointers(path)
    try:
        if file.is_file():
            backend = tokenizers.Tokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            backend = AutoTokenizer.from_pretrained(where).backend_tokenizer
    except Exception as why:
        raise TowerError(
            f"no tokenizer can be loaded from {where!r}: {(str(why) or repr(why)).splitlines()[0]}"
        ) from None
    if not _has_pieces(backend):
        raise TowerError(
            f"{where!r} has no tokenizer, every word would be unknown: copy its tokenizer.json there, or what its "
            "family has instead (vocab.txt, vocab.json, spiece.model …)"
        )
    return backend


def _has_pieces(backend: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer knows more than special tokens: transformers makes one without where there are no files."""
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    pieces = {piece for piece in backend.get_vocab(with_added_tokens=False) if not _SPECIAL.fullmatch(piece)}
    return bool(pieces - special)


def wordpiece(file: Path) -> tokenizers.Tokenizer:
    """The uncased tokenizer of the released LiT models, from a vocabulary with one piece per line.

    Its ids equal those of tensorflow_text's BertTokenizer(lower_case=True), from which transformers' BERT tokenizers
    differ: Unicode's NFKC case folding (ß is ss, ﬁ is fi, ² is 2, Ａ is a; soft hyphens and joiners go), accents off,
    control characters are spaces, and a word of more than 100 bytes, not characters, is [UNK]. The tokenizer.json has
    the pieces in byte-level spelling, so that the limit counts bytes. A special token spelled out in a text is read as
    punctuation and letters. Raises `DataError` where the file is not such a vocabulary.
    """
    try:
        pieces = [line.rstrip("\r\n") for line in read_text(file).split("\n")]
    except OSError as why:
        raise DataError(f"{file} can't be read: {why.strerror or why}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text: a WordPiece vocabulary has one piece per line") from None
    if pieces[-1] == "":
        pieces.pop()
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {"".join(part for part, _ in as_bytes.pre_tokenize_str(piece)): i for i, piece in enumerate(pieces)}
    if missing := [name for name in ("[UNK]", "[CLS]") if name not in vocabulary]:
        raise DataError(f"{file} has no {missing[0]}: a WordPiece vocabulary has one piece per line, that among them")
    if len(vocabulary) < len(pieces):
        raise DataError(f"{file} has {len(pieces) - len(vocabulary)} of its pieces twice: each line is a piece")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.Lowercase(),
            *(normalizers.Replace(letter, folded) for letter, folded in FOLDED.items()),
            normalizers.Replace(Regex(f"[{IGNORED}]"), ""),
            normalizers.NFKD(),
            normalizers.Replace(Regex(r"\p{Mn}"), ""),
            normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}]"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\t\n\f\r ]+"), "removed"),
            pre_tokenizers.Split(Regex(rf"[!-/:-@\[-`{{-~\p{{P}}{CHINESE}]"), "isolated"),
            as_bytes,
        ]
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


FOLDED = {"ß": "ss", "ς": "σ", "\u0345": "ι", "㋿": "令和", **dict(zip("ᲀᲁᲂᲃᲄᲅᲆᲇᲈ", "вдосттъѣꙋ", strict=True))}
"""Characters that case folding changes but lower-casing does not, or that `tokenizers` is too old to know."""
IGNORED = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Unicode's Default_Ignorable_Code_Point, which NFKC case folding removes."""
CHINESE = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f"
)
"""Characters that BERT's tokenizer splits into words of one character."""


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-pair tokenizer with SentencePiece's word marks and at most `vocab_size` pieces, trained on captions.

    The end token `</s>` has id 1, as in the vocabularies of T5 and LiT. (Byte-pair merges depend on counts alone and
    are deterministic; the library's unigram trainer gives different scores in each run.)
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _special(backend: Backend, names: Sequence[str]) -> tuple[str, int]:
    for name in names:
        token = backend.token_to_id(name)
        if token is not None:
            return name, int(token)
    raise ConfigError(f"the tokenizer has none of the tokens {', '.join(names)} that the text tower needs")
