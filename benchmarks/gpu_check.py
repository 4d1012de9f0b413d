"""Whether litune is right and fast on this machine's GPU: one command, one JSON object at the end.

    python benchmarks/gpu_check.py                   # everything: at most six minutes on a card like an H100
    python benchmarks/gpu_check.py --parts right     # some parts: those whose names begin so (see PARTS)
    python benchmarks/gpu_check.py --quick           # small sizes, to see that it runs; always so without a GPU

Nothing is downloaded, and no package is needed that litune does not need itself: towers have random weights, captions
consist of a made-up vocabulary, features and pictures are drawn. Each part runs in a process of its own, so that a
crash, a hang or a lack of memory costs that part alone. The exit code is 1 where a part failed.

What the figures mean (limits and goals, with their reasons, stand in README.md beside this file):

    right:…        difference_…: ‖found − expected‖ / ‖expected‖, expected being the processor's float32; …_line: texts
                   read by the flash kernel, which else only long ones are;
                   same_seed_same_bytes, resumed_same_bytes: whether two runs' models are equal to the byte
    fast:tune-…    by batch size: pairs_per_second of `litune tune` after its first steps (seconds_of_warm_up);
                   teraflops of the text tower's matrix products in them; share_of_matmul, these by the rate of large
                   square products on this card (matmul_teraflops); share_of_tower_shapes, by the rate of products of
                   the tower's own shapes
    fast:embed-…   bare_per_second: the network alone, compiled, its pictures on the card; ready_per_second_…: litune's
                   runtimes, from pictures in the processor's memory to features there; share_of_bare, the faster of
                   these by the first; files_per_second: `litune embed` on JPEG files
    fast:search    queries_per_second of an exact search, many queries at once; seconds_first is the first time, from
                   disk; same_as_processor: the share of the nearest images in common
    fast:open_clip pairs_per_second of open_clip's training step, image tower locked, pictures on the card
    peak_…gb       the most memory, in 10⁹ bytes: allocated and reserved by torch on a card, else of the process; of
                   tuning, by batch size
    seconds        of the whole part, its process's start included
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench_gpu_task import SMALL, Sizes, SkippedError, Task, peak_memory

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# This process only supervises: it never opens the card, and what takes long to import is imported by the parts.

SECONDS = 350.0
"""How long all parts may take."""


@dataclass(frozen=True)
class Part:
    """A part: the module and the function that do it, and the most seconds it may take."""

    module: str
    function: str
    seconds: float


DEVICE = "device"
PARTS = {
    DEVICE: Part("gpu_check", "describe_device", 60),
    "right:towers": Part("bench_gpu_right", "towers", 60),
    "right:run": Part("bench_gpu_right", "run", 50),
    "right:ranks": Part("bench_gpu_right", "ranks", 70),
    "fast:tune-bert": Part("bench_gpu_fast", "tune_bert", 100),
    "fast:embed-vit-l": Part("bench_gpu_fast", "embed_vit_l", 100),
    "fast:tune-minilm": Part("bench_gpu_fast", "tune_minilm", 80),
    "fast:search": Part("bench_gpu_fast", "search", 60),
    "fast:embed-vit-b": Part("bench_gpu_fast", "embed_vit_b", 80),
    "fast:open_clip": Part("bench_gpu_fast", "open_clip", 60),
}
"""By name, what matters most first: when the time is over, the last ones are left out."""
CHOICES = [name for name in PARTS if name != DEVICE]


def describe_device(task: Task) -> None:
    """The card, the machine, and the versions of what runs on them."""
    import torch

    from litune.devices import processor_cores
    from litune.store.store import library_versions

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    task.add(cards=cards, cores=processor_cores(), **library_versions(), cuda=torch.version.cuda)
    if not cards:
        return
    card = torch.cuda.get_device_properties(0)
    task.add(card=card.name, gb=card.total_memory / 1e9, capability=f"{card.major}.{card.minor}")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    with suppress(OSError):
        told = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout
        task.add(**{"driver, clock, power": told.strip()})


def run_part(part: Part, task: Task) -> None:
    """A part in a process of its own: its figures and how it ended go to its file."""
    os.setsid()  # so that all it has started can be ended with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        getattr(importlib.import_module(part.module), part.function)(task)
        ended = {"status": "failed" if task.wrong else "ok", "reason": "; ".join(task.wrong) or None}
    except SkippedError as why:
        ended = {"status": "skipped", "reason": str(why)}
    except Exception as why:
        traceback.print_exc()
        ended = {"status": "failed", "reason": f"{type(why).__name__}: {why}"[:500]}
    if part != PARTS[DEVICE] and ended["status"] != "skipped":
        task.add(**peak_memory(task.device))
    task.add(**ended)


def supervise(part: Part, task: Task, seconds: float) -> dict[str, Any]:
    """Run a part for at most so many seconds: its figures, `status`, `reason` and `seconds`."""
    began = time.monotonic()
    context: Any = multiprocessing.get_context(task.start)
    process = context.Process(target=run_part, args=(part, task))
    process.start()
    try:
        process.join(seconds)
        late = process.is_alive()
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    found = task.figures()
    if "status" not in found:
        why = f"it was not done after {seconds:.0f} s" if late else f"its process ended with {process.exitcode}"
        found |= {"status": "failed", "reason": why}
    return found | {"seconds": round(time.monotonic() - began, 1)}


def check(names: Sequence[str], task: Task, deadline: float, patience: float = 1.0) -> dict[str, dict[str, Any]]:
    """Run these parts one after the other, each in a folder of its own; print what each found.

    They end at the deadline, and each after `patience` times its seconds.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        left = min(patience * PARTS[name].seconds, deadline - time.monotonic())
        if left < 1:
            found[name] = {"status": "skipped", "reason": "no time was left", "seconds": 0.0}
        else:
            with tempfile.TemporaryDirectory(dir=task.folder) as own:
                found[name] = supervise(PARTS[name], replace(task, folder=Path(own), wrong=[]), left)
        print_part(name, found[name])
    return found


def print_part(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['status']}, {found['seconds']:.0f} s")
    for figure, value in found.items():
        if figure not in ("status", "seconds") and value is not None:
            print(f"    {figure}: {value}")
    sys.stdout.flush()


def import_early() -> None:
    """Import what the parts need, so that processes that are forked from this one need not."""
    for name in ("bench_gpu_right", "bench_gpu_fast", "litune.tuning.tune", "litune.store.embed"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.bert.modeling_bert")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=CHOICES, help=f"of {', '.join(CHOICES)}, or their beginnings")
    parser.add_argument("--quick", action="store_true", help="small sizes, as without a GPU")
    parser.add_argument("--patience", type=float, default=1.0, help="on a slow machine: so many times the time limits")
    options = parser.parse_args(arguments)
    for given in options.parts:
        if not any(name.startswith(given) for name in CHOICES):
            parser.error(f"no part's name begins with {given!r}: there are {', '.join(CHOICES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = [name for name in CHOICES if name.startswith(tuple(options.parts))]
    began = time.monotonic()
    deadline = began + options.patience * SECONDS
    with tempfile.TemporaryDirectory() as folder:
        task = Task(SMALL if options.quick else Sizes(), "cuda", Path(folder))
        device = check([DEVICE], task, deadline, options.patience)[DEVICE]
        if not device.get("cards"):
            # Without a card to be opened twice, forked processes are safe on Linux, and spare most of the imports.
            task = replace(task, sizes=SMALL, device="cpu", start="fork" if sys.platform == "linux" else "spawn")
        if task.start == "fork" and device["status"] == "ok":
            import_early()
        parts = check(names, task, deadline, options.patience) if device["status"] == "ok" else {}
    failed = [name for name, one in {DEVICE: device, **parts}.items() if one["status"] == "failed"]
    whole = {"ran_on": task.device, DEVICE: device, "parts": parts, "failed": failed, "sizes": asdict(task.sizes)}
    print(json.dumps(whole | {"seconds": round(time.monotonic() - began, 1)}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
