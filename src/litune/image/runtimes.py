"""Runs a locked tower in the fastest runtime: torch, ONNX Runtime, OpenVINO or torch.compile.

A locked tower only ever runs forward, so any runtime whose features agree with those of torch in float32 will do. Which
is fastest depends on the tower and the machine: `fastest` tries the installed ones on some of the pictures to encode,
leaves out any that fails or disagrees, and stores its choice in the user's cache.

On a GPU, torch and torch.compile are tried on batches of the size used for encoding (see `litune.image.gpu`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litune.devices import fast_bfloat16, processor_cores
from litune.errors import LituneError, MissingExtraError, TowerError
from litune.files import cache_folder, write_text
from litune.image.gpu import BATCH, Encode, Parts, fitting_batch, repeated, stream_rate
from litune.image.registry import ImageTower
from litune.progress import say
from litune.towers.specs import reason

AGREEMENT = 0.9999
"""The least mean cosine of a runtime's features with those of torch in float32."""
ROUNDS, FEW = 3, 16
HOPELESS = 0.5
"""A runtime below this share of the fastest rate in the first round is not timed again."""
CHOICES = "runtimes.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """A way to run a tower; `name` and `precision` are recorded in the store."""

    name: str
    precision: str
    run: Encode
    """Preprocessed pictures [B, …] to float32 features [B, W] on its device; asynchronous on a GPU."""
    parallel: bool = False
    """Whether several threads should call it at once, each call computing on one core."""
    device: str = "cpu"
    """The kind of device: cpu, cuda or mps."""
    batch_size: int = BATCH
    """The number of pictures to give it at once."""

    @property
    def facts(self) -> dict[str, str]:
        """How the features were computed, as recorded in a store."""
        return {"precision": self.precision, "runtime": self.name, "device": self.device}

    def __str__(self) -> str:
        return f"{self.name} in {self.precision}"


@dataclass(frozen=True)
class Trial:
    """A runtime's measurements: pictures per second on all cores, and mean cosine with torch in float32."""

    name: str
    precision: str
    images_per_second: float
    cosine: float


@contextmanager
def shared_by_threads(runtime: Runtime) -> Iterator[Callable[[Tensor], Tensor]]:
    """`runtime.run` for any number of threads: each computes on one core, or they take turns if it is not parallel.

    Afterwards torch has as many threads as before.
    """
    before = torch.get_num_threads()
    turn: Any = nullcontext() if runtime.parallel else threading.Lock()
    known = threading.local()

    def run(pixels: Tensor) -> Tensor:
        if runtime.parallel and not hasattr(known, "alone"):
            torch.set_num_threads(1)  # of this thread
            known.alone = True
        with turn, torch.inference_mode():
            return runtime.run(pixels)

    try:
        yield run
    finally:
        torch.set_num_threads(before)


def build(tower: ImageTower, name: str, precision: str, pixels: Tensor) -> Runtime:
    """The tower in this runtime; `pixels` are some preprocessed pictures [B, …] like those to encode.

    All but torch on the CPU encode one of them, as compilers and GPUs only fail at the first run. Raises `TowerError`
    where the runtime can't run the tower, `MissingExtraError` where it is not installed.
    """
    if name not in BUILDERS:
        raise TowerError(f"there is no runtime {name!r}: known: {', '.join(BUILDERS)}")
    if name != "torch" and not isinstance(tower.network, nn.Module):
        raise TowerError(f"{tower.spec} runs by itself, not in {name}: leave out --runtime")
    try:
        runtime = BUILDERS[name](tower, precision, pixels)
        if len(pixels) and (name, runtime.device) != ("torch", "cpu"):
            # It also keeps OpenVINO's threads from deadlocking in a process's first inference.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler recommends TF32
                runtime.run(pixels[:1])
        return runtime
    except LituneError:
        raise
    except Exception as why:
        raise TowerError(reason(f"{tower.spec} can't run in {name} ({precision})", why)) from why


def _torch(tower: ImageTower, precision: str, pixels: Tensor) -> Runtime:
    if not isinstance(tower.network, nn.Module):
        return Runtime("torch", "float32", tower.encode)  # whatever precision is asked for: it runs by itself
    encode, device, size = _encoder(_arranged(tower, precision), precision), tower.device.type, len(pixels) or BATCH
    if device == "cpu":
        return Runtime("torch", precision, encode, parallel=True)
    return Runtime("torch", precision, Parts(encode, size), device=device, batch_size=size)


def _compiled(tower: ImageTower, precision: str, pixels: Tensor) -> Runtime:
    """The tower compiled by torch, for one batch size.

    In the default mode: batches keep the GPU busy for longer than their kernels take to launch, so CUDA graphs would
    only pin memory, and autotuning every matrix product takes minutes.
    """
    size = len(pixels) or BATCH
    tower = _arranged(copy.deepcopy(tower) if precision == "float32" else tower, precision)
    tower.network = torch.compile(tower.network, dynamic=False)
    run = Parts(_encoder(tower, precision), size, fill=True)
    return Runtime("compile", precision, run, device=tower.device.type, batch_size=size)


def _arranged(tower: ImageTower, precision: str) -> ImageTower:
    """The tower with its weights cast and laid out once, not in every call; a copy of it for bfloat16."""
    if precision == "bfloat16":
        tower = copy.deepcopy(tower)
        for layer in tower.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.bfloat16()
    return tower.to(memory_format=torch.channels_last)


def _encoder(tower: ImageTower, precision: str) -> Encode:
    return partial(tower.encode, bfloat16=precision == "bfloat16")


def _on_processor(tower: ImageTower) -> ImageTower:
    """The tower on the CPU, copied if it is elsewhere: for runtimes without GPU support."""
    return tower if tower.device.type == "cpu" else copy.deepcopy(tower).cpu()


class _Whole(nn.Module):
    """A tower as one network from preprocessed pictures to features, its normalisation included."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.tower(pixels)
        return features


def _onnxruntime(tower: ImageTower, precision: str, pixels: Tensor) -> Runtime:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("--runtime onnxruntime", "onnxruntime", "onnx") from None
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tower.onnx"
        export_onnx(_Whole(_on_processor(tower)), pixels[:2], file)
        if precision == "int8":
            file = _quantized(file, pixels)
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])

    return Runtime("onnxruntime", precision, run, parallel=True)


def export_onnx(network: nn.Module, example: Tensor, file: Path) -> None:
    """Write a network from one tensor `pixels` [B, …] to `features` [B, W] as ONNX, with any B.

    Raises `MissingExtraError` where the package onnx is not installed.
    """
    if find_spec("onnx") is None:
        raise MissingExtraError("another runtime than torch", "onnx", "onnx")
    with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(None):
        warnings.simplefilter("ignore")  # about the exporter itself
        torch.onnx.export(
            network,
            (example,),
            str(file),
            input_names=["pixels"],
            output_names=["features"],
            dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
            opset_version=18,
            dynamo=False,
        )


def _quantized(file: Path, pixels: Tensor) -> Path:
    """The network with int8 weights and activations, calibrated on these pictures."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter(pixels.split(8))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": batch.numpy()}

    prepared, out = file.with_name("prepared.onnx"), file.with_name("int8.onnx")
    with redirect_stdout(None):
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(str(prepared), str(out), Reader(), per_channel=True)
    return out


def _openvino(tower: ImageTower, precision: str, pixels: Tensor) -> Runtime:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import openvino
    except ImportError:
        raise MissingExtraError("--runtime openvino", "openvino", "openvino") from None
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tower.onnx"
        export_onnx(_Whole(_on_processor(tower)), pixels[:2], file)
        model = core.read_model(str(file))
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": processor_cores(),
        "NUM_STREAMS": processor_cores(),
    }
    compiled = core.compile_model(model, "CPU", settings)
    local = threading.local()

    def run(x: Tensor) -> Tensor:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return torch.from_numpy(local.request.infer([x.numpy()])[0].copy())

    return Runtime("openvino", precision, run, parallel=True)


BUILDERS: dict[str, Callable[[ImageTower, str, Tensor], Runtime]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "compile": _compiled,
}


def candidates(tower: ImageTower, name: str, precision: str, *, compiled: bool = True) -> list[tuple[str, str]]:
    """The (runtime, precision) choices to try: those of the installed ones that were asked for.

    `compiled`: whether torch.compile is among them on a GPU if no runtime is named.
    """
    device = tower.device
    if not isinstance(tower.network, nn.Module):
        return [("torch", "float32")]
    if name != "auto":
        names = [name]
    elif device.type == "cpu":
        others = [n for n in ("onnxruntime", "openvino") if find_spec(n) is not None and find_spec("onnx") is not None]
        names = ["torch", *others]
    else:
        names = ["torch", "compile"] if compiled else ["torch"]
    choices = [(n, p) for n in names for p in PRECISIONS[n] if precision in (p, "auto")]
    if precision == "auto":
        choices = [(n, p) for n, p in choices if p == "float32" or (p == "bfloat16" and fast_bfloat16(device))]
    if not choices:
        able = " or ".join(n for n, known in PRECISIONS.items() if precision in known)
        what = "no runtime that is installed can" if name == "auto" else f"{name} can't"
        raise TowerError(f"{what} compute in {precision}: use --runtime {able}")
    return choices


PRECISIONS = {
    "torch": ("float32", "bfloat16"),
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16"),
    "compile": ("float32", "bfloat16"),
}


def fastest(
    tower: ImageTower,
    pixels: Tensor,
    *,
    name: str = "auto",
    precision: str = "auto",
    compiled: bool = True,
    largest_batch: int | None = None,
) -> Runtime:
    """The fastest runtime of this tower whose features agree, on these preprocessed pictures [B, …].

    `name` and `precision` narrow the choice. With `largest_batch`, on a CUDA device, the batch size is chosen too, up
    to that; otherwise it is B. Measured once per tower, machine and set of versions; the choice is kept in the user's
    cache. Raises `TowerError` where no runtime that was asked for can run the tower.
    """
    wanted = candidates(tower, name, precision, compiled=compiled)
    try:
        if len(wanted) == 1 and largest_batch is None:
            return build(tower, *wanted[0], pixels)
        return _remembered(tower, wanted, pixels, largest_batch)
    except TowerError as why:
        if name in ("auto", "torch"):
            raise
        raise TowerError(f"{why}; use --runtime torch") from why


def _remembered(
    tower: ImageTower, wanted: Sequence[tuple[str, str]], pixels: Tensor, largest_batch: int | None
) -> Runtime:
    """The runtime in the user's cache if it still runs; else one chosen now."""
    key = _key(tower, wanted, pixels, largest_batch)
    file = cache_folder() / CHOICES
    known = _read(file)
    if key in known:
        try:
            chosen, its_precision = known[key]["chosen"]
            return build(tower, chosen, its_precision, repeated(pixels, known[key].get("batch_size", len(pixels))))
        except LituneError:
            pass  # it no longer runs: choose again
    if largest_batch is not None:
        precisions = {precision for _, precision in wanted}
        used = "bfloat16" if "bfloat16" in precisions else "float32"
        encode = _encoder(_arranged(tower, used), used)
        pixels = repeated(pixels, fitting_batch(encode, pixels, tower.device, largest_batch))
        say(f"encoding in batches of {len(pixels)}: what fits the GPU's memory and is fast (--batch-size)")
    runtime, trials = measure(tower, wanted, pixels) if len(wanted) > 1 else (build(tower, *wanted[0], pixels), [])
    known[key] = {
        "tower": tower.spec,
        "chosen": [runtime.name, runtime.precision],
        "trials": [asdict(trial) for trial in trials],
        **({} if largest_batch is None else {"batch_size": len(pixels)}),
    }
    write_text(file, json.dumps(known, indent=1))
    return runtime


@dataclass
class _Entrant:
    """A runtime under trial: its mean cosine with torch in float32, and its pictures per second."""

    runtime: Runtime
    cosine: float
    rate: float


def measure(tower: ImageTower, wanted: Sequence[tuple[str, str]], pixels: Tensor) -> tuple[Runtime, list[Trial]]:
    """The fastest of these runtimes that agrees with torch, and the trials of all that ran.

    One that fails in any way is left out with a line that says why. Raises `TowerError` where none is left.
    """
    say(f"trying what runs {tower.spec} fastest here: {', '.join(f'{n} ({p})' for n, p in wanted)}")
    # On a GPU `pixels` is a whole batch: a few pictures repeated.
    sample, timed = (pixels, pixels[:FEW]) if tower.device.type == "cpu" else (pixels[:BATCH], pixels)
    expected = _reference(tower, sample)
    if not expected.isfinite().all(1).any():
        raise TowerError(
            f"{tower.spec} gives no finite features for the first {len(sample)} pictures: check its weights, or "
            "go on with --runtime torch --precision float32, which leaves such pictures out"
        )
    reasons: list[str] = []

    def enter(name: str, precision: str) -> _Entrant:
        runtime = build(tower, name, precision, pixels)
        return _Entrant(runtime, _cosine(runtime.run(sample), expected), images_per_second(runtime, timed))

    tried = [
        _attempt(f"{tower.spec} can't run in {name} ({precision})", reasons, partial(enter, name, precision))
        for name, precision in wanted
    ]
    entrants = _timed_in_turns([entrant for entrant in tried if entrant is not None], timed, reasons)
    trials = [Trial(e.runtime.name, e.runtime.precision, round(e.rate, 1), round(e.cosine, 6)) for e in entrants]
    agreeing = [(entrant.rate, i) for i, entrant in enumerate(entrants) if agrees(entrant.cosine)]
    if not agreeing:
        raise TowerError(reasons[0] if reasons else f"no runtime agrees with torch in float32 on {tower.spec}")
    best = entrants[max(agreeing)[1]].runtime
    listed = (f"{t.name} {t.precision} {t.images_per_second:.0f}{'' if agrees(t.cosine) else ' (off)'}" for t in trials)
    say(f"running the tower in {best}; images a second were: {', '.join(listed)}")
    return best, trials


def _timed_in_turns(entrants: Sequence[_Entrant], pixels: Tensor, reasons: list[str]) -> list[_Entrant]:
    """The entrants that never failed, with their best rate of several rounds; slow and inexact ones run only once."""
    running = list(entrants)
    for _ in range(ROUNDS - 1):  # in turns, so that other load on the machine affects all of them
        best = max((entrant.rate for entrant in running), default=0.0)
        for entrant in [e for e in running if agrees(e.cosine) and e.rate > HOPELESS * best]:
            rate = _attempt(f"{entrant.runtime} failed", reasons, partial(images_per_second, entrant.runtime, pixels))
            if rate is None:
                running.remove(entrant)
            else:
                entrant.rate = max(entrant.rate, rate)
    return running


def _attempt(what: str, reasons: list[str], work: Callable[[], T]) -> T | None:
    """The result of `work`; if it fails, None, and the reason is printed and appended to `reasons`."""
    try:
        return work()
    except Exception as why:  # no C compiler, no Triton, no memory, or anything else that makes a compiler fail
        reasons.append(str(why) if isinstance(why, LituneError) else reason(what, why))
    say(f"left out: {reasons[-1]}")
    return None


def _reference(tower: ImageTower, pixels: Tensor) -> Tensor:
    """The features that torch computes in float32, sent to the CPU."""
    try:
        return Parts(tower.encode, BATCH)(pixels).cpu()
    except LituneError:
        raise
    except Exception as why:
        what = f"{tower.spec} can't run in torch (float32) on {tower.device.type}"
        raise TowerError(reason(what, why)) from why


def _cosine(features: Tensor, expected: Tensor) -> float:
    """The mean cosine of features [B, W] with those expected, over the pictures whose expected features are finite."""
    usable = expected.isfinite().all(1)
    return F.cosine_similarity(features.cpu()[usable].double(), expected[usable].double()).mean().item()


def agrees(cosine: float) -> bool:
    """Whether features with this mean cosine to those of torch in float32 may replace them."""
    return cosine >= AGREEMENT


def images_per_second(runtime: Runtime, pixels: Tensor, seconds: float = 0.5) -> float:
    """Pictures per second that a runtime encodes in batches of this size, measured for at least this many seconds.

    On the CPU with all cores; on a GPU from pinned memory, as in `litune.image.encoding`.
    """
    if runtime.device != "cpu":
        return stream_rate(runtime.run, pixels.pin_memory() if runtime.device == "cuda" else pixels, seconds)
    threads = processor_cores() if runtime.parallel else 1
    with shared_by_threads(runtime) as call, ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, [pixels] * threads))
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            list(pool.map(call, [pixels] * threads))
            done += threads * len(pixels)
        return done / (time.perf_counter() - began)


def _key(tower: ImageTower, wanted: Sequence[tuple[str, str]], pixels: Tensor, largest_batch: int | None) -> str:
    """A hash of what the choice depends on: tower, pictures, candidates, versions, device, cores."""
    device = tower.device
    parts = {
        "weights": tower.provenance["weights"],
        "pooling": tower.provenance["pooling"],
        "pixels": [*pixels.shape, str(pixels.dtype)],
        "wanted": list(wanted),
        "versions": {name: _version(name) for name in ("onnx", "onnxruntime", "openvino", "torch")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cores": processor_cores(),
        "host": os.uname().nodename if hasattr(os, "uname") else "",
        **({} if largest_batch is None else {"largest_batch": largest_batch}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        choices = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return choices if isinstance(choices, dict) else {}
