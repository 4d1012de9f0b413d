"""Whether litune is right and fast on this machine's GPU: one command, one JSON object at the end.

    python benchmarks/gpu_check.py                        # everything: at most six minutes on a card like an H100
    python benchmarks/gpu_check.py --parts right          # or some parts: those whose names begin so
    python benchmarks/gpu_check.py --quick                # small sizes, to see that it runs; so on a processor

Nothing is downloaded, and no package is needed that litune doesn't need itself: towers have random weights, captions are
made of a made-up vocabulary, features and pictures are drawn. Each part runs in a process of its own, so that a crash, a
hang or a lack of memory costs that part alone. The exit code is 1 where a part failed. What the figures mean:

right:…          `difference_…`: relative difference from the processor's float32, ‖found − expected‖ / ‖expected‖
                 (see LIMITS); `same_seed_same_bytes`, `resumed_same_bytes`: whether the models are equal to the byte
fast:tune-…      by batch size: `pairs_per_second` of `litune tune`, after WARM_UP steps; `teraflops` of the text tower's
                 matrix products in them; `share_of_matmul`, `share_of_tower_shapes`: these by the card's own rate at
                 large square products, and at products of the tower's shapes (goal: more than 0.5 of the first)
fast:embed-…     `ready_per_second`: pictures that lie ready in the processor's memory, to features there;
                 `share_of_bare` by the same network, compiled, on pictures that lie on the card (goal: 0.9);
                 `files_per_second`: `litune embed` from JPEG files
fast:search      `queries_per_second` of a search through all images; `same_as_processor`: the share of rows in common
fast:open_clip   open_clip's training step, its image tower locked, on the same captions
peak_…gb         the most memory of the card that torch had in use or had reserved; on a processor, of the process
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Only what is quick to import: this process supervises, and is never to open the card itself.

SECONDS = 350.0
WARM_UP = 4
"""Steps before `pairs_per_second` is measured: the first ones compile, and find how much fits into memory."""

LIMITS = {
    # A chain of float32 products is off by some 1e-6. TF32, with 10 bits of mantissa, would be off by some 3e-4: in
    # towers it is wrong, while the loss and its gradient may make use of it.
    "float32": {"features": 2e-5, "loss": 1e-4, "gradient": 2e-3, "run": 2e-3},
    # bfloat16 has 7 bits: 2e-3 for each rounding, which layers add up.
    "bfloat16": {"features": 3e-2, "loss": 2e-2, "gradient": 1e-1, "run": 5e-2},
}
"""The most that a part may differ from the processor. A run's losses differ more than a step's: steps add up."""


@dataclass(frozen=True)
class Shape:
    """A BERT's layers, width, width of its MLP, and heads."""

    layers: int
    width: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    bert: Shape = Shape(12, 768, 3072, 12)
    minilm: Shape = Shape(6, 384, 1536, 12)
    vocabulary: int = 30522
    pairs: int = 131072
    dim: int = 768
    steps: dict[int, int] = field(default_factory=lambda: {16384: 24, 65536: 10})
    """Measured steps by batch size."""
    vit_l: str = "timm:vit_large_patch14_224?init=random"
    vit_b: str = "timm:vit_base_patch16_224?init=random"
    compiled: bool = True
    """Whether image towers are compiled."""
    ready: int = 256
    pictures: int = 2048
    images: int = 1_000_000
    queries: int = 256
    square: int = 8192
    peer_tower: str = "vit_base_patch16_224"
    peer_batch: int = 1024
    peer_steps: int = 10


SMALL = Sizes(
    bert=Shape(2, 64, 128, 4),
    minilm=Shape(1, 64, 128, 4),
    vocabulary=1000,
    pairs=256,
    dim=64,
    steps={32: 3, 64: 2},
    vit_l="timm:test_vit.r160_in1k?init=random&size=64",
    vit_b="timm:test_vit2.r160_in1k?init=random&size=64",
    compiled=False,
    ready=4,
    pictures=16,
    images=2000,
    queries=8,
    square=128,
    peer_tower="vit_tiny_patch16_224",
    peer_batch=2,
    peer_steps=2,
)


class SkippedError(Exception):
    """Why a part can't be run here."""


@dataclass
class Task:
    """What a part works with, and where its figures go: to a file as they come, so that a crash leaves them there."""

    sizes: Sizes
    device: str
    folder: Path
    start: str = "spawn"
    """How further processes are started, as multiprocessing names it."""
    wrong: list[str] = field(default_factory=list)

    def add(self, **figures: Any) -> None:
        """Keep some figures."""
        with open(self.folder / "figures.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def check(self, name: str, value: float, limit: float) -> None:
        """Keep a figure that is wrong where it is above `limit`, or not a number."""
        self.add(**{name: value})
        if not value <= limit:
            self.wrong.append(f"{name} is {value:.2g}, at most {limit:.2g} is right")

    def figures(self) -> dict[str, Any]:
        """All that was kept."""
        file = self.folder / "figures.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {name: value for line in lines for name, value in json.loads(line).items()}


# What parts are fed with


def write_text_tower(task: Task, shape: Shape) -> str:
    """The spec of a BERT with random weights: its configuration, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig

    folder = task.folder / f"bert-{shape.layers}-{shape.width}"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *made_words(task.sizes.vocabulary - 4)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    BertConfig(
        vocab_size=len(words),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp,
    ).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return f"hf:{folder}?init=random"


def made_words(count: int) -> list[str]:
    """So many words of three syllables each."""
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    size = len(syllables)
    return [syllables[i // size**2] + syllables[i // size % size] + syllables[i % size] for i in range(count)]


def make_captions(task: Task, count: int) -> list[str]:
    """So many captions, as long as those of photos are (some 11 words), frequent words and rare ones."""
    import numpy as np

    random = np.random.default_rng(0)
    words = np.array(made_words(min(10_000, task.sizes.vocabulary - 4)))
    lengths = random.normal(11, 3, count).round().clip(4, 20).astype(int)
    drawn = words[(len(words) ** random.random(lengths.sum())).astype(int) - 1]  # Zipf's law
    return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


def make_store(task: Task, count: int) -> tuple[Path, list[str]]:
    """A store of `count` images with random features and a caption each, and the captions."""
    from bench_store import write_store

    captions = make_captions(task, count)
    write_store(task.folder / "store", captions, task.sizes.dim)
    return task.folder / "store", captions


def tune(out: Path, on_log: Callable[[dict[str, Any]], None] | None = None, **settings: Any) -> Any:
    """`litune tune` with nothing held out: the model."""
    import litune

    return litune.tune(out=out, holdout=0.0, evaluations=0, on_log=on_log, **settings)


def logged(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one for each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def synchronize(device: str) -> None:
    """Wait until the card has done what it was asked."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str, least: float = 0.3) -> float:
    """The seconds that `work` takes: the mean of so many calls that they take `least` seconds or longer."""
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


def peak_memory(device: str) -> dict[str, float]:
    """The most memory that was in use so far, in 10⁹ bytes."""
    import resource

    import torch

    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_allocated_gb": allocated / 1e9, "peak_reserved_gb": reserved / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gb": peak * (1 if sys.platform == "darwin" else 1024) / 1e9}


# Parts: right


def difference(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ of two tensors, in float64 on the processor."""
    import torch

    found, expected = (torch.as_tensor(one).detach().cpu().double() for one in (found, expected))
    return float((found - expected).norm() / expected.norm())


def right_towers(task: Task) -> None:
    """Features of both towers, losses and gradients, of one model on the processor and on the card."""
    store, captions = make_store(task, 256)
    tower = write_text_tower(task, task.sizes.minilm)
    run = task.folder / "run"
    tune(run, store=store, text_tower=tower, duration="1steps", image_map="whiten", precision="float32", device="cpu")
    expected = model_results(run, store, captions, "cpu", bfloat16=False)
    pictures = {device: image_results(task, device) for device in ("cpu", task.device)}
    for precision, limits in LIMITS.items():
        found = model_results(run, store, captions, task.device, bfloat16=precision == "bfloat16")
        for name, value in found.items():
            kind = name.rpartition("_")[2]
            task.check(f"difference_{name}_{precision}", difference(value, expected[name]), limits[kind])
        of_pictures = difference(pictures[task.device][precision], pictures["cpu"]["float32"])
        task.check(f"difference_image_tower_features_{precision}", of_pictures, limits["features"])


def model_results(run: Path, store: Path, captions: list[str], device: str, *, bfloat16: bool) -> dict[str, Any]:
    """Features, and each loss with its gradient in all of the text side's parameters."""
    import torch

    import litune

    raw = torch.from_numpy(litune.FeatureStore(store).features(slice(0, len(captions)))).to(device)
    found = {}
    for name in ("softmax", "sigmoid"):
        model = litune.load(run, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            texts = model.text_features(model.tokenizer(captions))
            images = model.image_features(raw)
            bias = torch.tensor(-2.0, device=device)
            loss = (
                litune.softmax_loss(images, texts, model.scale)
                if name == "softmax"
                else litune.sigmoid_loss(images, texts, model.scale, bias)
            )
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found |= {"text_features": texts, "image_features": images}
        found |= {f"{name}_loss": loss, f"{name}_gradient": torch.cat(gradients)}
    return found


def image_results(task: Task, device: str) -> dict[str, Any]:
    """Features of some pictures, in both precisions."""
    import torch

    from litune.towers.image import load_image_tower

    torch.manual_seed(0)
    tower = load_image_tower(task.sizes.vit_b).to(device)
    pixels = random_pixels(tower, 8)
    return {precision: tower.encode(pixels, bfloat16=precision == "bfloat16") for precision in LIMITS}


def random_pixels(tower: Any, count: int) -> Any:
    """So many pictures of the tower's size, as its preprocessing gives them."""
    import torch

    height, width = tower.preprocess.size
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def right_run(task: Task) -> None:
    """Short runs: their losses beside the processor's; the same seed again; interrupted and gone on with."""
    store, _ = make_store(task, 512)
    tower = write_text_tower(task, SMALL.bert)
    settings = {"store": store, "text_tower": tower, "batch_size": 64, "duration": "24steps", "device": task.device}
    exact = settings | {"dropout": 0.0}  # each device draws other random numbers
    expected = losses_of(task.folder / "cpu", **exact | {"device": "cpu", "precision": "float32"})
    for precision, limits in LIMITS.items():
        found = losses_of(task.folder / precision, **exact | {"precision": precision})
        task.check(f"difference_run_{precision}", difference(found, expected), limits["run"])
    for name in ("first", "again"):
        tune(task.folder / name, **settings, precision="bfloat16")
    interrupt_and_resume(task.folder / "resumed", **settings, precision="bfloat16")
    models = {name: (task.folder / name / "model.safetensors").read_bytes() for name in ("first", "again", "resumed")}
    for figure, name in (("same_seed_same_bytes", "again"), ("resumed_same_bytes", "resumed")):
        task.add(**{figure: models[name] == models["first"]})
        if models[name] != models["first"]:
            task.wrong.append(f"{figure} is false")


def losses_of(out: Path, **settings: Any) -> list[float]:
    """The losses of a run's steps."""
    tune(out, **settings)
    return [line["loss"] for line in logged(out)]


def interrupt_and_resume(out: Path, **settings: Any) -> None:
    """A run in which Ctrl-C is pressed early, and which the same command then ends."""

    def press(line: dict[str, Any]) -> None:
        if line["step"] == 8:
            signal.raise_signal(signal.SIGINT)

    try:
        tune(out, press, **settings)
    except KeyboardInterrupt:
        tune(out, **settings)
    else:
        raise RuntimeError("the run was not interrupted")


def right_ranks(task: Task) -> None:
    """One run on two ranks, beside the same in one process."""
    store, _ = make_store(task, 512)
    tower = write_text_tower(task, SMALL.bert)
    settings: dict[str, Any] = {"store": store, "text_tower": tower, "batch_size": 64, "duration": "12steps"}
    settings |= {"dropout": 0.0, "precision": "float32", "device": task.device}
    out = task.folder / "two"
    arguments = ["tune", str(store), "--out", str(out), "--holdout", "0", "--evaluations", "0"]
    for name, value in list(settings.items())[1:]:
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    start_ranks(task, arguments)
    found = [line["loss"] for line in logged(out)]
    expected = losses_of(task.folder / "one", **settings)
    task.check("difference_run_two_ranks", difference(found, expected), LIMITS["float32"]["run"])


def start_ranks(task: Task, arguments: list[str]) -> None:
    """`litune` with these arguments on two ranks, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = multiprocessing.get_context(task.start)
    logs = [task.folder / f"rank-{rank}.txt" for rank in range(2)]
    ranks = [context.Process(target=run_rank, args=(i, port, arguments, log)) for i, log in enumerate(logs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if all(rank.exitcode == 0 for rank in ranks):
        return
    said = [log.read_text(encoding="utf-8").strip() for log in logs]
    print("\n".join(said), file=sys.stderr)
    reason = next((line for one in said for line in one.splitlines() if line.startswith("litune: ")), said[0][-300:])
    if task.device == "cuda" and device_facts()["cards"] == 1:
        raise SkippedError(f"two ranks don't run on one card: {reason}")
    raise RuntimeError(reason)


def run_rank(rank: int, port: int, arguments: list[str], log: Path) -> None:
    """The command line as one of two ranks; what it prints goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from litune.cli import main as litune

    litune(arguments)


# Parts: fast


def tune_bert(task: Task) -> None:
    """Tuning a text tower of BERT-base's shape."""
    tune_speed(task, task.sizes.bert)


def tune_minilm(task: Task) -> None:
    """Tuning a text tower of MiniLM's shape."""
    tune_speed(task, task.sizes.minilm)


def tune_speed(task: Task, shape: Shape) -> None:
    """Pairs a second in bfloat16 at each batch size, and how near these are to the card's matrix products."""
    import torch

    sizes = task.sizes
    store, captions = make_store(task, sizes.pairs)
    tower = write_text_tower(task, shape)
    square = products_rate([(sizes.square,) * 3], task.device)
    task.add(matmul_teraflops=square / 1e12)
    for batch, steps in sizes.steps.items():
        if task.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        out = task.folder / f"run-{batch}"
        settings = {"store": store, "text_tower": tower, "batch_size": batch, "precision": "bfloat16"}
        model = tune(out, **settings, duration=f"{WARM_UP + steps}steps", device=task.device)
        peak = peak_memory(task.device)
        lines = logged(out)
        before, seconds = lines[WARM_UP - 1]["seconds"], lines[-1]["seconds"] - lines[WARM_UP - 1]["seconds"]
        lengths = torch.as_tensor(model.tokenizer(captions).lengths).double()
        rate = steps * batch / max(seconds, 0.01)  # seconds are logged in hundredths
        flops = rate * flops_per_text(model.text, lengths, shape)
        rows = min(batch, 16384) * round(lengths.mean().item())
        wide, mlp = shape.width, shape.mlp
        of_tower = [(rows, wide, 3 * wide), (rows, wide, wide), (rows, wide, mlp), (rows, mlp, wide)]
        shaped = products_rate(of_tower, task.device)
        figures = {
            "pairs_per_second": rate,
            "tokens_per_caption": lengths.mean().item(),
            "teraflops": flops / 1e12,
            "share_of_matmul": flops / square,
            "share_of_tower_shapes": flops / shaped,
            "seconds_of_warm_up": before,
            "steps": steps,
            **peak,
        }
        task.add(**{str(batch): figures})
        del model


def flops_per_text(tower: Any, lengths: Any, shape: Shape) -> float:
    """Operations of the tower's matrix products for a mean text of these lengths [N], forward and backward.

    Linear layers take 2 for each weight and token, attention 4 · width for each pair of a text's tokens and each layer; to
    go backward takes twice as many as forward.
    """
    from torch import nn

    linear = sum(layer.weight.numel() for layer in tower.modules() if isinstance(layer, nn.Linear))
    forward = 2 * linear * lengths.mean() + 4 * shape.width * shape.layers * lengths.square().mean()
    return float(3 * forward)


def products_rate(shapes: Sequence[tuple[int, ...]], device: str) -> float:
    """Operations a second of bfloat16 products [n, k] @ [k, m], forward and both backward, of all these (n, k, m)."""
    import torch

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    operands = [(drawn(n, k), drawn(m, k), drawn(n, m)) for n, k, m in shapes]

    def products() -> None:
        for x, weight, to_output in operands:
            x @ weight.T
            to_output @ weight  # the input's gradient
            to_output.T @ x  # the weight's

    return sum(6 * n * k * m for n, k, m in shapes) / seconds_of(products, device)


def embed_vit_l(task: Task) -> None:
    """Embedding with ViT-L/14."""
    embed_speed(task, task.sizes.vit_l)


def embed_vit_b(task: Task) -> None:
    """Embedding with ViT-B/16."""
    embed_speed(task, task.sizes.vit_b)


def embed_speed(task: Task, spec: str) -> None:
    """Pictures a second in bfloat16: the bare network, litune's runtime on ready pictures, `litune embed` on files."""
    import torch
    from embed_speed import link_pictures, make_pictures

    import litune
    from litune.towers.image import load_image_tower
    from litune.towers.runtimes import fastest, images_per_second

    name = "auto" if task.sizes.compiled else "torch"
    torch.manual_seed(0)
    tower = load_image_tower(spec).to(task.device)
    pixels = random_pixels(tower, task.sizes.ready)
    bare = bare_rate(task, tower, pixels)
    task.add(bare_per_second=bare)
    runtime = fastest(tower, pixels, name=name, precision="bfloat16")
    ready = images_per_second(runtime, pixels, seconds=2.0 if task.sizes.compiled else 0.1)
    task.add(ready_per_second=ready, share_of_bare=ready / bare, runtime=str(runtime), batch_size=len(pixels))
    made = make_pictures(task.folder / "made", min(256, task.sizes.pictures))
    link_pictures(task.folder / "pictures", made * (task.sizes.pictures // len(made)))
    torch.manual_seed(0)
    settings: dict[str, Any] = {"image_tower": spec, "runtime": name, "precision": "bfloat16", "device": task.device}
    store = litune.embed(task.folder / "pictures", out=task.folder / "store", **settings)
    rate, made_by = store.manifest["images_per_second"], store.manifest["tower"]
    task.add(files=len(store), files_per_second=rate, runtime_of_files=f"{made_by['runtime']} in {made_by['precision']}")


def bare_rate(task: Task, tower: Any, pixels: Any) -> float:
    """Pictures a second of the network alone: weights and normalised pictures in bfloat16, on the card."""
    import copy

    import torch

    network = copy.deepcopy(tower.network).to(torch.bfloat16)
    values = ((pixels.to(task.device).float() - tower.mean) / tower.std).to(torch.bfloat16)
    with torch.inference_mode():
        if task.sizes.compiled:
            try:
                compiled = torch.compile(network)
                compiled(values)
                network = compiled
            except Exception as why:
                task.add(not_compiled=f"the bare network was not compiled: {type(why).__name__}: {why}"[:300])
        return len(pixels) / seconds_of(lambda: network(values), task.device, 1.0 if task.sizes.compiled else 0.05)


def search_speed(task: Task) -> None:
    """An exact search of random queries through a large store, on the card and on the processor."""
    import torch
    from bench_store import write_store

    import litune

    sizes = task.sizes
    pairs, _ = make_store(task, 256)
    tower = write_text_tower(task, SMALL.bert)
    tune(task.folder / "run", store=pairs, text_tower=tower, duration="1steps", precision="float32", device="cpu")
    write_store(task.folder / "large", [f"picture {i}" for i in range(sizes.images)], sizes.dim)
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(sizes.queries, sizes.dim))
    index = litune.Index(task.folder / "large")
    model = litune.load(task.folder / "run", device=task.device)
    for name in ("first", "second", "third"):  # an index may keep on the card what it has read
        began = time.perf_counter()
        _, rows = index.nearest(model, queries, 10, exact=True)
        task.add(**{f"seconds_{name}": time.perf_counter() - began})
    task.add(queries_per_second=len(queries) / task.figures()["seconds_third"], images=len(index))
    began = time.perf_counter()
    index.nearest(model, queries[:1], 10, exact=True)
    task.add(milliseconds_of_one_query=1000 * (time.perf_counter() - began))
    some = min(32, len(queries))
    _, expected = litune.Index(task.folder / "large").nearest(
        litune.load(task.folder / "run", device="cpu"), queries[:some], 10, exact=True
    )
    in_common = [len({*one.tolist()} & {*other.tolist()}) for one, other in zip(rows[:some], expected, strict=True)]
    task.add(same_as_processor=sum(in_common) / (10 * some))
    if sum(in_common) < 0.99 * 10 * some:
        task.wrong.append("the nearest images are not those that the processor finds")


def open_clip_speed(task: Task) -> None:
    """open_clip's step with a locked image tower, its text tower of BERT-base's shape."""
    if find_spec("open_clip") is None or find_spec("open_clip_train") is None:
        raise SkippedError("open_clip is not installed: pip install open_clip_torch")
    from bench_open_clip import OpenClipSteps

    sizes = task.sizes
    folder = write_text_tower(task, sizes.bert).removeprefix("hf:").partition("?")[0]
    step = OpenClipSteps(
        folder,
        make_captions(task, 8 * sizes.peer_batch),
        sizes.peer_batch,
        16,
        True,
        image_tower=sizes.peer_tower,
        pretrained=False,
        device=task.device,
    )
    seconds = [step() for _ in range(2 + sizes.peer_steps)][2:]
    rate = sizes.peer_batch * len(seconds) / sum(seconds)
    task.add(pairs_per_second=rate, batch_size=sizes.peer_batch, image_tower=sizes.peer_tower)


# Running them


def device_facts() -> dict[str, Any]:
    """The card, the machine, and the versions of what runs on them."""
    import torch

    from litune.devices import processor_cores
    from litune.features import library_versions

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = {"cards": cards, "cores": processor_cores(), **library_versions(), "cuda": torch.version.cuda}
    if not cards:
        return facts
    card = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    with suppress(OSError):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        facts["driver, clock, power"] = driver
    return facts | {"card": card.name, "gb": card.total_memory / 1e9, "capability": f"{card.major}.{card.minor}"}


def describe_device(task: Task) -> None:
    """Which card this is."""
    task.add(**device_facts())


@dataclass(frozen=True)
class Part:
    """A part, and how many seconds it may take."""

    run: Callable[[Task], None]
    seconds: float


DEVICE = "device"
PARTS = {
    DEVICE: Part(describe_device, 60),
    "right:towers": Part(right_towers, 60),
    "right:run": Part(right_run, 90),
    "right:ranks": Part(right_ranks, 60),
    "fast:tune-bert": Part(tune_bert, 120),
    "fast:embed-vit-l": Part(embed_vit_l, 100),
    "fast:tune-minilm": Part(tune_minilm, 90),
    "fast:search": Part(search_speed, 60),
    "fast:embed-vit-b": Part(embed_vit_b, 80),
    "fast:open_clip": Part(open_clip_speed, 60),
}
"""By name, what matters most first: when the time is over, the last ones are left out."""


def run_part(name: str, task: Task) -> None:
    """A part in a process of its own: its figures and how it ended, in its file."""
    os.setsid()  # so that what it has started ends with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        PARTS[name].run(task)
        ended = {"status": "failed" if task.wrong else "ok", "reason": "; ".join(task.wrong) or None}
    except SkippedError as why:
        ended = {"status": "skipped", "reason": str(why)}
    except Exception as why:
        traceback.print_exc()
        ended = {"status": "failed", "reason": f"{type(why).__name__}: {why}"[:500]}
    if name != DEVICE:
        task.add(**peak_memory(task.device))
    task.add(**ended)


def supervise(name: str, task: Task, seconds: float) -> dict[str, Any]:
    """Run a part for at most so many seconds: its figures, `status`, `reason` and `seconds`."""
    began = time.monotonic()
    context: Any = multiprocessing.get_context(task.start)
    process = context.Process(target=run_part, args=(name, task))
    process.start()
    try:
        process.join(seconds)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    found = task.figures()
    if "status" not in found:
        took = time.monotonic() - began
        late = f"ended after {seconds:.0f} s, which is all it may take" if took >= seconds else None
        found |= {"status": "failed", "reason": late or f"the process ended with {process.exitcode}"}
    return found | {"seconds": time.monotonic() - began}


def check(names: Sequence[str], task: Task, deadline: float) -> dict[str, dict[str, Any]]:
    """Run these parts one after the other, each in a folder of its own; print what each found."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        left = min(PARTS[name].seconds, deadline - time.monotonic())
        if left < 1:
            found[name] = {"status": "skipped", "reason": "no time was left", "seconds": 0.0}
        else:
            with tempfile.TemporaryDirectory(dir=task.folder) as own:
                found[name] = supervise(name, replace(task, folder=Path(own), wrong=[]), left)
        print(f"{name}: {found[name]['status']}, {found[name]['seconds']:.0f} s", flush=True)
        for figure, value in found[name].items():
            if figure not in ("status", "seconds") and value is not None:
                print(f"    {figure}: {value}", flush=True)
    return found


def import_early() -> None:
    """Import what the parts do, so that processes that are forked from this one need not."""
    import timm  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import litune.commands.embed
    import litune.commands.tune  # noqa: F401


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[""], help=f"of {', '.join(list(PARTS)[1:])}")
    parser.add_argument("--quick", action="store_true", help="small sizes, as on a machine without a GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long all parts together may take")
    options = parser.parse_args(arguments)
    names = [name for name in list(PARTS)[1:] if name.startswith(tuple(options.parts))]
    if not names:
        parser.error(f"no part begins with {' or '.join(options.parts)}: there are {', '.join(list(PARTS)[1:])}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        task = Task(SMALL if options.quick else Sizes(), "cuda", Path(folder))
        found = check([DEVICE], task, began + options.seconds)
        if found[DEVICE]["status"] == "ok" and not found[DEVICE]["cards"]:
            task = replace(task, sizes=SMALL, device="cpu")
            if sys.platform == "linux":  # where there is no card, forked processes are safe, and save the imports
                task.start = "fork"
                import_early()
        if found[DEVICE]["status"] == "ok":
            found |= check(names, task, began + options.seconds)
    whole = {DEVICE: found.pop(DEVICE), "device_used": task.device, "parts": found, "sizes": asdict(task.sizes)}
    failed = [name for name, one in {DEVICE: whole[DEVICE], **found}.items() if one["status"] == "failed"]
    print(json.dumps(whole | {"failed": failed, "seconds": time.monotonic() - began}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
