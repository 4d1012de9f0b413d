"""SentencePiece models (`.model`): read by the sentencepiece library itself, and written as a tokenizer.json.

The library's own segmentation is kept because no other is equal to it for every text: it sums scores in 32 bits and
normalises by longest match. The tokenizer.json that is written from a model is for other tools; it gives the same
ids but for rare texts (ties between segmentations, marks on full-width letters, "</s>" spelled out).

From 0.2.2 on the library decides ties otherwise ("..." as ". .." where it was ".. ."): the extra asks for older ones,
which cut texts as TensorFlow's tokenizer did when LiT's models were trained.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from litune.errors import MissingExtraError, TowerError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models


@dataclass(frozen=True)
class Encoded:
    """The ids of one text."""

    ids: list[int]


class SentencePiece:
    """A SentencePiece model as a backend of `litune.text.tokenizers.Tokenizer`."""

    def __init__(self, model: bytes, name: str = "the SentencePiece model") -> None:
        """Of the bytes of a .model file.

        Raises `TowerError` where they are none, `MissingExtraError` without the library.
        """
        try:
            import sentencepiece
        except ImportError:
            raise MissingExtraError("a SentencePiece tokenizer", "sentencepiece", "sentencepiece") from None
        self.model, self.name = model, name
        try:
            if not model:
                raise ValueError("it is empty")
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as why:
            reason = (str(why).splitlines() or ["unknown reason"])[0]
            raise TowerError(f"{name} is no SentencePiece model: {reason}") from None

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[Encoded]:
        """The ids of each text; a model of the official kind adds no special tokens of its own."""
        ends = [self._processor.eos_id()] if add_special_tokens and self._processor.eos_id() >= 0 else []
        return [Encoded([*ids, *ends]) for ids in self._processor.encode(list(texts), out_type=int)]

    def get_vocab_size(self) -> int:
        """The number of pieces."""
        return int(self._processor.get_piece_size())

    def token_to_id(self, token: str) -> int | None:
        """The number of a piece; None where there is none of this name."""
        found = int(self._processor.piece_to_id(token))
        return found if self._processor.id_to_piece(found) == token else None

    def no_truncation(self) -> None:
        """Texts are never cut here."""

    def no_padding(self) -> None:
        """Texts are never padded here."""

    def to_str(self) -> str:
        """The tokenizer.json nearest to the model."""
        text: str = convert(self.model, self.name).to_str()
        return text


def read_sentencepiece(file: Path) -> SentencePiece:
    """The model in a .model file."""
    try:
        return SentencePiece(file.read_bytes(), str(file))
    except OSError as why:
        raise TowerError(f"{file} can't be read: {why.strerror or why}") from None


@dataclass
class _Model:
    """What a .model file holds, as far as a tokenizer.json needs it."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True


def convert(model: bytes, name: str) -> tokenizers.Tokenizer:
    """A SentencePiece model as a `tokenizers.Tokenizer`. Raises `TowerError` for kinds other than unigram and BPE."""
    read = _read(model, name)
    scores = [(piece, score) for piece, score, _ in read.pieces]
    unknown = next((i for i, (_, _, kind) in enumerate(read.pieces) if kind == UNKNOWN), None)
    if read.kind == UNIGRAM:
        inner: Any = models.Unigram(scores, unk_id=unknown, byte_fallback=read.byte_fallback)
    elif read.kind == BPE:
        inner = models.BPE(
            vocab={piece: i for i, (piece, _) in enumerate(scores)},
            merges=_merges(read.pieces),
            unk_token=None if unknown is None else scores[unknown][0],
            fuse_unk=True,
            byte_fallback=read.byte_fallback,
        )
    else:
        raise TowerError(f"{name} is a SentencePiece model of kind {read.kind}: only unigram and BPE can be written")
    tokenizer = tokenizers.Tokenizer(inner)
    steps: list[Any] = [normalizers.Precompiled(read.charsmap)] if read.charsmap else []
    if read.remove_extra_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if read.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merges of a BPE model in their order: it keeps only what they give, with the order as the score."""
    known = {piece for piece, _, kind in pieces if kind in (NORMAL, USER)}
    found = [
        (-score, i, piece[:cut], piece[cut:])
        for i, (piece, score, kind) in enumerate(pieces)
        if kind == NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _read(model: bytes, name: str) -> _Model:
    """The few fields of sentencepiece_model.proto that count; field numbers are those of that file.

    Read here, since the library's own protobuf module and transformers' copy of it can't be in one process: each
    registers that file's name, and whichever comes second fails. It would also ask use-m3 for protobuf.
    """
    found = _Model()
    try:
        for number, value in _fields(model):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                found.pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
                found.kind, found.byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                found.charsmap = normalizer.get(2, b"")
                found.dummy_prefix, found.remove_extra_spaces = (bool(normalizer.get(n, 1)) for n in (3, 4))
    except (IndexError, KeyError, ValueError, struct.error, TypeError, AttributeError) as why:
        raise TowerError(f"{name} is no SentencePiece model: {why}") from None
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: number and value, an int or bytes (fixed-width numbers as their bytes)."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        else:
            size = {1: 8, 5: 4}[kind]
        if place + size > len(data):
            raise ValueError("it is cut short")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits per byte, the lowest first; and the place after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
