"""What the parts of gpu_check.py work on, made here: towers, captions, stores, pictures; and runs of `litune tune`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gpu_task import Shape, Task
from bench_store import write_store
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import BertConfig

import litune
from litune.image.registry import ImageTower, load_image_tower

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_text_tower(task: Task, shape: Shape) -> str:
    """The spec of a BERT with random weights: its configuration, and a tokenizer of made-up words."""
    folder = task.folder / f"bert-{shape.layers}-{shape.width}"
    words = [*MARKS, *made_words(task.sizes.vocabulary - len(MARKS))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp,
    )
    config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return f"hf:{folder}?init=random"


def made_words(count: int) -> list[str]:
    """So many words of three syllables each."""
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    size = len(syllables)
    return [syllables[i // size**2] + syllables[i // size % size] + syllables[i % size] for i in range(count)]


def make_captions(task: Task, count: int) -> list[str]:
    """So many captions, as long as those of photos are (some 11 words), frequent words and rare ones."""
    random = np.random.default_rng(0)
    words = np.array(made_words(min(10_000, task.sizes.vocabulary - len(MARKS))))
    lengths = random.normal(11, 3, count).round().clip(4, 20).astype(int)
    drawn = words[(len(words) ** random.random(lengths.sum())).astype(int) - 1]  # Zipf's law
    return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


def make_store(task: Task, count: int) -> tuple[Path, list[str]]:
    """A store of `count` images with random features and a caption each, and the captions."""
    captions = make_captions(task, count)
    write_store(task.folder / "pairs", captions, task.sizes.dim)
    return task.folder / "pairs", captions


def random_tower(spec: str, device: str) -> ImageTower:
    """The image tower of a spec that asks for random weights: the same ones each time."""
    torch.manual_seed(0)
    return load_image_tower(spec).to(device)


def random_pixels(tower: Any, count: int) -> Tensor:
    """So many pictures of the tower's size [count, 3, H, W], as its preprocessing gives them."""
    return torch.randint(0, 256, (count, 3, *tower.preprocess.size), dtype=torch.uint8)


def tune(out: Path, on_log: Callable[[dict[str, Any]], None] | None = None, **settings: Any) -> litune.LiT:
    """`litune tune` with nothing held out and no checkpoints on the way: the model."""
    return litune.tune(out=out, holdout=0.0, evaluations=0, checkpoint_seconds=3600.0, on_log=on_log, **settings)


def logged(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one for each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
