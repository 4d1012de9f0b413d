"""What the tests share: small real pictures, a tiny text tower with its own tokenizer, and tiny stores.

Towers and pictures are made here (seeded), so that nothing outside the repo is needed; tests on real weights use
the packages of the extra `quickstart`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The shapes on public signatures are checked while the tests run: before litune is imported.
from jaxtyping import install_import_hook

_hook = install_import_hook(
    [
        "litune.tuning.losses",
        "litune.evaluation",
        "litune.index",
        "litune.model",
        "litune.image",
        "litune.text",
        "litune.vectors",
    ],
    "beartype.beartype",
)

import numpy as np
import pytest
import torch
from PIL import Image

from litune.config import TuneConfig
from litune.image.pictures import ImageTransform
from litune.image.registry import ImageTower
from litune.store.store import FeatureStore, StoreWriter

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("bar", "box", "ring")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing by a second thread, and on a busy machine wait for it."""
    torch.set_num_threads(1)


def draw(color: str, shape: str, size: int = 48) -> Image.Image:
    """A plain picture of a colored shape."""
    values = np.full((size, size, 3), 255, np.uint8)
    y, x = np.mgrid[:size, :size] - size // 2
    inside = {
        "bar": np.abs(y) < size // 8,
        "box": (np.abs(x) < size // 4) & (np.abs(y) < size // 4),
        "ring": np.abs(np.hypot(x, y) - size / 3) < size / 10,
    }[shape]
    values[inside] = COLORS[color]
    return Image.fromarray(values)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 24 pictures with two captions each in English and one in German (see `write_photos`)."""
    return write_photos(tmp_path / "photos")


def write_photos(folder: Path, *, german: bool = True) -> Path:
    """Write 24 pictures with two captions each in English, their splits and languages in captions.csv."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split", "lang", "caption"])
        for i, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
            for copy in range(2):
                name = f"{color}-{shape}-{copy}.png"
                draw(color, shape, 48 + 8 * copy).save(folder / "images" / name)
                split = "val" if i % 4 == 3 else "train"
                writer.writerow([name, split, "en", f"a {color} {shape}"])
                writer.writerow([name, split, "en", f"the {shape} is {color}, really"])
                if german:
                    writer.writerow([name, split, "de", f"{shape} in {color}"])
    return folder


@pytest.fixture
def class_tree(tmp_path: Path) -> Path:
    """Class folders: one per color, three pictures each."""
    root = tmp_path / "classes"
    for color in COLORS:
        (root / color).mkdir(parents=True)
        for shape in SHAPES:
            draw(color, shape).save(root / color / f"{shape}.png")
    return root


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT of random weights and its WordPiece tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    letters = "abcdefghijklmnopqrstuvwxyz,.'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    words += ["the", "is", "in", "really", *COLORS, *SHAPES]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def tower_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The spec of the tower of `write_color_tower`."""
    return write_color_tower(tmp_path, monkeypatch)


def write_color_tower(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """The spec of a python: tower, fast and deterministic: 8 × 8 means of the colors. Changes to the folder."""
    (folder / "colortower.py").write_text(
        "import numpy as np\n"
        "import torch\n"
        "def preprocess(image):\n"
        "    return np.asarray(image.resize((32, 32))).transpose(2, 0, 1)\n"
        "def encode(pixels):\n"
        "    return torch.nn.functional.avg_pool2d(pixels.float() / 255, 8).flatten(1)\n"
        "def make():\n"
        "    return encode, preprocess\n"
    )
    patch.chdir(folder)
    import sys

    sys.modules.pop("colortower", None)
    return "python:colortower:make"


@pytest.fixture
def store(photos: Path, tower_module: str, tmp_path: Path) -> FeatureStore:
    """A feature store of `photos`, embedded with the color tower."""
    from litune.store.embed import embed

    return embed(pairs=photos, image_tower=tower_module, out=tmp_path / "store")


@pytest.fixture
def tune_config(store: FeatureStore, tiny_bert: Path, tmp_path: Path) -> TuneConfig:
    """A short run on `store`."""
    return short_run(store, tiny_bert, tmp_path / "run")


def short_run(store: FeatureStore, tiny_bert: Path, out: Path) -> TuneConfig:
    return TuneConfig(
        store=store.path,
        text_tower=f"hf:{tiny_bert}",
        out=out,
        lang=("en",),
        duration="240pairs",
        batch_size=6,
        learning_rate=3e-3,
        evaluations=2,
        precision="float32",  # quick on a model this small; bfloat16 has a test of its own
        device="cpu",
    )


@pytest.fixture(scope="session")
def tuned(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on the store of `photos`, to be copied (see `run`)."""
    from litune.store.embed import embed
    from litune.tuning.tune import tune

    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        tower = write_color_tower(folder, patch)
        store = embed(pairs=write_photos(folder / "photos"), image_tower=tower, out=folder / "store")
        tune.run(dataclasses.replace(short_run(store, tiny_bert, folder / "run"), duration="20steps", evaluations=0))
    return folder / "run"


@pytest.fixture
def run(tuned: Path, tower_module: str, tmp_path: Path) -> Path:
    """A run of 20 steps, of its own for each test."""
    return Path(shutil.copytree(tuned, tmp_path / "run"))


def random_store(path: Path, rows: int, width: int, captions: int = 1) -> FeatureStore:
    """A store of random features with numbered captions, written without a tower."""
    import pyarrow as pa

    random = np.random.default_rng(0)
    writer = StoreWriter(path, {"tower": None, "images": rows, "dtype": "float16", "pairs": None})
    table = pa.table(
        {
            "key": [f"{i}.png" for i in range(rows)],
            "image_path": [f"/nowhere/{i}.png" for i in range(rows)],
            "captions": [[f"picture {i} number {c}" for c in range(captions)] for i in range(rows)],
        }
    )
    writer.write_shard(random.normal(size=(rows, width)).astype(np.float32), table, [], rows)
    return writer.finish()


def random_timm_tower(name: str = "resnet10t", **options: object) -> ImageTower:
    """A small timm model with random weights, dropout and drop-path turned up, as a locked tower."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, drop_rate=0.5, drop_path_rate=0.5, **options)
    transform = ImageTransform(size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return ImageTower("test", model, transform, description=transform.describe(), weights="0", pooling="avg")


def interrupt(step: int, config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin or go on with a run, and press Ctrl-C at this step."""
    from litune.tuning.run import Tuning
    from litune.tuning.tune import tune

    take = Tuning.step

    def stopping(self: Tuning, *batch: Any) -> dict[str, float]:
        if self.progress.step == step:
            raise KeyboardInterrupt
        return take(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Tuning, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune.run(config)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by selenium; its own files only, nothing of the user's."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the tests of pages drive a browser with selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking no-first-run"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.set_script_timeout(30)
    yield found
    found.quit()
