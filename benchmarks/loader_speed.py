"""Whether what feeds a tuning step keeps up with it, and what millions of images cost in memory.

`python benchmarks/loader_speed.py --rows 10000000`; what the figures mean stands in ../docs/mixing.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench_options import add_options

# A process's peak begins at that of the process that started it: what needs much is imported in processes of their own.

SHARD = 250_000


def prepare(options: argparse.Namespace, place: Path) -> None:
    """Write the store, and one with half of its images."""
    for name, rows in (("whole", options.rows), ("half", options.rows // 2)):
        write_store(options, place / name, rows)


def write_store(options: argparse.Namespace, folder: Path, rows: int) -> None:
    """A store of so many images: real captions, again and again; one file of random features, linked as often."""
    import os

    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from bench_store import read_captions

    from litune.files import write_json
    from litune.store.store import FORMAT, MANIFEST

    captions = pa.array(read_captions(options.captions, options.split, options.lang))
    size = min(rows, SHARD)
    features = np.random.default_rng(0).standard_normal((size, options.dim), dtype=np.float32).astype(np.float16)
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, start in enumerate(range(0, rows, size)):
        numbers = np.arange(start, min(start + size, rows))
        file = folder / "img_emb" / f"img_emb_{number:04d}.npy"
        first = folder / "img_emb" / "img_emb_0000.npy"
        if number == 0 or len(numbers) < size:
            np.save(file, features[: len(numbers)])
        else:
            os.link(first, file)
        keys = pc.binary_join_element_wise(pa.array(numbers).cast(pa.string()), ".png", "")
        texts = captions.take(pa.array(numbers % len(captions)))
        lists = pa.ListArray.from_arrays(pa.array(np.arange(len(numbers) + 1, dtype=np.int32)), texts)
        hashes = hexadecimal(np.random.default_rng([1, number]), len(numbers))
        table = pa.table({"key": keys, "image_path": keys, "captions": lists, "sha256": hashes})
        pa.parquet.write_table(table, folder / "metadata" / f"metadata_{number:04d}.parquet")
    facts = {"tower": None, "images": rows, "rows": rows, "seen": rows, "dtype": "float16", "pairs": None}
    write_json(folder / MANIFEST, {"format": FORMAT, "complete": True, "width": options.dim, **facts})


def hexadecimal(random: Any, count: int) -> Any:
    """So many random hashes, as text."""
    import numpy as np
    import pyarrow as pa

    letters = np.frombuffer(b"0123456789abcdef", np.uint8)[random.integers(16, size=64 * count, dtype=np.uint8)]
    offsets = np.arange(0, 64 * count + 1, 64, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(letters))


class Memory:
    """The most memory of this process's own that is seen while it runs: what is not a file's page, in bytes."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, anonymous())


def anonymous() -> int:
    """Memory that is the process's own, in bytes; all that is resident where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One store's figures, from a process that has done nothing else; of the whole store, real steps' too."""
    import torch
    from bench_run import machine, start_run

    if options.threads:
        torch.set_num_threads(options.threads)
    imported, memory = anonymous(), Memory()
    # The text tower first, so that loading it is no part of what is measured.
    from litune.text.registry import make_text_tower, parse_text_spec

    make_text_tower(parse_text_spec(options.text_tower), vocab_size=0, max_tokens=16, pooling="auto", dropout=None)
    begin = time.perf_counter()
    run = start_run(
        folder,
        text_tower=options.text_tower,
        batch_size=options.batch_size,
        precision=options.precision,
        shuffle=options.shuffle,
        duration="1000000steps",
    )
    opened = time.perf_counter() - begin
    batches = run.inputs(0)
    first = next(batches)
    to_first = time.perf_counter() - begin
    seen, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < options.seconds:
        seen += len(next(batches).batch.images)
    loader = (time.perf_counter() - begin) / seen
    batches.close()
    run.batches._passes.clear()
    begin = time.perf_counter()
    again = run.inputs(run.batches.per_epoch // 2)
    next(again)
    to_resume = opened + time.perf_counter() - begin
    again.close()
    most = memory.most
    seconds = []
    for _ in range(0 if options.step_rate or folder.name == "half" else options.steps):
        begin = time.perf_counter()
        run.step(first)
        seconds.append(time.perf_counter() - begin)
        run.progress.step += 1
    return {
        "loader": loader,
        "step": sorted(seconds)[len(seconds) // 2] / options.batch_size if seconds else None,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "own": most - imported,
        "own_peak_gb": most / 1e9,
        "seconds_to_first_batch": to_first,
        "seconds_to_resume": to_resume,
        **machine(),
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.inside:
        place, name = Path(options.inside[0]), options.inside[1]
        print(json.dumps(measure(options, place / name) if name else prepare(options, place)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:

        def fresh(name: str) -> Any:
            command = [sys.executable, __file__, *arguments, "--inside", place, name]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            return json.loads(run.stdout.splitlines()[-1])

        fresh("")
        half, whole = fresh("half"), fresh("whole")
    step = 1 / options.step_rate if options.step_rate else whole.pop("step")
    found = {
        "rows": options.rows,
        "pairs_per_second_loader": 1 / whole.pop("loader"),
        "pairs_per_second_step": 1 / step,
        "share_of_step": 0.0,
        "peak_gb": whole.pop("peak_gb"),
        "bytes_per_row": (whole.pop("own") - half["own"]) / (options.rows - options.rows // 2),
        **{name: value for name, value in whole.items() if name != "step"},
        "settings": {
            "text_tower": options.text_tower,
            "dim": options.dim,
            "batch_size": options.batch_size,
            "shuffle": options.shuffle,
            "captions": options.captions.name if options.captions else "emoji names",
        },
    }
    found["share_of_step"] = found["pairs_per_second_step"] / found["pairs_per_second_loader"]
    print_table(found)
    print(json.dumps(found))


def print_table(found: dict[str, Any]) -> None:
    print(f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}")
    print(f"{found['rows']:,} images, D = {found['settings']['dim']}, {found['settings']['text_tower']}")
    print(f"loader {found['pairs_per_second_loader']:12,.0f} pairs/s")
    print(f"step   {found['pairs_per_second_step']:12,.0f} pairs/s: the loader's share {found['share_of_step']:.1%}")
    print(f"memory {found['peak_gb']:.2f} GB with the pages of files, {found['own_peak_gb']:.2f} GB without them")
    print(f"       {found['bytes_per_row']:.0f} bytes an image")
    first, resumed = found["seconds_to_first_batch"], found["seconds_to_resume"]
    print(f"first batch after {first:.1f} s, after an interruption {resumed:.1f} s")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(dim=64)
    parser.add_argument("--rows", type=int, default=200_000, help="images in the store")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--shuffle", choices=["full", "window"], default="full")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long the loader runs")
    parser.add_argument("--steps", type=int, default=7, help="real steps; the median is taken")
    parser.add_argument("--step-rate", type=float, help="pairs a second of a step that was measured elsewhere")
    parser.add_argument("--folder", type=Path, help="where the store is written, for a while")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.seconds, options.steps = 2_000, 0.2, 1
    return options


if __name__ == "__main__":
    main()
