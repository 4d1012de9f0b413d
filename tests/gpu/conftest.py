"""A small store of pictures and a run on it, made once on the processor, and a pretend GPU to use them on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.conftest import write_photos
from tests.pretend_cuda import PretendGPU, pretend

import litune
from litune.config import TuneConfig
from litune.store.embed import embed


@dataclass(frozen=True)
class World:
    """Where what the tests share is: 24 pictures with captions, their features, and a run tuned on those."""

    photos: Path
    tower: str
    """A small ResNet from a checkpoint."""
    store: Path
    run: Path

    def config(self, out: Path, text_tower: str | Path, **settings: object) -> TuneConfig:
        """A run of three steps in float32 without dropout."""
        usual = {
            "duration": "3steps", "batch_size": 6, "learning_rate": 3e-3, "warmup": "1steps", "evaluations": 1,
            "precision": "float32", "dropout": 0.0, "feature_dropout": 0.0, "lang": ("en",),
        }  # fmt: skip
        name = text_tower if isinstance(text_tower, str) else f"hf:{text_tower}"
        return TuneConfig(store=self.store, text_tower=name, out=out, **(usual | settings))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> World:
    import timm

    folder = tmp_path_factory.mktemp("gpu")
    photos = write_photos(folder / "photos", german=False)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / "resnet.pth")
    tower = f"timm:test_resnet?checkpoint={folder / 'resnet.pth'}&size=32"
    embed(pairs=photos, image_tower=tower, out=folder / "store", device="cpu")
    made = World(photos, tower, folder / "store", folder / "run")
    litune.tune.run(made.config(made.run, tiny_bert, device="cpu"))
    return made


@pytest.fixture
def gpu() -> Iterator[PretendGPU]:
    with pretend() as device:
        yield device
