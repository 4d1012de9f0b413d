from __future__ import annotations

import pytest

from litune.text.alike import find_alike


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], None),
        (["cat", "dog", "C++ cat", "猫", "!!!", "???"], None),
        (["cat", "dog", "cat"], "'cat' twice"),
        (["great_white", "Great  White!"], "'Great  White!' beside 'great_white', which is read alike"),
        (["!", "a", "!"], "'!' twice"),
    ],
)
def test_names_that_are_read_alike(names: list[str], expected: str | None) -> None:
    found = find_alike(names)
    assert found == (None if expected is None else f"{expected}: equal names would share their probability")
