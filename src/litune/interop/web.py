"""A run and the images of a store as static files: the page of `litune serve`, with its model in the browser.

    index.html, page/          the page; its backend.js asks the worker instead of a server
    page/local/                the worker: tokenizer, preprocessing, onnxruntime-web
    data/model.json            what the page shows of the run, and the temperature
    data/text.onnx             the text tower (text.int8.onnx with int8), tokenizer.json beside it
    data/features.f16          the store's image features [N, D]: float16, little-endian, of length one
    data/images.json           keys, captions and labels of the N images
    data/pictures/ROW.jpg      small pictures
    data/image.onnx            the image tower, if requested

Any static file server will do; nothing is fetched from elsewhere and nothing is sent.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from litune.devices import processor_cores
from litune.errors import DataError, ExportError
from litune.files import atomic, cache_folder, write_json, write_text
from litune.image.pictures import ImageTransform, map_ahead, open_rgb
from litune.interop.onnx import OnnxHalves, need_packages, quantize_text, write_image_half, write_text_half
from litune.interop.plain import plain_image, plain_text
from litune.interop.samples import TEXTS, compare, pictures
from litune.interop.tokenizer import save_tokenizer
from litune.model.lit import LiT
from litune.pairs.reference import read_bytes
from litune.progress import say, track
from litune.prompts import BARE_TEMPLATES, DEFAULT_TEMPLATES, SHORT_TEMPLATES
from litune.store.store import FeatureStore
from litune.text.tokenizers import Tokenizer

ONNXRUNTIME_WEB = "1.30.0"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
SIDE, QUALITY = 256, 80
"""The longer side of the small pictures, and their JPEG quality."""
MOST_CAPTIONS = 5
"""At most this many captions of an image are shown."""

KINDS: dict[str, set[str | None]] = {
    "normalizer": {
        None, "Sequence", "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip",
        "Replace", "Prepend", "Precompiled",
    },
    "pre_tokenizer": {
        None, "Sequence", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Split", "Metaspace",
        "ByteLevel",
    },
    "model": {"WordPiece", "BPE", "Unigram"},
    "post_processor": {None, "TemplateProcessing", "ByteLevel"},
}  # fmt: skip
"""The parts of a tokenizer.json that local/tokenizer.js implements."""


def export_web(
    model: LiT,
    folder: Path,
    store: FeatureStore,
    *,
    name: str,
    text_tower: str | None,
    split: str | None,
    int8: bool,
    with_image_tower: bool,
    runtime: Path | None,
) -> dict[str, Any]:
    """Write the page with everything it needs; returns the largest differences from the run and the size in bytes.

    `runtime` is a folder with the files of the npm package onnxruntime-web, which npm fetches by default. The text
    tower (and the image tower) are compared with the run in ONNX Runtime, the tokenizer with node where that is
    installed.

    Raises `ExportError` where a half or the tokenizer can't be expressed, or onnxruntime-web can't be had;
    `DataError` where not one picture of the store can be read.
    """
    need_packages()
    data, page, local = folder / "data", folder / "page", folder / "page" / "local"
    data.mkdir()
    check_tokenizer(json.loads(save_tokenizer(data, model.tokenizer).to_str()))
    tower = _preprocessed_here(model) if with_image_tower else None
    find_runtime(local, runtime)
    rows = np.arange(len(store)) if split is None else store.select(split).rows
    _copy_page(page)
    (page / "index.html").replace(folder / "index.html")

    write_text_half(plain_text(model), data / "text.onnx")
    report: dict[str, Any] = {"largest_difference": compare("web", model, texts=OnnxHalves(data, None).texts)}
    text_file = "text.onnx"
    if int8:
        report["int8"], text_file = _to_int8(model, data), "text.int8.onnx"
    if tower is not None:
        pixels = torch.from_numpy(np.stack([tower(picture) for picture in pictures()[:2]]).astype(np.float32))
        write_image_half(plain_image(model), data / "image.onnx", pixels)
        halves = OnnxHalves(data, model.load_image_tower(), text_file)
        report["largest_difference"] |= compare("web", model, images=halves.images)

    report["tokenizer_checked"] = _check_with_node(model.tokenizer, data, local, store, rows)
    _write_features(model, store, rows, data / "features.f16")
    _write_pictures(store, rows, data / "pictures")
    labels = _write_images(store, rows, data / "images.json")
    page_data = {
        "run": name,
        "dim": model.dim,
        "temperature": float(model.scale.detach()),  # as the server's API names it: the factor on the cosines
        "text_tower": text_tower,
        "image_tower": (model.image_provenance or {}).get("spec"),
        "can_encode_images": with_image_tower,
        "images": len(rows),
        "templates": {
            "auto": list(DEFAULT_TEMPLATES),
            "bare": list(BARE_TEMPLATES),
            "short": list(SHORT_TEMPLATES),
        },
        "columns": ["key", "captions", *(["label"] if labels else [])],
    }
    settings = None if tower is None else {**tower.describe(), "mean": None, "std": None}
    about = {"page": page_data, "text_file": text_file, "image": settings}
    write_json(data / "model.json", about)
    report["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"{len(rows):,} images, {report['bytes'] / 1e6:.0f} MB; look at it:  python -m http.server -d {folder}")
    return report


def check_tokenizer(config: dict[str, Any]) -> None:
    """Raise `ExportError` where a tokenizer.json has a part that the page's tokenizer does not implement."""
    for part, known in KINDS.items():
        for kind in _kinds(config.get(part)):
            if kind not in known:
                possible = "WordPiece, byte-pair and SentencePiece tokenizers without rules of their own"
                raise ExportError(
                    f"the tokenizer's {part.replace('_', '-')} {kind} does not run in the browser ({possible} do): "
                    "export to onnx, and answer from a server"
                )


def _kinds(part: dict[str, Any] | None) -> Iterator[str | None]:
    yield None if part is None else part["type"]
    for inner in ("normalizers", "pretokenizers"):
        for child in (part or {}).get(inner, []):
            yield from _kinds(child)


def _preprocessed_here(model: LiT) -> ImageTransform:
    """The image tower's preprocessing. Raises `ExportError` where local/pixels.js can't do it."""
    tower = model.load_image_tower()
    transform = tower.preprocess
    if not isinstance(transform, ImageTransform):
        raise ExportError(
            f"the preprocessing of {tower.spec} is not known to the browser: leave out --with-image-tower"
        )
    square = transform.size[0] == transform.size[1]
    if transform.crop_mode != "squash" and not (transform.crop_mode == "center" and square):
        raise ExportError(f"crop_mode {transform.crop_mode} of {transform.size} pixels: leave out --with-image-tower")
    if transform.interpolation not in ("bilinear", "bicubic", "lanczos", "tensorflow"):
        raise ExportError(f"interpolation {transform.interpolation} is not the browser's: leave out --with-image-tower")
    return transform


def find_runtime(local: Path, given: Path | None) -> None:
    """Copy onnxruntime-web's files into `local`, from the folder `given` or from the cache, which npm fills."""
    if given is not None:
        source = next((folder for folder in (given, given / "dist") if (folder / RUNTIME_FILES[0]).is_file()), None)
        if source is None or not all((source / name).is_file() for name in RUNTIME_FILES):
            raise ExportError(f"{given} has no {' and '.join(RUNTIME_FILES)}: give the dist/ of onnxruntime-web")
    else:
        source = cache_folder() / f"onnxruntime-web-{ONNXRUNTIME_WEB}"
        if not all((source / name).is_file() for name in RUNTIME_FILES):
            _from_npm(source)
    local.mkdir(parents=True, exist_ok=True)
    for name in RUNTIME_FILES:
        shutil.copyfile(source / name, local / name)


def _from_npm(target: Path) -> None:
    package = f"onnxruntime-web@{ONNXRUNTIME_WEB}"
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(f"npm is not installed, it brings {package}: install it, or give --onnxruntime-web FOLDER")
    say(f"fetching {package} with npm")
    with tempfile.TemporaryDirectory() as temporary:
        # npm compares the archive with the registry's own checksum.
        command = [npm, "pack", package, "--loglevel=error", "--pack-destination", temporary]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        archive = next(Path(temporary).glob("*.tgz"), None)
        if ran.returncode or archive is None:
            said = [line for line in ran.stderr.splitlines() if "error" in line and "error code" not in line]
            why = next(iter(said), "no reason given")
            raise ExportError(f"npm can't bring {package} ({why.strip()}): give --onnxruntime-web FOLDER")
        with tarfile.open(archive) as tar:
            for name in RUNTIME_FILES:
                member = tar.extractfile(f"package/dist/{name}")
                assert member is not None
                with atomic(target / name) as file:
                    file.write_bytes(member.read())


def _copy_page(page: Path) -> None:
    package = resources.files("litune")
    _copy(package / "serve" / "page", page)
    _copy(package / "interop" / "web", page / "local")
    (page / "local" / "backend-local.js").replace(page / "backend-local.js")
    write_text(page / "backend.js", 'export * from "./backend-local.js";\n')
    (page / "backend-server.js").unlink()


def _copy(source: Traversable, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("."):
            (target / file.name).write_bytes(file.read_bytes())


def _to_int8(model: LiT, data: Path) -> dict[str, Any]:
    """Replace text.onnx by text.int8.onnx; returns the sizes of both and the cosines between their features."""
    quantize_text(data)
    sizes = {name: (data / name).stat().st_size for name in ("text.onnx", "text.int8.onnx")}
    cosines = (model.encode_text(TEXTS) * OnnxHalves(data, None, "text.int8.onnx").texts(TEXTS)).sum(1)
    (data / "text.onnx").unlink()
    return {"bytes": sizes, "cosine": {"least": float(cosines.min()), "mean": float(cosines.mean())}}


_NODE = """
import fs from "node:fs";
import { Tokenizer } from "./tokenizer.js";
const { config, texts } = JSON.parse(fs.readFileSync(0, "utf8"));
const tokenizer = new Tokenizer(config);
console.log(JSON.stringify(texts.map((text) => tokenizer.encode(text))));
"""


def browser_ids(local: Path, config: dict[str, Any], texts: list[str]) -> list[list[int]]:
    """Token ids of texts from local/tokenizer.js with this tokenizer.json, in node. Raises `OSError` where it fails."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("tokenizer.js", "unicode.js"):
            shutil.copyfile(local / name, Path(temporary) / name)
        (Path(temporary) / "package.json").write_text('{"type": "module"}')
        (Path(temporary) / "run.js").write_text(_NODE)
        asked = json.dumps({"config": config, "texts": texts})
        ran = subprocess.run(["node", "run.js"], cwd=temporary, input=asked, capture_output=True, text=True)
        if ran.returncode:
            line = next((text for text in ran.stderr.splitlines() if re.match(r"\w*Error: ", text)), ran.stderr[:200])
            raise OSError(f"node stopped: {line}")
        ids: list[list[int]] = json.loads(ran.stdout)
        return ids


def _check_with_node(tokenizer: Tokenizer, data: Path, local: Path, store: FeatureStore, rows: np.ndarray) -> int:
    """The number of texts whose ids were compared, samples and captions of the store; 0 without node."""
    if shutil.which("node") is None:
        say("node is not installed: the page's tokenizer was not tried on the store's captions")
        return 0
    captions = [c for r in rows[:1000].tolist() for c in store.metadata["captions"][r].as_py()[:1]]
    texts = [*TEXTS, *captions]
    config = json.loads((data / "tokenizer.json").read_text(encoding="utf-8"))
    try:
        all_ids = browser_ids(local, config, texts)
    except OSError as why:
        raise ExportError(
            f"the page's tokenizer can't be tried ({why}): it needs node 20 or later, or no node"
        ) from None
    for text, ids in zip(texts, all_ids, strict=True):
        ours = tokenizer([text]).ids.tolist()
        padded = ids + [ours[-1]] * (len(ours) - len(ids)) if tokenizer.layout == "sticky_eos" else ids
        if padded != ours:
            raise ExportError(f"the page's tokenizer reads {text[:40]!r} otherwise than the run: please report it")
    return len(texts)


def _write_features(model: LiT, store: FeatureStore, rows: np.ndarray, file: Path) -> None:
    with atomic(file) as temporary, open(temporary, "wb") as out:
        for block in store.blocks(rows):
            out.write(model.encode_features(block).numpy().astype("<f2").tobytes())


def _write_pictures(store: FeatureStore, rows: np.ndarray, folder: Path) -> None:
    """Write thumbnails, named by their number in the export; unreadable pictures are counted and left out."""
    folder.mkdir()
    paths = store.metadata["image_path"]
    missing: list[str] = []

    def shrink(number: int) -> str | None:
        path = str(paths[int(rows[number])].as_py())
        try:
            (folder / f"{number}.jpg").write_bytes(thumbnail(open_rgb(read_bytes(path))))
        except (OSError, DataError):
            return path
        return None

    with track("pictures", "images", len(rows)) as task:
        for failed in map_ahead(shrink, range(len(rows)), processor_cores(), 64):
            if failed is not None:
                missing.append(failed)
            task.advance(1)
    if len(missing) == len(rows):
        raise DataError(f"no picture of {store.path} can be read ({missing[0]}): put them back where they were")
    if missing:
        say(f"{len(missing):,} pictures can't be read and are not shown, {missing[0]} among them")


def thumbnail(image: Image.Image) -> bytes:
    """A picture as a JPEG file of at most `SIDE` pixels a side."""
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()


def _write_images(store: FeatureStore, rows: np.ndarray, file: Path) -> bool:
    """Write keys, captions and labels of these rows; returns whether there are labels."""
    table = store.metadata.take(rows)
    labels = table["label"].to_pylist() if "label" in table.column_names else None
    known = labels is not None and any(label is not None for label in labels)
    captions = [texts[:MOST_CAPTIONS] for texts in table["captions"].to_pylist()]
    keys = table["key"].to_pylist()
    write_text(file, json.dumps({"keys": keys, "captions": captions, "labels": labels if known else None}))
    return known
