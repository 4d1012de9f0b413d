from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litune.evaluation import confusion as c


def test_counts_and_lines() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 2, 2, 1, 0, 3])
    counts = c.confusion(labels.astype(np.int8), predicted.astype(np.int8), 4)
    assert c.confusion(np.array([199], np.uint8), np.array([3], np.uint8), 200)[199, 3] == 1
    assert counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert c.commonest(counts, 10) == [(0, 2, 2), (1, 0, 1)]
    rows = c.class_rows(counts, ["cat", "dog", "cow|ox", "owl"])
    assert rows[0] == {
        "class": "cat",
        "images": 3,
        "accuracy": 0.3333,
        "precision": 0.5,
        "taken_for": "cow|ox",
        "taken_for_share": 0.6667,
    }
    assert (rows[2]["images"], rows[2]["accuracy"], rows[2]["precision"]) == (0, "", 0.0)
    assert next(csv.DictReader(io.StringIO(c.class_csv(rows))))["taken_for"] == "cow|ox"
    markdown = c.class_markdown(rows)
    assert "| cat | 3 | 33.3% | 50.0% | cow\\|ox (66.7%) |" in markdown


@pytest.mark.parametrize("classes", [2, 10, 41, 1000, 1300])
def test_picture(classes: int, tmp_path: Path) -> None:
    """Green on the diagonal, red where classes are taken for another, white elsewhere; two screens at most."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 4)
    predicted = np.where(random.random(len(labels)) < 0.7, labels, (labels + 1) % classes)
    file = tmp_path / "confusion.png"
    c.write_confusion(file, c.confusion(labels, predicted, classes), [f"class number {i}" for i in range(classes)])
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert max(picture.size) < 2000
    red, green, _ = np.moveaxis(pixels, -1, 0)
    assert (green > red + 40).sum() > 300
    assert (red > green + 40).sum() > 100


def test_many_classes_keep_rare_confusions_visible() -> None:
    """Where several classes share a pixel, one image that went wrong is still seen."""
    counts = 50 * np.eye(2000, dtype=int)
    counts[100, 1500] = 25
    field = np.asarray(c._field(counts / counts.sum(1, keepdims=True), counts, [str(i) for i in range(2000)]))
    assert (field[110, 170 + 750].astype(int) - field[110, 170 + 740].astype(int)).min() < -80
