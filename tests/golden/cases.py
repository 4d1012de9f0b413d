"""What the golden files are about: made texts, pictures, gradients and weights, the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.interop.released import layout, random_values

TEXTS = [
    "",
    " \t\n ",
    "The CAFÉ in the Straße, ẞ and all",
    "don't; it's 3.14% of $5 (or €4)",
    "ﬁshing oﬃce ĳ ŉ ǰ ½ x² H₂O ™ ① Ⅷ ㎏ ㋿",
    "Ａｂｃ １２ ，。！？「」 ｶﾞｷ ￥",
    "ΟΔΥΣΣΕΎΣ σοφός ΐ ᾳ ᾼ ΰ",
    "İstanbul ISPARTA ıssız ſee",
    "Ёлка Йод й ᲀᲁᲂᲃᲄᲅᲆᲇᲈ Ꙋ",
    "中文字 𠀀𫝀𫠠 豈 日本のテキスト、です。",
    "한국어 각 각",
    "สวัสดี ภาษาไทย ไม้",
    "नमस्ते हिन्दी क्षत्रिय।",
    "مُحَمَّد العربيّة ﷺ",
    "שָׁלוֹם עולם",
    "Việt Nam e\u0323\u0302 o\u0301\u0323 ệ",
    "soft\u00adhyphen zero\u200bwidth non\u200cjoin\u200djoin mark\u200e bom\ufeff word\u2060joiner",
    "no\u00a0break em\u2003space thin\u2009 narrow\u202fspace ideo\u3000graphic",
    "ogham\u1680mark line\u2028end para\u2029end",
    "bell\x07 vertical\x0btab form\x0cfeed file\x1csep next\x85line delete\x7f nul\x00nul",
    "bad\ufffdcharacter private\ue000use tag\U000e0041s filler\u3164\uffa0\u115f",
    "👩\u200d👩\u200d👧\ufe0f 👍🏽 🇩🇪 1\ufe0f\u20e3 ☃ ❤️",
    "[CLS] [SEP] [PAD] </s> ##ing @you #tag _x_ `a` {b} ~c^",
    "“quoted” ‘so’ — dash – … ‽ ⁇ ¿que? «là» § ¶ † ‰ ⁄",
    "a\u0301\u0327 Å Å Ω Ω K",
    "a" * 100 + " " + "a" * 101,
    "é" * 60 + " " + "е" * 50 + " " + "е" * 51 + " " + "ก" * 33 + " " + "ก" * 34,
    "字☃x ☃",
]
"""For tensorflow_text's BertTokenizer."""

NAMES = [
    "tench", "Great_White  Shark!", "T-shirt", "Egyptian_Mau", "crane,  (bird)", "Bonaire, Saint Eustatius & Saba",
    "goldfish, Carassius_auratus", ",_a,,b ,", "St. Bernard's #1 (100%)", " a.b  c ", "back\\slash `x` ~^|<>=+*@$",
    "{} {a}", "“quoted” ‘so’ – dash… ¿que? «là»", "Straße ẞ", "İstanbul IĞDIR", "ΟΔΥΣΣΕΎΣ ΟΣ. ΑΣ", "鶴、つる", "КРАН",
    "a\u00a0b\u3000c\u2003d", "tab\tline\nfile\x1csep\x85next", "bom\ufeffword zero\u200bwidth\u2028line",
    "👩\u200d🚒 Fire_Fighter", "e\u0301 É",
]  # fmt: skip
TEMPLATES = [
    "{}", "a photo of a {}.", "a photo of the {}, a type of pet.", "itap of a {}.", "A_Photo  of {}!", "{{}} and {x}",
    "a {}'s photo - (really)", "une photo d'un·e «{}».", "  {}  ", "{}{", "ein FOTO von:\t{},",
]  # fmt: skip
"""Class names and templates for big_vision's zero-shot prompts."""

CASES = [
    (1, 1, 16), (7, 1, 24), (33, 50, 24), (97, 64, 224), (224, 224, 224), (223, 225, 224), (256, 341, 224),
    (333, 500, 288), (640, 480, 224), (31, 900, 64),
]  # fmt: skip
"""Height and width of a picture, and the side of the square that it is scaled to."""


def picture(height: int, width: int) -> np.ndarray:
    """Values [height, width, 3] that look random."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((y * y * 7 + x * 101 + x * y * 13 + c * 59) % 256).astype(np.uint8)


SHAPES = {"kernel": (40, 36), "kernel_4d": (4, 3, 34, 33), "kernel_small": (8, 50), "bias": (36,), "t": ()}
STEPS, WARMUP = 30, 5


def start(name: str) -> np.ndarray:
    """A parameter's first value."""
    size = int(np.prod(SHAPES[name]))
    return (0.5 * np.sin(np.arange(size) * 1.7 + len(name))).astype(np.float32).reshape(SHAPES[name])


def gradient(name: str, step: int) -> np.ndarray:
    """A parameter's gradient at a step: rows and columns of unlike size."""
    shape = SHAPES[name]
    values = np.sin(np.arange(int(np.prod(shape))) * (0.37 + 0.11 * step) + step * 2.1).reshape(shape)
    for axis, size in enumerate(shape):
        values = values * np.linspace(0.1, 2, size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return (values * 0.05).astype(np.float32)


def sums(value: np.ndarray) -> list[float]:
    """Six weighted means, which tell arrays apart."""
    flat = np.asarray(value, np.float64).ravel()
    return [float((flat * np.cos(np.arange(flat.size) * 0.9 * k)).mean()) for k in range(6)]


WIDTHS = (6, 150)
"""Of the features for the few-shot regression: fewer, and more, than the 50 images that it learns from."""


def shots_data(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and labels of 100 images to learn from and of 400 others, in five clouds."""
    random = np.random.default_rng(width)
    centers, labels = random.normal(size=(5, width)), np.arange(500) % 5
    values = ((centers[labels] + 3 * random.normal(size=(500, width))) * np.linspace(0.1, 4, width) + 2).astype(
        np.float32
    )
    return values[:100], labels[:100], values[100:], labels[100:]


def small_release(kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The values of a small file of the released layout, and its sizes."""
    facts: dict[str, Any] = {"image": (32, 2, 64, 2), "patch": 8, "dim": 24 if kind == "bert" else 32}
    facts["text"] = (128, 2, 160, 2) if kind == "bert" else (48, 2, 80, 4)
    facts["pictures"] = [(16, 16)]
    values = random_values(
        layout(
            facts["image"],
            facts["text"],
            bert=kind == "bert",
            patch=8,
            size=16,
            vocabulary=40,
            positions=20 if kind == "bert" else 8,
            dim=facts["dim"],
            image_head=kind == "bert",
        ),
        seed=5,
    )
    return values, facts


def token_ids(kind: str) -> np.ndarray:
    """Three texts' ids [3, 8]: padded with 0 behind 7 and 4 tokens for BERT, ended by 1 for SentencePiece."""
    ids = np.array([[2, 9, 5, 33, 7, 8, 39, 11], [2, 30, 31, 32, 4, 12, 6, 0], [2, 20, 21, 22, 0, 0, 0, 0]])
    if kind == "pieces":
        ids = np.where(ids == 0, 1, ids)
        ids[:, -1] = 1
    return ids
