from __future__ import annotations

import re

import pytest

from litune.errors import StoreError, TowerError
from litune.image.tower import MadeWith, check_same_tower

KNOWN = {"spec": "timm:a", "weights": "a", "pooling": "avg", "preprocess": {"size": 32}}
OTHER = KNOWN | {"spec": "timm:b", "preprocess": {"size": 64}}


@pytest.mark.parametrize(
    ("made", "other", "strict", "message"),
    [
        (
            KNOWN,
            OTHER,
            False,
            "s was made with the image tower timm:a, not with timm:b as t (preprocess size 32 and 64)",
        ),
        (KNOWN, KNOWN | {"spec": "elsewhere"}, True, ""),
        (None, KNOWN, False, ""),
        (None, KNOWN, True, "s was made with the image tower unknown, not with timm:a as t (weights None and a; "),
        (None, None, True, ""),
    ],
)
def test_what_differs_and_what_to_do(
    made: dict[str, object] | None, other: dict[str, object] | None, strict: bool, message: str
) -> None:
    sides = MadeWith("s", made, 8), MadeWith("t", other, 8)
    if not message:
        check_same_tower(*sides, "embed again", strict=strict)
        return
    with pytest.raises(StoreError, match=re.escape(message) + ".*: embed again$"):
        check_same_tower(*sides, "embed again", strict=strict)


def test_widths_tell_unknown_towers_apart() -> None:
    with pytest.raises(StoreError, match="^s has features of width 8, t of 16: embed again$"):
        check_same_tower(MadeWith("s", None, 8), MadeWith("t", KNOWN, 16), "embed again")
    check_same_tower(MadeWith("s", None), MadeWith("t", KNOWN, 16), "embed again")


def test_further_differences_and_another_error() -> None:
    with pytest.raises(TowerError, match=re.escape("s was made with the image tower timm:a, not with timm:a (int8)")):
        check_same_tower(MadeWith("s", KNOWN), MadeWith("", KNOWN), also=["int8"], error=TowerError)
