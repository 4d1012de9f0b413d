from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from litune.curation import facts
from litune.curation.facts import gather, read_facts
from litune.errors import DataError
from litune.image.pictures import open_rgb


def test_facts_of_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    found = read_facts(str(tmp_path / "turned.jpg"), content=True)
    data = (tmp_path / "turned.jpg").read_bytes()
    assert found == {
        "width": 20, "height": 30, "format": "JPEG", "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(), "damage": "",
    }  # fmt: skip
    (tmp_path / "cut.jpg").write_bytes(data[:-20])
    assert not read_facts(str(tmp_path / "cut.jpg"))["damage"]  # its header is whole
    assert "truncated" in read_facts(str(tmp_path / "cut.jpg"), content=True, look=open_rgb)["damage"]
    (tmp_path / "text.jpg").write_text("no picture")
    assert read_facts(str(tmp_path / "text.jpg"))["damage"] == "not an image"
    assert read_facts(str(tmp_path / "none.jpg"))["damage"] == "the file does not exist"


def test_gathering_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is not done again; other pairs begin anew; too much damage stops."""
    monkeypatch.setattr(facts, "PART", 4)
    seen: list[int] = []

    def run(about: str = "a", stop: int = 99, bad: int = 99, allowed: float = 1.0) -> pa.Table:
        def work(row: int) -> dict[str, Any]:
            if row >= stop:
                raise KeyboardInterrupt
            seen.append(row)
            return {"row": row, "damage": "bad" if row >= bad else ""}

        parts = gather(
            work, range(10), tmp_path / "work", {"pairs": about}, what="testing", workers=1, keys=str,
            max_damaged=allowed,
        )  # fmt: skip
        return pa.concat_tables(parts)

    with pytest.raises(KeyboardInterrupt):
        run(stop=6)
    seen.clear()
    assert run()["row"].to_pylist() == list(range(10))
    assert seen == [4, 5, 6, 7, 8, 9]
    seen.clear()
    run(about="b")
    assert seen == list(range(10))
    with pytest.raises(DataError, match=r"2 of 10 images can't be used \(at most 10.0% may\), as 8: bad"):
        run(about="c", bad=8, allowed=0.1)
