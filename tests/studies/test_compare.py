from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.test_docs import blocks

import litune
from litune.cli import main
from litune.config import EvalConfig, TuneConfig, to_json
from litune.errors import ConfigError, OutputExistsError, RunError, StoreError
from litune.studies.compare import agreed, compare, evaluate, markdown, percent, tune
from litune.studies.plan import Outline, read_plan

ROWS = """
[[row]]
name = "no head"
image_head = "none"
[[row]]
name = "Linear head"
image-head = "linear"
"""


@pytest.fixture
def short_run(tune_config: TuneConfig) -> TuneConfig:
    """The run of `tune_config` in a third of the steps."""
    return dataclasses.replace(tune_config, batch_size=18, evaluations=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of class folders are kept for one test."""
    monkeypatch.setattr("litune.evaluation.evaluate.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def base(short_run: TuneConfig) -> str:
    """[base] of a file: the settings of `short_run`."""
    defaults = {f.name: f.default for f in dataclasses.fields(TuneConfig)}
    given = {k: v for k, v in to_json(short_run).items() if v is not None and v != defaults[k]}
    given = {k: v for k, v in given.items() if k not in ("out", "seed")} | {"store": "store"}
    return "[base]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*parts: str) -> Path:
        file = tmp_path / "table.toml"
        file.write_text("\n".join(parts), encoding="utf-8")
        return file

    return write


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really tuned and evaluated, in order."""
    done: list[str] = []
    for command in (tune, evaluate):
        function: Callable[[Any], Any] = command.run

        def counting(config: Any, function: Callable[[Any], Any] = function) -> Any:
            if isinstance(config, EvalConfig):
                done.append(f"evaluate {config.run.name} {config.classes.name if config.classes else 'pairs'}")
            else:
                done.append(f"tune {config.out.name}")
            return function(config)

        monkeypatch.setattr(command, "run", counting)
    return done


def body(out: Path) -> dict[str, list[str]]:
    """The table's lines by their first cell."""
    lines = [x for x in (out / "table.md").read_text(encoding="utf-8").splitlines() if x.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_equals_tuning_and_evaluating_by_hand(
    base: str, write: Callable[..., Path], class_tree: Path, short_run: TuneConfig, tmp_path: Path
) -> None:
    """Two rows of two seeds: every figure, mean and spread, against `litune.tune` and `litune.eval`."""
    file = write(
        'title = "Heads"\nseeds = [0, 1]',
        base,
        '[eval]\ntemplates = "a {} box"\n[eval.classes]\ncolors = "classes"',
        ROWS,
    )
    out = tmp_path / "table"
    results = compare(file, out=out)
    assert results == json.loads((out / "results.json").read_text())
    assert not results["failed"]
    by_hand: dict[str, list[list[float]]] = {}
    for name, head in (("no head", "none"), ("Linear head", "linear")):
        for seed in (0, 1):
            run = tmp_path / f"{head}-{seed}"
            tune.run(dataclasses.replace(short_run, out=run, seed=seed, image_head=head))
            pairs = litune.eval(run, store=short_run.store, split="val", lang="en")["retrieval"]
            found = [pairs[way][f"recall@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 10)]
            classes = litune.eval(run, classes=class_tree, templates="a {} box")["zero_shot"]
            by_hand.setdefault(name, []).append([*found, classes["accuracy"]])
    table = body(out)
    assert table[""] == ["T→I R@1", "T→I R@10", "I→T R@1", "I→T R@10", "colors"]
    means = {name: np.round(100 * np.mean(values, axis=0), 1) for name, values in by_hand.items()}
    best = np.max(list(means.values()), axis=0)
    for name, values in by_hand.items():
        spread = 100 * np.std(values, axis=0, ddof=1)
        shown = [f"{m:.1f} ± {s:.1f}" for m, s in zip(means[name], spread, strict=True)]
        assert table[name] == [
            f"**{text}**" if m == b else text for text, m, b in zip(shown, means[name], best, strict=True)
        ]
        row = next(row for row in results["rows"] if row["name"] == name)
        for position, metric in enumerate(results["metrics"]):
            assert row["mean"][metric] == pytest.approx(np.mean(values, axis=0)[position])
            assert [run["figures"][metric] for run in row["runs"]] == [v[position] for v in values]
        assert row["settings"] == {"image_head": "none" if name == "no head" else "linear"}
        assert all(run["seconds"] > 0 for run in row["runs"])
    assert table["chance"] == ["16.7", "100.0", "16.7", "98.5", "25.0"]
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text.startswith("## Heads\n")
    assert "mean ± sample standard deviation over 2 seeds (0, 1)" in text
    assert "retrieval (val): 6 images, 12 captions; colors: 12 images, 4 classes" in text
    assert "store store" in text
    assert "batch-size 18" in text
    assert sorted(p.name for p in out.iterdir()) == [
        "linear-head-0", "linear-head-1", "no-head-0", "no-head-1", "results.json", "table.md",
    ]  # fmt: skip


def test_repeated_reuses_what_is_done(
    base: str, write: Callable[..., Path], class_tree: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(base, ROWS)
    results = compare(file, out=file.parent / "t")
    assert calls == [
        "tune no-head-0", "evaluate no-head-0 pairs", "tune linear-head-0", "evaluate linear-head-0 pairs",
    ]  # fmt: skip
    calls.clear()
    assert "reused" not in capsys.readouterr().err
    table = (file.parent / "t" / "table.md").read_bytes()
    assert compare(file, out=file.parent / "t") == results
    assert calls == []
    assert (file.parent / "t" / "table.md").read_bytes() == table
    assert "run 2 of 2, Linear head, seed 0: reused" in capsys.readouterr().err
    # More to measure: nothing is tuned, and only what is new is evaluated.
    compare(write(base, ROWS, '[eval.classes]\ncolors = "classes"'), out=file.parent / "t")
    assert calls == ["evaluate no-head-0 classes", "evaluate linear-head-0 classes"]
    calls.clear()
    # Another seed: only its runs.
    compare(write("seeds = [0, 3]", base, ROWS, '[eval.classes]\ncolors = "classes"'), out=file.parent / "t")
    assert {call.split()[1] for call in calls} == {"no-head-3", "linear-head-3"}


@pytest.mark.parametrize("at", ["tune linear-head-0", "evaluate linear-head-0 pairs"])
def test_interrupted_and_repeated(
    at: str, base: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, calls: list[str], tmp_path: Path
) -> None:
    """Whenever Ctrl-C comes, the table has what is done, and the same command does what is left."""
    file, out = write(base, ROWS), tmp_path / "t"
    command = tune if at.startswith("tune") else evaluate
    with monkeypatch.context() as patch:
        run: Callable[[Any], Any] = command.run

        def interrupted(config: Any) -> Any:
            if "linear" in str(config.out if command is tune else config.run):
                raise KeyboardInterrupt
            return run(config)

        patch.setattr(command, "run", interrupted)
        with pytest.raises(SystemExit) as why:
            main(["compare", str(file), "--out", str(out)])
        assert why.value.code == 130
    table = body(out)
    assert table["Linear head"] == ["not run yet", "", "", ""]
    assert float(table["no head"][0]) > 0
    calls.clear()
    results = compare(file, out=out)
    assert calls == ["tune linear-head-0", "evaluate linear-head-0 pairs"][at.startswith("evaluate") :]
    assert all(len(row["runs"]) == 1 for row in results["rows"])


def test_other_settings_are_refused(base: str, write: Callable[..., Path], calls: list[str], tmp_path: Path) -> None:
    out = tmp_path / "t"
    compare(write(base, ROWS), out=out)
    calls.clear()
    file = write(base, ROWS + "clip_norm = 0.5\n")
    both = r"linear-head-0 holds a run of 'Linear head' with other settings \(clip_norm was 1.0, is 0.5\).*--overwrite"
    with pytest.raises(RunError, match=both):
        compare(file, out=out)
    assert calls == []
    compare(file, out=out, overwrite=True)
    assert calls == ["tune linear-head-0", "evaluate linear-head-0 pairs"], "the other row is reused"


def test_a_failing_row_is_reported_and_others_go_on(
    base: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is not finite: in the table, on standard error and as exit code 1."""
    file = write(base, '[[row]]\nname = "hot"\nlogit_scale = 1000\n[[row]]\nname = "as it is"')
    with pytest.raises(SystemExit) as why:
        main(["compare", str(file), "--out", str(tmp_path / "t")])
    assert why.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("litune: failed: hot, seed 0: the loss is nan at step 0")
    table = body(tmp_path / "t")
    assert table["hot"][0].startswith("failed: the loss is nan")
    assert float(table["as it is"][0]) > 0
    assert (tmp_path / "t" / "table.md").read_text(encoding="utf-8") in printed.out
    results = json.loads((tmp_path / "t" / "results.json").read_text())
    assert [(one["row"], one["seed"]) for one in results["failed"]] == [("hot", 0)]


def test_on_the_command_line(
    base: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(write(base)), "--out", str(tmp_path / "t")])
    printed = capsys.readouterr().out
    assert "| base   |" in printed
    assert "±" not in printed.splitlines()[2], "one seed has no spread"
    assert "**" not in printed, "one row has no best"
    assert "one seed (0)" in printed


WRONG = [
    ("[[row]]\nimage_haed = 'linear'", "there is no setting 'image_haed': perhaps you meant 'image_head'"),
    ("[[row]]\nname = 'a'\nbatch_size = 1", "row 'a': --batch-size is 1, it must be at least 2"),
    ("[[row]]\nname = 'a'\nbatch_size = '6'", "row 'a': batch_size is '6', it must be a whole number"),
    ("[[row]]\nname = 'a'\nimage_head = 'big'", "row 'a': --image-head is 'big', it must be one of"),
    ("[[row]]\nname = 'a'\nstore = 'stroe'", "row 'a': store is 'stroe', but"),
    ("[[row]]\nname = 'a'\nseed = 3", "row 'a': seed is not set here: list them as seeds"),
    ("[[row]]\nname = 'a'\n[[row]]\nname = 'A'", "the row name 'A' is too like 'a'"),
    ("[[row]]\nname = '?'", "the row name '?' has no letter"),
    ("[grid]\nclip_norm = 1", "[grid] clip_norm is 1, it must be a list of values"),
    ("[grid]\nclip_norm = [1, 2]\n[[row]]\nclip-norm = 3", "clip_norm stands in [grid] and in a [[row]]"),
    ("[eval]\nspilt = 'val'", "there is no setting 'spilt': perhaps you meant 'split'"),
    ("[eval.classes]\ncolors = 'nowhere'", "eval.classes.colors is 'nowhere', but"),
    ("[rows]", "there is no setting 'rows': perhaps you meant 'row'"),
    ("[[row]", "is not valid TOML"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_files(wrong: str, message: str, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    file = write("[base]\nstore = 'store'\ntext_tower = 'minilm'", wrong)
    with pytest.raises(ConfigError) as why:
        compare(file, out=tmp_path / "t")
    assert message in str(why.value)
    assert str(file) in str(why.value)
    assert not (tmp_path / "t").exists()


def test_wrong_at_the_top(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    base = "[base]\nstore = 'store'\ntext_tower = 'minilm'"
    for wrong, message in (
        ("seeds = [1, 1]", r"seeds is \[1, 1\]"),
        ("metrics = ['text_to_image.recall@2']", "perhaps you meant 'text_to_image.recall@5'"),
        ("metrics = ['zero_shot.cats']", "there is no metric 'zero_shot.cats'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_plan(write(wrong, base), tmp_path / "t")
    with pytest.raises(ConfigError, match="row 'base': text_tower is not set"):
        read_plan(write("[base]\nstore = 'store'"), tmp_path / "t")
    with pytest.raises(ConfigError, match="there is no file"):
        read_plan(tmp_path / "nowhere.toml", tmp_path / "t")


def test_bad_input_ends_with_2_before_any_run(
    base: str, write: Callable[..., Path], tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as why:
        main(["compare", str(write(base, ROWS + "max_tokens = 1")), "--out", str(tmp_path / "t")])
    assert why.value.code == 2
    assert "row 'Linear head': --max-tokens is 1" in capsys.readouterr().err
    with pytest.raises(StoreError, match=r"row 'Linear head' can't be evaluated: .* has no split 'vla'"):
        compare(write(base, ROWS + "[row.eval]\nsplit = 'vla'"), out=tmp_path / "t")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(OutputExistsError, match="holds no comparison"):
        compare(write(base, ROWS), out=tmp_path / "full")
    assert calls == []


def test_grid_is_the_product(write: Callable[..., Path], tmp_path: Path) -> None:
    """Rows × values × values, named by what varies; lists are values; every seed goes through all rows."""
    (tmp_path / "store").mkdir()
    file = write(
        "seeds = [4, 5]",
        "[base]\nstore = 'store'\ntext-tower = 'minilm'\nlang = ['fr']\nbatch_size = 8",
        "[grid]\nbatch-size = [16, 32]\nlang = ['en', ['en', 'de']]",
        "[[row]]\nname = 'plain'\n[[row]]\nimage_head = 'linear'",
    )
    plan = read_plan(file, tmp_path / "t")
    names = [
        f"{row}, batch-size {size}, lang {lang}"
        for row in ("plain", "image-head linear")
        for size in (16, 32)
        for lang in ("en", "en de")
    ]
    assert [row.name for row in plan.rows] == names
    assert [(run.row, run.tune.seed) for run in plan.runs] == [(name, seed) for seed in (4, 5) for name in names]
    tuned = plan.runs[7].tune
    assert (tuned.image_head, tuned.batch_size, tuned.lang) == ("linear", 32, ("en", "de"))
    assert tuned.store == (tmp_path / "store").resolve()
    assert tuned.out == tmp_path / "t" / "image-head-linear-batch-size-32-lang-en-de-4"


def test_what_is_measured(write: Callable[..., Path], tmp_path: Path) -> None:
    """By default a row's own held-out split; what a row sets goes before what all set, set of classes by set."""
    for name in ("store", "other", "colors", "colors-of-other", "shapes"):
        (tmp_path / name).mkdir()
    file = write(
        "[base]\nstore = 'store'\ntext_tower = 'minilm'\nlang = 'en'\nval_split = 'held'\ndevice = 'cpu'",
        "[eval]\ntemplates = ['a {}']\n[eval.classes]\ncolors = 'colors'\nshapes = 'shapes'",
        "[[row]]\nname = 'a'",
        "[[row]]\nname = 'b'\n[row.eval]\nstore = 'other'\nlang = 'de'\n[row.eval.classes]\ncolors = 'colors-of-other'",
    )
    plan = read_plan(file, tmp_path / "t")
    root = tmp_path.resolve()
    a, b = plan.runs
    shared: Any = {"templates": ("a {}",), "device": "cpu"}
    assert a.evaluations == {
        "retrieval": EvalConfig(run=a.tune.out, store=root / "store", split="held", lang=("en",), **shared),
        "zero_shot.colors": EvalConfig(run=a.tune.out, classes=root / "colors", **shared),
        "zero_shot.shapes": EvalConfig(run=a.tune.out, classes=root / "shapes", **shared),
    }
    assert b.evaluations["retrieval"] == EvalConfig(run=b.tune.out, store=root / "other", lang=("de",), **shared)
    assert b.evaluations["zero_shot.colors"].classes == root / "colors-of-other"
    assert b.evaluations["zero_shot.shapes"].classes == root / "shapes"
    assert plan.metrics[-2:] == ("zero_shot.colors", "zero_shot.shapes")


def test_table_of_written_results() -> None:
    """Spread against numpy, ties for the best, seeds that failed, selections that differ: a table by hand."""
    random = np.random.default_rng(0)
    shares = random.uniform(size=3)
    metric = "zero_shot.a|b"
    run: Callable[[int], dict[str, Any]] = lambda seed: {"seed": seed, "figures": {}, "measured_on": {metric: {}}}  # noqa: E731
    mean, sd = float(np.mean(shares)), float(np.std(shares, ddof=1))
    text = markdown(
        {
            "title": "",
            "seeds": [0, 1, 2],
            "metrics": [metric],
            "same_settings": {"lang": ["en"]},
            "rows": [
                {"name": "x", "mean": {metric: mean}, "sd": {metric: sd}, "runs": [run(0), run(1), run(2)]},
                {"name": "y", "mean": {metric: mean + 1e-6}, "sd": {}, "runs": [run(0), {"failed": "why"}]},
                {"name": "z", "mean": {}, "sd": {}, "runs": [{"failed": "w" * 80}]},
            ],
            "chance": {},
            "measured_on": {},
            "failed": [{"row": "z", "seed": 1, "reason": "w" * 80}],
        }
    )
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")] for line in lines[:5]]
    assert cells[0] == ["", "ab"]
    assert cells[2] == ["x", f"**{percent(mean)} ± {percent(sd)}**"]
    assert cells[3] == ["y (1 of 3 seeds)", f"**{percent(mean)}**"]
    assert cells[4] == ["z", "failed: …"]
    assert len({len(line) for line in lines[:5]}) == 1, "aligned"
    assert "a|b: not the same for all rows" in text
    assert "Failed: z, seed 1: " + "w" * 80 in text


def test_agreed() -> None:
    tables = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4}]
    assert agreed(tables) == {"a": 1, "c": 3}
    assert agreed(tables, everywhere=True) == {"a": 1}
    assert agreed([]) == {}


def test_designs_are_toml() -> None:
    designs = Path(__file__).parents[2] / "benchmarks" / "designs"
    files = sorted(designs.glob("*.toml"))
    assert [file.name for file in files] == ["heads.toml", "locking.toml", "losses.toml", "towers.toml"]
    for file in files:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        assert len(set(found["seeds"])) >= 2  # for a spread
        assert found.keys() <= {field.name for field in dataclasses.fields(Outline)}


def test_the_file_in_the_docs(write: Callable[..., Path], tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs" / "compare.md"
    for folder in ("my-features", "clothing/test"):
        (tmp_path / folder).mkdir(parents=True)
    plan = read_plan(write(blocks(guide.read_text(encoding="utf-8"), "toml")[0]), tmp_path / "t")
    assert [row.name for row in plan.rows] == ["no head", "linear head"]
    assert len(plan.runs) == 6
