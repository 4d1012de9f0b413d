"""The parts of gpu_check.py that compare: what the card computes with what the processor does, and runs with runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_gpu_inputs import logged, make_store, random_pixels, random_tower, tune, write_text_tower
from bench_gpu_task import SMALL, Task
from torch import Tensor

import litune
from litune.text import packing

LIMITS = {
    # A chain of float32 products is off by some 1e-6. TF32, which keeps 10 bits of each number, is off by some 3e-4: in
    # a tower that is wrong, while the loss and its gradient may make use of it.
    "float32": {"features": 2e-5, "loss": 1e-4, "gradient": 2e-3, "run": 2e-4},
    # bfloat16 keeps 7 bits: off by 2e-3 in each rounding, which layers add up.
    "bfloat16": {"features": 3e-2, "loss": 1e-2, "gradient": 1e-1, "run": 1e-2},
}
"""The largest differences from the processor's float32 that are no fault; "run": of the losses of a short run."""
PRESSED_AT = 2
"""The step at which Ctrl-C is pressed."""


def difference(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖, in float64 on the processor."""
    found, expected = (torch.as_tensor(one).detach().cpu().double() for one in (found, expected))
    return float((found - expected).norm() / expected.norm())


def towers(task: Task) -> None:
    """Features of both towers, losses and gradients, of one model on the processor and on the card."""
    store, captions = make_store(task, 256)
    tower = write_text_tower(task, task.sizes.minilm)
    run = task.folder / "run"
    tune(run, store=store, text_tower=tower, duration="1steps", image_map="whiten", precision="float32", device="cpu")
    expected = results_of_model(run, store, captions, "cpu", bfloat16=False)
    expected_of_pictures = results_of_pictures(task, "cpu", bfloat16=False)
    with texts_in_a_line():  # captions lie in rows, as short as they are
        for name, value in results_of_model(run, store, captions, task.device, bfloat16=True).items():
            if name != "image_features":
                limit = LIMITS["bfloat16"][name.rpartition("_")[2]]
                task.check(f"difference_{name}_bfloat16_line", difference(value, expected[name]), limit)
    for precision, limits in LIMITS.items():
        bfloat16 = precision == "bfloat16"
        for name, value in results_of_model(run, store, captions, task.device, bfloat16=bfloat16).items():
            limit = limits[name.rpartition("_")[2]]
            task.check(f"difference_{name}_{precision}", difference(value, expected[name]), limit)
        of_pictures = results_of_pictures(task, task.device, bfloat16=bfloat16)
        name = f"difference_image_tower_features_{precision}"
        task.check(name, difference(of_pictures, expected_of_pictures), limits["features"])


@contextmanager
def texts_in_a_line() -> Iterator[None]:
    """Inside, a flash attention kernel reads texts in bfloat16, however short, where the card has it."""
    before = packing.FLASH_FROM
    packing.FLASH_FROM = 0
    try:
        yield
    finally:
        packing.FLASH_FROM = before


def results_of_model(run: Path, store: Path, captions: list[str], device: str, *, bfloat16: bool) -> dict[str, Tensor]:
    """Features, and each loss with its gradient in all parameters that have one."""
    raw = torch.from_numpy(litune.FeatureStore(store).features(slice(0, len(captions)))).to(device)
    bias = torch.tensor(-2.0, device=device)
    found = {}
    for name in ("softmax", "sigmoid"):
        model = litune.load(run, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            texts = model.text_features(model.tokenizer(captions))
            images = model.image_features(raw)
            if name == "softmax":
                loss = litune.softmax_loss(images, texts, model.scale)
            else:
                loss = litune.sigmoid_loss(images, texts, model.scale, bias)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found |= {"text_features": texts, "image_features": images}
        found |= {f"{name}_loss": loss, f"{name}_gradient": torch.cat(gradients)}
    return found


def results_of_pictures(task: Task, device: str, *, bfloat16: bool) -> Tensor:
    """An image tower's features of some pictures."""
    tower = random_tower(task.sizes.vit_b, device)
    return tower.encode(random_pixels(tower, 8), bfloat16=bfloat16)


def short_run(task: Task) -> dict[str, Any]:
    """The settings of a run in which the loss falls far within few steps."""
    store, _ = make_store(task, 128)
    settings = {"store": store, "text_tower": write_text_tower(task, SMALL.bert), "device": task.device}
    return settings | {"batch_size": 64, "learning_rate": 3e-3, "duration": f"{task.sizes.run_steps}steps"}


def losses_of(out: Path, **settings: Any) -> list[float]:
    """The losses of a run's steps."""
    tune(out, **settings)
    return [line["loss"] for line in logged(out)]


def run(task: Task) -> None:
    """Short runs: their losses beside the processor's; the same seed again; interrupted and gone on with."""
    settings = short_run(task)
    exact = settings | {"dropout": 0.0}  # each device draws other random numbers
    expected = losses_of(task.folder / "cpu", **exact | {"device": "cpu", "precision": "float32"})
    for precision, limits in LIMITS.items():
        found = losses_of(task.folder / precision, **exact | {"precision": precision})
        task.check(f"difference_run_{precision}", difference(found, expected), limits["run"])
    settings["precision"] = "bfloat16"
    for name in ("first", "again"):
        tune(task.folder / name, **settings)
    interrupt_and_go_on(task.folder / "resumed", **settings)
    models = {name: (task.folder / name / "model.safetensors").read_bytes() for name in ("first", "again", "resumed")}
    task.require("same_seed_same_bytes", models["again"] == models["first"])
    task.require("resumed_same_bytes", models["resumed"] == models["first"])


def interrupt_and_go_on(out: Path, **settings: Any) -> None:
    """A run in which Ctrl-C is pressed early, and which the same command then ends."""

    def press(line: dict[str, Any]) -> None:
        if line["step"] == PRESSED_AT:
            signal.raise_signal(signal.SIGINT)

    try:
        tune(out, press, **settings)
    except KeyboardInterrupt:
        tune(out, **settings)
    else:
        raise RuntimeError("the run was not interrupted")


def ranks(task: Task) -> None:
    """A short run on two ranks, beside the same in one process."""
    settings = short_run(task) | {"dropout": 0.0, "precision": "float32"}
    out = task.folder / "two"
    options = {name: value for name, value in settings.items() if name != "store"}
    options |= {"out": out, "holdout": 0, "evaluations": 0}
    start_ranks(task, ["tune", str(settings["store"])] + [f"--{n.replace('_', '-')}={v}" for n, v in options.items()])
    found = [line["loss"] for line in logged(out)]
    expected = losses_of(task.folder / "one", **settings)
    task.check("difference_run_two_ranks", difference(found, expected), LIMITS["float32"]["run"])


def start_ranks(task: Task, arguments: list[str]) -> None:
    """`litune` with these arguments on two ranks, in the environment that torchrun makes for them.

    Each has a card of its own where there are two (NCCL); else they share one (gloo, by way of the processor).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    if task.device == "cuda":
        cards = min(torch.cuda.device_count(), 2)
        task.add(cards=cards)
        common |= {"LITUNE_SHARE_GPU": "1"} if cards == 1 else {}
    context: Any = multiprocessing.get_context(task.start)
    logs = [task.folder / f"rank-{rank}.txt" for rank in range(2)]
    variables = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [
        context.Process(target=run_rank, args=(own, arguments, log)) for own, log in zip(variables, logs, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode != 0 for process in started):
        said = "\n".join(log.read_text(encoding="utf-8").strip() for log in logs)
        print(said, file=sys.stderr)
        lines = said.splitlines() or ["they said nothing"]
        raise RuntimeError(next((line for line in lines if line.startswith("litune: ")), lines[-1]))


def run_rank(variables: dict[str, str], arguments: list[str], log: Path) -> None:
    """The command line as one of two ranks; what it prints goes to a file."""
    os.environ |= variables
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from litune.cli import main

    main(arguments)
