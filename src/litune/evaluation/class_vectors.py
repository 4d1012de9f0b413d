"""Class names and templates of the field's evaluation sets, and class vectors out of them.

The words are those of CLIP_benchmark (MIT): the extra `eval` brings its JSON files; none of its code is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from litune.errors import ConfigError, MissingExtraError, nearest
from litune.progress import track
from litune.prompts import BARE_TEMPLATES, SHORT_TEMPLATES, prompted_name, prompted_template, write_prompts
from litune.vectors import class_vectors

TemplateSet = Literal["lit", "clip", "short", "bare"]

DEFAULT = "imagenet1k"
"""The set whose templates stand in for those of a set that has none, as in CLIP_benchmark."""
TRANSLATED = ("ar", "cn", "it", "jp")
"""Languages with translated class names and templates of ImageNet, as CLIP_benchmark writes them."""

BLOCK = 8192
"""Prompts that are embedded before the next are written: memory stays flat."""

EncodeText = Callable[[list[str]], Tensor]
"""N texts to their normalised features [N, D]."""


@cache
def package_json(name: str) -> Any:
    """One of the package's JSON files. Raises `MissingExtraError` where it is not installed."""
    try:
        text = files("clip_benchmark").joinpath("datasets", name).read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise MissingExtraError("evaluating on named sets", "clip-benchmark", "eval") from None
    return json.loads(text)


def class_names(key: str, lang: str = "en") -> list[str]:
    """The class names of a set, in the set's order."""
    names: list[str] = package_json(f"{lang}_classnames.json")[key]
    return names


def dataset_templates(key: str | None, lang: str = "en") -> tuple[str, ...]:
    """The templates of a set, each with one {}; ImageNet's where the package has none for it."""
    known = package_json(f"{lang}_zeroshot_classification_templates.json")
    return tuple(_braced(template) for template in known[key if key in known else DEFAULT])


def babel_languages() -> list[str]:
    """The languages of Babel-ImageNet that have class names and templates, in capitals."""
    return sorted(package_json("babel_imagenet.json").keys() & package_json("nllb_dist13b_prompts.json").keys())


def babel(lang: str) -> tuple[list[int], list[str], tuple[str, ...]]:
    """Babel-ImageNet in one language: the numbers of the ImageNet classes that have a name in it, these, templates.

    Raises `ConfigError` for a language that it does not have.
    """
    if lang.upper() not in babel_languages():
        raise ConfigError(f"babel-imagenet has no language {lang!r} ({nearest(lang.upper(), babel_languages())})")
    numbers, names = package_json("babel_imagenet.json")[lang.upper()]
    prompts = package_json("nllb_dist13b_prompts.json")[lang.upper()]
    return list(numbers), list(names), tuple(" ".join(_braced(prompt).split()) for prompt in prompts)


def _braced(template: str) -> str:
    return template.replace("{c}", "{}")


def pick_templates(which: TemplateSet, own: Sequence[str]) -> tuple[str, ...]:
    """The templates of a named set; `own` are those of the dataset.

    lit is the protocol of the LiT paper: the dataset's own, and the bare name. clip is the dataset's own alone, as
    CLIP_benchmark has it.
    """
    sets: dict[str, tuple[str, ...]] = {
        "lit": tuple(dict.fromkeys([*own, *BARE_TEMPLATES])),
        "clip": tuple(own),
        "short": SHORT_TEMPLATES,
        "bare": BARE_TEMPLATES,
    }
    assert sets.keys() == set(get_args(TemplateSet))
    return sets[which]


class ClassVectors:
    """Class vectors of one text tower (`litune.vectors`): each distinct name is embedded once per set of templates.

    ImageNet and its variants share their 1,000 names, and so this work.
    """

    def __init__(self, encode: EncodeText, block: int = BLOCK) -> None:
        self.encode, self.block = encode, block
        self._known: dict[tuple[str, tuple[str, ...]], Float[Tensor, " D"]] = {}
        self.texts = 0
        """Prompts that were embedded so far."""

    def __call__(
        self, names: Sequence[str], templates: Sequence[str], *, canonical: bool = True
    ) -> Float[Tensor, "C D"]:
        """One vector of length one for each of C names; `canonical`: names and templates are written so."""
        templates = tuple(prompted_template(template, canonical) for template in templates)
        written = [prompted_name(name, canonical) for name in names]
        new = [name for name in dict.fromkeys(written) if (name, templates) not in self._known]
        if new:
            with track("encoding", "class prompts", len(new) * len(templates)) as task:
                self._embed(new, templates, task.advance)
        return torch.stack([self._known[name, templates] for name in written])

    def _embed(self, names: Sequence[str], templates: tuple[str, ...], advance: Callable[[int], None]) -> None:
        at_once = max(1, self.block // len(templates))
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            features = self.encode(write_prompts(some, templates, canonical=False))
            self.texts += len(features)
            vectors = class_vectors(features, len(some))
            self._known |= {(name, templates): vector for name, vector in zip(some, vectors, strict=True)}
            advance(len(features))
