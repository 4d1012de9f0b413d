from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from litune.curation.captions import is_boilerplate, is_empty_title, letter_share, rare, repeated, shuffle_tags, words


@pytest.mark.parametrize(
    ("title", "dropped"),
    [
        ("DSC_0042", True),
        ("DSC00112 Paris", True),
        ("IMG 7", True),
        ("Picture of my dog", True),  # the rule is the paper's, as it stands
        ("my Picture", False),
        ("image", True),
        (" Image ", True),
        ("image of a dog", False),
        ("20080501 x", True),  # 8 of 10
        ("2008 abcd", False),  # 4 of 9
        ("12ab", False),  # half is not more than half
        ("a dog", False),
    ],
)
def test_titles_of_yfcc(title: str, dropped: bool) -> None:
    assert is_empty_title(pa.array([title])).tolist() == [dropped]


@pytest.mark.parametrize(
    "caption",
    ["photo.jpg", "IMG_1234", "img-1234 (2)", "P1010034", "Screenshot 2020-01-01 at 10.22.11", "https://a.b/c",
     "12 / 34", "Untitled", "thumbnail", "Image 3", "🙂", "...", "nan", "<NA>", "#N/A", "NaT", "(null)", "\\N"],
)  # fmt: skip
def test_boilerplate(caption: str) -> None:
    assert is_boilerplate(pa.array([caption]))[0]


@pytest.mark.parametrize(
    "caption", ["a photo of a dog", "Image of 3 dogs", "dog.jpg on a table", "3 dogs", "images", "狗"]
)
def test_no_boilerplate(caption: str) -> None:
    assert not is_boilerplate(pa.array([caption]))[0]


def test_words_are_those_of_a_split() -> None:
    """Where words stand between spaces, they are Python's."""
    texts = ["Two dogs play", "it's  well-known", "Ein Mädchen, 5 Jahre.", ""]
    assert words(pa.array(texts)).tolist() == [len(text.split()) for text in texts]
    assert words(pa.array(["两条狗玩球。", "- –"])).tolist() == [5, 0]


def test_letter_share() -> None:
    texts = ["abc 123", "été", "...", "", "狗 5"]
    expected = [sum(c.isalpha() for c in t) / max(1, sum(not c.isspace() for c in t)) for t in texts]
    assert letter_share(pa.array(texts)) == pytest.approx(expected)


def test_repeated_counts_images_not_captions() -> None:
    texts = pa.array(["A dog", "a  dog ", "a cat", "a cat", "a bird"])
    assert repeated(texts, np.array([0, 1, 2, 2, 3])).tolist() == [2, 2, 1, 1, 1]
    assert not len(repeated(pa.array([], pa.string()), np.zeros(0, np.int64)))


@pytest.mark.parametrize("size", [1, 5, 9, 30, 1000])
def test_rare_by_counting(size: int) -> None:
    """Against Python's counters of words and neighbouring words."""
    random = np.random.default_rng(size)
    texts = [" ".join(random.choice(list("abcdefg"), random.integers(1, 6))) for _ in range(60)]
    counts: Counter[object] = Counter(w for t in texts for w in t.split())
    counts += Counter(p for t in texts for p in zip(t.split(), t.split()[1:], strict=False))
    least = sorted(counts.values(), reverse=True)[min(size, len(counts)) - 1] if size < len(counts) else 0
    known = {one for one, count in counts.items() if count >= least}
    expected = [not ({*t.split(), *zip(t.split(), t.split()[1:], strict=False)} <= known) for t in texts]
    assert rare(pa.array(texts), size).tolist() == expected


def test_tags() -> None:
    text = shuffle_tags("new+york,caf%C3%A9, , x", np.random.default_rng(0))
    assert sorted(text.split(" ")) == ["café", "new", "x", "york"]
    assert "new york" in text
    orders = {shuffle_tags("a b c", np.random.default_rng(seed)) for seed in range(60)}
    assert len(orders) == 6
