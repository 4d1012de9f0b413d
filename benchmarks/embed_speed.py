"""How fast `litune embed` is, from JPEG files to a finished store: beside the machine's limit, and plain torch.

`python benchmarks/embed_speed.py --images FOLDER`; what the figures mean stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_run import machine
from PIL import Image

from litune.devices import processor_cores
from litune.image.pictures import ImageTransform
from litune.image.registry import ImageTower, load_image_tower
from litune.image.runtimes import agrees, build, candidates, images_per_second, measure
from litune.store.embed import embed

TOWERS = ("efficientnet-lite0", "timm:vit_small_patch16_224?init=random")
BATCH = 32


def link_pictures(folder: Path, found: Sequence[Path]) -> None:
    """A folder of so many JPEG files; made ones of photos' usual size where none are given."""
    folder.mkdir()
    for i, file in enumerate(found):
        (folder / f"{i:06}.jpg").symlink_to(file.absolute())
        (folder / f"{i:06}.txt").write_text(f"picture {i}", encoding="utf-8")


def make_pictures(folder: Path, count: int) -> list[Path]:
    """JPEG files of 500 × 375 pixels, smooth shapes with some noise: about as many bytes as photos have."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + random.integers(-12, 13, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def decoders(transform: ImageTransform) -> dict[str, Callable[[bytes], object]]:
    """Bare decoding of a JPEG, resizing to the tower's size and cropping, by each library at hand."""
    height, width = transform.size
    side = round(max(transform.size) / transform.crop_pct)

    def pillow(data: bytes) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))

    found: dict[str, Callable[[bytes], object]] = {"Pillow": pillow}
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2 import functional as tv
    except ImportError:
        return found

    def torchvision(data: bytes) -> object:
        values = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        values = tv.resize(values, [side], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
        return tv.center_crop(values, [height, width])

    return found | {"torchvision": torchvision}


def pictures_per_second(decode: Callable[[bytes], object], files: Sequence[bytes]) -> float:
    """With a thread per core; single-threaded calls."""

    def work(data: bytes) -> None:
        torch.set_num_threads(1)
        decode(data)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(processor_cores()) as pool:
        began = time.perf_counter()
        list(pool.map(work, files))
        rate = len(files) / (time.perf_counter() - began)
    torch.set_num_threads(before)
    return rate


def measure_tower(spec: str, pictures: Path, count: int, rounds: int, work: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    tower = load_image_tower(spec)
    assert isinstance(tower.preprocess, ImageTransform)
    files = [file.read_bytes() for file in sorted(pictures.glob("*.jpg"))]
    bare = decoders(tower.preprocess)
    ready = np.stack([tower.preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in files[:BATCH]])
    pixels = torch.from_numpy(ready)
    _, trials = measure(tower, candidates(tower, "auto", "auto"), pixels)
    found: list[dict[str, float]] = []
    for i in range(rounds + 1):  # one after the other, so that whatever else the machine does hits all of them alike
        torch.manual_seed(0)
        began = time.perf_counter()
        store = embed(pairs=pictures, image_tower=spec, out=work / f"{i}", batch_size=BATCH)
        whole = time.perf_counter() - began
        runtime = store.manifest["tower"]["runtime"], store.manifest["tower"]["precision"]
        found.append(
            {
                "litune": count / whole,
                "litune_images_alone": store.manifest["images_per_second"],
                "runtime": rate_alone(tower, runtime, pixels),
                "decoding": max(pictures_per_second(decode, files) for decode in bare.values()),
                "plain_torch": plain_torch(spec, pixels),
            }
        )
    medians = {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
    limit = 1 / (1 / medians["runtime"] + 1 / medians["decoding"])
    return {
        "images_per_second": medians["litune_images_alone"],
        "images_per_second_with_start": medians["litune"],
        "limit_images_per_second": limit,
        "share_of_limit": medians["litune_images_alone"] / limit,
        "times_plain_torch": medians["litune_images_alone"] / medians["plain_torch"],
        "ready_tensors_per_second": medians["runtime"],
        "decoded_per_second": medians["decoding"],
        "plain_torch_per_second": medians["plain_torch"],
        "runtime": " ".join(runtime),
        "trials": {f"{t.name} {t.precision}": [t.images_per_second, t.cosine] for t in trials},
        "agreeing": [f"{t.name} {t.precision}" for t in trials if agrees(t.cosine)],
    }


def rate_alone(tower: ImageTower, runtime: tuple[str, str], pixels: torch.Tensor) -> float:
    """The bare rate of the chosen runtime on ready tensors, with all cores."""
    return images_per_second(build(tower, *runtime, pixels), pixels, seconds=2.0)


def plain_torch(spec: str, pixels: torch.Tensor) -> float:
    """The tower called as its library's example does it: float32, pictures channel by channel, torch's own threads."""
    torch.manual_seed(0)
    network: Any = load_image_tower(spec).network
    values = (pixels.float() / 255).contiguous()
    with torch.inference_mode():
        network(values)
        began = time.perf_counter()
        network(values)
        return len(values) / (time.perf_counter() - began)


def print_table(found: dict[str, Any]) -> None:
    print(f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}, {found['images']} pictures")
    print(f"{'images a second':42}{'embed':>8}{'limit':>8}{'share':>8}{'torch':>8}{'times':>8}")
    for spec, one in found["towers"].items():
        numbers = (one["images_per_second"], one["limit_images_per_second"])
        print(f"{spec:42}" + "".join(f"{v:8.1f}" for v in numbers) + f"{one['share_of_limit']:8.2f}", end="")
        print(f"{one['plain_torch_per_second']:8.1f}{one['times_plain_torch']:8.1f}   in {one['runtime']}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG files; by default some are made")
    parser.add_argument("--count", type=int, default=640, help="at most so many of them")
    parser.add_argument("--towers", nargs="+", default=TOWERS)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds; one more warms up")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.images:
            given = sorted(options.images.rglob("*.jpg"))[: options.count]
        else:
            given = make_pictures(folder / "made", options.count)
        link_pictures(folder / "pictures", given)
        towers = {}
        for i, spec in enumerate(options.towers):
            (folder / str(i)).mkdir()
            towers[spec] = measure_tower(spec, folder / "pictures", len(given), options.rounds, folder / str(i))
    found = {"towers": towers, "images": len(given), "rounds": options.rounds, **machine()}
    print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
