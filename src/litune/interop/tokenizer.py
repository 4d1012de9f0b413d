"""A run's tokenizer as one file that adds special tokens, truncates and pads itself, as other libraries expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.processors import TemplateProcessing

from litune.errors import ExportError
from litune.files import write_json, write_text
from litune.interop.samples import TEXTS
from litune.text.tokenizers import Tokenizer

_PADS = ("[PAD]", "<pad>", "</s>", "<unk>", "[UNK]")


def plain_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A copy that gives the run's ids by itself: special tokens, truncation and padding included.

    Raises `ExportError` where the tokenizer's own rules can't express what the run does.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if tokenizer.layout == "bert":
        first = tokenizer.first_token
        backend.post_processor = TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
        )
    elif tokenizer.layout == "sticky_eos":
        end = tokenizer.end_token
        backend.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
        )
    backend.enable_truncation(tokenizer.max_tokens)
    pad = tokenizer.end_token if tokenizer.layout == "sticky_eos" else pad_token(backend)
    length = tokenizer.max_tokens if tokenizer.layout == "sticky_eos" else None
    backend.enable_padding(pad_id=backend.token_to_id(pad), pad_token=pad, length=length)
    check_ids(tokenizer, [e.ids[: sum(e.attention_mask)] for e in backend.encode_batch(list(TEXTS))])
    return backend


def pad_token(backend: tokenizers.Tokenizer) -> str:
    """A token to pad with. Raises `ExportError` where the tokenizer has none of the usual ones."""
    for token in _PADS:
        if backend.token_to_id(token) is not None:
            return token
    raise ExportError(f"the tokenizer has none of the tokens {', '.join(_PADS)} to pad with: it can't be exported")


def check_ids(tokenizer: Tokenizer, rows: list[list[int]], texts: tuple[str, ...] = TEXTS) -> None:
    """Raise `ExportError` where unpadded ids differ from the run's."""
    expected = tokenizer(texts)
    for text, ids, own in zip(texts, rows, np.split(expected.ids, np.cumsum(expected.lengths)[:-1]), strict=True):
        padded = ids + [own[-1]] * (len(own) - len(ids)) if tokenizer.layout == "sticky_eos" else ids
        if padded != own.tolist():
            raise ExportError(
                f"the tokenizer's own rules can't cut or frame texts as the run does (at {text[:24]!r}): "
                "tune with a tokenizer that ends texts by a special token"
            )


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **more: Any) -> tokenizers.Tokenizer:
    """Write tokenizer.json, and the tokenizer_config.json with which transformers loads it unchanged."""
    backend = plain_tokenizer(tokenizer)
    pad = (backend.padding or {})["pad_token"]
    write_text(folder / "tokenizer.json", backend.to_str())
    special = {"pad_token": pad}
    if tokenizer.layout == "bert":
        special["cls_token"] = tokenizer.first_token
    if tokenizer.layout == "sticky_eos":
        special["eos_token"] = tokenizer.end_token
    # transformers looks for special tokens in texts; where the run's tokenizer does not, their names are plain text.
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if known.isdisjoint(special.values()):
        more = {"split_special_tokens": True} | more
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": tokenizer.max_tokens,
            "padding_side": "right",
            "truncation_side": "right",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **special,
            **more,
        },
    )
    return backend
