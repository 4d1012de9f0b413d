"""The same locked tower in whatever runs it fastest: torch, ONNX Runtime, OpenVINO, torch.compile.

A locked tower only ever runs forward, so any runtime will do whose features agree with those of torch in float32. Which
is fastest depends on the tower and the machine: `fastest` tries those that are installed on some of the pictures at
hand, leaves out any that doesn't agree, and remembers the answer in the user's cache.
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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litune.devices import fast_bfloat16, processor_cores
from litune.errors import LituneError, MissingExtraError, TowerError
from litune.files import cache_folder, write_text
from litune.progress import say
from litune.towers.image import ImageTower
from litune.towers.specs import reason

AGREEMENT = 0.9999
"""The least mean cosine of a runtime's features with those of torch in float32."""
ROUNDS, FEW = 3, 16
HOPELESS = 0.5
"""What reaches less than this share of the fastest rate in the first round is not tried again."""
CHOICES = "runtimes.json"


@dataclass(frozen=True)
class Runtime:
    """A way to run a tower: `name` and `precision` as a store records them."""

    name: str
    precision: str
    run: Callable[[Tensor], Tensor]
    """Preprocessed pictures [B, …] to float32 features [B, W] on the CPU."""
    parallel: bool = False
    """Whether it is meant to be called by several threads at once, each call computing on one core."""

    def __str__(self) -> str:
        return f"{self.name} in {self.precision}"


@dataclass(frozen=True)
class Trial:
    """How a runtime did: pictures a second on all cores, and its mean cosine with torch in float32."""

    name: str
    precision: str
    images_per_second: float
    cosine: float


@contextmanager
def shared_by_threads(runtime: Runtime) -> Iterator[Callable[[Tensor], Tensor]]:
    """`runtime.run` for any number of threads: each computes on one core; where it is not parallel, they take turns.

    Afterwards torch computes with as many threads as before.
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
    """The tower in this runtime; `pixels` are some preprocessed pictures [B, …] of the kind it will meet.

    Raises `TowerError` where the runtime can't take the tower, `MissingExtraError` where it is not installed.
    """
    if name not in BUILDERS:
        raise TowerError(f"there is no runtime {name!r}: known: {', '.join(BUILDERS)}")
    if name != "torch" and not isinstance(tower.network, nn.Module):
        raise TowerError(f"{tower.spec} runs by itself, not in {name}: leave out --runtime")
    try:
        return BUILDERS[name](tower, precision, pixels)
    except (LituneError, KeyboardInterrupt):
        raise
    except Exception as why:
        raise TowerError(reason(f"{tower.spec} can't run in {name} ({precision})", why)) from why


def _torch(tower: ImageTower, precision: str, pixels: Tensor) -> Runtime:
    if not isinstance(tower.network, nn.Module):
        return Runtime("torch", "float32", lambda x: tower.encode(x).cpu())  # whatever is asked: it runs by itself
    if precision == "bfloat16":
        tower = copy.deepcopy(tower)
        for layer in tower.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.bfloat16()  # once, where autocast would cast them in every call
    tower.to(memory_format=torch.channels_last)
    parallel = tower.get_buffer("mean").device.type == "cpu"
    return Runtime("torch", precision, lambda x: tower.encode(x, bfloat16=precision == "bfloat16").cpu(), parallel)


def _compiled(tower: ImageTower, precision: str, pixels: Tensor) -> Runtime:
    tower = copy.deepcopy(tower)
    tower.network = torch.compile(tower.network)
    return Runtime("compile", precision, lambda x: tower.encode(x, bfloat16=precision == "bfloat16").cpu())


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
        export_onnx(_Whole(tower), pixels[:2], file)
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
        warnings.simplefilter("ignore")  # the exporter speaks of itself
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
    """The network with int8 weights and activations, whose ranges are those that these pictures give."""
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
        export_onnx(_Whole(tower), pixels[:2], file)
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

    run(pixels[:1])  # threads that meet in a process's first inference can wait for each other for ever
    return Runtime("openvino", precision, run, parallel=True)


BUILDERS: dict[str, Callable[[ImageTower, str, Tensor], Runtime]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "compile": _compiled,
}


def candidates(tower: ImageTower, name: str, precision: str) -> list[tuple[str, str]]:
    """The runtimes and precisions to try: those asked for, of those that are installed here."""
    device = tower.get_buffer("mean").device
    if not isinstance(tower.network, nn.Module):
        return [("torch", "float32")]
    if name != "auto":
        names = [name]
    elif device.type == "cpu":
        others = [n for n in ("onnxruntime", "openvino") if find_spec(n) is not None and find_spec("onnx") is not None]
        names = ["torch", *others]
    else:
        names = ["torch", "compile"]
    found = [(n, p) for n in names for p in PRECISIONS[n] if precision in (p, "auto")]
    if precision == "auto":
        found = [(n, p) for n, p in found if p == "float32" or (p == "bfloat16" and fast_bfloat16(device))]
    if not found:
        able = " or ".join(n for n, known in PRECISIONS.items() if precision in known)
        what = "no runtime that is installed can" if name == "auto" else f"{name} can't"
        raise TowerError(f"{what} compute in {precision}: use --runtime {able}")
    return found


PRECISIONS = {
    "torch": ("float32", "bfloat16"),
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16"),
    "compile": ("float32", "bfloat16"),
}


def fastest(tower: ImageTower, pixels: Tensor, *, name: str = "auto", precision: str = "auto") -> Runtime:
    """The fastest runtime of this tower whose features agree, on these preprocessed pictures [B, …].

    `name` and `precision` narrow the choice. Measured once per tower, machine and set of versions; the answer is kept
    in the user's cache. Raises `TowerError` where nothing that was asked for can run the tower.
    """
    wanted = candidates(tower, name, precision)
    if len(wanted) == 1:
        return build(tower, *wanted[0], pixels)
    key = _key(tower, wanted, pixels)
    file = cache_folder() / CHOICES
    known = _read(file)
    if key in known:
        try:
            chosen, its_precision = known[key]["chosen"]
            return build(tower, chosen, its_precision, pixels)
        except LituneError:
            pass  # no longer so
    runtime, trials = measure(tower, wanted, pixels)
    known[key] = {
        "tower": tower.spec,
        "chosen": [runtime.name, runtime.precision],
        "trials": [asdict(trial) for trial in trials],
    }
    write_text(file, json.dumps(known, indent=1))
    return runtime


def measure(tower: ImageTower, wanted: Sequence[tuple[str, str]], pixels: Tensor) -> tuple[Runtime, list[Trial]]:
    """The fastest of these runtimes that agrees, and how each did that could run."""
    say(f"trying what runs {tower.spec} fastest here: {', '.join(f'{n} ({p})' for n, p in wanted)}")
    expected = tower.encode(pixels).cpu().double()
    runtimes, reasons = [], []
    for name, precision in wanted:
        try:
            runtime = build(tower, name, precision, pixels)
            cosine = F.cosine_similarity(runtime.run(pixels).double(), expected).mean().item()
        except LituneError as why:
            reasons.append(str(why))
            continue
        runtimes.append((runtime, cosine))
    few = pixels[:FEW]
    rates = [images_per_second(one, few) for one, _ in runtimes]
    for _ in range(ROUNDS - 1):  # in turns, so that whatever else the machine does hits them alike
        for i, (one, cosine) in enumerate(runtimes):
            if agrees(cosine) and rates[i] > HOPELESS * max(rates):
                rates[i] = max(rates[i], images_per_second(one, few))
    trials = [
        Trial(one.name, one.precision, round(rate, 1), round(cosine, 6))
        for rate, (one, cosine) in zip(rates, runtimes, strict=True)
    ]
    agreeing = [(rate, i) for i, (rate, (_, cosine)) in enumerate(zip(rates, runtimes, strict=True)) if agrees(cosine)]
    if not agreeing:
        raise TowerError(reasons[0] if reasons else f"no runtime agrees with torch in float32 on {tower.spec}")
    best = runtimes[max(agreeing)[1]][0]
    listed = (f"{t.name} {t.precision} {t.images_per_second:.0f}{'' if agrees(t.cosine) else ' (off)'}" for t in trials)
    say(f"running the tower in {best}; images a second were: {', '.join(listed)}")
    return best, trials


def agrees(cosine: float) -> bool:
    """Whether features of this mean cosine with those of torch in float32 may stand for them."""
    return cosine >= AGREEMENT


def images_per_second(runtime: Runtime, pixels: Tensor, seconds: float = 0.5) -> float:
    """Pictures a second that a runtime encodes with all cores, in batches of this size, over this time or longer."""
    threads = processor_cores() if runtime.parallel else 1
    with shared_by_threads(runtime) as call, ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, [pixels] * threads))
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            list(pool.map(call, [pixels] * threads))
            done += threads * len(pixels)
        return done / (time.perf_counter() - began)


def _key(tower: ImageTower, wanted: Sequence[tuple[str, str]], pixels: Tensor) -> str:
    """What the choice depends on, hashed: tower, pictures, candidates, versions, device, cores."""
    device = tower.get_buffer("mean").device
    facts = {
        "weights": tower.provenance["weights"],
        "pixels": [*pixels.shape, str(pixels.dtype)],
        "wanted": list(wanted),
        "versions": {name: _version(name) for name in ("onnx", "onnxruntime", "openvino", "torch")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cores": processor_cores(),
        "host": os.uname().nodename if hasattr(os, "uname") else "",
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
