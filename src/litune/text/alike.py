"""Finds class names that a model can't tell apart, because it reads them without case and punctuation."""

from __future__ import annotations

from collections.abc import Sequence

from litune.prompts import prompted_name


def find_alike(names: Sequence[str]) -> str | None:
    """What is wrong where two names are read as the same, and would share their probability; else None.

    >>> find_alike(["cat", "dog", "Cat!"])
    "'Cat!' beside 'cat', which is read alike: equal names would share their probability"
    """
    names_by_form: dict[str, str] = {}
    for name in names:
        form = prompted_name(name)
        if form in names_by_form:
            clash = "twice" if names_by_form[form] == name else f"beside {names_by_form[form]!r}, which is read alike"
            return f"{name!r} {clash}: equal names would share their probability"
        names_by_form[form] = name
    return None
