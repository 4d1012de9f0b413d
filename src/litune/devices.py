"""The devices that towers run on, and their precision."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.utils.deterministic
from torch import Tensor

from litune.errors import ConfigError

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for; `auto`: CUDA, else Apple's MPS, else the CPU.

    On CUDA, float32 is exact from then on, in the whole process (see `exact_float32`).
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available.get(name, False):
        raise ConfigError(f"--device {name} is not available on this machine: use cpu or auto")
    if name == "cuda":
        exact_float32()
    return torch.device(name)


def exact_float32() -> None:
    """Have GPUs compute float32 convolutions and matrix products in float32.

    By default torch lets convolutions round their inputs to TF32's ten bits. These two older settings set the newer
    ones (`fp32_precision`) too; with the newer ones alone, torch's compiler fails because the two differ.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def processor_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are much faster than float32 ones on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated and slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


def pick_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as asked, or where it is fast for `auto`."""
    return precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A GPU copies it out of pinned memory while the processor goes on."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sent(value: T, device: torch.device) -> T:
    """A tensor, or a dataclass, list or tuple that holds tensors, with all of them sent to `device`."""
    return cast(T, _sent(value, device))


def _sent(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return send(value, device)
    if isinstance(value, list | tuple):
        return type(value)(_sent(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _sent(item, device) for name, item in fields.items()})
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a value of the kind that `sent` takes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


@contextmanager
def tf32_products(device: torch.device, bfloat16: bool) -> Iterator[None]:
    """Inside, GPUs round what float32 matrix products multiply to TF32's ten bits, where towers compute in bfloat16.

    These are the products of the loss, of whitening and of heads that no autocast takes to bfloat16. Sums are float32.
    What it does to a loss and its gradients is measured by benchmarks/loss_precision.py (docs/method.md has the table):
    less than what bfloat16 did to the features before.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and bfloat16:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic(device: torch.device, *, strict: bool = True) -> Iterator[None]:
    """Inside, a GPU's operations add in one order, so that one seed gives the same bytes; elsewhere they do anyway.

    What litune's own towers, losses and optimizers call has such a form: sums by sorted indices, attention without
    atomics. An operation that has none raises RuntimeError, or, where it is not `strict`, runs as it does, with a
    warning: of pooling and resizing in image towers some have none.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, or matrix products raise
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    memory.fill_uninitialized_memory = False  # no memory is read that wasn't written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def receive(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the function returned waits for that copy alone, and returns it."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = tensor.to("cpu", non_blocking=True)  # torch takes pinned memory for it
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return copy.clone()  # to free the pinned memory for the next copy

    return wait


def free_memory(device: torch.device) -> int:
    """The bytes that a CUDA device has for new tensors: free ones, and those that torch has reserved and not used."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep freed memory for the next step.

    By default it returns large blocks to the system, which zeroes them page by page when the next step allocates the
    same again.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
