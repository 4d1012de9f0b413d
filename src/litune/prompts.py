"""Class names and templates: the words of zero-shot classification."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from pathlib import Path, PurePath

from litune.errors import ConfigError
from litune.files import read_text

DEFAULT_TEMPLATES = ("{}", "a photo of a {}.")
BARE_TEMPLATES = ("{}",)
SHORT_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "{}",
)
"""The seven templates that CLIP's authors chose out of their 80 for ImageNet, and the bare name."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str, keep: str | None = None) -> str:
    """A text in canonical form: `_` becomes a space, punctuation but `keep` is removed, spaces are folded, lower case.

    >>> canonicalize("Great_White  Shark!")
    'great white shark'
    """
    spaced = text.replace("_", " ")
    parts = spaced.split(keep) if keep else [spaced]
    return " ".join((keep or "").join(part.translate(_NO_PUNCTUATION) for part in parts).lower().split())


def prompted_name(name: str, canonical: bool = True) -> str:
    """A class name as it goes into templates: in canonical form with its commas, or as it is where nothing is left.

    Names and templates are written as big_vision's zero-shot evaluator writes them (`prompt_engineering.py`).

    >>> prompted_name("Crane,  (bird)")
    'crane, bird'
    """
    return (canonicalize(name, keep=",") or name) if canonical else name


def prompted_template(template: str, canonical: bool = True) -> str:
    """A template as names go into it: in canonical form with its {}.

    >>> prompted_template("A photo of a {}, a type of pet.")
    'a photo of a {} a type of pet'
    """
    return canonicalize(template, keep="{}") if canonical else template


def write_prompts(names: Sequence[str], templates: Sequence[str], canonical: bool = True) -> list[str]:
    """The prompts of C names in N templates [C · N]: all of the first name, then all of the second, …"""
    written = [prompted_template(template, canonical) for template in templates]
    return [one.replace("{}", prompted_name(name, canonical)) for name in names for one in written]


def read_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates as given, or out of text files with one per line; the default ones for none.

    Raises `ConfigError` for a template without exactly one {}.
    """
    found: list[str] = []
    for template in templates:
        if "{" not in template and Path(template).is_file():
            found += read_list(template)
        else:
            found.append(template)
    for template in found:
        if template.count("{}") != 1:
            raise ConfigError(f"the template {template!r} needs exactly one {{}}, as in 'a photo of a {{}}.'")
    return tuple(found) or DEFAULT_TEMPLATES


def read_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as given, or out of text files (.txt) with one per line. Raises `ConfigError` where one is not there.

    >>> read_labels(["wombat", "jaguar"])
    ('wombat', 'jaguar')
    """
    lists = (read_list(label) if PurePath(label).suffix.lower() == ".txt" else [label] for label in labels)
    return tuple(itertools.chain.from_iterable(lists))


def read_list(file: str) -> list[str]:
    """The lines of a text file that are not empty. Raises `ConfigError` where it can't be read."""
    try:
        return [line.strip() for line in read_text(Path(file)).split("\n") if line.strip()]
    except OSError as why:
        raise ConfigError(f"{file} can't be read: {why.strerror or why}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is no text: give a text file with one on each line") from None
