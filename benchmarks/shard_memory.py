"""The memory of each of two processes that tune a BERT, with --shard and without.

    python benchmarks/shard_memory.py [--layers 12] [--width 768]

In GB: the most that tensors took at once (weights, gradients, Adam's moments and what steps keep), which is what a GPU
has to hold, and the process's peak. On processors the latter tells little: gloo, torch.distributed's modules and memory
that the C library keeps are in it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def rank(folder: Path, text_tower: str, shard: bool) -> None:
    """Tune for three steps as one of two processes, and write down how much memory that took."""
    import torch
    from bench_held import Held

    from litune.tuning.tune import tune

    torch.set_num_threads(1)
    with Held() as held:
        tune(
            store=folder / "store",
            text_tower=text_tower,
            out=folder / f"run-{shard}",
            shard=shard,
            device="cpu",
            precision="float32",
            duration="3steps",
            batch_size=16,
            holdout=0.0,
        )
    found = {"tensors_gb": round(held.most / 1e9, 3), "process_gb": round(peak_gb(), 3)}
    (folder / f"{shard}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def measure(folder: Path, text_tower: str, shard: bool) -> list[dict[str, Any]]:
    """What each of two processes took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*LAUNCH, "--rank-of", str(folder), text_tower, str(int(shard))], check=True, env=environment)
    return [json.loads((folder / f"{shard}-{one}.json").read_text()) for one in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        folder, text_tower, shard = options.rank_of
        rank(Path(folder), text_tower, shard == "1")
        return
    from bench_gpu_inputs import make_captions, write_text_tower
    from bench_gpu_task import Shape, Sizes, Task
    from bench_store import write_store

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = Task(Sizes(), "cpu", folder)
        shape = Shape(layers=options.layers, width=options.width, mlp=4 * options.width, heads=options.width // 64)
        write_store(folder / "store", make_captions(task, 64), 64)
        text_tower = write_text_tower(task, shape)
        found = {"sharded": measure(folder, text_tower, True), "whole": measure(folder, text_tower, False)}
    print(json.dumps({"layers": options.layers, "width": options.width, **found}))


if __name__ == "__main__":
    main()
