from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from litune.errors import ConfigError, OutputExistsError
from litune.pairs.pairs import read_pairs
from litune.pairs.write import check_table, write_pairs, write_table


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("beside", [True, False])
def test_pairs_are_read_back(photos: Path, tmp_path: Path, suffix: str, beside: bool) -> None:
    before = read_pairs(photos).table
    (tmp_path / "elsewhere").mkdir()
    file = (photos / "images" if beside else tmp_path / "elsewhere") / f"kept{suffix}"
    write_pairs(file, before)
    after = read_pairs(file).table
    for name in ("captions", "langs", "split"):
        assert after[name].to_pylist() == before[name].to_pylist()
    assert [Path(p).resolve() for p in after["path"].to_pylist()] == [
        Path(p).resolve() for p in before["path"].to_pylist()
    ]
    assert after["key"].to_pylist() == before["key"].to_pylist()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_fields_are_read_back(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.png").touch()
    source = tmp_path / "t.csv"
    source.write_text('image,title,description,tags\na.png,one,"two, ""quoted""",\nb.png,,,three\n', encoding="utf-8")
    columns = ("title", "description", "tags")
    before = read_pairs(source, caption_columns=columns).table
    write_pairs(tmp_path / f"kept{suffix}", before)
    after = read_pairs(tmp_path / f"kept{suffix}", caption_columns=columns).table
    for name in ("key", "captions", "fields"):
        assert after[name].to_pylist() == before[name].to_pylist()


def test_outputs_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_table(tmp_path / "x.csv", "--out", overwrite=False)
    check_table(tmp_path / "x.csv", "--out", overwrite=True)
    with pytest.raises(ConfigError, match=r"ends with .parquet, .jsonl, .csv"):
        check_table(tmp_path / "x.txt", "--out", overwrite=True)
    write_table(tmp_path / "x.csv", pa.table({"a": ["1", 'x "y", z'], "b": [None, "2"]}))
    assert (tmp_path / "x.csv").read_text() == 'a,b\n1,\n"x ""y"", z",2\n'
