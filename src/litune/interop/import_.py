"""A released checkpoint → an ordinary run folder."""

from __future__ import annotations

import shutil
from typing import Any

from litune.config import ImportConfig, command, to_json
from litune.errors import ConfigError, DataError, RunError
from litune.files import clear_output, read_json, sha256_file, write_json
from litune.interop.layout import Design
from litune.interop.official import Checkpoint, read_model
from litune.model.lit import LiT
from litune.model.run_folder import CONFIG, MANIFEST, load, save_model
from litune.progress import say
from litune.store.store import library_versions
from litune.text.sentencepiece import read_sentencepiece
from litune.text.tokenizers import Tokenizer, wordpiece
from litune.towers.vit import vit_name

MAX_TOKENS = 16
END = 1
"""The id of the end token in LiT's SentencePiece vocabularies."""


@command(ImportConfig)
def import_(config: ImportConfig) -> LiT:
    """Make a run folder from a released LiT checkpoint and its vocabulary; returns the model, loaded from it.

    Raises `DataError` where the file is damaged or of another layout (with the keys that are missing, left over or
    misshapen) or the vocabulary is not that of the checkpoint, `OutputExistsError` where there is a run already.
    """
    if not config.overwrite:
        _clear(config)  # fail before gigabytes are read
    checkpoint = Checkpoint(config.checkpoint)
    model = read_model(checkpoint, _tokenizer(config, checkpoint.design))
    manifest: dict[str, Any] = {
        "complete": True,
        "imported": {
            "file": config.checkpoint.name,
            "sha256": sha256_file(config.checkpoint),
            "vocabulary": config.vocab.name,
            "vocabulary_sha256": sha256_file(config.vocab),
            "parameters": checkpoint.design.parameters,
        },
        "libraries": library_versions(),
    }
    building = config.out.with_name(f".{config.out.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)  # left by an import that was killed
    try:
        write_json(building / CONFIG, to_json(config))
        save_model(building, model, manifest)
        _clear(config)
        building.replace(config.out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    say(f"{config.checkpoint}: {_in_words(checkpoint.design)}")
    say(f"wrote {config.out}; its image tower is run:{config.out}")
    return load(config.out)


def _clear(config: ImportConfig) -> None:
    manifest = config.out / MANIFEST
    ours = manifest.is_file() and {"format", "model"} <= read_json(manifest, RunError).keys()
    clear_output(config.out, ours, "run", config.overwrite)


def _tokenizer(config: ImportConfig, design: Design) -> Tokenizer:
    """The tokenizer of the checkpoint's text tower, from the vocabulary file."""
    if not config.vocab.is_file():
        raise DataError(f"the vocabulary {config.vocab} does not exist: give the file released with the checkpoint")
    if config.max_tokens is not None and config.max_tokens > design.positions:
        raise ConfigError(
            f"--max-tokens {config.max_tokens} is more than the {design.positions} positions of {config.checkpoint}"
        )
    if design.bert:
        tokenizer = Tokenizer(wordpiece(config.vocab), "bert", config.max_tokens or min(MAX_TOKENS, design.positions))
    else:
        sentencepiece = read_sentencepiece(config.vocab)
        if sentencepiece.token_to_id("</s>") != END:
            raise DataError(f"{config.vocab} has no end token </s> at {END}: it is no vocabulary of LiT")
        tokenizer = Tokenizer(sentencepiece, "sticky_eos", config.max_tokens or design.positions)
    if tokenizer.vocab_size < design.vocabulary:
        say(
            f"{config.vocab} has {tokenizer.vocab_size:,} tokens, {config.checkpoint} embeds {design.vocabulary:,}: "
            "is it the right one?"
        )
    return tokenizer


def _in_words(design: Design) -> str:
    image, text = design.image, design.text
    size = vit_name(image.width, image.depth, image.mlp, image.heads)
    kind = (
        f"BERT of {text.depth} layers, {text.width} wide"
        if design.bert
        else f"text transformer {vit_name(text.width, text.depth, text.mlp, text.heads)}"
    )
    head = "with" if design.image_head else "without"
    return f"image tower {size}/{design.patch} {head} a head, {kind}, {design.parameters:,} parameters"
