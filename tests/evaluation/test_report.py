from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import draw

from litune.errors import ConfigError, DataError, OutputExistsError
from litune.evaluation.calibration import calibrate
from litune.evaluation.intervals import interval, paired
from litune.evaluation.published import published
from litune.evaluation.report import write_report
from litune.evaluation.result import Result

CLASSES = ("red", "green", "blue & <b>bold</b>", "yellow")


def classified(folder: Path, skill: float, seed: int, task: str = "imagenet1k") -> Result:
    """A classifier of 60 pictures that is right about as often as `skill` says."""
    random = np.random.default_rng(seed)
    labels = np.arange(60) % 4
    logits = 3 * random.normal(size=(60, 4))
    logits[np.arange(60), labels] += 8 * skill
    predicted = logits.argmax(1)
    hits = (predicted == labels).astype(float)
    pictures = []
    for i, label in enumerate(labels):
        file = folder / f"{i}.png"
        if not file.exists():
            draw(("red", "green", "blue", "yellow")[label], "box").save(file)
        pictures.append(str(file))
    per_class = [hits[labels == c].mean() for c in range(4)]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Result(
        task=task,
        kind="classification",
        metric="accuracy",
        values={"accuracy": float(hits.mean()), "mean_per_class": float(np.mean(per_class))},
        chance={"accuracy": 0.25, "mean_per_class": 0.25},
        definition="accuracy: the share of images that are right.",
        images=60,
        protocol={"templates": 2, "canonicalised": True, "set": str(folder)},
        outcomes={"accuracy": hits, "mean_per_class": hits},
        groups={"mean_per_class": labels},
        keys=[f"picture {i}" for i in range(60)],
        pictures=pictures,
        hashes=[""] * 60,
        class_names=list(CLASSES),
        labels=labels,
        predicted=predicted,
        confidence=shares.max(1),
        captions=[],
        owner=None,
        best_images=None,
        extras={"calibration": calibrate(logits, labels), "seconds": 1.5},
    )


def retrieved(folder: Path, lang: str = "") -> Result:
    """Two captions for each of 30 images; the first of each finds it, the second does not."""
    owner = np.repeat(np.arange(30), 2)
    found = (owner[:, None] + np.arange(5)) % 30
    found[1::2] = (found[1::2] + 7) % 30
    hits = (found[:, 0] == owner).astype(float)
    return Result(
        task="coco",
        kind="retrieval",
        metric="text_to_image recall@1",
        values={"text_to_image recall@1": 0.5, "image_to_text recall@1": 1.0},
        chance={"text_to_image recall@1": 1 / 30, "image_to_text recall@1": 0.07},
        definition="recall@k: the share of captions that find their image.",
        images=30,
        protocol={"lang": lang},
        outcomes={"text_to_image recall@1": hits, "image_to_text recall@1": np.ones(30)},
        groups={"text_to_image recall@1": owner},
        keys=[f"picture {i}" for i in range(30)],
        pictures=[str(folder / f"{i}.png") for i in range(29)] + [str(folder / "gone.png")],
        hashes=[""] * 30,
        class_names=[],
        labels=None,
        predicted=None,
        confidence=None,
        captions=[f"caption “{i}” <script>" for i in range(60)],
        owner=owner,
        best_images=found,
        lang=lang,
        extras={
            "contamination": {
                "images": 30,
                "tuned_images": 100,
                "hashes_compared": 30,
                "features_compared": 30,
                "exact": [{"image": "picture 3", "tuned": "t3"}],
                "near": [{"image": "picture 4", "tuned": "t9", "cosine": 0.97}],
                "warning": "2 of 30 evaluation images were tuned on",
                "definition": "…",
            }
        },
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Result]]]:
    """The report of two runs: one better than the other on a classification, equal on a retrieval in two languages."""
    folder = tmp_path_factory.mktemp("report")
    runs = {
        name: [classified(folder, skill, seed), retrieved(folder), retrieved(folder, "de")]
        for name, skill, seed in (("weak", 0.2, 0), ("strong & <i>", 1.0, 1))
    }
    write_report(folder / "out", runs, overwrite=False)
    return folder / "out", runs


def test_json_has_every_figure(written: tuple[Path, dict[str, list[Result]]]) -> None:
    out, runs = written
    results = json.loads((out / "results.json").read_text())
    weak, strong = runs["weak"][0], runs["strong & <i>"][0]
    entry = results["runs"]["weak"][0]
    got = entry["figures"]["mean_per_class"]
    assert got["value"] == weak.values["mean_per_class"]
    expected = interval(weak.outcomes["mean_per_class"], weak.groups["mean_per_class"], True)
    assert got["interval"] == pytest.approx(expected)
    assert entry["published_percent"]["CLIP"] == {"accuracy": 76.2}
    assert results["runs"]["weak"][2]["published_percent"] == {}  # those in German are not comparable
    difference = next(d for d in results["differences"] if d["task"] == "imagenet1k" and d["figure"] == "accuracy")
    pair = paired(strong.outcomes["accuracy"], weak.outcomes["accuracy"])
    assert difference["difference"] == pytest.approx(strong.values["accuracy"] - weak.values["accuracy"])
    assert difference["interval"] == pytest.approx([pair["low"], pair["high"]])
    assert difference["clear"]
    assert not any(d["clear"] for d in results["differences"] if d["task"] == "coco")


def test_markdown_table(written: tuple[Path, dict[str, list[Result]]]) -> None:
    out, runs = written
    text = (out / "report.md").read_text()
    weak = runs["weak"][0]
    low, high = interval(weak.outcomes["accuracy"])
    cell = f"{100 * weak.values['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})"
    assert f"| **weak** | {cell} | 50.0 " in text
    assert re.search(r"\| CLIP \| 76\.2 \|  \|", text)
    assert re.search(r"\| LiT L/16, public CC12M\+YFCC \| 75\.7 \| 31\.2 \| 48\.5 \|", text)
    assert "- weak, coco: 2 of 30 evaluation images were tuned on" in text


class Page(HTMLParser):
    """What a page refers to, its headings and tables, and whether every element is closed."""

    EMPTY = ("meta", "img", "br", "i", "circle", "rect", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.targets: set[str] = set()
        self.tags: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        self.addresses += [str(found[name]) for name in ("src", "href", "srcset", "data") if name in found]
        if found.get("id"):
            self.targets.add(str(found["id"]))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_alone(written: tuple[Path, dict[str, list[Result]]]) -> None:
    """Well-formed; no address but its own parts and inlined pictures; names of people are escaped."""
    out, _ = written
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    for address in page.addresses:
        assert address.startswith(("data:image/", "#"))
        assert address[0] != "#" or address[1:] in page.targets
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<script" not in text
    assert "blue &amp; &lt;b&gt;bold" in text
    assert "strong &amp; &lt;i&gt;" in text
    names = [tag for tag, _ in page.tags]
    assert "html" in names
    assert all(found.get("alt") for tag, found in page.tags if tag == "img")
    assert names.count("caption") == names.count("table") >= 4
    assert all(found.get("scope") for tag, found in page.tags if tag == "th")
    scrolling = [found for _, found in page.tags if found.get("class") == "scroll"]
    assert scrolling
    assert all(found["tabindex"] == "0" and found["aria-label"] for found in scrolling)
    assert text.count("data:image/jpeg") > 20
    assert "no picture" in text  # the file that is gone
    assert 'class="warning"' in text


def test_files_beside(written: tuple[Path, dict[str, list[Result]]]) -> None:
    out, _ = written
    names = sorted(file.name for file in out.iterdir())
    stems = ("imagenet1k-strong-i", "imagenet1k-weak")
    ends = ("-classes.csv", "-classes.md", "-confusion.png")
    assert names == sorted([s + e for s in stems for e in ends] + ["report.html", "report.md", "results.json"])
    with Image.open(out / "imagenet1k-weak-confusion.png") as picture:
        assert picture.format == "PNG"


def test_runs_on_other_examples_are_not_compared(tmp_path: Path) -> None:
    one = classified(tmp_path, 0.5, 0)
    other = replace(one, keys=["another", *one.keys[1:]])
    write_report(tmp_path / "out", {"a": [one], "b": [other]}, overwrite=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["differences"], results["examples_differ"]) == ([], ["imagenet1k"])
    assert "Not compared" in (tmp_path / "out" / "report.md").read_text()


def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old report stays until the new one is whole; other folders are never removed; a failure leaves no trace."""
    out, result = tmp_path / "out", classified(tmp_path, 0.5, 0, task="own set")
    write_report(out, {"a": [result]}, overwrite=False)
    before = (out / "results.json").read_bytes()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_report(out, {"b": [result]}, overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr("litune.evaluation.report.write_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(out, {"b": [result]}, overwrite=True)
    assert (out / "results.json").read_bytes() == before
    assert not list(tmp_path.glob(".*tmp"))
    write_report(out, {"b": [result]}, overwrite=True)
    assert list(json.loads((out / "results.json").read_text())["runs"]) == ["b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text('{"kept": 1}')
    with pytest.raises(OutputExistsError, match="not a report"):
        write_report(tmp_path / "mine", {"a": [result]}, overwrite=True)


def test_refuses(tmp_path: Path) -> None:
    result = classified(tmp_path, 0.5, 0)
    with pytest.raises(ConfigError, match="no results"):
        write_report(tmp_path / "out", {"a": []}, overwrite=False)
    with pytest.raises(DataError, match="no figure 'top1'"):
        write_report(tmp_path / "out", {"a": [replace(result, metric="top1")]}, overwrite=False)
    with pytest.raises(DataError, match="60 outcomes and 3 groups"):
        write_report(tmp_path / "out", {"a": [replace(result, groups={"accuracy": np.zeros(3)})]}, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_published_figures() -> None:
    """Some cells of the published table; none for other languages and sets."""
    assert published("imagenet1k")["LiT g/14, private 4B (v3)"] == {"accuracy": 85.2}
    assert published("imagenet-a")["ALIGN"] == {"accuracy": 75.8}
    assert published("coco").keys() == {"LiT g/14, private 4B (v3)", "LiT L/16, public CC12M+YFCC"}
    assert published("imagenet1k", "de") == published("my own") == {}
    assert published("vtab-natural")["LiT g/14, private 4B (v1)"] == {"accuracy": 72.6}
