"""The command line as it is read: its pages of help, and what is said of one that can't be read."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from litune.arguments import EXAMPLES, GROUPS
from litune.cli import COMMANDS, main, parse
from litune.config import EvalConfig, FilterConfig
from litune.errors import ConfigError
from litune.settings import settings_of

TUNE = ["tune", "s", "--text-tower", "minilm", "--out", "r"]


def page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """What a page of help prints, on one line, without boxes."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("usage"))
    return " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_example_is_of_the_command_and_can_be_read(name: str) -> None:
    words = shlex.split(EXAMPLES[name])
    assert words[: 1 + len(name.split())] == ["litune", *name.split()]
    assert type(parse(words[1:])) is COMMANDS[name][0]


@pytest.mark.parametrize("name", COMMANDS)
def test_page_has_every_setting_with_its_docstring(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = COMMANDS[name][0]
    shown = page(capsys, monkeypatch, *name.split())
    assert f"usage: litune {name} " in shown
    assert EXAMPLES[name] in shown
    for doc in docs_in_source(config):
        assert " ".join(doc.split()) in shown
    for empty in ("None", "(default: )", "True", "False"):
        assert empty not in shown
    assert set(GROUPS.get(config, {})) <= {field.name for field in dataclasses.fields(config)}


def docs_in_source(config: type[Any]) -> list[str]:
    """The docstrings of a config's fields, and of those that it inherits."""
    bodies = [ast.parse(inspect.getsource(kind)).body[0].body for kind in config.__mro__[:-1]]  # type: ignore[attr-defined]
    return [
        doc.value.value
        for body in bodies
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
    ]


def test_defaults_switches_and_places(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = page(capsys, monkeypatch, "tune")
    assert "STORE [STORE...]" in shown
    assert "--batch-size N " in shown
    assert "(default: 256)" in shown
    assert "--mask-duplicates, --no-mask-duplicates " in shown
    assert "--no-overwrite" not in shown
    assert "--workers N Threads that decode pictures; 0: one per processor core. (default: 0)" in shown
    assert "{adamw,adafactor,lion}" in shown
    assert "RUN [RUN...]" in page(capsys, monkeypatch, "eval")


def test_switches_are_taken_both_ways() -> None:
    assert parse(TUNE).mask_duplicates
    assert parse([*TUNE, "--mask-duplicates"]).mask_duplicates
    assert not parse([*TUNE, "--no-mask-duplicates"]).mask_duplicates
    assert parse([*TUNE, "--shard"]).shard


def test_every_form_of_a_value() -> None:
    found = parse(
        [*TUNE, "more", "stores", "--lang", "en", "de", "--logit-scale", "-0.5", "--seed=3", "--batch_size", "8"]
    )
    assert found.more_stores == (Path("more"), Path("stores"))
    assert (found.lang, found.logit_scale, found.seed, found.batch_size) == (("en", "de"), -0.5, 3, 8)
    assert parse(["tune", "s", "--text-tower=x", "--out=o", "more"]).more_stores == (Path("more"),)
    assert parse(["eval", "r", "--store", "s", "--templates", "a {}", "--templates", "{}"]).templates == ("a {}", "{}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tuen"], "there is no command litune tuen (perhaps you meant 'tune')"),
        (["data", "filtr"], "there is no command litune data filtr (perhaps you meant 'filter')"),
        (["--helpp"], "there is no command litune --helpp"),
        (["tune"], "litune tune needs STORE, --text-tower and --out, as in: litune tune my-features"),
        (
            ["tune", "s", "--text-towr", "x", "--out", "r"],
            "has no option --text-towr (perhaps you meant '--text-tower'",
        ),
        ([*TUNE, "--no-shard"], "litune tune has no option --no-shard (perhaps you meant '--shard'"),
        ([*TUNE, "-b", "3"], "litune tune has no option -b"),
        ([*TUNE, "--batch-size"], "--batch-size needs a value"),
        ([*TUNE, "--batch-size", "--seed", "3"], "--batch-size needs a value"),
        ([*TUNE, "--batch-size", "many"], "--batch-size is 'many', it must be a whole number"),
        ([*TUNE, "--learning-rate", ""], "--learning-rate is '', it must be a number"),
        ([*TUNE, "--loss", "softmx"], "one of softmax, sigmoid (perhaps you meant 'softmax')"),
        ([*TUNE, "--flip=yes"], "--flip is a switch: write it without =yes"),
        (
            ["data", "filter", "p", "--out", "o", "--preset", "alig"],
            "one of yfcc, align, lit (perhaps you meant 'align')",
        ),
        (["data", "filter", "p", "--out", "o", "--preset", "x"], "--preset is 'x', it must be one of yfcc, align, lit"),
        (["embed", "a", "b", "--image-tower", "x", "--out", "o"], "litune embed takes PAIRS, 'b' is one too many"),
        (["search", "r", "s", "q", "more"], "litune search takes RUN, STORE and QUERY, 'more' is one too many"),
        (["classify", "r", "--labels", "a"], "litune classify needs IMAGE, as in"),
        (
            ["classify", "r", "i.png", "--labels", "a", "--labels", "b"],
            "--labels is given twice: put all its values behind one --labels",
        ),
        ([*TUNE, "--texts", ""], "--texts is '', it must be a path"),
        (["classify", "r", "a.png", "", "--labels", "x"], "IMAGE is '', it must be a path or a URL"),
        (["embed", "", "--image-tower", "x", "--out", "o"], "PAIRS is '', it must be a path or a URL"),
        ([*TUNE, "--split", "w\udcff"], "it is not UTF-8"),
        ([*TUNE, "--seed", "-1"], "--seed is -1, it must be at least 0"),
        ([*TUNE, "--logit-scale", "nan"], "--logit-scale is nan, it must be a number"),
        ([*TUNE, "--learning-rate", "inf"], "--learning-rate is inf, it must be finite"),
        (["data", "filter", "p", "--out", "o", "--vocabulary", "0"], "--vocabulary is 0, it must be at least 1"),
        (["data", "filter", "p", "--out", "o", "--max-aspect", "0.5"], "--max-aspect is 0.5, it must be at least 1"),
        (["data", "dedup", "s", "--out", "o", "--min-cosine", "2"], "--min-cosine is 2.0, it must be between -1 and 1"),
        (["inspect", "x", "--json", "."], "--json is '.', it is a folder, it must be a file"),
        (["classify", "r", "i.png", "--labels", "a", " "], "a label of --labels is empty"),
        (["quickstart", "x"], "litune quickstart takes no arguments, 'x' is one too many"),
    ],
)
def test_what_cannot_be_read_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("litune: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "None" not in printed.err


@pytest.mark.parametrize("argv", [[], ["tune", "--help"]])
def test_terminals_without_all_letters(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "litune", *argv], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"usage: litune" in done.stdout


def test_settings_are_those_of_python() -> None:
    """Every field is an option, the inherited ones as well, and what is said of its kind is so."""
    for config, _ in COMMANDS.values():
        assert [one.name for one in settings_of(config)] == [field.name for field in dataclasses.fields(config)]
    kinds = {one.name: one for one in settings_of(FilterConfig)}
    assert (kinds["min_side"].kind, kinds["split"].kind, kinds["split"].several) == (int, str, True)
    assert {one.name for one in settings_of(EvalConfig) if one.required} == {"run"}
    with pytest.raises(ConfigError, match="--batch-size is 1"):
        parse([*TUNE, "--batch-size", "1"])
