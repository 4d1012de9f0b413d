from __future__ import annotations

import sys

import pytest

from litune.curation import languages
from litune.curation.languages import check_languages, identify, known_languages
from litune.errors import ConfigError, MissingExtraError

CAPTIONS = {
    "en": "A man with a red hat rides his bicycle down the street.",
    "de": "Ein Mann mit rotem Hut fährt auf seinem Fahrrad die Straße hinunter.",
    "fr": "Un homme avec un chapeau rouge descend la rue sur son vélo.",
    "cs": "Muž s červeným kloboukem jede na kole po ulici.",
    "zh": "一个戴着红帽子的男人在街上骑自行车。",
}


def test_identified() -> None:
    found = list(identify(CAPTIONS.values()))
    assert [code for code, _ in found] == list(CAPTIONS)
    assert all(0.5 < certainty <= 1 for _, certainty in found)


def test_codes() -> None:
    assert {*CAPTIONS} <= set(known_languages())
    assert "wuu" not in known_languages()  # counted as Chinese
    check_languages(["en", "zh"])
    with pytest.raises(ConfigError, match="'eng' can't be identified"):
        check_languages(["eng"])


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    languages._identifier.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'litune\[data\]'"):
        list(identify(["x"]))
