"""How fast a tuning step is: beside the matrix products it cannot do without, and beside open_clip's own step.

`python benchmarks/tune_speed.py`; what the figures mean stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_open_clip import OpenClipSteps
from bench_options import add_options
from bench_run import machine, start_run
from bench_store import read_captions, vary, write_store
from torch import Tensor, nn
from torch.nn import functional as F

from litune.text.packing import in_rows
from litune.text.registry import parse_text_spec
from litune.tuning.run import Tuning

WARM_UP = 2
PROFILED = 3
PHASES = {
    "encode_images": "encode images",
    "encode_texts": "texts forward",
    "loss": "loss",
    "sum_gradients": "backward",
}
"""The parts of a step that end where these methods return; what follows is the optimizer's."""


class LituneSteps:
    """litune's own steps, loader included, with the seconds of each phase."""

    def __init__(self, run: Tuning) -> None:
        self.run, self.batches = run, run.inputs(0)
        self.marks: dict[str, float] = {}
        for method, phase in PHASES.items():
            setattr(run.take, method, partial(self._marking, getattr(run.take, method), phase))

    def _marking(self, method: Callable[..., Any], phase: str, *args: Any, **options: Any) -> Any:
        found = method(*args, **options)
        self.marks[phase] = time.perf_counter()
        return found

    def __call__(self) -> dict[str, float]:
        """Take a step; returns the seconds of its phases."""
        self.marks = {"begin": time.perf_counter()}
        inputs = next(self.batches)
        self.marks["loader"] = time.perf_counter()
        self.run.step(inputs)
        self.run.progress.step += 1
        self.marks["optimizer"] = time.perf_counter()
        ends = list(self.marks.values())
        seconds = (end - begin for begin, end in pairwise(ends))
        self.captions = inputs.batch.captions[0]
        return dict(zip(list(self.marks)[1:], seconds, strict=True))


class Limit:
    """The matrix products of one step, alone: forward, and the gradients of the input and of the weight."""

    def __init__(self, run: Tuning) -> None:
        self.run = run
        self.dtype = torch.bfloat16 if run.bfloat16 else torch.float32
        self.body = [layer for layer in run.model.text.modules() if isinstance(layer, nn.Linear)]
        self.head = [layer for layer in run.model.text_head.modules() if isinstance(layer, nn.Linear)]
        config = run.model.text.architecture["config"]
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.head_width = config["hidden_size"] // self.heads

    def linear(self, captions: Any) -> float:
        """Seconds of all linear layers, the tower's on the real tokens of these captions, the head's on their number.

        Layers of one shape share their operands, which makes the limit faster if anything.
        """
        tokens = int(self.run.tokens.lengths[captions].sum())
        layers = [(tokens, layer) for layer in self.body] + [(len(captions), layer) for layer in self.head]
        shapes = [(rows, layer.in_features, layer.out_features) for rows, layer in layers]
        operands = {
            shape: (self._random(rows, wide), self._random(out, wide), self._random(rows, out))
            for shape in set(shapes)
            for rows, wide, out in [shape]
        }

        def products() -> None:
            for shape in shapes:
                x, weight, to_output = operands[shape]
                F.linear(x, weight)
                to_output @ weight  # the input's gradient
                to_output.T @ x  # the weight's

        return seconds_of(products)

    def attention(self, captions: Any) -> float:
        """Seconds of attention's products on the rows that the captions are packed into."""
        rows, width = in_rows(self.run.tokens.take(captions)).ids.shape
        q, k, v, to_mixed = (self._random(rows, self.heads, width, self.head_width) for _ in range(4))
        weights = self._random(rows, self.heads, width, width)

        def products() -> None:
            for _ in range(self.layers):
                q @ k.transpose(2, 3)
                weights @ v
                weights.transpose(2, 3) @ to_mixed  # the gradient of v,
                to_mixed @ v.transpose(2, 3)  # of the weights,
                weights @ k  # of q,
                weights.transpose(2, 3) @ q  # and of k

        return seconds_of(products)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def find_open_clip() -> bool:
    found = find_spec("open_clip") is not None
    if not found:
        print("open_clip is not here to be compared with: pip install open_clip_torch")
    return found


def measure(options: argparse.Namespace, store: Path) -> dict[str, Any]:
    captions = vary(read_captions(options.captions, options.split, options.lang), options.batch_size)
    write_store(store, captions, options.dim)
    steps = WARM_UP + options.rounds + (PROFILED if options.breakdown else 0)
    run = start_run(
        store,
        text_tower=options.text_tower,
        batch_size=options.batch_size,
        precision=options.precision,
        duration=f"{steps}steps",
    )
    litune, limit = LituneSteps(run), Limit(run)
    peer = None
    if options.peer_batch and find_open_clip():
        folder = parse_text_spec(options.text_tower).name
        peer = OpenClipSteps(folder, captions, options.peer_batch, run.config.max_tokens, run.bfloat16)

    rounds: list[dict[str, Any]] = []
    for _ in range(WARM_UP + options.rounds):
        # One after the other, so that whatever else the machine does hits all of them alike.
        phases = litune()
        rounds.append(
            {
                "litune_step": sum(phases.values()),
                "linear_products": limit.linear(litune.captions),
                "attention_products": limit.attention(litune.captions),
                "open_clip_step": peer() if peer else None,
                "phases": phases,
                "tokens": int(run.tokens.lengths[litune.captions].sum()),
            }
        )
    rounds = rounds[WARM_UP:]
    if options.breakdown:
        print(breakdown(litune))
    return report(options, run, rounds)


def report(options: argparse.Namespace, run: Tuning, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float | None:
        found = [one[name] for one in rounds]
        return None if None in found else statistics.median(found)

    names = ("litune_step", "linear_products", "attention_products", "open_clip_step")
    seconds = {name: median(name) for name in names}
    step, linear, attention, theirs = seconds.values()
    phases = {name: statistics.median(one["phases"][name] for one in rounds) for name in rounds[0]["phases"]}
    whole = sum(phases.values())
    ours = run.size / step
    open_clip = options.peer_batch / theirs if theirs else None
    return {
        "pairs_per_second": ours,
        "limit_pairs_per_second": run.size / linear,
        "share_of_limit": linear / step,
        "share_of_limit_with_attention": (linear + attention) / step,
        "open_clip_pairs_per_second": open_clip,
        "times_open_clip": ours / open_clip if open_clip else None,
        "precision": "bfloat16" if run.bfloat16 else "float32",
        "seconds": seconds,
        "phases": {name: value / whole for name, value in phases.items()},
        "tokens_per_caption": statistics.mean(one["tokens"] for one in rounds) / run.size,
        "rounds": options.rounds,
        "settings": {
            "text_tower": options.text_tower,
            "batch_size": run.size,
            "dim": options.dim,
            "peer_batch": options.peer_batch,
            "max_tokens": run.config.max_tokens,
            "captions": options.captions.name if options.captions else "emoji names",
        },
        **machine(),
    }


def breakdown(litune: LituneSteps) -> str:
    """torch.profiler's table of the operators that take most of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            litune()
    return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))


def print_table(found: dict[str, Any]) -> None:
    settings, seconds = found["settings"], found["seconds"]
    print(f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}, {found['precision']}")
    print(
        f"{settings['captions']}, {found['tokens_per_caption']:.1f} tokens a caption, {found['rounds']} rounds, medians"
    )
    rows = [
        (f"litune tune, batch {settings['batch_size']}", seconds["litune_step"], found["pairs_per_second"]),
        ("its linear layers' products alone", seconds["linear_products"], found["limit_pairs_per_second"]),
    ]
    if found["times_open_clip"]:
        name = f"open_clip, image tower locked, batch {settings['peer_batch']}"
        rows.append((name, seconds["open_clip_step"], found["open_clip_pairs_per_second"]))
    print(f"{'':44}{'seconds':>10}{'pairs/s':>10}")
    for name, value, rate in rows:
        print(f"{name:44}{value:10.4f}{rate:10.1f}")
    print(f"share of the limit: {found['share_of_limit']:.2f}", end="")
    print(f" ({found['share_of_limit_with_attention']:.2f} with attention's products)")
    if found["times_open_clip"]:
        print(f"times open_clip: {found['times_open_clip']:.1f}")
    print("litune's step: " + ", ".join(f"{name} {share:.0%}" for name, share in found["phases"].items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--batch-size", type=int, default=512, help="pairs in litune's batch")
    parser.add_argument("--peer-batch", type=int, default=64, help="pairs in open_clip's batch; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each")
    parser.add_argument("--breakdown", action="store_true", help="also print the operators that take most of a step")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch_size, options.peer_batch, options.rounds = 64, min(options.peer_batch, 8), 3
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder) / "store")
    print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
