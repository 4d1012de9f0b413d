"""How much memory a tuning step takes as the batch grows, and how long it lasts.

`python benchmarks/tune_memory.py`; what the figures mean stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_options import add_options

# A process's peak begins at that of the process that started it. So this one stays small: whatever needs numpy or
# torch is imported in the processes that it starts.

WARM_UP = 64


def peak_gb() -> float:
    """The most memory that this process has had resident, in GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def prepare(options: argparse.Namespace, store: Path) -> None:
    """Write a store of as many images as the largest batch has pairs."""
    from bench_store import read_captions, vary, write_store

    captions = read_captions(options.captions, options.split, options.lang)
    write_store(store, vary(captions, max(options.batch_sizes)), options.dim)


def measure(options: argparse.Namespace, store: Path, size: int) -> dict[str, Any]:
    """One size's figures, from a process that has done nothing else."""
    import torch
    from bench_run import machine, start_run

    if options.threads:
        torch.set_num_threads(options.threads)
    imported = peak_gb()
    run = start_run(
        store, text_tower=options.text_tower, batch_size=size, precision=options.precision, duration="1000steps"
    )
    loaded = peak_gb()
    batches = run.inputs(0)
    run.step(next(batches))  # makes the optimizer's moments, which every later step has
    seconds = []
    for _ in range(options.steps):
        run.progress.step += 1
        begin = time.perf_counter()
        run.step(next(batches))
        seconds.append(time.perf_counter() - begin)
    return {
        "peak_gb": peak_gb(),
        "imported_gb": imported,
        "loaded_gb": loaded,
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
        "precision": "bfloat16" if run.bfloat16 else "float32",
        "micro_batch": run.micro.texts,
        **machine(),
    }


def fit_line(points: dict[int, float]) -> dict[str, float]:
    """The least-squares line through the peaks, and how far the worst of them is from it."""
    sizes, peaks = list(points), list(points.values())
    x, y = sum(sizes) / len(sizes), sum(peaks) / len(peaks)
    slope = sum((a - x) * (b - y) for a, b in points.items()) / sum((a - x) ** 2 for a in sizes)
    worst = max(abs(y + slope * (a - x) - b) / b for a, b in points.items())
    return {"gb_per_1000_pairs": 1000 * slope, "gb_at_0": y - slope * x, "worst_relative_residual": worst}


def print_table(found: dict[str, Any]) -> None:
    settings, fit = found["settings"], found["fit"]
    print(f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}, {found['precision']}")
    print(f"D = {settings['dim']}, {settings['text_tower']}, micro-batches of {found['micro_batch']}")
    print(
        f"after the imports {found['imported_gb']:.2f} GB, with model, captions and store {found['loaded_gb']:.2f} GB"
    )
    print(f"{'batch':>8}{'peak GB':>10}{'seconds a step':>17}")
    for size, peak in found["peak_gb"].items():
        print(f"{size:>8}{peak:10.2f}{found['seconds_per_step'][size]:17.2f}")
    if fit:
        print(
            f"line: {fit['gb_at_0']:.2f} GB + {fit['gb_per_1000_pairs']:.4f} GB per 1,000 pairs, "
            f"no peak further from it than {fit['worst_relative_residual']:.1%}"
        )


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.inside:
        store, size = Path(options.inside[0]), int(options.inside[1])
        print(json.dumps(measure(options, store, size) if size else prepare(options, store)))
        return
    with tempfile.TemporaryDirectory() as folder:

        def fresh(size: int) -> Any:
            inside = ["--inside", str(Path(folder) / "store"), str(size)]
            run = subprocess.run([sys.executable, __file__, *arguments, *inside], check=True, stdout=subprocess.PIPE)
            return json.loads(run.stdout.splitlines()[-1])

        fresh(0)
        sizes = {size: fresh(size) for size in options.batch_sizes}
    first = next(iter(sizes.values()))
    found = {
        "peak_gb": {str(size): one["peak_gb"] for size, one in sizes.items()},
        "seconds_per_step": {str(size): one["seconds_per_step"] for size, one in sizes.items()},
        "fit": fit_line({size: one["peak_gb"] for size, one in sizes.items()}) if len(sizes) > 1 else None,
        "settings": {
            "text_tower": options.text_tower,
            "dim": options.dim,
            "images": max(options.batch_sizes),
            "steps": options.steps,
            "captions": options.captions.name if options.captions else "emoji names",
        },
        **{k: v for k, v in first.items() if k not in ("peak_gb", "seconds_per_step")},
    }
    print_table(found)
    print(json.dumps(found))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384, 32768])
    parser.add_argument("--steps", type=int, default=1, help="measured steps of each size")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch_sizes = [256, 1024]
    return options


if __name__ == "__main__":
    main()
