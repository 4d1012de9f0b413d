"""The released LiT checkpoints: told by their shapes, equal to a float64 reference, and back bit for bit."""

from __future__ import annotations

import csv
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import draw
from tests.interop.released import OLD, Names, Reference, layout, random_values, released, resize, write

import litune
from litune.cli import main
from litune.errors import ConfigError, DataError, LituneError, OutputExistsError, RunError
from litune.interop.import_ import import_
from litune.interop.layout import entries, find_design
from litune.interop.official import Checkpoint, build, export_npz

SIZE = 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789,.!?'-[]</>"]
WORDS += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
WORDS += ["the", "red", "box", "blue", "ring", "caf", "##fe", "##ing", "cls", "in", "is", "狗", "und"]
TEXTS = [
    "The red box",
    "a Café, with an umlaut: ÜBER [CLS] and ﬁve 狗狗 dogs!",
    "",
    "   blue\tring \n in the caffeing box's red-blue ring, the blue ring is in the box and so on and on",
    "Ünïcödé ½ 🙂",
]
PREFIXES = {"": "", "params": "params/", "target": "opt/target/"}


def make(
    file: Path, *, bert: bool, names: Names | None = None, vocabulary: int, head: bool = False, more: bool = False
) -> tuple[dict[str, np.ndarray], Reference]:
    """A small released file, of a text tower two layers deep, and what it computes."""
    shapes = layout(
        (48, 2, 100, 3),
        (128, 2, 160, 2) if bert else (48, 3, 80, 4),
        bert=bert,
        patch=8,
        size=SIZE,
        vocabulary=vocabulary,
        positions=40 if bert else 12,
        dim=40 if head else 48,
        image_head=head,
        second_positions=more,
        names=names,
    )
    values = random_values(shapes)
    write(file, values)
    return values, Reference(values, names, SIZE)


@pytest.fixture
def wordpieces(tmp_path: Path) -> Path:
    file = tmp_path / "vocab.txt"
    file.write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few hundred pieces, its end token 1 as in LiT's."""
    library = pytest.importorskip("sentencepiece", reason="SentencePiece models need the extra sentencepiece")
    file = tmp_path_factory.mktemp("pieces") / "cc12m.model"
    with open(file, "wb") as out:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter([f"{text} number {i}" for i in range(40) for text in TEXTS if text]),
            model_writer=out,
            vocab_size=120,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            num_threads=1,
        )
    return file


def wordpiece_ids(text: str) -> list[int]:
    """BERT's uncased tokens by hand: lower case without accents, words and punctuation, the longest pieces first."""
    spaced = []
    for letter in unicodedata.normalize("NFD", text.lower()):
        if unicodedata.category(letter) == "Mn":
            continue
        alone = not (letter.isalnum() or letter.isspace()) or "一" <= letter <= "鿿"
        alone = alone and not unicodedata.category(letter).startswith("So")
        spaced.append(f" {letter} " if alone else letter)
    ids = []
    for word in "".join(spaced).split():
        found, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            mark = "##" if start else ""
            end = next((end for end in ends if mark + word[start:end] in WORDS), None)
            if end is None:
                found, start = [WORDS.index("[UNK]")], len(word)
            else:
                found.append(WORDS.index(mark + word[start:end]))
                start = end
        ids += found
    return ids


def bert_ids(texts: list[str], length: int = 16) -> np.ndarray:
    """[CLS] and at most 15 pieces, padded with 0."""
    rows = [[WORDS.index("[CLS]"), *wordpiece_ids(text)][:length] for text in texts]
    return np.array([row + [0] * (length - len(row)) for row in rows])


def pieces_ids(file: Path, texts: list[str], length: int) -> np.ndarray:
    """The library's pieces, cut to one less than `length` and filled up with the end token."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    rows = [processor.encode(text)[: length - 1] for text in texts]
    return np.array([row + [1] * (length - len(row)) for row in rows])


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    sizes = [(16, 16), (24, 40), (80, 56), (10, 12)]  # scales that float32 holds exactly
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def check(model: Any, reference: Reference, ids: np.ndarray) -> None:
    """Pictures and texts to features and scores, all within 1e-5 of the reference."""
    images, texts = reference.image(pictures()), reference.text(ids)
    assert np.ptp(images, axis=0).max() > 0.05
    assert np.ptp(texts, axis=0).max() > 0.05, "the reference tells its inputs apart"
    ours_images = model.encode_image([Image.fromarray(p) for p in pictures()]).numpy()
    ours_texts = model.encode_text(TEXTS).numpy()
    assert np.abs(ours_images - images).max() <= 1e-5
    assert np.abs(ours_texts - texts).max() <= 1e-5
    scores = (model.scale.detach() * (torch.from_numpy(ours_images) @ torch.from_numpy(ours_texts).T)).numpy()
    assert np.abs(scores - reference.scores(images, texts)).max() <= 1e-5 * 12.5


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_bert(tmp_path: Path, wordpieces: Path, old: bool, prefix: str) -> None:
    names = Names(**{**vars(OLD if old else Names()), "prefix": PREFIXES[prefix]})
    file = tmp_path / "LiT.npz"
    _, reference = make(file, bert=True, names=names, vocabulary=len(WORDS), head=old)
    model = import_(file, vocab=wordpieces, out=tmp_path / "run")
    check(model, reference, bert_ids(TEXTS))
    export_npz(model, tmp_path / "back.npz")
    assert (tmp_path / "back.npz").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("more", [False, True], ids=["one-table", "two-tables"])
@pytest.mark.parametrize("names", [Names(), OLD, Names(norm="LayerNorm_2")], ids=["new", "old", "mixed"])
def test_sentencepiece(tmp_path: Path, pieces: Path, names: Names, more: bool) -> None:
    file = tmp_path / "LiT.npz"
    _, reference = make(file, bert=False, names=names, vocabulary=140, more=more)
    model = import_(file, vocab=pieces, out=tmp_path / "run")
    check(model, reference, pieces_ids(pieces, TEXTS, 12))
    again = litune.load(tmp_path / "run")
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    export_npz(again, tmp_path / "back.npz")
    assert (tmp_path / "back.npz").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_numbers_come_back_as_they_were(tmp_path: Path, wordpieces: Path, dtype: str) -> None:
    values, _ = make(tmp_path / "LiT.npz", bert=True, vocabulary=len(WORDS))
    if dtype == "float16":
        short = {key: value.astype(np.float16) for key, value in values.items()}
        meant = {key: value.astype(np.float32) for key, value in short.items()}
    else:
        bits = {key: value.view(np.uint32) & 0xFFFF0000 for key, value in values.items()}
        short = {key: (value >> 16).astype(np.uint16).view("V2") for key, value in bits.items()}
        meant = {key: value.view(np.float32) for key, value in bits.items()}
    short["img/cls"] = meant["img/cls"] = values["img/cls"]  # one of another type
    file = write(tmp_path / "short.npz", short)
    model = import_(file, vocab=wordpieces, out=tmp_path / "run")
    check(model, Reference(meant, size=SIZE), bert_ids(TEXTS))
    export_npz(model, tmp_path / "back.npz")
    assert (tmp_path / "back.npz").read_bytes() == file.read_bytes()


COUNTS = {
    "LiT-B16B": 195_871_489,
    "LiT-B16B_2": 195_280_897,
    "LiT-L16L": 638_443_521,
    "LiT-L16S": 331_140_353,
    "LiT-L16Ti": 311_913_089,
}


@pytest.mark.parametrize("name", COUNTS)
def test_released_sizes(name: str, wordpieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The five layouts, by shapes alone: every key once, every parameter, and the published counts."""
    from litune.text.tokenizers import Tokenizer, wordpiece

    shapes = released(name)
    assert sum(math.prod(shape) for shape in shapes.values()) == COUNTS[name]
    design = find_design(shapes, Path(name))
    found = entries(design)
    assert {entry.key: entry.shape for entry in found} == shapes
    assert len(found) == len(shapes)
    assert design.parameters == COUNTS[name]
    monkeypatch.setattr("litune.image.timm.weights_hash", lambda module: "")
    with torch.device("meta"):
        model = build(design, Tokenizer(wordpiece(wordpieces), "bert", 16))
    assert model.image_provenance is not None
    size = "B" if "B16B" in name else "L"
    assert model.image_provenance["spec"] == f"vit:{size}/16?size=224&init=random"
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    filled: dict[str, int] = {}
    for entry in found:
        filled[entry.name] = filled.get(entry.name, 0) + math.prod(entry.shape)
    assert filled == {n: p.numel() for n, p in model.named_parameters()}


def test_the_run_is_an_ordinary_one(
    tmp_path: Path, wordpieces: Path, photos: Path, class_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classify, embed, search, evaluate and tune further, from the run folder alone."""
    file, run = tmp_path / "LiT-tiny.npz", tmp_path / "run"
    _, reference = make(file, bert=True, vocabulary=len(WORDS), head=True)
    main(["import", str(file), "--vocab", str(wordpieces), "--out", str(run)])
    assert "image tower 48-2-100-3/8 with a head" in capsys.readouterr().err
    file.unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["imported"]["file"] == "LiT-tiny.npz"
    assert len(manifest["imported"]["sha256"]) == 64
    image = class_tree / "red" / "box.png"
    found = litune.classify(run, [image], labels=("red", "blue"), templates=["a {}"])[0].probabilities
    scores = reference.scores(
        reference.image([np.asarray(draw("red", "box"))]), reference.text(bert_ids(["a red", "a blue"]))
    )[0]
    assert found["red"] == pytest.approx(math.exp(scores[0]) / np.exp(scores).sum(), abs=1e-5)
    store = litune.embed(photos, image_tower=f"run:{run}", out=tmp_path / "store", workers=1)
    hits = litune.search(run, store.path, "a red box", top=3)
    assert len(hits) == 3
    results = litune.eval(run, store=store.path, classes=class_tree, features=tmp_path / "f")
    assert results["retrieval"]["images"] == 24
    assert results["zero_shot"]["classes"] == 4
    further = litune.tune(
        store.path,
        text_tower=f"run:{run}",
        out=tmp_path / "further",
        image_head="linear",
        image_map="none",
        dim=40,
        learning_rate=1e-12,
        weight_decay=0.0,
        duration="1steps",
        evaluations=0,
        batch_size=8,
        precision="float32",
        temperature_rate=0,
    )
    assert torch.allclose(further.encode_text(TEXTS), litune.load(run).encode_text(TEXTS), atol=1e-5), "it went on"
    export_npz(further, tmp_path / "further.npz")
    again = import_(tmp_path / "further.npz", vocab=wordpieces, out=tmp_path / "again")
    check(again, reference, bert_ids(TEXTS))


def test_a_run_of_pieces_is_tuned_further(tmp_path: Path, pieces: Path, photos: Path) -> None:
    run = tmp_path / "run"
    make(tmp_path / "LiT.npz", bert=False, vocabulary=140, more=True)
    import_(tmp_path / "LiT.npz", vocab=pieces, out=run)
    store = litune.embed(photos, image_tower=f"run:{run}", out=tmp_path / "store", workers=1)
    with pytest.raises(ConfigError, match=r"--max-tokens 16 is more than the 12 positions"):
        litune.tune(store.path, text_tower=f"run:{run}", out=tmp_path / "further")
    for wrong, message in (
        ({"pooling": "mean"}, "keeps its pooling and its dropout"),
        ({"locking": "Lu"}, "wants a text tower from scratch"),
        ({"tokenizer": str(pieces)}, "was trained with its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            litune.tune(store.path, text_tower=f"run:{run}", out=tmp_path / "further", max_tokens=12, **wrong)
    further = litune.tune(
        store.path, text_tower=f"run:{run}", out=tmp_path / "further", max_tokens=12, duration="2steps", evaluations=0
    )
    assert (tmp_path / "further" / "pieces.model").read_bytes() == pieces.read_bytes()
    assert further.encode_text("a red box").shape == (1, 48)
    with pytest.raises(RunError, match="its image features are mapped"):
        export_npz(further, tmp_path / "back.npz")
    assert not (tmp_path / "back.npz").exists()


def test_a_run_from_scratch_goes_out(tmp_path: Path, pieces: Path, store: litune.FeatureStore) -> None:
    """A run of litune's own with towers of the official kind becomes such a file, and comes back the same."""
    model = litune.tune(
        store.path,
        text_tower="vit:32-2-64-2",
        tokenizer=str(pieces),
        image_tower="vit:48-1-96-3/8?size=16",
        locking="uu",
        dim=24,
        out=tmp_path / "run",
        max_tokens=8,
        duration="2steps",
        evaluations=0,
        batch_size=8,
    )
    export_npz(litune.load(tmp_path / "run"), tmp_path / "mine.npz")
    with np.load(tmp_path / "mine.npz", allow_pickle=False) as file:
        assert {key: file[key].shape for key in file} == layout(
            (48, 1, 96, 3), (32, 2, 64, 2), bert=False, patch=8, size=16, vocabulary=model.tokenizer.vocab_size,
            positions=8, dim=24, image_head=True,
        )  # fmt: skip
    back = import_(tmp_path / "mine.npz", vocab=pieces, out=tmp_path / "back")
    assert torch.equal(back.encode_text(TEXTS), model.encode_text(TEXTS))
    images = [draw("red", "box"), draw("blue", "ring", 31)]
    assert torch.equal(back.encode_image(images), model.encode_image(images))
    assert back.image_provenance is not None
    assert model.image_provenance is not None
    assert back.image_provenance["weights"] == model.image_provenance["weights"], "one and the same tower"


def test_other_runs_are_refused(store: litune.FeatureStore, tiny_bert: Path, tmp_path: Path) -> None:
    model = litune.tune(
        store.path, text_tower=f"hf:{tiny_bert}", out=tmp_path / "run", duration="1steps", evaluations=0
    )
    with pytest.raises(RunError, match=r"its image tower is python:colortower:make, not a vit: one"):
        export_npz(model, tmp_path / "out.npz")


def damaged(values: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    """The values with something wrong."""
    values = dict(values)
    if how == "missing":
        del values["txt/head/bias"]
    elif how == "missing block":
        values = {key: value for key, value in values.items() if "encoderblock_0" not in key}
    elif how == "extra":
        values["img/pre_logits/bias"] = np.zeros(3, np.float32)
    elif how == "shape":
        values["img/Transformer/encoderblock_1/MlpBlock_0/Dense_1/kernel"] = np.zeros((99, 48), np.float32)
    elif how == "dimensions":
        values["img/embedding/kernel"] = np.zeros((8, 48), np.float32)
    elif how == "pickled":
        values["img/cls"] = np.array([{"a": 1}], dtype=object)
    elif how == "float64":
        values["t"] = values["t"].astype(np.float64)
    elif how == "two":
        values |= {"optimizer": np.zeros(1, np.float32), "img/cls2": np.zeros(2, np.float32)}
        del values["t"]
    return values


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "it lacks the key txt/head/bias"),
        (
            "missing block",
            "it lacks the key img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel",
        ),
        ("extra", "it has the key img/pre_logits/bias too many"),
        ("shape", r"Dense_1/kernel has the shape \(99, 48\), expected \(100, 48\)"),
        ("dimensions", r"img/embedding/kernel has the shape \(8, 48\), expected \(patch patch 3 width\)"),
        ("pickled", "img/cls .*pickled objects|img/cls has the shape"),
        ("float64", "t holds float64, expected float32"),
        ("two", "it lacks the key t; it has 2 keys, img/cls2 first too many"),
    ],
)
def test_wrong_keys(tmp_path: Path, wordpieces: Path, how: str, message: str) -> None:
    values, _ = make(tmp_path / "LiT.npz", bert=True, vocabulary=len(WORDS))
    file = write(tmp_path / "wrong.npz", damaged(values, how))
    with pytest.raises(DataError, match=message) as caught:
        import_(file, vocab=wordpieces, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_damaged_files(tmp_path: Path, wordpieces: Path) -> None:
    make(tmp_path / "LiT.npz", bert=True, vocabulary=len(WORDS))
    whole = (tmp_path / "LiT.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    contents = {
        "cut": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "text": b"not a checkpoint",
        "empty": b"",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "array.npz", np.zeros(3))
    for file in [tmp_path / f"{name}.npz" for name in (*contents, "array.npz", "nothing")] + [tmp_path]:
        with pytest.raises(DataError, match=r"no whole \.npz file|is damaged at|does not exist") as caught:
            import_(file, vocab=wordpieces, out=tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wrong_vocabularies(tmp_path: Path, wordpieces: Path, pieces: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="SentencePiece models need the extra sentencepiece")
    make(tmp_path / "bert.npz", bert=True, vocabulary=len(WORDS) - 1)
    make(tmp_path / "pieces.npz", bert=False, vocabulary=140)
    other = tmp_path / "other.model"
    with open(other, "wb") as out:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20), model_writer=out, vocab_size=90, hard_vocab_limit=False, minloglevel=2
        )
    (tmp_path / "no-cls.txt").write_text("[UNK]\na\n")
    (tmp_path / "twice.txt").write_text("[UNK]\n[CLS]\na\na\n")
    for file, vocabulary, message in (
        ("bert.npz", wordpieces, f"has {len(WORDS)} tokens, .* embeds {len(WORDS) - 1}"),
        ("bert.npz", pieces, "WordPiece vocabulary has one piece per line"),
        ("bert.npz", tmp_path / "no-cls.txt", r"has no \[CLS\]"),
        ("bert.npz", tmp_path / "twice.txt", "1 of its pieces twice"),
        ("bert.npz", tmp_path / "nothing.txt", "does not exist"),
        ("pieces.npz", wordpieces, "is no SentencePiece model"),
        ("pieces.npz", other, "no end token </s> at 1"),
    ):
        with pytest.raises(LituneError, match=message) as caught:
            import_(tmp_path / file, vocab=vocabulary, out=tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def full_disk(*_: Any) -> None:
    raise OSError(28, "the disk is full")


def test_overwriting(tmp_path: Path, wordpieces: Path) -> None:
    file, out = tmp_path / "LiT.npz", tmp_path / "run"
    make(file, bert=True, vocabulary=len(WORDS))
    import_(file, vocab=wordpieces, out=out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="already holds a run"):
        import_(file, vocab=wordpieces, out=out)
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(DataError):
        import_(tmp_path / "bad.npz", vocab=wordpieces, out=out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before, "what is there goes when the new one is read"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("litune.model.run_folder._header", full_disk)
        import_(file, vocab=wordpieces, out=out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before, "nor before the new one is on the disk"
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"
    import_(file, vocab=wordpieces, out=out, overwrite=True, max_tokens=8)
    assert json.loads((out / "manifest.json").read_text())["model"]["tokenizer"]["max_tokens"] == 8
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="not a run of litune"):
        import_(file, vocab=wordpieces, out=tmp_path / "mine", overwrite=True)


def test_resize_of_the_reference_is_the_formula() -> None:
    """The reference's own resize on a case worked out by hand: 2 pixels to 4, and 3 to 2."""
    ramp = np.array([[0, 100]], np.uint8)[:, :, None].repeat(3, 2)
    assert resize(ramp, 4)[0, :, 0].tolist() == [0, 25, 75, 100]
    three = np.array([[0, 90, 30]], np.uint8)[:, :, None].repeat(3, 2)
    assert resize(three, 2)[0, :, 0].tolist() == [22, 45], "22.5 and 45: half a pixel in, and the cast cuts off"


def test_headers_are_read_without_the_numbers(tmp_path: Path) -> None:
    values, _ = make(tmp_path / "LiT.npz", bert=True, vocabulary=len(WORDS))
    checkpoint = Checkpoint(tmp_path / "LiT.npz")
    assert checkpoint.shapes == {key: value.shape for key, value in values.items()}
    assert all(np.array_equal(checkpoint.read(key), value) for key, value in values.items())


def test_wordpiece_by_hand_agrees_on_captions(wordpieces: Path, photos: Path) -> None:
    from litune.text.tokenizers import Tokenizer, wordpiece

    with open(photos / "captions.csv", encoding="utf-8", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)] + TEXTS
    tokens = Tokenizer(wordpiece(wordpieces), "bert", 16)(captions)
    rows = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
    assert [row.tolist() for row in rows] == [[2, *wordpiece_ids(text)][:16] for text in captions]
