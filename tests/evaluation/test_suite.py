"""Whole evaluations of a tiny run, through the command, against the model's own methods."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.conftest import COLORS, SHAPES, draw

import litune
from litune.cli import main
from litune.config import TuneConfig
from litune.errors import ConfigError, DataError, OutputExistsError, StoreError
from litune.evaluation import class_vectors as prompts
from litune.evaluation.evaluate import evaluate, run_names
from litune.evaluation.extras import tuned_on
from litune.evaluation.subject import Protocol, Subject
from litune.evaluation.suite import run_task
from litune.evaluation.task import Task
from litune.evaluation.tasks import find_tasks
from litune.image import encoding
from litune.image.pictures import open_rgb
from litune.pairs.benchmarks import read_set
from litune.pairs.reference import read_bytes
from litune.store import build
from litune.store.embed import embed
from litune.store.store import FeatureStore
from litune.tuning.tune import tune

QUIET: dict[str, Any] = {"calibration": False, "contamination": False}


@pytest.fixture
def sets(tmp_path: Path, class_tree: Path) -> Path:
    """A folder of sets: CIFAR-10's name on the colors, as class folders."""
    shutil.copytree(class_tree, tmp_path / "sets" / "cifar10" / "test")
    return tmp_path / "sets"


def by_hand(run: Path, tree: Path, templates: tuple[str, ...]) -> tuple[float, list[int]]:
    """Accuracy and predictions, image by image with the model's own classifier."""
    model = litune.load(run)
    names = sorted(COLORS)
    features = model.encode_image(sorted(tree.glob("*/*.png")))
    scores = model.zero_shot(names, templates).scores(features)
    own = np.repeat(np.arange(4), 3)
    best = scores.argmax(1).numpy()
    return float((best == own).mean()), best.tolist()


def test_a_named_set(run: Path, sets: Path, tmp_path: Path) -> None:
    found = evaluate(
        run, tasks="cifar10", data=sets, features=tmp_path / "f", template_set="bare", json=tmp_path / "e.json", **QUIET
    )
    (one,) = found["tasks"]
    expected, _ = by_hand(run, sets / "cifar10" / "test", ("{}",))
    assert one["values"]["accuracy"] == pytest.approx(expected)
    assert (one["images"], one["protocol"]["classes"], one["protocol"]["templates"]) == (12, 4, 1)
    assert one["chance"]["accuracy"] == 0.25
    assert "Ties count against the model" in one["definition"]
    assert json.loads((tmp_path / "e.json").read_text())["tasks"] == json.loads(json.dumps(found["tasks"]))
    for kept, option in (("e.json", "json"), ("f", "out")):
        with pytest.raises(OutputExistsError, match=f"choose another --{option}"):  # before anything is read
            evaluate("nowhere", tasks="cifar10", data=sets, **{option: tmp_path / kept})


def test_templates_of_the_set(run: Path, sets: Path, tmp_path: Path) -> None:
    own = prompts.dataset_templates("cifar10")
    for which, templates in (("clip", own), ("lit", (*own, "{}"))):
        (task,) = find_tasks(["cifar10"], sets)
        subject = Subject("r", run, litune.load(run))
        protocol = Protocol(template_set=which, calibration=False)  # type: ignore[arg-type]
        (one,) = run_task(task, subject, protocol, sets, tmp_path / "f")
        expected, best = by_hand(run, sets / "cifar10" / "test", templates)
        assert one.values["accuracy"] == pytest.approx(expected)
        assert one.predicted is not None
        assert one.predicted.tolist() == best
        assert one.class_names == sorted(COLORS)
        assert one.outcomes["accuracy"].mean() == one.values["accuracy"]
        assert one.groups["mean_per_class"].tolist() == np.repeat(np.arange(4), 3).tolist()
        assert one.pictures[0] == str(sets / "cifar10" / "test" / "blue" / "bar.png")
        assert len(one.hashes[0]) == 64
        assert subject.vectors.texts == 4 * len(templates)


def test_features_are_made_once(
    run: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"tasks": "cifar10", "data": sets, "features": tmp_path / "f", **QUIET}
    first = evaluate(run, **settings)["tasks"]
    assert "embedding" in capsys.readouterr().err
    monkeypatch.setattr(build, "encode_images", None)
    again = evaluate(run, **settings)["tasks"]
    assert again[0]["values"] == first[0]["values"]
    assert "embedding" not in capsys.readouterr().err
    monkeypatch.undo()
    draw("red", "ring").save(sets / "cifar10" / "test" / "red" / "more.png")  # another set now
    assert evaluate(run, **settings)["tasks"][0]["images"] == 13


def test_an_interrupted_set_goes_on(
    run: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH", 5)
    monkeypatch.setattr(build, "SHARD_SECONDS", 0.0)
    settings: dict[str, Any] = {"tasks": "cifar10", "data": sets, "features": tmp_path / "f", **QUIET}
    whole = build.encode_images
    with monkeypatch.context() as patch:

        def stopping(*args: Any, **kwargs: Any) -> Any:
            yield next(batches := whole(*args, **kwargs))
            batches.close()
            raise KeyboardInterrupt

        patch.setattr(build, "encode_images", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, **settings)
    capsys.readouterr()
    found = evaluate(run, **settings)["tasks"][0]
    assert "5 of 12 images are done" in capsys.readouterr().err
    assert found["values"] == evaluate(run, **settings | {"features": tmp_path / "g"})["tasks"][0]["values"]


def test_damaged_pictures(run: Path, sets: Path, tmp_path: Path) -> None:
    (sets / "cifar10" / "test" / "red" / "box.png").write_bytes(b"no picture")
    settings: dict[str, Any] = {"tasks": "cifar10", "data": sets, "features": tmp_path / "f", **QUIET}
    for _ in range(2):  # also from the features that are kept
        with pytest.raises(DataError, match=r"1 of 12 images can't be read .*damaged\.jsonl.*--max-damaged"):
            evaluate(run, **settings)
    found = evaluate(run, **settings, max_damaged=0.1)["tasks"][0]
    assert (found["images"], found["protocol"]["damaged"]) == (11, 1)
    for file in (sets / "cifar10" / "test").glob("*/*.png"):
        file.write_bytes(b"none at all")
    with pytest.raises(DataError, match=r"none of the 12 images can be read: .*damaged\.jsonl says why"):
        evaluate(run, **settings, max_damaged=1.0)


def write_tar(pictures: list[Path], root: Path) -> None:
    """The pictures as CLIP_benchmark's shard."""
    folder = root / "wds_cifar10" / "test"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, file in enumerate(pictures):
            label = str(sorted(COLORS).index(file.parent.name)).encode()
            for extension, data in (("png", file.read_bytes()), ("cls", label)):
                member = tarfile.TarInfo(f"s{i:07d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "nshards.txt").write_text("1")
    (folder.parent / "classnames.txt").write_text("\n".join(sorted(COLORS)))


def write_parquet(pictures: list[Path], root: Path) -> None:
    """The pictures as the hub's Parquet."""
    (root / "cifar10").mkdir(parents=True)
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in pictures]
    table = pa.table({"image": images, "label": [file.parent.name for file in pictures]})
    pa.parquet.write_table(table, root / "cifar10" / "test.parquet", row_group_size=5)


@pytest.mark.parametrize(("write", "layout"), [(write_tar, "webdataset"), (write_parquet, "Parquet")])
def test_pictures_in_archives_give_the_same(
    write: Callable[[list[Path], Path], None], layout: str, run: Path, sets: Path, tmp_path: Path
) -> None:
    """The same figures as files, from a cache that is a store like any other; reports show the pictures."""
    write(sorted((sets / "cifar10" / "test").glob("*/*.png")), tmp_path / "archives")
    settings: dict[str, Any] = {"tasks": "cifar10", "features": tmp_path / "f", **QUIET}
    both = [
        evaluate(run, data=data, out=tmp_path / "reports" / data.name, **settings)["tasks"][0]
        for data in (sets, tmp_path / "archives")
    ]
    assert both[0]["values"] == both[1]["values"]
    assert layout in both[1]["protocol"]["layout"]
    for data in ("sets", "archives"):
        page = (tmp_path / "reports" / data / "report.html").read_text()
        assert 'src="data:image/jpeg' in page
        assert "no picture" not in page
    caches = [FeatureStore(one["protocol"]["features"]) for one in both]
    assert caches[0].metadata["sha256"].equals(caches[1].metadata["sha256"])
    for cache in caches:
        data = [read_bytes(reference) for reference in cache.metadata["image_path"].to_pylist()]
        assert [hashlib.sha256(one).hexdigest() for one in data] == cache.metadata["sha256"].to_pylist()


def test_pictures_behind_addresses(run: Path, photos: Path, tmp_path: Path) -> None:
    """A table of pictures elsewhere gives what it gives of files."""
    with fsspec.open("memory://sets/README", "w") as file:
        file.write("made by the test")
    fsspec.filesystem("memory").put(f"{photos}/images/", "/sets/images/", recursive=True)
    rows = (photos / "captions.csv").read_text().splitlines()
    table = [rows[0], *(f"memory://sets/images/{row}" for row in rows[1:])]
    (tmp_path / "elsewhere.csv").write_text("\n".join(table))
    (tmp_path / "my.yaml").write_text(
        "- {name: here, table: photos/captions.csv, split: val}\n- {name: there, table: elsewhere.csv, split: val}\n"
    )
    settings: dict[str, Any] = {"tasks": str(tmp_path / "my.yaml"), "features": tmp_path / "f", **QUIET}
    here, there = evaluate(run, **settings, out=tmp_path / "o")["tasks"]
    assert here["values"] == there["values"]
    assert here["images"] == there["images"] == 6
    page = (tmp_path / "o" / "report.html").read_text()
    assert "no picture" not in page
    cache = FeatureStore(there["protocol"]["features"])
    assert cache.metadata["image_path"][0].as_py().startswith("memory://sets/images/")


def test_a_store_as_a_set(run: Path, sets: Path, tower_module: str, tmp_path: Path) -> None:
    embed(pairs=sets / "cifar10" / "test", image_tower=tower_module, out=tmp_path / "stored" / "cifar10")
    both = [
        evaluate(run, tasks="cifar10", data=data, features=tmp_path / "f", **QUIET)["tasks"][0]["values"]
        for data in (sets, tmp_path / "stored")
    ]
    assert both[0] == both[1]


def test_a_set_that_fails_leaves_the_others(
    run: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sets / "pets" / "strange").mkdir(parents=True)
    draw("red", "box").save(sets / "pets" / "strange" / "a.png")
    argv = [
        "eval",
        str(run),
        "--data",
        str(sets),
        "--features",
        str(tmp_path / "f"),
        "--json",
        str(tmp_path / "e.json"),
    ]
    argv += ["--template-set", "bare", "--no-calibration", "--tasks"]
    with pytest.raises(SystemExit) as ended:
        main([*argv, "available"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "cifar10: 12 images, 4 classes, templates: 1 (bare)" in said.out
    assert "litune: failed: pets: " in said.err
    found = json.loads((tmp_path / "e.json").read_text())
    assert [one["task"] for one in found["tasks"]] == ["cifar10"]
    assert [one["task"] for one in found["failed"]] == ["pets"]
    with pytest.raises(DataError, match="the class 'strange' is none of the 37 of pets"):  # nothing else to show
        evaluate(run, tasks="pets", data=sets, features=tmp_path / "f")


def test_what_was_published_stands_with_what_differs(run: Path, sets: Path, tmp_path: Path) -> None:
    (sets / "cifar10").rename(sets / "imagenet1k")
    for number, color in enumerate(COLORS):
        (sets / "imagenet1k" / "test" / color).rename(sets / "imagenet1k" / "test" / str(number))
    (one,) = evaluate(
        run, tasks="imagenet1k", data=sets, features=tmp_path / "f", template_set="bare", out=tmp_path / "o", **QUIET
    )["tasks"]
    said = (
        "not comparable with what was published: 12 images here, 50,000 there; templates here: bare, there: the set's"
    )
    assert one["extras"]["published"]["CLIP"] == {"accuracy": 0.762}
    assert one["extras"]["published_note"] == said
    assert f"\n\nimagenet1k: {said}.\n\n" in (tmp_path / "o" / "report.md").read_text()
    page = (tmp_path / "o" / "report.html").read_text()
    assert "12 images · 1,000 classes. Not comparable with what was published: 12 images here" in page
    written = json.loads((tmp_path / "o" / "results.json").read_text())["runs"]["run"][0]
    assert written["published_note"] == said


def test_yaml_and_several_runs(
    run: Path, sets: Path, photos: Path, tmp_path: Path, tune_config: TuneConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tune.run(dataclasses.replace(tune_config, out=other, duration="3steps", evaluations=0))
    (tmp_path / "my.yaml").write_text(
        "- name: colors\n  folder: sets/cifar10\n  templates: ['a {} thing']\n"
        "  classes: {red: Dark-red, green: green, blue: blue, yellow: gold}\n"
        "- name: pairs\n  table: photos/captions.csv\n  split: val\n"
    )
    found = evaluate(run, (other,), tasks=str(tmp_path / "my.yaml"), features=tmp_path / "f", by_lang=True, **QUIET)
    assert "colors: 'Dark-red' is asked for as 'darkred'" in capsys.readouterr().err
    assert list(found["runs"]) == ["run", "other"]
    rows = found["runs"]["other"]["tasks"]
    assert [row["name"] for row in rows] == ["colors", "pairs de", "pairs en"]
    assert rows[0]["protocol"]["template_set"] == "own"
    assert rows[0]["protocol"]["example"] in {f"a {name} thing" for name in ("darkred", "green", "blue", "gold")}
    low, high = rows[0]["interval"]["accuracy"]
    assert 0 <= low <= rows[0]["values"]["accuracy"] <= high <= 1
    assert low < high
    # The German captions alone, as the store's own evaluation has them.
    expected = evaluate(other, store=tune_config.store, split="val", lang="de")["retrieval"]
    assert rows[1]["protocol"]["captions"] == expected["captions"] == 6
    for way in ("text_to_image", "image_to_text"):
        for k, share in expected[way].items():
            assert rows[1]["values"][f"{way} {k}"] == pytest.approx(share)
            assert rows[1]["chance"][f"{way} {k}"] == pytest.approx(expected["chance"][way][k])


def test_a_stores_languages(run: Path, tune_config: TuneConfig) -> None:
    found = evaluate(run, store=tune_config.store, split="val", by_lang=True)["retrieval"]
    assert found["captions"] == 18
    assert found["by_lang"].keys() == {"de", "en"}
    for lang, one in found["by_lang"].items():
        alone = evaluate(run, store=tune_config.store, split="val", lang=lang)["retrieval"]
        assert {k: one[k] for k in one} == {k: alone[k] for k in one}
    german = evaluate(run, store=tune_config.store, split="val", lang="de", by_lang=True)["retrieval"]
    assert german["by_lang"] == {"de": found["by_lang"]["de"]}


def test_what_a_run_was_tuned_on(tune_config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tune_config.out
    tune.run(dataclasses.replace(tune_config, duration="20steps", evaluations=0))
    ((store, rows),), why = tuned_on(run)
    assert not why
    splits = np.array(store.metadata["split"].to_pylist())
    assert (splits[rows] == "train").all()
    assert len(rows) == 18
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"split": "val", "val_split": "train"}))
    ((_, rows),), _ = tuned_on(run)
    assert (splits[rows] == "val").all()
    (run / "config.json").write_text(json.dumps(config))
    shutil.move(tune_config.store, tmp_path / "moved")
    stores, why = tuned_on(run)
    assert not stores
    assert "is neither here nor beside the run" in why
    # By the path as it was typed, from the folder above the run; another store of that name is not taken for it.
    (run / "config.json").write_text(json.dumps(config | {"store": "moved"}))
    monkeypatch.chdir(tmp_path.parent)
    ((store, _),), _ = tuned_on(shutil.copytree(run, tmp_path / "runs" / "copied"))
    assert store.path == tmp_path / "moved"
    facts = json.loads((tmp_path / "moved" / "store.json").read_text())
    (tmp_path / "moved" / "store.json").write_text(json.dumps(facts | {"pairs": {"fingerprint": "x"}}))
    assert not tuned_on(tmp_path / "runs" / "copied")[0]


def test_bfloat16_texts(run: Path, sets: Path, tmp_path: Path) -> None:
    subjects = [Subject("r", run, litune.load(run), bfloat16) for bfloat16 in (False, True)]
    exact, fast = (subject.vectors(sorted(COLORS), ["a {}", "{}"]) for subject in subjects)
    assert fast.dtype == exact.dtype
    assert not (fast == exact).all()
    assert (fast * exact).sum(1).min() > 0.999


def test_settings_that_contradict(run: Path, sets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(run)
    with pytest.raises(ConfigError, match="as a task in YAML"):
        evaluate(run, classes=sets, out=tmp_path / "o")
    (tmp_path / "o" / "report").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="choose another --out"):
        evaluate(run, tasks="cifar10", data=sets, out=tmp_path / "o")
    with pytest.raises(StoreError, match="embed the images with"):
        module = tmp_path / "othertower.py"
        module.write_text((tmp_path / "colortower.py").read_text().replace("8)", "16)"))
        embed(pairs=sets / "cifar10" / "test", image_tower="python:othertower:make", out=tmp_path / "s" / "cifar10")
        evaluate(run, tasks="cifar10", data=tmp_path / "s", **QUIET)
    assert run_names([Path("a/x"), Path("b/x"), Path("c")]) == {"a/x": Path("a/x"), "b/x": Path("b/x"), "c": Path("c")}


def test_probes_and_reports(run: Path, sets: Path, tmp_path: Path) -> None:
    """All that the reports need, together."""
    pytest.importorskip("litune.evaluation.report")
    for color in COLORS:
        for i, shape in enumerate(SHAPES):
            (sets / "cifar10" / "train" / color).mkdir(parents=True, exist_ok=True)
            draw(color, shape, 40 + 2 * i).save(sets / "cifar10" / "train" / color / f"{shape}.png")
            draw(color, shape, 50).save(sets / "cifar10" / "test" / color / f"{shape}-50.png")
    found = evaluate(
        run, tasks="cifar10", data=sets, features=tmp_path / "f", kshot=2, probes=True, out=tmp_path / "report"
    )["tasks"][0]
    assert found["extras"]["ridge"]["train_images"] == 8
    assert len(found["extras"]["ridge"]["by_seed"]) == 3
    assert found["extras"]["knn"]["train_images"] == 12
    assert found["extras"]["calibration"]["images"] == 24
    assert found["extras"]["contamination"]["images"] == 24
    assert (tmp_path / "report" / "report.md").is_file()
    assert json.loads((tmp_path / "report" / "results.json").read_text())


def test_retrieval_by_language_of_one_task(run: Path, photos: Path, tmp_path: Path) -> None:
    task = Task("mine", "", kind="retrieval", metric="text_to_image recall@1", path=photos, splits=("val",), lang="en")
    (one,) = run_task(task, Subject("r", run, litune.load(run)), Protocol(), None, tmp_path / "f")
    assert one.lang == "en"
    assert len(one.captions) == 12
    assert one.owner is not None
    assert one.best_images is not None
    assert one.best_images.shape == (12, 5)
    assert one.groups["text_to_image recall@5"].tolist() == one.owner.tolist()
    features = FeatureStore(next((tmp_path / "f").iterdir()))
    assert features.metadata["position"].to_pylist() == list(range(6))
    assert open_rgb(read_bytes(read_set(photos, "retrieval").pictures[0])).size[0] in (48, 56)
