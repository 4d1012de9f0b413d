from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from litune.errors import OutputBusyError, OutputExistsError, RunError
from litune.files import atomic, clear_output, read_json, sweep_temporaries, write_json, write_text


def test_atomic_leaves_the_old_file_on_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(ValueError, match="stop"), atomic(file) as temporary:
        temporary.write_text("half of the n")
        raise ValueError("stop")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"name": "Zoë"})
    assert read_json(tmp_path / "a" / "b.json", RunError) == {"name": "Zoë"}
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RunError, match="expected a JSON object"):
        read_json(tmp_path / "list.json", RunError)


def test_clear_output(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    clear_output(folder, False, "feature store", overwrite=False)
    folder.mkdir()
    clear_output(folder, False, "feature store", overwrite=False)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not a feature store of litune"):
        clear_output(folder, False, "feature store", overwrite=True)
    assert (folder / "thesis.tex").exists()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        clear_output(folder, True, "feature store", overwrite=False)
    clear_output(folder, True, "feature store", overwrite=True)
    assert not folder.exists()
    folder.write_text("a file")
    with pytest.raises(OutputExistsError, match="is a file"):
        clear_output(folder, True, "feature store", overwrite=True)


def test_sweep(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "img_emb" / ".img_emb_0001.npy.123.tmp").write_text("half")
    (tmp_path / ".tmpE6Rsec").write_text("half of a safetensors file")
    (tmp_path / "keep").write_text("")
    sweep_temporaries(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["keep"]


def _claim_and_wait(folder: Path, there: Connection) -> None:
    with claim(folder):
        there.send("claimed")
        there.recv()


def test_a_folder_is_claimed_until_its_process_ends_or_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_claim_and_wait, args=(tmp_path / "out", there))
    other.start()
    assert here.recv() == "claimed"
    with (
        pytest.raises(OutputBusyError, match=f"out is being written by process {other.pid}: wait"),
        claim(tmp_path / "out"),
    ):
        pass
    with claim(tmp_path / "another"):
        pass
    other.kill()
    other.join()
    for _ in range(2):  # and whoever lets go leaves nothing behind
        with claim(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
