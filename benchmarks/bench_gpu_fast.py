"""The parts of gpu_check.py that measure: tuning, embedding, search, and open_clip's training step."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_gpu_inputs import (
    logged,
    make_captions,
    make_store,
    random_pixels,
    random_tower,
    tune,
    write_text_tower,
)
from bench_gpu_task import SMALL, Shape, SkippedError, Task, peak_memory
from bench_store import write_store
from embed_speed import link_pictures, make_pictures
from torch import Tensor, nn
from torch.nn import functional as F

import litune
from litune.image.registry import ImageTower
from litune.image.runtimes import build, images_per_second

WARM_UP = 2
"""Steps before pairs are counted: the first ones allocate memory and build kernels."""
TOP = 10
COMPARED = 32
"""Queries that the processor answers, too."""


def seconds_of(work: Callable[[], object], device: str, least: float = 0.3) -> float:
    """The mean seconds of a call, over so many that they take `least` seconds or longer."""
    for _ in range(3):
        work()
    synchronize(device)
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        for _ in range(3):
            work()
        calls += 3
        synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: str) -> None:
    """Wait until the card has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def forget_memory(device: str) -> None:
    """Give back what earlier work holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def products_rate(shapes: Sequence[tuple[int, int, int]], device: str) -> float:
    """Operations a second of bfloat16 products [n, k] @ [k, m], forward and both backward, of all these (n, k, m)."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    operands = [(drawn(n, k), drawn(m, k), drawn(n, m)) for n, k, m in shapes]

    def products() -> None:
        for x, weight, to_output in operands:
            x @ weight.T
            to_output @ weight  # the input's gradient
            to_output.T @ x  # the weight's

    return sum(6 * n * k * m for n, k, m in shapes) / seconds_of(products, device)


def tune_bert(task: Task) -> None:
    """Tuning a text tower of BERT-base's shape."""
    tune_at_each_size(task, task.sizes.bert)


def tune_minilm(task: Task) -> None:
    """Tuning a text tower of MiniLM's shape."""
    tune_at_each_size(task, task.sizes.minilm)


def tune_at_each_size(task: Task, shape: Shape) -> None:
    """Pairs a second in bfloat16 by batch size, and how near these are to the card's bare matrix products."""
    store, captions = make_store(task, task.sizes.pairs)
    tower = write_text_tower(task, shape)
    square = products_rate([(task.sizes.square,) * 3], task.device)
    task.add(matmul_teraflops=square / 1e12)
    lengths: Tensor | None = None
    for batch, steps in task.sizes.steps.items():
        forget_memory(task.device)
        if task.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        out = task.folder / f"run-{batch}"
        settings: dict[str, Any] = {"store": store, "text_tower": tower, "batch_size": batch, "precision": "bfloat16"}
        settings["learning_rate"] = 1e-4  # gentle, for weights that are random
        model = tune(out, **settings, duration=f"{WARM_UP + steps}steps", device=task.device)
        figures = rate_of_steps(out, batch) | {"steps": steps, **peak_memory(task.device)}
        if lengths is None:
            lengths = torch.as_tensor(model.tokenizer(captions).lengths).double()
        flops = figures["pairs_per_second"] * flops_per_text(model.text, lengths, shape)
        del model
        forget_memory(task.device)
        of_tower = products_rate(tower_products(shape, min(batch, 16384) * int(lengths.mean())), task.device)
        shares = {"share_of_matmul": flops / square, "share_of_tower_shapes": flops / of_tower}
        figures |= {"teraflops": flops / 1e12, **shares, "tokens_per_caption": lengths.mean().item()}
        task.add(**{str(batch): figures})


def rate_of_steps(out: Path, batch: int) -> dict[str, float]:
    """Pairs a second of a run's steps after the first ones, and the seconds of these."""
    lines = logged(out)
    first, last = lines[WARM_UP - 1], lines[-1]
    seconds = max(last["seconds"] - first["seconds"], 0.01)  # logged in hundredths
    return {
        "pairs_per_second": (last["step"] - first["step"]) * batch / seconds,
        "seconds_of_warm_up": first["seconds"],
    }


def tower_products(shape: Shape, rows: int) -> list[tuple[int, int, int]]:
    """The products of a layer: queries, keys and values; attention's output; the MLP's two."""
    wide, mlp = shape.width, shape.mlp
    return [(rows, wide, 3 * wide), (rows, wide, wide), (rows, wide, mlp), (rows, mlp, wide)]


def flops_per_text(tower: nn.Module, lengths: Tensor, shape: Shape) -> float:
    """Operations of the tower's matrix products for a mean text of these lengths [N], forward and backward.

    A linear layer takes 2 for each weight and token. Attention takes 4 · width in each layer for each pair of a text's
    tokens. To go backward takes twice as many as to go forward.
    """
    linear = sum(layer.weight.numel() for layer in tower.modules() if isinstance(layer, nn.Linear))
    forward = 2 * linear * lengths.mean() + 4 * shape.width * shape.layers * lengths.square().mean()
    return float(3 * forward)


def embed_vit_l(task: Task) -> None:
    """Embedding with ViT-L/14."""
    embed_each_way(task, task.sizes.vit_l)


def embed_vit_b(task: Task) -> None:
    """Embedding with ViT-B/16."""
    embed_each_way(task, task.sizes.vit_b)


def embed_each_way(task: Task, spec: str) -> None:
    """Pictures a second in bfloat16: the bare network, litune's runtime on ready pictures, `litune embed` on files."""
    tower = random_tower(spec, task.device)
    pixels = random_pixels(tower, task.sizes.ready)
    pixels = pixels.pin_memory() if task.device == "cuda" else pixels
    bare = bare_rate(task, tower, pixels)
    task.add(bare_per_second=bare, batch_size=len(pixels))
    names = ("compile", "torch") if task.sizes.compiled else ("torch",)
    rates = {name: ready_rate(task, tower, name, pixels) for name in names}
    task.add(share_of_bare=max(rates.values()) / bare)
    del tower
    forget_memory(task.device)
    embed_files(task, image_tower=spec, runtime="auto", precision="bfloat16", device=task.device)


def bare_rate(task: Task, tower: ImageTower, pixels: Tensor) -> float:
    """Pictures a second of the network alone, compiled: weights and normalised pictures in bfloat16 on the card."""
    network: Any = copy.deepcopy(tower.network)
    network = network.to(torch.bfloat16)
    values = ((pixels.to(task.device).float() - tower.mean) / tower.std).to(torch.bfloat16)
    with torch.inference_mode():
        if task.sizes.compiled:
            try:
                compiled = torch.compile(network)
                compiled(values)
                network = compiled
            except Exception as why:  # no compiler: the figure is of the network as it is, and says so
                task.add(bare_not_compiled=f"{type(why).__name__}: {why}"[:300])
        return len(pixels) / seconds_of(lambda: network(values), task.device, 1.0 if task.sizes.compiled else 0.05)


def ready_rate(task: Task, tower: ImageTower, name: str, pixels: Tensor) -> float:
    """Pictures a second of one of litune's runtimes, from the processor's memory; 0 where it can't run."""
    try:
        rate = images_per_second(build(tower, name, "bfloat16", pixels), pixels, 1.0 if task.sizes.compiled else 0.1)
    except litune.LituneError as why:
        task.add(**{f"{name}_failed": str(why)})
        return 0.0
    task.add(**{f"ready_per_second_{name}": rate})
    return rate


def embed_files(task: Task, **settings: Any) -> None:
    """Pictures a second of `litune embed`, from JPEG files."""
    made = make_pictures(task.folder / "made", min(256, task.sizes.pictures))
    link_pictures(task.folder / "pictures", made * (task.sizes.pictures // len(made)))
    torch.manual_seed(0)
    store = litune.embed(task.folder / "pictures", out=task.folder / "store", **settings)
    facts = store.manifest
    runtime = f"{facts['tower']['runtime']} in {facts['tower']['precision']}"
    task.add(files=len(store), files_per_second=facts["images_per_second"], runtime_of_files=runtime)


def search(task: Task) -> None:
    """An exact search of random queries through a large store, on the card and on the processor."""
    pairs, _ = make_store(task, 256)
    tower = write_text_tower(task, SMALL.bert)
    run = task.folder / "run"
    tune(run, store=pairs, text_tower=tower, duration="1steps", precision="float32", device="cpu")
    large = task.folder / "large"
    write_store(large, [f"picture {i}" for i in range(task.sizes.images)], task.sizes.dim)
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(task.sizes.queries, task.sizes.dim))
    index, model = litune.Index(large), litune.load(run, device=task.device)
    for name in ("first", "second", "third"):  # an index may keep on the card what it has read
        began = time.perf_counter()
        _, rows = index.nearest(model, queries, TOP, exact=True)
        seconds = time.perf_counter() - began
        task.add(**{f"seconds_{name}": seconds})
    task.add(queries_per_second=len(queries) / seconds, images=len(index))
    began = time.perf_counter()
    index.nearest(model, queries[:1], TOP, exact=True)
    task.add(seconds_of_one_query=time.perf_counter() - began)
    on_processor = litune.load(run, device="cpu")
    _, expected = litune.Index(large).nearest(on_processor, queries[:COMPARED], TOP, exact=True)
    found = zip(rows[:COMPARED], expected, strict=True)
    common = sum(len({*one.tolist()} & {*other.tolist()}) for one, other in found)
    share = common / (TOP * len(expected))
    task.add(same_as_processor=share)
    task.require("finds_what_the_processor_finds", share >= 0.99)


def open_clip(task: Task) -> None:
    """open_clip's training step with a locked image tower, and a text tower of BERT-base's shape."""
    if find_spec("open_clip") is None or find_spec("open_clip_train") is None:
        raise SkippedError("open_clip is not installed: pip install open_clip_torch")
    from bench_open_clip import OpenClipSteps

    sizes = task.sizes
    folder = write_text_tower(task, sizes.bert).removeprefix("hf:").partition("?")[0]
    captions = make_captions(task, 8 * sizes.peer_batch)
    settings = {"image_tower": sizes.peer_tower, "pretrained": False, "device": task.device}
    step = OpenClipSteps(folder, captions, sizes.peer_batch, context=16, bfloat16=True, **settings)
    seconds = [step() for _ in range(WARM_UP + sizes.peer_steps)][WARM_UP:]
    rate = sizes.peer_batch * len(seconds) / sum(seconds)
    task.add(pairs_per_second=rate, batch_size=sizes.peer_batch, image_tower=sizes.peer_tower)
