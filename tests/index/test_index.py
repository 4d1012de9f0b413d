from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.conftest import random_store

import litune
from litune.config import TuneConfig
from litune.errors import DataError, StoreError
from litune.index.cells import make_cells
from litune.index.index import EXACT_ROWS, Found, FoundCaption, Index, nearest_images, top_positions
from litune.index.search import line, search
from litune.model.hubs import Bank
from litune.model.lit import LiT
from litune.store.store import FeatureStore, StoreWriter
from litune.tuning.tune import tune


class Plain:
    """A model whose image features are the raw ones, normalised."""

    def encode_features(self, raw: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(raw))


class Shifted(Plain):
    """Another run's image side: its own centre, and a head."""

    def encode_features(self, raw: np.ndarray) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        turn = torch.linalg.qr(torch.randn(raw.shape[1], raw.shape[1], generator=generator))[0]
        scales = torch.linspace(0.5, 2, raw.shape[1])
        return super().encode_features(((torch.from_numpy(raw) - 0.3) * scales @ turn).numpy())


# Without the check of types: what is searched needs no whole model.
unchecked = getattr(nearest_images, "__wrapped__", nearest_images)


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def groups_store(path: Path, rows: int, width: int = 16, groups: int = 40, seed: int = 0) -> FeatureStore:
    """A store of features that lie in groups, as those of pictures do."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(groups, width)) + 1
    features = centers[random.integers(0, groups, rows)] + 0.4 * random.normal(size=(rows, width))
    writer = StoreWriter(path, {"tower": None, "images": rows, "dtype": "float16", "pairs": None})
    table = pa.table({
        "key": [f"{path.name}-{i}" for i in range(rows)],
        "image_path": [f"/nowhere/{i}.png" for i in range(rows)],
        "captions": [[f"picture {i}"] for i in range(rows)],
        "split": ["val" if i % 10 == 0 else "train" for i in range(rows)],
    })  # fmt: skip
    for start in range(0, rows, 700):
        part = slice(start, start + 700)
        writer.write_shard(features[part].astype(np.float32), table[part], [], min(start + 700, rows))
    return writer.finish()


def full(
    model: Plain, index: Index, queries: torch.Tensor, top: int, mask: np.ndarray | None = None
) -> list[list[int]]:
    """The nearest rows by the whole matrix in float64."""
    keep = index.there if mask is None else index.there & mask
    scores = queries.double() @ model.encode_features(index.features(np.arange(index.rows))).double().T
    scores[:, torch.from_numpy(~keep)] = -torch.inf
    return [line[: min(top, int(keep.sum()))].tolist() for line in scores.argsort(dim=1, descending=True)]


def rows_of(found: list[torch.Tensor]) -> list[list[int]]:
    return [one.tolist() for one in found]


@pytest.mark.parametrize("block", [3, 7, 100])
def test_against_the_full_matrix(tmp_path: Path, block: int) -> None:
    store = random_store(tmp_path, 40, 6)
    queries = unit(3, 6)
    found = unchecked(Plain(), store, queries, 5, block)
    scores = queries @ Plain().encode_features(store.features(slice(None))).T
    best = scores.topk(5, dim=1)
    for row, values, order in zip(found, best.values, best.indices, strict=True):
        assert [f.row for f in row] == order.tolist()
        assert [f.score for f in row] == pytest.approx(values.tolist(), abs=1e-6)
        assert row[0].key == f"{row[0].row}.png"


def test_more_than_there_are(tmp_path: Path) -> None:
    store = random_store(tmp_path, 4, 6)
    assert len(unchecked(Plain(), store, torch.ones(1, 6), 10)[0]) == 4


def test_equal_scores_keep_their_order() -> None:
    scores = torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5, 0.0])
    assert top_positions(scores, 4).tolist() == [1, 3, 0, 2]
    assert top_positions(scores, 9).tolist() == [1, 3, 0, 2, 4, 5]


def test_cells_serve_every_map(tmp_path: Path) -> None:
    """Built once, through cells: the results of either run are the exact ones, but for the stated recall."""
    store = groups_store(tmp_path / "s", 3000)
    index = Index(store)
    index.build()
    assert index.cells is not None
    assert index.cells.count().sum() == len(index) == 3000
    index.save()
    for model in (Plain(), Shifted()):
        again = Index(store)
        queries = unit(30, 16)
        assert again.codes is not None
        assert again.calibrate(model, queries, target=0.9) >= 0.9
        probes = again.probes
        assert again.recall(model, queries) >= 0.9
        again.probes -= 1
        assert again.recall(model, queries) < 0.9  # it is the least number
        again.probes = probes
        assert again.probes < len(index.cells) / 2  # most cells were not looked into
        assert again.recall(model, queries) == pytest.approx(again.calibrate(model, queries, target=0.9))
        scores, rows = again.nearest(model, queries, 10, exact=False)
        expected = full(model, again, queries, 10)
        hits = [len(set(a) & set(b)) / 10 for a, b in zip(rows_of(rows), expected, strict=True)]
        assert np.mean(hits) == pytest.approx(again.recall(model, queries))
        # What is found has its true score.
        features = model.encode_features(store.features(rows[0].numpy()))
        assert torch.allclose(features @ queries[0], scores[0], atol=1e-6)
        again.probes = len(index.cells)
        assert rows_of(again.nearest(model, queries, 10, exact=False)[1]) == expected


def test_codes_choose_what_is_compared(tmp_path: Path) -> None:
    """The best by codes are compared with their own features; codes follow what is added, and can be done without."""
    store = groups_store(tmp_path / "s", 3000)
    index = Index(store)
    index.build(cells=50)
    assert index.codes is None
    index.probes = 50
    queries = unit(20, 16)
    expected = full(Shifted(), index, queries, 10)
    assert rows_of(index.nearest(Shifted(), queries, 10, exact=False)[1]) == expected
    index.save()
    codes = index.codes
    assert codes is not None
    assert index.cells is not None
    raw = store.features(index.cells.order)
    assert np.abs(codes.features(np.arange(3000)) - raw).max() <= 0.51 * (raw.max(0) - raw.min(0)).max() / 255
    read = []
    index.features = lambda rows, dtype=None: read.append(len(rows)) or store.features(rows)  # type: ignore[assignment]
    scores, rows = index.nearest(Shifted(), queries, 10, exact=False)
    assert rows_of(rows) == expected
    assert read == [140] * 20  # of 3,000
    exact = Shifted().encode_features(store.features(rows[3].numpy())) @ queries[3]
    assert torch.allclose(scores[3], exact, atol=1e-6)

    index = Index(store)
    index.remove([f"s-{expected[0][0]}"])
    index.save()
    assert list(tmp_path.glob("s/index.codes-*")) == [codes.file]  # not written again
    assert rows_of(index.nearest(Shifted(), queries[:1], 9, exact=False)[1])[0] == expected[0][1:]
    index.add(groups_store(tmp_path / "more", 300, seed=1))
    expected = full(Shifted(), index, queries, 10)
    assert rows_of(index.nearest(Shifted(), queries, 10, exact=False)[1]) == expected
    index.save()
    index = Index(store)
    assert index.codes is not None
    assert index.codes.values.shape == (3300, 16)
    assert list(tmp_path.glob("s/index.codes-*")) == [index.codes.file]
    assert rows_of(index.nearest(Shifted(), queries, 10, exact=False)[1]) == expected
    index.codes.file.unlink()
    index = Index(store)
    assert index.codes is None
    assert rows_of(index.nearest(Shifted(), queries, 10, exact=False)[1]) == expected


def test_small_stores_are_searched_exactly(tmp_path: Path) -> None:
    index = Index(groups_store(tmp_path / "s", 500))
    index.build(cells=20)
    index.probes = 1
    queries = unit(5, 16)
    assert len(index) <= EXACT_ROWS
    assert rows_of(index.nearest(Plain(), queries, 10)[1]) == full(Plain(), index, queries, 10)


def test_filters_through_cells(tmp_path: Path) -> None:
    index = Index(groups_store(tmp_path / "s", 2000))
    index.build(cells=60)
    index.probes = 6
    mask = np.arange(2000) % 10 == 0
    queries = unit(20, 16)
    _, rows = index.nearest(Plain(), queries, 10, mask=mask, exact=False)
    expected = full(Plain(), index, queries, 10, mask)
    hits = [len(set(a) & set(b)) / 10 for a, b in zip(rows_of(rows), expected, strict=True)]
    assert all(mask[line].all() for line in rows)
    assert np.mean(hits) > 0.95  # a tenth of the images: ten times as many cells
    assert rows_of(index.nearest(Plain(), queries, 10, mask=mask)[1]) == expected
    assert [len(one) for one in index.nearest(Plain(), queries[:2], 400, mask=mask, exact=False)[1]] == [200, 200]


def test_adding_and_removing(tmp_path: Path) -> None:
    store = groups_store(tmp_path / "s", 1500)
    index = Index(store)
    index.build(cells=40)
    before = index.cells.centroids.copy() if index.cells else None
    index.add(groups_store(tmp_path / "more", 300, seed=1))
    assert index.remove(["s-3", "more-7"]) == 2
    index.save()
    index = Index(store)  # as kept
    assert (index.rows, len(index)) == (1800, 1798)
    assert index.cells is not None
    assert np.array_equal(index.cells.centroids, before)  # type: ignore[arg-type]
    assert index.cells.count().sum() == 1800
    for row, there in ((3, False), (4, True), (1507, False), (1510, True)):
        own = Plain().encode_features(index.features(np.array([row])))
        for exact in (True, False):
            index.probes = 2
            found = index.nearest(Plain(), own, 1, exact=exact)[1][0].tolist()
            assert (found == [row]) == there
    assert index.metadata["key"][1510].as_py() == "more-10"
    index.probes = len(index.cells)
    queries = unit(5, 16)
    assert rows_of(index.nearest(Plain(), queries, 10, exact=False)[1]) == full(Plain(), index, queries, 10)
    with pytest.raises(DataError, match="no image of the index has the key 's-3'"):
        index.remove(["s-3"])
    with pytest.raises(StoreError, match="is in the index already"):
        index.add(store)
    with pytest.raises(StoreError, match="features of width 8, the index of .* of 16: embed"):
        index.add(random_store(tmp_path / "narrow", 5, 8))


def test_a_damaged_or_outdated_index_is_named(tmp_path: Path) -> None:
    store = groups_store(tmp_path / "s", 100)
    index = Index(store)
    index.build(cells=4)
    file = index.save()
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    with pytest.raises(StoreError, match="is damaged"):
        Index(store)
    file.write_bytes(whole)
    other = groups_store(tmp_path / "other", 90)
    with pytest.raises(StoreError, match="had rows 100, it has 90"):
        Index(other, file)


def test_cells_of_few_rows() -> None:
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    there = np.array([True, True, False, True, True])
    cells = make_cells(lambda rows: raw[rows], there, 50, 0, lambda count: None)
    assert cells.cell[2] == -1
    assert len(cells) == 4
    assert cells.order[cells.positions(np.arange(4))].tolist() == cells.order.tolist()
    assert sorted(cells.order.tolist()) == [0, 1, 3, 4]
    assert all(cells.cell[cells.order[cells.positions(np.array([c]))]] == c for c in range(4))


def test_a_new_text_tower_searches_the_old_index(tune_config: TuneConfig, tmp_path: Path) -> None:
    """An index built once serves two runs that were tuned on the same store, also with other maps of its features."""
    settings = {"duration": "36pairs", "evaluations": 0}
    first = dataclasses.replace(tune_config, **settings)
    second = dataclasses.replace(first, out=tmp_path / "two", seed=1, image_map="whiten", text_head="mlp")
    tune.run(first)
    index = Index(first.store)
    index.build(cells=6)
    file = index.save()
    kept = file.read_bytes()
    tune.run(second)
    found = []
    for run in (first.out, second.out):
        model = litune.load(run)
        index = Index(first.store)
        assert index.cells is not None
        queries = model.encode_text(["a red box", "the ring is blue", "yellow bar"])
        features = model.encode_features(index.store.features(slice(None)))
        expected = (queries.double() @ features.double().T).argsort(dim=1, descending=True)[:, :5].tolist()
        index.probes = len(index.cells)
        assert rows_of(index.nearest(model, queries, 5)[1]) == expected
        assert rows_of(index.nearest(model, queries, 5, exact=False)[1]) == expected
        found.append(expected)
    assert found[0] != found[1]  # the runs do differ
    assert file.read_bytes() == kept


@pytest.fixture
def run(tune_config: TuneConfig) -> TuneConfig:
    tune.run(dataclasses.replace(tune_config, duration="36pairs", evaluations=0))
    return tune_config


def test_queries(run: TuneConfig, tmp_path: Path) -> None:
    """Texts, pictures, both together, captions: against sums written out."""
    model, index = litune.load(run.out), Index(run.store)
    path = index.metadata["image_path"][7].as_py()
    text, image = model.encode_text("a red box")[0], model.encode_image(path)[0]
    features = model.encode_features(index.features(np.arange(24)))
    query = torch.nn.functional.normalize(0.3 * text - 2 * image, dim=0)
    best = (features @ query).sort(descending=True, stable=True)
    for _ in range(3):  # first out of the store, then out of memory
        found = index.search(model, "a red box", image=path, text_weight=0.3, image_weight=-2.0, top=4, offset=2)
        assert [one.row for one in found] == best.indices[2:6].tolist()
        assert [one.score for one in found] == pytest.approx(best.values[2:6].tolist(), abs=1e-5)
    assert index.search(model, image=7, top=1)[0].row == 7
    assert index.search(model, image=features[3], top=1)[0].row == 3
    assert torch.allclose(index.query(model, image=path), image)
    only = index.search(model, "a red box", top=30, where=["split=val", "captions~ring"])
    table = index.metadata.to_pylist()
    assert {one.row for one in only} == {
        i for i, one in enumerate(table) if one["split"] == "val" and "ring" in one["captions"][0]
    }
    captions = [caption for one in table for caption in one["captions"]]
    scores = model.encode_text(captions) @ text
    nearest = index.search_captions(model, "a red box", top=3)
    order = scores.argsort(descending=True, stable=True)[:3].tolist()
    assert [one.caption for one in nearest] == [captions[i] for i in order]
    assert [one.row for one in nearest] == [i // 3 for i in order]
    assert nearest[0].caption == "a red box"
    for bad, message in (
        ({}, "needs a text, an image or both"),
        ({"image": 24}, "there is no row 24"),
        ({"text": "a", "text_weight": 0.0}, "cancel each other out"),
    ):
        with pytest.raises(DataError, match=message):
            index.query(model, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (None, "0.5000  /a/b.png  a dog, red 猫猫 in the snow"),
        (60, "0.5000  /a/b.png  a dog, red 猫猫 in the snow"),
        (45, "0.5000  /a/b.png  a dog, red 猫猫 in the snow"),
        (44, "0.5000  /a/b.png  a dog, red 猫猫 in the sn…"),
        (31, "0.5000  /a/b.png  a dog, red …"),
        (19, "0.5000  /a/b.png"),
        (5, "0.5000  /a/b.png"),
    ],
)
def test_a_line_of_what_was_found(width: int | None, expected: str) -> None:
    found = Found(3, "b", "/a/b.png", 0.5, ["a dog,\x1b red\n 猫猫 in the snow", "another"])
    assert line(found, width) == expected
    assert line(Found(3, "b", "/a/b.png", 0.5), width) == "0.5000  /a/b.png"
    assert line(FoundCaption(3, "b", "a\ndog", 0.25), width) == "0.2500  a dog"
    inside = str(Path.cwd() / "photos" / "b.png")
    shown = inside if width is None else str(Path("photos") / "b.png")
    assert line(Found(3, "b", inside, 0.5), width) == f"0.5000  {shown}"


def test_the_command(run: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"run": run.out, "store": run.store, "device": "cpu"}
    exact = search(**settings, query="a red box", top=3)
    assert search(**settings, query="a red box", top=3, index="approximate")[0] == exact[0]
    assert "of them hold" in capsys.readouterr().err
    assert (run.store / "index.safetensors").exists()
    picture = exact[1].path
    assert search(**settings, image=picture, top=1)[0].path == picture
    assert search(**settings, query="a red box", captions=True, top=1)[0].caption == "a red box"
    found = search(**settings, query="a red box", where=["width>=56"], top=50)
    assert len(found) == 12


def csls(candidates: np.ndarray, queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Corrected scores [Q, B] by the formula, in float64."""
    return queries @ candidates.T - np.sort(candidates @ bank.T, axis=1)[:, -10:].mean(1) / 2


@pytest.fixture
def with_bank(run: TuneConfig) -> LiT:
    model = litune.load(run.out)
    model.bank = Bank.of(unit(50, model.dim, 1), unit(50, model.dim, 2))
    return model


def test_a_text_ranks_by_corrected_scores(with_bank: LiT, run: TuneConfig) -> None:
    """Exact, kept in memory and through cells with codes; scores are cosines, and a query with a picture's part in it
    is corrected by its share."""
    model, index = with_bank, Index(run.store)
    assert model.bank is not None
    images = model.encode_features(index.features(np.arange(index.rows))).double().numpy()
    text = model.encode_text("a red box").double().numpy()
    scores = csls(images, text, model.bank.texts.double().numpy())[0]
    cosines = (text @ images.T)[0]
    assert scores.argsort().tolist() != cosines.argsort().tolist()

    def check(exact: bool) -> None:
        matches = index.search(model, "a red box", top=6, exact=exact)
        assert [match.row for match in matches] == (-scores).argsort()[:6].tolist()
        assert [match.score for match in matches] == pytest.approx([cosines[match.row] for match in matches], abs=1e-6)

    for _ in range(3):  # from the second search on, features are kept
        check(exact=True)
    bare = index.search(model, "a red box", top=6, hub_correction=False)
    assert [match.row for match in bare] == (-cosines).argsort()[:6].tolist()
    both = model.encode_features(index.features(np.array([3])))[0].double().numpy() * 0.5 + text[0]
    both_scores = (both @ images.T + scores - cosines) / np.linalg.norm(both)
    matches = index.search(model, "a red box", 3, image_weight=0.5, top=6)
    assert [match.row for match in matches] == (-both_scores).argsort()[:6].tolist()
    of_picture = index.search(model, image=3, top=6)
    assert [match.row for match in of_picture] == (-(images @ images[3])).argsort()[:6].tolist()
    pytest.importorskip("faiss")
    index.build(cells=4)
    index.save()
    index.probes = 4
    check(exact=False)


def test_corrections_are_kept_beside_the_features(with_bank: LiT, run: TuneConfig) -> None:
    """They are read again; what is damaged, of another run or of another bank is computed anew."""
    index = Index(run.store)
    expected = index.corrections(with_bank)
    (file,) = (run.store / "hubs").iterdir()
    np.save(file, np.full(index.rows, 7, np.float32))
    assert Index(run.store).corrections(with_bank).unique().tolist() == [7]
    file.write_bytes(b"damaged")
    assert torch.equal(Index(run.store).corrections(with_bank), expected)
    with_bank.bank = Bank.of(unit(50, with_bank.dim, 3), unit(50, with_bank.dim, 2))
    assert not torch.equal(index.corrections(with_bank), expected)
    assert len(list((run.store / "hubs").iterdir())) == 2


def test_a_picture_ranks_captions_by_corrected_scores(with_bank: LiT, run: TuneConfig) -> None:
    model, index = with_bank, Index(run.store)
    assert model.bank is not None
    captions = [text for texts in index.metadata["captions"].to_pylist() for text in texts]
    texts = model.encode_text(captions).double().numpy()
    image = model.encode_features(index.features(np.array([3]))).double().numpy()
    scores = csls(texts, image, model.bank.images.double().numpy())[0]
    matches = index.search_captions(model, image=3, top=5)
    assert [match.caption for match in matches] == [captions[i] for i in (-scores).argsort(kind="stable")[:5]]
    best = max(matches, key=lambda match: match.score)
    assert best.score == pytest.approx(float((image @ texts.T)[0][captions.index(best.caption)]), abs=1e-6)
    bare = index.search_captions(model, image=3, top=5, hub_correction=False)
    assert [match.score for match in bare] == sorted((match.score for match in bare), reverse=True)
