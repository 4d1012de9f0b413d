"""How many planted copies `litune data dedup` finds, how many pairs it reports that are none, and what it costs.

`python benchmarks/dedup_recall.py --images FOLDER`; what the figures mean stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_run import machine
from embed_speed import make_pictures
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from litune.curation.dedup import dedup_data
from litune.curation.duplicates import PROBES, NeighbourIndex, Space
from litune.image.pictures import open_rgb

KNOWN = Path(__file__).parent / "dedup_known.txt"
Change = Callable[[Image.Image, random.Random], Image.Image]


def crop(share: float) -> Change:
    """Cuts this share of the width and of the height off, at a random place."""

    def change(picture: Image.Image, chance: random.Random) -> Image.Image:
        width, height = (round(side * (1 - share)) for side in picture.size)
        left, top = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
        return picture.crop((left, top, left + width, top + height))

    return change


def write_on(picture: Image.Image, chance: random.Random) -> Image.Image:
    """A line of text a fourteenth of the height tall, at a random place, in a random color."""
    picture = picture.copy()
    place = chance.uniform(0.02, 0.5) * picture.width, chance.uniform(0.05, 0.85) * picture.height
    font = ImageFont.load_default(max(10, picture.height // 14))
    ImageDraw.Draw(picture).text(place, "(c) my-photos.example", chance.choice(["white", "black", "yellow"]), font)
    return picture


def halve(picture: Image.Image, chance: random.Random) -> Image.Image:
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def brighten(picture: Image.Image, chance: random.Random) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(chance.choice([0.7, 1.3]))


# Each kind of copy: what it does to the picture, and the JPEG quality it is saved with.
KINDS: dict[str, tuple[Change, int]] = {
    **{f"JPEG {quality}": (lambda picture, chance: picture, quality) for quality in (30, 50, 75, 95)},
    "half size": (halve, 90),
    "crop 5%": (crop(0.05), 90),
    "crop 10%": (crop(0.10), 90),
    "mirrored": (lambda picture, chance: ImageOps.mirror(picture), 90),
    "text": (write_on, 90),
    "brightness": (brighten, 90),
}
MUST = [kind for kind in KINDS if kind not in ("crop 10%", "text")]


def plant(originals: Sequence[Path], folder: Path) -> dict[str, tuple[str, str]]:
    """Copies of all kinds in a folder: {file name: (original's name, kind)}."""
    planted = {}
    for original in originals:
        picture = open_rgb(original.read_bytes())
        for number, (kind, (change, quality)) in enumerate(KINDS.items()):
            name = f"{original.stem}.copy{number}.jpg"
            chance = random.Random(f"{original.name} {kind}")
            change(picture, chance).save(folder / name, quality=quality)
            planted[name] = original.name, kind
    return planted


def link(files: Sequence[Path], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file.name).symlink_to(file.absolute())
    return folder


def read_known(file: Path) -> set[frozenset[str]]:
    """Pairs of originals that a person has looked at and found to show the same moment."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {frozenset(line.split()[:2]) for line in lines if line.strip() and not line.startswith("#")}


def index_cost(counts: Sequence[int], width: int, queries: int) -> list[dict[str, float]]:
    """Time and recall of the index on made features: clusters, and of each query a copy with a cosine of about 0.8."""
    chance = np.random.default_rng(0)
    middles = chance.normal(size=(1000, width)).astype(np.float32)
    found = []
    for count in counts:
        features = middles[chance.integers(0, len(middles), count)]
        features += chance.normal(size=features.shape).astype(np.float32)
        rows = chance.choice(count, min(queries, count), replace=False)
        noise = chance.normal(size=(len(rows), width)).astype(np.float32)
        copies = features[rows] + 0.75 * np.sqrt(2) * noise
        space = Space.fit(features[:20_000])
        began = time.perf_counter()

        def blocks(numbers: np.ndarray, features: np.ndarray = features) -> Any:
            yield from (features[numbers[start : start + 8192]] for start in range(0, len(numbers), 8192))

        index = NeighbourIndex(space, blocks, count)
        built = time.perf_counter()
        nearest, cosines = index.search(space(copies), 4)
        searched = time.perf_counter() - built
        hit = nearest == rows[:, None]
        found.append(
            {
                "vectors": count,
                "build_seconds": built - began,
                "search_seconds_per_million": searched * 1e6 / len(rows),
                "recall_at_4": float(hit.any(axis=1).mean()),
                "mean_cosine": float(cosines[hit].mean()),
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG files; by default some are made")
    parser.add_argument("--count", type=int, default=1000, help="originals, each with a copy of every kind")
    parser.add_argument("--others", type=int, default=2000, help="further files of the folder among the copies")
    parser.add_argument("--image-tower", default="efficientnet-lite0")
    parser.add_argument("--index", type=int, nargs="*", default=[10_000, 100_000, 200_000], help="sizes of the index")
    parser.add_argument("--known", type=Path, default=KNOWN, help="pairs of originals that are duplicates themselves")
    parser.add_argument("--out", type=Path, help="keep the report with its pictures in this folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        files = (
            sorted(options.images.glob("*.jpg")) if options.images else make_pictures(work / "made", options.count + 50)
        )
        random.Random(0).shuffle(files)
        originals, others = files[: options.count], files[options.count : options.count + options.others]
        evaluation, tuning = link(originals, work / "evaluation"), link(others, work / "tuning")
        planted = plant(originals, tuning)
        began = time.perf_counter()
        out = options.out or work / "out"
        report = dedup_data(
            pairs=tuning, against=[evaluation], image_tower=options.image_tower, out=out, within=False, overwrite=True
        )
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in (out / "removed.jsonl").read_text(encoding="utf-8").splitlines()]
    known = read_known(options.known)
    hits = dict.fromkeys(KINDS, 0)
    false, own = [], []
    for line in lines:
        original, kind = planted.get(line["key"], (line["key"], ""))
        if line["duplicate_of"] == original:
            hits[kind] += 1
        elif frozenset((original, line["duplicate_of"])) in known:
            own.append(line)
        else:
            false.append(line)
    recall = {kind: count / len(originals) for kind, count in hits.items()}
    images = len(planted) + len(others)
    found = {
        "recall": recall,
        "least_recall": min(recall[kind] for kind in MUST),
        "false_pairs": len(false),
        "false_pairs_per_10k": len(false) * 1e4 / images,
        "known_pairs": len(own),
        "images": images,
        "originals": len(originals),
        "candidates_per_image": report["candidates"] / images,
        "seconds": seconds,
        "seconds_per_million_images": {
            name: value * 1e6 / (images + len(originals)) for name, value in report["seconds"].items()
        },
        "index": index_cost(options.index, 256, 10_000),
        "probes": PROBES,
        "image_tower": options.image_tower,
        **machine(),
    }
    print(f"{found['cpu']}, {found['threads']} threads, {options.image_tower}")
    print(f"{images:,} images against {len(originals):,} originals")
    for kind, value in recall.items():
        print(f"{kind:14}{value:8.2%}")
    print(f"false pairs: {len(false)} ({found['false_pairs_per_10k']:.2f} per 10,000 images); known ones: {len(own)}")
    for line in false:
        print(f"  {line['key']} and {line['duplicate_of']}: match {line['match']:.3f}, cosine {line['cosine']:.3f}")
    for one in found["index"]:
        print(
            f"index of {one['vectors']:,}: built in {one['build_seconds']:.1f} s, a million searches in "
            f"{one['search_seconds_per_million']:.0f} s, recall@4 {one['recall_at_4']:.2%}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
