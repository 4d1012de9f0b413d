"""Two processes under torchrun do what one does: tune, embed, eval, and their errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tests.conftest import COLORS, SHAPES, draw
from tests.forked import quick_python, wait_until_gone

from litune import distributed
from litune.cli import main
from litune.config import EmbedConfig, TuneConfig
from litune.errors import DataError, LituneError, StoreError
from litune.evaluation import subject
from litune.evaluation.evaluate import evaluate
from litune.image import encoding
from litune.model.run_folder import load_tensors
from litune.pairs.pairs import Pairs
from litune.store import build
from litune.store.embed import embed
from litune.store.store import FeatureStore
from litune.tuning.output import prepare_run
from litune.tuning.tune import tune

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# Batches of 7 of 18 pairs, some with equal captions, so that masks count and ranks have 4 and 3 pairs.
COMMON = {
    "lang": ["en"], "duration": "28pairs", "batch_size": 7, "evaluations": 2, "learning_rate": 1e-3,
    "precision": "float32", "dropout": 0.0, "feature_dropout": 0.0, "device": "cpu", "start": "random",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    # Strongly shrunk, its scores are near ties: recalls may differ by a rounding.
    "fitted": {"start": "fit", "logit_scale": 0.0, "learning_rate": 1e-5, "evaluations": 0},
    "sigmoid": {"loss": "sigmoid", "logit_bias": -2.0},
    "cached": {"micro_batch": 2, "optimizer": "adafactor"},
    "sharded": {"shard": True, "micro_batch": 2, "clip_norm": 0.05},
    "negatives": {"image_negatives": 5, "image_to_text": 0.3},
    "fields": {"fields": ["title", "tags"], "store": "fields", "lang": []},
    "mixed": {"more_stores": ["fields"], "mix": ["2", "1"], "lang": [], "image_negatives": 3},
    "turns": {"more_stores": ["fields"], "mix": ["alternate"], "lang": [], "texts": ["texts.parquet"]},
    "pixels": {
        "locking": "uU",
        "image_tower": "timm:test_vit?init=random&size=64",
        "micro_batch": 3,
        "max_damaged": 0.2,
    },
}
EMBED = {"pairs": "photos", "image_tower": "python:colortower:make", "batch_size": 5, "max_damaged": 0.2}
TASKS = {"tasks": "sets.yaml", "kshot": 2, "by_lang": True, "max_damaged": 0.1, "device": "cpu"}
SETS = """
- {name: colors, folder: classes, train: training}
- {name: rotten, folder: rotten}
- {name: torn, folder: torn}
- {name: pairs, table: photos/captions.csv, split: val}
"""
FAILED = {
    "rotten": r"2 of 8 images can't be read .*damaged\.jsonl names them",
    "torn": "the cable of rank [01] is torn",
}
"""The sets that fail: one on all ranks alike, one on the last rank alone."""
WRONG: list[dict[str, Any]] = [
    {"store": "nowhere", "out": "new"},
    {"out": "two/softmax"},
    {"out": "unfinished", "seed": 1},
    {"batch_size": 2, "out": "new", "lang": ["fr"]},
]


def torchrun(*args: str | Path, cwd: Path, python: str = "") -> subprocess.Popen[str]:
    """A launch of two ranks."""
    python = python or quick_python()
    path = os.pathsep.join([str(cwd), *sys.path])
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [python, *TORCHRUN, *map(str, args)], cwd=cwd, env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_when(process: subprocess.Popen[str], ready: Any) -> None:
    """Kill -9 the whole launch as soon as `ready()`."""
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]  # it has ended by itself
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for killed in (process.pid, *map(int, ranks)):  # torchrun first: it would start or end the others
        os.kill(killed, signal.SIGKILL)
    process.communicate()
    wait_until_gone()


def work(out: str) -> dict[str, Any]:
    """What is done alike by one process and by each of two."""
    torch.set_num_threads(1)  # of a few cores, two processes spin for none
    subject.CHUNK, encoding.BATCH = 3, 5
    found: dict[str, Any] = {"errors": []}
    for name, settings in VARIANTS.items():
        tune(**{"store": "store", "text_tower": "hf:bert", **COMMON, **settings, "out": f"{out}/{name}"})
    store = embed(**EMBED, out=f"{out}/store")
    found["rows"] = len(store)
    # The same run in both, as weights differ in their last bits.
    where = {"json": f"{out}/eval.json", "features": f"{out}/of-classes"}
    found["eval"] = evaluate("two/softmax", store="store", classes="classes", device="cpu", **where)
    encode = build._encode

    def torn(config: EmbedConfig, pairs: Pairs, part: range, *args: Any) -> float:
        if Path(config.pairs).name == "torn" and part.stop == len(pairs):
            raise DataError(f"the cable of rank {distributed.rank()} is torn")
        return encode(config, pairs, part, *args)

    build._encode = torn
    measured = evaluate("two/softmax", **TASKS, features=f"{out}/features", out=f"{out}/report")
    found |= {"tasks": measured["tasks"], "failed": measured["failed"]}
    if distributed.world_size() > 1:
        for settings in WRONG:
            try:
                tune(**{"store": "store", "text_tower": "hf:bert", **COMMON, **settings})
            except LituneError as why:
                found["errors"].append(f"{type(why).__name__}: {why}")
    return found


@pytest.fixture
def place(photos: Path, tower_module: str, tiny_bert: Path, tmp_path: Path) -> Path:
    """A folder with stores, pictures and a text tower, all under short names."""
    shutil.copytree(tiny_bert, tmp_path / "bert")
    embed(pairs="photos", image_tower=tower_module, out="store")
    with open("fields.jsonl", "w", encoding="utf-8") as file:
        for i, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
            words = {"tags": f"{color} {shape}"} | ({"title": f"the {shape}"} if i % 3 == 0 else {})
            file.write(json.dumps({"image": f"{color}-{shape}-0.png", "title": None, **words}) + "\n")
    embed(
        pairs="fields.jsonl", images="photos/images", image_tower=tower_module, out="fields",
        caption_column=("title", "tags"),
    )  # fmt: skip
    stores = ["store"] * 24 + ["fields"] * 12
    texts = {"store": stores, "row": [*range(24), *range(12)], "caption": [f"the {one} box" for one in stores]}
    pa.parquet.write_table(pa.table(texts), "texts.parquet")
    for color in COLORS:
        (tmp_path / "classes" / color).mkdir(parents=True)
        for size in range(40, 50):
            draw(color, "box", size).save(tmp_path / "classes" / color / f"{size}.png")
        (tmp_path / "training" / color).mkdir(parents=True)
        for shape in SHAPES:
            draw(color, shape).save(tmp_path / "training" / color / f"{shape}.png")
        for name in ("rotten", "torn"):
            (tmp_path / name / color).mkdir(parents=True)
            for size in (40, 50):
                draw(color, "box", size).save(tmp_path / name / color / f"{size}.png")
    for size in (40, 50):
        (tmp_path / "rotten" / "red" / f"{size}.png").write_bytes(b"<html>")
    (tmp_path / "sets.yaml").write_text(SETS)
    return tmp_path


def test_two_ranks_are_as_one(place: Path) -> None:
    """Losses to 1e-5 of their size, each tensor of weights to 1e-5 of its norm and a 50th of a step; the rest equal."""
    prepare_run(TuneConfig(Path("store"), "hf:bert", Path("unfinished"), **COMMON))  # type: ignore[arg-type]
    for name in ("red-bar-1.png", "yellow-bar-0.png"):
        (place / "photos" / "images" / name).write_bytes(b"<html>")
    process = torchrun(__file__, cwd=place)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Warning" not in said
    one, (two, other) = work("one"), (json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert two == other
    for name in VARIANTS:
        assert said.count(f"wrote two/{name}") == 1
        check_runs(place / "one" / name, place / "two" / name)
    check_stores(FeatureStore("one/store"), FeatureStore("two/store"))
    assert two["rows"] == 22
    assert two["eval"] == json.loads((place / "one" / "eval.json").read_text())
    assert one["eval"]["retrieval"]["captions"] == 72
    assert json.loads((place / "two" / "eval.json").read_text()) == two["eval"]
    check_tasks(place, one["tasks"], two["tasks"])
    for failed, rank in ((one["failed"], 0), (two["failed"], 1)):
        assert [one["task"] for one in failed] == [*FAILED]
        for why, expected in zip(failed, FAILED.values(), strict=True):
            assert re.search(expected.replace("[01]", str(rank)), why["reason"])
    no_store, finished, differing, no_lang = two["errors"]
    assert no_store.startswith("StoreError: there is no feature store at nowhere")
    assert finished.startswith("OutputExistsError: two/softmax holds a finished run")
    assert "another config (seed was 0, is 1)" in differing
    assert "no captions in 'fr'" in no_lang
    assert not Path("new").exists()


def check_runs(one: Path, two: Path) -> None:
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(logs[0]) == len(logs[1]) >= 4
    for a, b in zip(*logs, strict=True):
        assert a["step"] == b["step"]
        assert a.get("val") == b.get("val")
        for figure in {"loss", "scale", "bias"} & a.keys():
            assert b[figure] == pytest.approx(a[figure], rel=1e-5)
        assert b.get("sources", {}).keys() == a.get("sources", {}).keys()
        for name, source in a.get("sources", {}).items():
            assert b["sources"][name] == (pytest.approx(source, rel=1e-5) if "loss" in source else source)
    weights = [load_tensors(run / "model.safetensors")[0] for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, a in weights[0].items():
        # A softmax over keys does not see their common bias: its gradient is rounding, which Adam blows up to a step.
        if not name.endswith(("key.bias", "qkv.bias")):
            assert np.linalg.norm(a - weights[1][name]) <= 1e-5 * np.linalg.norm(a) + 2e-5, (one.name, name)


def check_tasks(place: Path, one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """Equal figures of named sets, from stores that are equal, too; one report."""
    whole = [(place / out / "features").glob("[cp]*") for out in ("one", "two")]  # of colors and pairs
    stores = [sorted(found) for found in whole]
    assert [store.name for store in stores[0]] == [store.name for store in stores[1]]
    for a, b in zip(*stores, strict=True):
        check_stores(FeatureStore(a), FeatureStore(b))
    assert [row["name"] for row in one] == ["colors", "pairs de", "pairs en"]
    for a, b in zip(one, json.loads(json.dumps(two)), strict=True):
        assert a["extras"].pop("seconds").keys() == b["extras"].pop("seconds").keys()
        assert b["protocol"].pop("features") == a["protocol"].pop("features").replace("one", "two")
        assert json.loads(json.dumps(a)) == b
    assert one[0]["extras"]["ridge"]["train_images"] == 8
    assert one[0]["extras"]["contamination"]["tuned_images"] == 18
    assert (place / "two" / "report" / "report.md").is_file()


def check_stores(one: FeatureStore, two: FeatureStore) -> None:
    assert np.array_equal(one.features(slice(None)), two.features(slice(None)))
    assert one.metadata.equals(two.metadata)
    damaged = [(s.path / "damaged.jsonl").read_text() if s.manifest["damaged"] else None for s in (one, two)]
    assert damaged[0] == damaged[1]
    timed = ("seconds", "shards", "images_per_second")
    assert one.manifest.keys() == two.manifest.keys()
    assert all(two.manifest[k] == v for k, v in one.manifest.items() if k not in timed)
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())


def test_tune_killed_on_two_and_gone_on_with_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launch as typed is killed, one process finishes it; then every rank finds it finished, and one says so."""
    command = ["-m", "litune", "tune", "store", "--text-tower", "hf:bert", "--out", "run", "--lang", "en"]
    command += ["--batch-size", "6", "--evaluations", "1", "--precision", "float32", "--device", "cpu"]
    command += ["--duration", "240pairs", "--checkpoint-seconds", "0"]
    kill_when(torchrun(*command, cwd=place), (place / "run" / "state.safetensors").exists)
    assert not (place / "run" / "manifest.json").exists()
    capsys.readouterr()
    torch.set_num_threads(1)
    main(command[2:])
    assert "begun on 2 processes, now on 1: the batches and the loss are the same" in capsys.readouterr().err
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))

    process = torchrun(*command, cwd=place, python=sys.executable)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's own
    assert "exitcode  : 2 " in said
    assert said.count("holds a finished run") == said.count("litune: error: run holds a finished run") == 1


def test_sharded_killed_and_gone_on(place: Path) -> None:
    """Shared states are whole in a checkpoint: two ranks go on from their own, one from theirs, as if undisturbed."""
    command = ["-m", "litune", "tune", "store", "--text-tower", "hf:bert", "--lang", "en", "--duration", "120pairs"]
    command += ["--batch-size", "6", "--evaluations", "1", "--precision", "float32", "--device", "cpu"]
    command += ["--dropout", "0", "--checkpoint-seconds", "0"]
    torch.set_num_threads(1)
    main([*command[2:], "--out", "straight", "--start", "random"])  # as with --shard
    for ranks in (1, 2):
        sharded = [*command, "--out", f"run-{ranks}", "--shard"]
        states = place / f"run-{ranks}"
        kill_when(torchrun(*sharded, cwd=place), lambda states=states: any(states.glob("state-*/facts.json")))
        assert not (place / f"run-{ranks}" / "manifest.json").exists()
        if ranks == 1:
            main(sharded[2:])
        else:
            _, said = (process := torchrun(*sharded, cwd=place)).communicate(timeout=120)
            assert process.returncode == 0, said
            assert "going on with run-2 from step" in said
        check_runs(place / "straight", place / f"run-{ranks}")


SLOW_TOWER = """
import os, time, colortower
def encode(pixels):
    with open("encoded.log", "a") as log:
        log.write(f"{len(pixels)}\\n")
    time.sleep(0.2 if os.environ.get("SLOW") else 0)
    return colortower.encode(pixels)
def make():
    return encode, colortower.preprocess
"""


def test_embed_killed_and_gone_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "sleepytower.py").write_text(SLOW_TOWER)
    command = ["-m", "litune", "embed", "photos", "--image-tower", "python:sleepytower:make", "--out", "s"]
    command += ["--batch-size", "2", "--shard-size", "2"]
    part = place / "s" / ".rank-1-of-2" / "store.json"
    monkeypatch.setenv("SLOW", "1")
    kill_when(torchrun(*command, cwd=place), lambda: part.exists() and json.loads(part.read_text())["seen"] >= 4)
    done = sum(json.loads(file.read_text())["seen"] for file in (place / "s").glob(".rank-*/store.json"))
    assert 4 <= done < 24
    monkeypatch.delenv("SLOW")
    with pytest.raises(StoreError, match="s is incomplete"):
        FeatureStore("s")
    with pytest.raises(StoreError, match="begun by 2 processes, now there are 1: go on with 2, or give --overwrite"):
        embed(pairs="photos", image_tower="python:sleepytower:make", out="s")
    (place / "encoded.log").unlink()

    process = torchrun(*command[:-4], cwd=place)  # with another batch size: the parts stay those that they were
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"going on with s: {done} of 24 images are done" in said
    assert "Warning" not in said
    assert sum(int(line) for line in (place / "encoded.log").read_text().split()) == 24 - done
    check_stores(embed(pairs="photos", image_tower="python:sleepytower:make", out="whole"), FeatureStore("s"))


if __name__ == "__main__":
    distributed.start("cpu")
    found = work("two")
    Path(f"rank-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.stop()
