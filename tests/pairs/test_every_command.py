"""Every command that takes pairs takes all kinds of them: here, in a pattern, elsewhere, in a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tests.conftest import write_color_tower
from tests.pairs.packed import NAMES, hub_table, picture
from tests.pairs.test_columns import write_arrow
from tests.pairs.test_elsewhere import LAYOUTS

import litune
from litune.curation.dedup import dedup_data
from litune.curation.filter import filter_data
from litune.curation.inspect import inspect_data
from litune.errors import DataError
from litune.pairs.find import holds_pairs
from litune.pairs.pairs import pictures_at, read_pairs
from litune.store.embed import embed

UNLIKE = 8
"""How many of the pictures are no near-duplicates: boxes and rings of one colour are hardly told apart."""


@dataclass(frozen=True)
class World:
    """What all tests share: an image tower, pairs of each kind by their addresses, and a run."""

    tower: str
    addresses: dict[str, str]
    features: np.ndarray
    """[12, W] of the pictures in the order of NAMES."""
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    memory = fsspec.filesystem("memory")
    with pytest.MonkeyPatch.context() as patch:
        tower = write_color_tower(root, patch)
        writers = LAYOUTS | {"saved": lambda folder: write_arrow(folder / "data.arrow", hub_table(NAMES))}
        for kind, write in writers.items():
            write(root / kind)
        addresses = {kind: str(root / kind) for kind in writers}
        addresses |= {"pattern": f"{root}/shards/*.tar", "braces": f"{root}/shards/{{00000..00002}}.tar"}
        for kind in ("shards", "files", "parquet"):
            memory.put(addresses[kind], f"/every/{kind}", recursive=True)
            addresses[f"{kind} elsewhere"] = f"memory://every/{kind}"
        store = embed(pairs=addresses["shards"], image_tower=tower, out=root / "store")
        addresses["store"] = str(store.path)
        settings = {"batch_size": 4, "duration": "8pairs", "evaluations": 1, "precision": "float32", "device": "cpu"}
        litune.tune(store=store.path, text_tower=f"hf:{tiny_bert}", out=root / "run", **settings)
        yield World(tower, addresses, store.features(slice(None)), root / "run")
    memory.rm("/every", recursive=True)


KINDS = (*LAYOUTS, "saved", "pattern", "braces", "shards elsewhere", "files elsewhere", "parquet elsewhere", "store")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, world: World, tmp_path: Path) -> None:
    """All read the same pictures: each command names or counts them."""
    pairs = world.addresses[kind]
    copies = 2 if kind == "classes" else 1
    references = read_pairs(pairs).table["path"].to_pylist()
    assert len(references) == len(NAMES) * copies

    store = embed(pairs=pairs, image_tower=world.tower, out=tmp_path / "store")
    rows = np.lexsort(store.features(slice(None)).T)[::copies]
    assert np.array_equal(store.features(rows), world.features[np.lexsort(world.features.T)])

    assert inspect_data(pairs=pairs)["images"] == len(references)

    out = tmp_path / ("filtered" if kind == "store" else "filtered.parquet")
    filter_data(pairs=pairs, out=out, min_side=1)
    assert len(read_pairs(out)) == len(references)

    report = dedup_data(pairs=pairs, out=tmp_path / "within", image_tower=world.tower)
    assert (report["images"], report["kept"]) == (len(references), UNLIKE)

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "copy.png").write_bytes(picture(NAMES[3]))
    report = dedup_data(
        pairs=tmp_path / "own", against=[pairs], out=tmp_path / "against", image_tower=world.tower, within=False
    )
    assert report["kept"] == 0

    classified = litune.classify(run=world.run, images=[pairs], labels=("red", "blue"))
    assert [result.image for result in classified] == references


def test_one_picture_wherever_it_is(world: World, tmp_path: Path) -> None:
    """A file, a member of a tar, a URL: classify and search take each, and see the same."""
    file = Path(world.addresses["files"]) / f"{NAMES[0]}.png"
    member = read_pairs(world.addresses["shards"]).table["path"][0].as_py()
    images = [file, member, f"memory://every/files/{file.name}"]
    classified = litune.classify(run=world.run, images=images, labels=("red", "blue"))
    assert [result.image for result in classified] == [*map(str, images)]
    assert all(result.probabilities == pytest.approx(classified[0].probabilities, abs=1e-6) for result in classified)
    for image in images:
        matches = litune.search(run=world.run, store=world.addresses["store"], image=image, top=1)
        assert [match.path for match in matches] == [member]


def test_what_is_one_picture(tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(picture(NAMES[0]))
    for address in ("nowhere.jpg", "photo", "a.tar::512+3::b.jpg", "https://host/a.jpg"):
        assert not holds_pairs(str(tmp_path / address) if "photo" in address else address), address
    for address in (str(tmp_path), "a.tar", "pairs.csv", "s3://bucket/{0..9}.tar"):
        assert holds_pairs(address), address
    with pytest.raises(DataError, match=r"a\.tar does not exist"):
        pictures_at(f"{tmp_path}/a.tar")
