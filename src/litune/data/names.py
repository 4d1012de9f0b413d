"""Class names and templates: the words of zero-shot classification."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from litune.errors import ConfigError

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


def canonicalize(name: str) -> str:
    """A class name in canonical form: `_` becomes a space, punctuation is removed, lower case.

    >>> canonicalize("Great_White  Shark!")
    'great white shark'
    """
    return " ".join(name.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def read_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates as given, or out of text files with one per line; the default ones for none.

    Raises `ConfigError` for a template without exactly one {}.
    """
    found: list[str] = []
    for template in templates:
        if "{" not in template and Path(template).is_file():
            lines = Path(template).read_text(encoding="utf-8").splitlines()
            found += [line.strip() for line in lines if line.strip()]
        else:
            found.append(template)
    for template in found:
        if template.count("{}") != 1:
            raise ConfigError(f"the template {template!r} needs exactly one {{}}, as in 'a photo of a {{}}.'")
    return tuple(found) or DEFAULT_TEMPLATES
