"""The command line as a user meets it, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.forked import quick_python

from litune.cli import COMMANDS, main
from litune.store.store import FeatureStore

SNAPSHOT = Path(__file__).parent / "cli_options.txt"


def run(*args: str | Path, cwd: Path | None = None, python: str = "") -> subprocess.CompletedProcess[str]:
    command = [python or quick_python(), "-m", "litune", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_help_without_torch() -> None:
    code = (
        "import sys\n"
        "from litune.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as why:\n"
        "    assert not why.code, why.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for name in COMMANDS:
        assert name.split()[0] in found.stdout


def test_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["data"], ["data", "--help"]):
        with pytest.raises(SystemExit) as why:
            main(args)
        assert not why.value.code
        printed = capsys.readouterr().out
        for name in COMMANDS:
            if name.startswith("data "):
                assert f"\n  {name.removeprefix('data ')} " in printed
        assert "\n  tune" not in printed


def test_version() -> None:
    import litune

    assert run("--version", python=sys.executable).stdout.strip() == f"litune {litune.__version__}"


def test_options_are_a_reviewed_list() -> None:
    """A new flag is a reviewed difference: run scripts/write_docs.py to take it over."""
    from scripts.write_docs import options

    assert options() == SNAPSHOT.read_text(encoding="utf-8")


def test_the_way(photos: Path, class_tree: Path, tower_module: str, tiny_bert: Path, tmp_path: Path) -> None:
    """embed, tune, eval, search, classify, as typed."""
    typed = ("embed", photos, "--image-tower", tower_module, "--out", "s")
    done = run(*typed, cwd=tmp_path, python=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "24 images, 72 captions" in done.stderr
    done = run(
        "tune", "s", "--text-tower", f"hf:{tiny_bert}", "--out", "r", "--lang", "en", "--duration", "120pairs",
        "--batch-size", "6", "--precision", "float32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "18 images with 36 captions, 6 images held out; 20 steps of 6 pairs" in done.stderr
    done = run(
        "eval", "r", "--store", "s", "--split", "val", "--lang", "en", "--classes", class_tree, "--templates", "{}",
        "--templates", "a {} box", "--json", "e.json", "--features", "f", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "retrieval: 6 images, 12 captions" in done.stdout
    assert "chance" in done.stdout
    results = json.loads((tmp_path / "e.json").read_text())
    assert results["retrieval"]["chance"]["text_to_image"]["recall@1"] == pytest.approx(1 / 6)
    assert results["zero_shot"]["templates"] == ["{}", "a {} box"]
    assert results["zero_shot"]["images"] == 12
    assert "Ties count against the model" in results["zero_shot"]["definition"]
    done = run("search", "r", "s", "a red box", "--top", "3", "--sheet", "found.png", "--json", "f.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert Path(lines[0].split()[1]).is_file()
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    again = run("search", "r", "s", "a red box", "--sheet", "found.png", cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    done = run("classify", "r", class_tree / "red" / "box.png", "--labels", "red", "blue", "green", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert sum(float(line.split("%")[0]) for line in done.stdout.splitlines()[1:]) == pytest.approx(100, abs=0.3)

    # The same classification on a store made from the tree.
    run("embed", class_tree, "--image-tower", tower_module, "--out", "tree", cwd=tmp_path)
    run(
        "eval",
        "r",
        "--classes",
        "tree",
        "--templates",
        "{}",
        "--templates",
        "a {} box",
        "--json",
        "e2.json",
        cwd=tmp_path,
    )
    from_store = json.loads((tmp_path / "e2.json").read_text())
    assert from_store["zero_shot"]["accuracy"] == results["zero_shot"]["accuracy"]

    # A store of another tower is refused, both sides named.
    (tmp_path / "other.py").write_text(
        "from colortower import encode, preprocess\ndef make():\n    return encode, preprocess"
    )
    run("embed", class_tree, "--image-tower", "python:other:make", "--out", "o", cwd=tmp_path)
    refused = run("search", "r", "o", "a red box", cwd=tmp_path)
    assert refused.returncode == 2
    assert "python:other:make" in refused.stderr
    assert "python:colortower:make" in refused.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["embed", "nowhere", "--image-tower", "efficientnet-lite0", "--out", "s"], "nowhere does not exist"),
        (["embed", "empty.csv", "--image-tower", "efficientnet-lite0", "--out", "s"], "empty.csv is empty"),
        (["embed", "t.csv", "--image-tower", "x", "--out", "s", "--caption-column", "words"], "has no column 'words'"),
        (
            ["embed", "t.csv", "--image-tower", "eficientnet-lite0", "--out", "s"],
            "perhaps you meant 'efficientnet-lite0'",
        ),
        (["embed", "t.csv", "--image-tower", "efficientnet-lite0", "--out", "full"], "not a feature store of litune"),
        (["embed", "t.csv", "--image-tower", "x", "--out", "s", "--batch-size", "0"], "--batch-size is 0"),
        (["tune", "nowhere", "--text-tower", "minilm", "--out", "r"], "there is no feature store at nowhere"),
        (["eval", "nowhere", "--store", "s"], "there is no run at nowhere"),
        (["eval", "nowhere"], "nothing to evaluate"),
        (["search", "nowhere", "s", " "], "the query is empty"),
        (["search", "nowhere", "s", "x", "--device", "cpu"], "there is no feature store at s"),
        (["classify", "nowhere", "x.jpg", "--labels", "a", "b"], "there is no run at nowhere"),
        (["export", "nowhere", "--to", "onnx"], "there is no run at nowhere"),
        (["export", "nowhere", "--to", "hf", "--int8"], "--int8 is for --to onnx"),
        (["push", "nowhere", "me/run"], "nowhere is no finished run or export"),
        (["data", "inspect", "nowhere"], "nowhere does not exist"),
        (["data", "filter", "t.csv", "--out", "k.csv"], "no rule is set"),
        (["data", "filter", "t.csv", "--out", "k.txt", "--min-words", "1"], "ends with .parquet, .jsonl, .csv"),
        (["data", "filter", "t.csv", "--out", "k.csv", "--min-words", "3"], "the rules drop all 1 images"),
        (["data", "dedup", "t.csv", "--out", "d"], "name the tower of the features"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").touch()
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "t.csv").write_text("image,caption\na.png,x\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as why:
        main(args)
    assert why.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("litune: error: ")
    assert message in lines[-1]
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "nothing is made or lost"


def test_interrupted(store: FeatureStore, tiny_bert: Path, tmp_path: Path) -> None:
    """Ctrl-C ends a run with one line and 130; the same command finishes it."""
    import signal
    import time

    command = [
        quick_python(), "-m", "litune", "tune", str(store.path), "--text-tower", f"hf:{tiny_bert}", "--out", "r",
        "--duration", "900pairs", "--batch-size", "6", "--checkpoint-seconds", "0", "--evaluations", "0",
        "--precision", "float32",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "r" / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in message.splitlines()[-1]
    assert "Traceback" not in message
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_is_too_small_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("litune.cli.find_command", full)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "anything"])
    assert stop.value.code == 2
    assert "memory is too small for this model: end what else is on the GPU, or give --device cpu" in (
        capsys.readouterr().err
    )
