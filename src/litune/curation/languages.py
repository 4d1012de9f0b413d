"""The language of captions, identified from their characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from litune.errors import ConfigError, MissingExtraError, nearest

# Written languages that the library distinguishes and caption tables don't.
_WRITTEN_AS = {"wuu": "zh", "yue": "zh", "nn": "no", "nb": "no"}


@lru_cache(1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtraError("identifying languages", "py3langid", "data") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def known_languages() -> list[str]:
    """The codes (en, de, zh, …) of the languages that can be identified, sorted."""
    return sorted({_WRITTEN_AS.get(code, code) for code in _identifier().labels})


def check_languages(codes: Sequence[str]) -> None:
    """Raise `ConfigError` for a code that is not among `known_languages`."""
    known = known_languages()
    for code in codes:
        if code not in known:
            raise ConfigError(f"--languages: {code!r} can't be identified ({nearest(code, known)})")


def identify(captions: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Each caption's language, and its probability among all known ones.

    Short captions in related languages are often confused: see docs/curate.md for figures.
    Raises `MissingExtraError` without the extra `data`.
    """
    identifier = _identifier()
    for caption in captions:
        code, probability = identifier.classify(caption)
        yield _WRITTEN_AS.get(str(code), str(code)), float(probability)
