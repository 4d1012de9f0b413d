"""Class names that a model can't tell apart, as it reads them without case and punctuation."""

from __future__ import annotations

from collections.abc import Sequence

from litune.prompts import prompted_name


def find_alike(names: Sequence[str]) -> str | None:
    """What is wrong where two names are read alike, so that they would share their probability; None where none are.

    >>> find_alike(["cat", "dog", "Cat!"])
    "'Cat!' beside 'cat', which is read alike: equal names would share their probability"
    """
    read: dict[str, str] = {}
    for name in names:
        form = prompted_name(name)
        if form in read:
            alike = "twice" if read[form] == name else f"beside {read[form]!r}, which is read alike"
            return f"{name!r} {alike}: equal names would share their probability"
        read[form] = name
    return None
