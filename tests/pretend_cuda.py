"""A GPU that isn't there: tensors that say they are on `cuda:0`, hold real values, and compute on the processor.

    with pretend() as gpu:
        litune.tune(store, out=run, device="cuda")
    assert not gpu.waits

What a real card refuses is refused: operations on tensors of two devices, `.numpy()`, float64 on MPS, more memory than
there is. What costs time on a real card is counted, each with the line in litune that asked for it:

    gpu.waits       what makes the processor wait for the card: values read (`item`, `bool(tensor)`, `tolist`), copies
                    to the host, copies that block, results whose shape depends on values (`nonzero`, boolean indices,
                    `unique`), synchronising with a stream, an event or the device
    gpu.copies      copies to the card out of pageable memory: they wait, and can't go on beside the computation
    gpu.unordered   kernels that add floats up in no fixed order: not the same bytes twice

Streams and events order nothing here, everything is computed at once; but what may be read too early or written too
late on a real card is found. A tensor that another stream has written can be used only after waiting for that stream.
Memory that another stream may still read can't be used again (`Tensor.record_stream`). What is copied to the host
without waiting is NaN there until something waits for it.

Known differences: kernels are the processor's, so that sums are rounded otherwise; autocast follows CUDA's lists of
operations where litune and its libraries call them from Python; `torch.compile` compiles nothing.

The device works in any thread: its tensors are a subclass that dispatches on its own, and what makes tensors
(`torch.zeros(device="cuda")`, `Tensor.to`, …) is replaced while the device is there, as is `torch.cuda`.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm  # noqa: F401  what it compiles when it is imported, it compiles out of torch's own functions
import torch
import torch.nn.attention.varlen
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import litune

aten: Any = torch.ops.aten
LITUNE = str(Path(litune.__file__).parent)
GIB = 1 << 30


# Streams and events


class Stream:
    """Where operations queue up. `launched` counts them; `seen` says how much of other streams this one waited for."""

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        self.gpu = current()
        self.launched = 0
        self.host_waited = 0
        """How many of its operations are known to be done, since the processor has waited for them."""
        self.seen: dict[Stream, int] = {}
        self.freed: list[tuple[Stream, int]] = []
        """The last reads by other streams of memory that went back to this one."""
        self.device = self.gpu.device
        self.priority = priority
        self._outer: list[Stream] = []

    def known(self) -> dict[Stream, int]:
        """How far each stream is when all that is queued here is done."""
        return {**self.seen, self: self.launched}

    def has_seen(self, stream: Stream, operation: int) -> bool:
        """Whether what is queued here from now on begins after that operation."""
        return stream is self or max(self.seen.get(stream, 0), stream.host_waited) >= operation

    def wait_event(self, event: Event) -> None:
        for stream, operation in event.known.items():
            self.seen[stream] = max(operation, self.seen.get(stream, 0))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.known = self.known()
        return event

    def synchronize(self) -> None:
        self.gpu.wait("Stream.synchronize", self.known())

    def query(self) -> bool:
        self.gpu.reach(self.known())
        return True

    def __enter__(self) -> Stream:
        self._outer.append(self.gpu.stream)
        self.gpu.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.stream = self._outer.pop()


class Event:
    """A mark in a stream's queue."""

    def __init__(self, *_: object, **__: object) -> None:
        self.gpu = current()
        self.known: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.stream).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.stream).wait_event(self)

    def synchronize(self) -> None:
        self.gpu.wait("Event.synchronize", self.known)

    def query(self) -> bool:
        self.gpu.reach(self.known)
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Block:
    """A piece of the card's memory, for as long as a tensor is in it: who wrote it last, and who reads it."""

    def __init__(self, gpu: PretendGPU, size: int) -> None:
        self.gpu, self.size, self.stream = gpu, 0, gpu.stream
        self.stream.launched += 1  # what writes into it first
        self.writer, self.written = self.stream, self.stream.launched
        self.readers: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        gpu.allocate(size, self.stream)
        self.size = size  # not before: what was refused is not given back

    def __del__(self) -> None:
        self.gpu.allocated -= self.size
        self.stream.freed += [(s, last) for s, last in self.readers.items() if s not in self.recorded]


# The device


class PretendGPU:
    """What a pretend device counts, refuses and remembers."""

    def __init__(self, kind: str, memory: int, compile_error: Exception | None) -> None:
        self.kind, self.memory, self.compile_error = kind, memory, compile_error
        self.device = torch.device(kind, 0)
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.unordered: Counter[str] = Counter()
        self.faults: list[str] = []
        """What a real card would refuse or get wrong: any of these fails the test."""
        self.compiled: list[Any] = []
        """What was given to torch.compile."""
        self.allocated = self.peak = 0
        self.generator = torch.Generator()
        self.lock = threading.RLock()
        self._threads = threading.local()
        self._pending: list[tuple[Stream, int, Tensor, Tensor]] = []
        self.default_stream: Stream

    @property
    def stream(self) -> Stream:
        """The stream that is current in this thread."""
        found: Stream = getattr(self._threads, "stream", self.default_stream)
        return found

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._threads.stream = stream

    def allocate(self, size: int, stream: Stream) -> None:
        """Take memory, that of `stream` again first. Raises torch.OutOfMemoryError where there isn't enough."""
        if self.allocated + size > self.memory:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has a total capacity of {self.memory} "
                f"bytes of which {self.memory - self.allocated} bytes are free."
            )
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        freed, stream.freed = stream.freed, []
        if any(not stream.has_seen(other, last) for other, last in freed):
            self.fault("memory is used again that another stream may still read: call record_stream, or wait for it")

    def fault(self, what: str) -> None:
        """Remember a mistake, and raise it as a RuntimeError. Code may catch it: the test fails all the same."""
        self.faults.append(f"{what} ({litune_line()})")
        raise RuntimeError(self.faults[-1])

    def wait(self, what: str, known: dict[Stream, int] | None = None) -> None:
        """Count that the processor waits: for the current stream, if not for what is `known`."""
        with self.lock:
            self.waits[f"{what} @ {litune_line()}"] += 1
        self.reach(self.stream.known() if known is None else known)

    def reach(self, known: dict[Stream, int]) -> None:
        """Let the processor know that these operations are done; what was being copied to it has arrived."""
        with self.lock:
            for stream, operation in known.items():
                stream.host_waited = max(stream.host_waited, operation)
            waiting, self._pending = self._pending, []
            for stream, operation, there, value in waiting:
                if operation <= stream.host_waited:
                    there.copy_(value)
                else:
                    self._pending.append((stream, operation, there, value))

    def synchronize(self, *_: object) -> None:
        with self.lock:
            self.wait(f"torch.{self.kind}.synchronize")
            for stream, _operation, _there, _value in list(self._pending):
                self.reach(stream.known())

    def copy_later(self, there: Tensor, value: Tensor) -> None:
        """Copy to the host without waiting: until something waits, nonsense is there."""
        there.copy_(nonsense(value))
        with self.lock:
            self._pending.append((self.stream, self.stream.launched, there, value.clone()))

    def count_copy(self, pinned: bool, non_blocking: bool, what: str) -> None:
        """Count a copy from the host."""
        if not pinned:
            with self.lock:
                self.copies[f"{what} @ {litune_line()}"] += 1
        if not (pinned and non_blocking):
            self.wait(f"{what}, {'pinned but blocking' if pinned else 'from pageable memory'}")

    def is_mine(self, device: object) -> bool:
        """Whether a `device` argument means this device."""
        if device is None or isinstance(device, torch.dtype | bool):
            return False
        if isinstance(device, int):
            return True
        return torch.device(device).type == self.kind  # type: ignore[arg-type]

    def hold(self, value: Tensor) -> Tensor:
        """The device's tensor of these values, which are the device's from now on."""
        if self.kind == "mps" and value.dtype == torch.float64:
            self.fault("the MPS framework doesn't support float64: use float32")
        return GPUTensor(self, value)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers come out of the card's own generator meanwhile."""
        with self.lock:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.generator.get_state())
            try:
                yield
            finally:
                self.generator.set_state(torch.get_rng_state())
                torch.set_rng_state(outside)


_present: PretendGPU | None = None


def current() -> PretendGPU:
    assert _present is not None, "there is no pretend device here"
    return _present


def litune_line() -> str:
    """The innermost line of litune that is running in this thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(LITUNE):
            code = linecache.getline(file, frame.f_lineno).strip()
            return f"{file[len(LITUNE) + 1 :]}:{frame.f_lineno} {code}"
        frame = frame.f_back
    return "outside litune"


def nonsense(value: Tensor) -> Tensor:
    """What is in memory that nothing was copied into yet."""
    if value.is_floating_point():
        return torch.full_like(value, torch.nan)
    return torch.ones_like(value) if value.dtype == torch.bool else torch.full_like(value, torch.iinfo(value.dtype).min)


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def pin(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return tensor


# Tensors


class GPUTensor(Tensor):
    """A tensor on the pretend device; `value` is an ordinary tensor of the same memory.

    For torch's C++ side it is on the processor, which has autograd run in the calling thread as ever.
    """

    value: Tensor
    gpu: PretendGPU

    @staticmethod
    def __new__(cls, gpu: PretendGPU, value: Tensor) -> GPUTensor:
        made: GPUTensor = torch.Tensor._make_subclass(cls, value)
        made.value, made.gpu = value, gpu
        storage: Any = value.untyped_storage()
        if not hasattr(storage, "block"):
            storage.block = Block(gpu, storage.nbytes())
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @property
    def block(self) -> Block:
        found: Block = self.value.untyped_storage().block  # type: ignore[attr-defined]
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.gpu.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.gpu.kind == "cuda"

    @property
    def is_mps(self) -> bool:  # type: ignore[override]
        return self.gpu.kind == "mps"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, GPUTensor):
            self.gpu.fault("param.data is set to a tensor of another device")
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.value = other.value

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return move(self, *args, **kwargs)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return move(self, "cpu", memory_format=memory_format)

    def cuda(self, *_: object, **__: object) -> Tensor:
        return move(self, "cuda")

    def pin_memory(self, *_: object) -> Tensor:
        raise RuntimeError(f"cannot pin '{self.device}' only dense CPU tensors can be pinned")

    def is_pinned(self, *_: object) -> bool:
        return False

    def record_stream(self, stream: Stream) -> None:
        self.block.recorded.add(stream)

    def tolist(self) -> Any:
        self.gpu.wait("tolist")
        return self.value.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, *_: object, **__: object) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = GPUTensor(self.gpu, self.value.detach().clone())
            if isinstance(self, nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError("a tensor of the pretend device can't be pickled")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"GPUTensor({self.value})"


def _new(name: str) -> Callable[..., Tensor]:
    """`tensor.new_zeros` and the like: on the tensor's own device, or the one that is asked for."""
    original = getattr(torch.Tensor, name)

    def make(self: GPUTensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made: Tensor = original(self.value, *args, **kwargs)
        if device is not None and not self.gpu.is_mine(device):
            return made
        if name == "new_tensor":
            self.gpu.count_copy(False, False, name)
        return self.gpu.hold(made)

    return make


for _name in ("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "new_tensor"):
    setattr(GPUTensor, _name, _new(_name))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, host: Tensor, gpu: PretendGPU) -> Tensor:
        return gpu.hold(host.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _fetched(gradients[0], non_blocking=False), None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Tensor, non_blocking: bool) -> Tensor:
        assert isinstance(there, GPUTensor)
        ctx.gpu = there.gpu
        return _fetched(there, non_blocking)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.gpu.hold(gradients[0].clone()), None


def _fetched(there: GPUTensor, non_blocking: bool) -> Tensor:
    gpu = there.gpu
    launch(gpu, [there], [])
    if not non_blocking:
        gpu.wait("copy to the host")
        return there.value.detach().clone()
    here = pin(torch.empty_like(there.value))
    gpu.copy_later(here, there.value)
    return here


_to: Any = torch.Tensor.to


def move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, for tensors of the device and for those that go there."""
    other = kwargs.pop("other", args[0] if args and isinstance(args[0], Tensor) else None)
    if other is not None:
        rest = args[1:] if args and args[0] is other else args
        return move(tensor, other.device, other.dtype, *rest, **kwargs)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(
        *args, **{k: v for k, v in kwargs.items() if k != "copy"}
    )
    again = {"copy": kwargs["copy"]} if "copy" in kwargs else {}
    if layout is not None:
        again["memory_format"] = layout
    gpu = tensor.gpu if isinstance(tensor, GPUTensor) else _present
    if gpu is None or device is None or (gpu.is_mine(device) == isinstance(tensor, GPUTensor)):
        # No other device: it stays where it is, in C++ eyes the processor.
        where = device if device is not None and not isinstance(tensor, GPUTensor) else None
        given = [one for one in (where, dtype) if one is not None]
        return tensor if not given and not again else _to(tensor, *given, **again)  # type: ignore[no-any-return]
    if isinstance(tensor, GPUTensor):
        if dtype is not None:
            tensor = _to(tensor, dtype)
        found: Tensor = _Fetch.apply(tensor, non_blocking)  # type: ignore[assignment]
        return found
    if not gpu.is_mine(device):
        return _to(tensor, *args, **kwargs)  # type: ignore[no-any-return]
    gpu.count_copy(is_pinned(tensor), non_blocking, "copy to the device")
    if dtype is not None or again:
        tensor = _to(tensor, tensor.dtype if dtype is None else dtype, **again)
    sent: Tensor = _Send.apply(tensor, gpu)  # type: ignore[assignment]
    return sent


# Operations

_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_MIXED_NUMBERS = {"fill_", "masked_fill", "masked_fill_", "where", "lerp", "lerp_", "clamp", "clamp_", "copy_"}
"""Beside those that go value by value, what takes a number that is in a tensor on the host."""
_WAITING = {"_local_scalar_dense", "equal", "bincount", "histc", "_linalg_check_errors", "_linalg_eigh", "linalg_lu"}
_ATOMIC = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce",
    "index_reduce_", "put_", "bincount", "histc", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward", "reflection_pad2d_backward", "grid_sampler_2d_backward", "embedding_bag",
    "_embedding_bag_dense_backward",
}  # fmt: skip
_ORDERED_ON_DEMAND = {"index_add", "index_add_", "scatter_add", "scatter_add_", "put_"}
"""Those with another kernel for `torch.use_deterministic_algorithms`."""


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation with a tensor of the device among its arguments: checked, counted and computed."""
    given: list[Tensor] = []
    change([*args, *kwargs.values()], given.append)
    ours = [one for one in given if isinstance(one, GPUTensor)]
    gpu, name = ours[0].gpu, func.overloadpacket.__name__
    plain = [one for one in given if not isinstance(one, GPUTensor)]
    if name == "copy_" and plain:
        return copy_across(args[0], args[1], *args[2:], **kwargs)
    if plain:
        check_devices(gpu, func, name, args, kwargs, plain)
    count(gpu, func, name, args, kwargs)
    values = change(args, _value)
    named = {
        k: torch.device("cpu") if k == "device" and v is not None else change(v, _value) for k, v in kwargs.items()
    }
    kernel = EMULATED.get(func, func)
    random = (torch.Tag.nondeterministic_seeded in func.tags or func in EMULATED) and kwargs.get("generator") is None
    with gpu.drawing() if random else nullcontext():
        found = kernel(*values, **named)
    if not func.is_view:
        launch(gpu, ours, [a for a in ours if func._schema.is_mutable])
    known = {id(one.value): one for one in ours}
    for one in ours:
        if one.value.shape != one.shape:
            raise NotImplementedError(f"{func} changes a tensor's shape in place, which the pretend device can't")

    return change(found, lambda one: known[id(one)] if id(one) in known else gpu.hold(one))


def change(given: Any, how: Callable[[Tensor], Any]) -> Any:
    """What an operation takes or returns, with its tensors changed, those in lists and tuples too."""
    if isinstance(given, Tensor):
        return how(given)
    if isinstance(given, list | tuple):
        return type(given)(change(one, how) for one in given)
    return given


def _value(one: Tensor) -> Tensor:
    return one.value if isinstance(one, GPUTensor) else one


def launch(gpu: PretendGPU, used: Sequence[GPUTensor], written: Sequence[GPUTensor]) -> None:
    """Queue an operation up in the current stream, which must have waited for what made its arguments."""
    stream = gpu.stream
    with gpu.lock:
        stream.launched += 1
        for one in used:
            block = one.block
            if not stream.has_seen(block.writer, block.written):
                gpu.fault("a tensor is used that another stream may not have written yet: wait for that stream")
            if stream is not block.stream:
                block.readers[stream] = stream.launched
        for one in written:
            one.block.writer, one.block.written = stream, stream.launched


def check_devices(gpu: PretendGPU, func: Any, name: str, args: Any, kwargs: Any, plain: list[Tensor]) -> None:
    """Refuse tensors of the host beside the device's, but for those that CUDA takes: numbers, and indices."""
    if name in _INDEXING and isinstance(args[0], GPUTensor):
        indices = [one for one in args[1] if isinstance(one, Tensor) and not isinstance(one, GPUTensor)]
        for _ in indices:
            gpu.count_copy(False, False, "an index on the host")
        plain = [one for one in plain if not any(one is index for index in indices)]
    numbers = torch.Tag.pointwise in func.tags or name in _MIXED_NUMBERS | _INDEXING or name.startswith("_foreach")
    written = func._schema.is_mutable and not isinstance(args[0], GPUTensor | list | tuple)
    if written or any(one.ndim or not numbers for one in plain):
        shapes = " and ".join(str(list(one.shape)) for one in plain)
        gpu.fault(
            f"{name}: Expected all tensors to be on the same device, but found at least two devices, {gpu.device} and "
            f"cpu! Those of shape {shapes} are on the cpu"
        )


def count(gpu: PretendGPU, func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Count what makes the processor wait, and what adds up in no fixed order."""
    if name in _INDEXING:
        by_truth = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        filled = "put" in name and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        if by_truth and not filled:
            gpu.wait("boolean index")
    elif name == "repeat_interleave":
        if kwargs.get("output_size") is None:
            gpu.wait("repeat_interleave without output_size")
    elif name in _WAITING:
        gpu.wait({"_local_scalar_dense": "item"}.get(name, name))
    elif torch.Tag.dynamic_output_shape in func.tags:
        gpu.wait(name)
    floats = isinstance(args[0], Tensor) and args[0].is_floating_point() if args else False
    if name not in _ATOMIC or not floats:
        return
    if not torch.are_deterministic_algorithms_enabled():
        with gpu.lock:
            gpu.unordered[f"{name} @ {litune_line()}"] += 1
    elif name not in _ORDERED_ON_DEMAND and not torch.is_deterministic_algorithms_warn_only_enabled():
        gpu.fault(f"{name} does not have a deterministic implementation, but use_deterministic_algorithms is set")


def copy_across(there: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`there.copy_(source)` between the host and the device."""
    if isinstance(there, GPUTensor):
        there.gpu.count_copy(is_pinned(source), non_blocking, "copy to the device")
        there.value.copy_(source)
        launch(there.gpu, [], [there])
        return there
    assert isinstance(source, GPUTensor)
    launch(source.gpu, [source], [])
    if non_blocking and is_pinned(there):
        source.gpu.copy_later(there, source.value.to(there.dtype))
    else:
        source.gpu.wait("copy to the host")
        there.copy_(source.value)
    return there


# Attention of texts that lie one after the other, for which the processor has no kernel


class TextAttention:
    """Attention of each text to itself, text by text in float32: what the kernel for it computes, and its rules."""

    def __init__(self, q: Tensor, bounds: Tensor, longest: int, scale: float | None, dropout: float, seed: Tensor):
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if q.ndim != 3 or q.shape[-1] % 8 or q.shape[-1] > 256:
            raise RuntimeError("it wants [tokens, heads, depth], the depth a multiple of 8 and at most 256")
        if bounds.dtype != torch.int32 or not bounds.is_contiguous():
            raise RuntimeError("cu_seqlens must have dtype int32 and be contiguous")
        self.bounds: list[int] = bounds.tolist()
        self.longest, self.dropout = longest, dropout
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.random = torch.Generator().manual_seed(int(seed[0]))

    def texts(self) -> Iterator[slice]:
        for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
            assert end - begin <= self.longest, f"a text of {end - begin} tokens, when {self.longest} are the most"
            yield slice(begin, end)

    def weights(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores of a text [H, L, L], their softmax, and what dropout multiplies it by."""
        scores = q @ k.transpose(1, 2) * self.scale
        keep = torch.rand(scores.shape, generator=self.random) >= self.dropout
        return scores, scores.softmax(-1), keep / (1 - self.dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Its values [S, H, D] and the logarithms [H, S] of the sums; nonsense where no text is."""
        found = torch.full(v.shape, torch.nan)
        sums = torch.full((q.shape[1], len(q)), torch.nan)
        for text in self.texts():
            one, two, three = (x[text].float().transpose(0, 1) for x in (q, k, v))
            scores, weights, keep = self.weights(one, two)
            found[text] = ((weights * keep) @ three).transpose(0, 1)
            sums[:, text] = scores.logsumexp(-1)
        return found.to(q.dtype), sums

    def backward(self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v; 0 where no text is, as the kernel leaves them."""
        found = [torch.zeros(x.shape) for x in (q, k, v)]
        for text in self.texts():
            g, one, two, three = (x[text].float().transpose(0, 1) for x in (gradient, q, k, v))
            _, weights, keep = self.weights(one, two)
            to_weights = g @ three.transpose(1, 2) * keep
            to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True)) * self.scale
            parts = to_scores @ two, to_scores.transpose(1, 2) @ one, (weights * keep).transpose(1, 2) @ g
            for whole, part in zip(found, parts, strict=True):
                whole[text] = part.transpose(0, 1)
        return tuple(x.to(q.dtype) for x in found)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout: float,
    causal: bool, debug: bool, *, scale: float | None = None, **_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not causal, "a causal mask is not emulated"
    seed = torch.randint(1 << 40, (2,)) if dropout else torch.zeros(2, dtype=torch.int64)
    found, sums = TextAttention(q, cum_q, max_q, scale, dropout, seed).forward(k=k, q=q, v=v)
    return found, sums, seed, torch.zeros(2, dtype=torch.int64), found.new_empty(0)


def _flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cum_q: Tensor, cum_k: Tensor,
    max_q: int, max_k: int, dropout: float, causal: bool, seed: Tensor, unused: Tensor, *, scale: float | None = None,
    **_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return TextAttention(q, cum_q, max_q, scale, dropout, seed).backward(gradient, q, k, v)


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int,
    causal: bool = False, scale: float | None = None, *_: object, **__: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _flash_forward(q, k, v, cum_q, cum_k, max_q, max_k, 0.0, causal, False, scale=scale)[:3]


def _varlen_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cum_q: Tensor, cum_k: Tensor,
    max_q: int, max_k: int, causal: bool, seed: Tensor, scale: float | None = None, *_: object, **__: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return TextAttention(q, cum_q, max_q, scale, 0.0, seed).backward(gradient, q, k, v)


EMULATED: dict[Any, Callable[..., Any]] = {
    aten._flash_attention_forward.default: _flash_forward,
    aten._flash_attention_backward.default: _flash_backward,
    torch.ops.torch_attn._varlen_attn.default: _varlen_forward,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
}


# Autocast, by CUDA's lists

_LOW = [
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose2d",
    "matmul",
    "mm",
    "bmm",
    "mv",
    "addmm",
    "addmv",
    "addbmm",
    "baddbmm",
    "__matmul__",
    "__rmatmul__",
    "einsum",
    "chain_matmul",
    "scaled_dot_product_attention",
    "prelu",
]
_HIGH = [
    "softmax",
    "log_softmax",
    "layer_norm",
    "group_norm",
    "cross_entropy",
    "nll_loss",
    "cosine_similarity",
    "norm",
    "sum",
    "prod",
    "cumsum",
    "cumprod",
    "exp",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "pow",
    "__pow__",
    "__rpow__",
    "rsqrt",
    "reciprocal",
    "softplus",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "kl_div",
    "cdist",
    "dist",
    "renorm",
    "logsumexp",
    "acos",
    "asin",
    "cosh",
    "sinh",
    "tan",
    "erfinv",
]


def casting(original: Callable[..., Any], low: bool) -> Callable[..., Any]:
    """The function as autocast calls it: in half precision, or in float32."""

    @wraps(original)
    def cast(*args: Any, **kwargs: Any) -> Any:
        gpu = next((one.gpu for one in (*args, *kwargs.values()) if isinstance(one, GPUTensor)), None)
        if gpu is None or not torch.is_autocast_enabled(gpu.kind):
            return original(*args, **kwargs)
        dtype = torch.get_autocast_dtype(gpu.kind) if low else torch.float32

        def fit(one: Any) -> Any:
            fits = isinstance(one, GPUTensor) and one.is_floating_point() and one.dtype != torch.float64
            return one.to(dtype) if fits else one

        return original(*map(fit, args), **{name: fit(one) for name, one in kwargs.items()})

    return cast


for _name in (*_LOW, *_HIGH):
    if hasattr(torch.Tensor, _name):
        setattr(GPUTensor, _name, casting(getattr(torch.Tensor, _name), _name in _LOW))


# The device's own modules in torch


def _maker(original: Callable[..., Any], like: bool = False) -> Callable[..., Any]:
    """What makes tensors, for the device too."""
    copied = original.__name__ in ("tensor", "as_tensor", "asarray")

    @wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        gpu, device = _present, kwargs.get("device")
        if gpu is None:
            return original(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if copied and args and isinstance(args[0], Tensor) and original.__name__ != "tensor":
            given = [one for one in (device, kwargs.get("dtype")) if one is not None]
            return move(args[0], *given) if given else args[0]
        if isinstance(args[0] if args else None, GPUTensor) and device is not None and not gpu.is_mine(device):
            args = (args[0].value, *args[1:])  # zeros_like(gpu tensor, device="cpu")
        if not gpu.is_mine(device):
            made = original(*args, **kwargs)
            return pin(made) if pinned else made
        if copied:
            gpu.count_copy(False, False, f"torch.{original.__name__}")
        grad = kwargs.pop("requires_grad", False)
        if args and isinstance(args[0], GPUTensor):
            args = (args[0].value, *args[1:])
        generator = kwargs.get("generator")
        random = "rand" in original.__name__ and generator is None
        with gpu.drawing() if random else nullcontext():
            made = original(*args, **{**kwargs, "device": "cpu"})
        return gpu.hold(made.detach()).requires_grad_(grad)

    return make


def _grouping(original: Callable[..., Any]) -> Callable[..., Any]:
    """How the optimizers sort tensors: by the device that they say they are on."""

    def group(lists: list[list[Tensor | None]], with_indices: bool = False) -> Any:
        found = original(lists, with_indices)
        where = {key: next((one.device for one in of[0][0] if one is not None), key[0]) for key, of in found.items()}
        return {(where[key], key[1]): of for key, of in found.items()}

    return group


class _Generator(torch.Generator):
    """A generator that may say it is on the card."""

    _device = torch.device("cpu")

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made._device = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device


class _Compiled(nn.Module):
    """What torch.compile makes of a module: the same, or what fails at its first call."""

    def __init__(self, module: nn.Module, error: Exception | None) -> None:
        super().__init__()
        self._orig_mod, self._error = module, error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._error is not None:
            raise self._error
        return self._orig_mod(*args, **kwargs)


def _compile(model: Any = None, **options: Any) -> Any:
    gpu = current()
    if model is None:
        return lambda given: _compile(given, **options)
    gpu.compiled.append(model)
    if isinstance(model, nn.Module):
        return _Compiled(model, gpu.compile_error)

    @wraps(model)
    def called(*args: Any, **kwargs: Any) -> Any:
        if gpu.compile_error is not None:
            raise gpu.compile_error
        return model(*args, **kwargs)

    return called


def _moving(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Module.to` and the like: parameters stay the objects that they are, as on a real card."""

    @wraps(original)
    def move_module(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return move_module


def _memory(gpu: PretendGPU) -> dict[str, Any]:
    def reset(*_: object) -> None:
        gpu.peak = gpu.allocated

    return {
        "mem_get_info": lambda *_: (gpu.memory - gpu.allocated, gpu.memory),
        "memory_allocated": lambda *_: gpu.allocated,
        "memory_reserved": lambda *_: gpu.allocated,
        "max_memory_allocated": lambda *_: gpu.peak,
        "max_memory_reserved": lambda *_: gpu.peak,
        "memory_stats": lambda *_: {"allocated_bytes.all.current": gpu.allocated, "allocated_bytes.all.peak": gpu.peak},
        "reset_peak_memory_stats": reset,
        "empty_cache": lambda: None,
        "current_allocated_memory": lambda: gpu.allocated,
        "driver_allocated_memory": lambda: gpu.allocated,
        "recommended_max_memory": lambda: gpu.memory,
    }


def _random(gpu: PretendGPU) -> dict[str, Any]:
    def seed(seed: int) -> None:
        gpu.generator.manual_seed(seed)

    return {
        "manual_seed": seed,
        "manual_seed_all": seed,
        "initial_seed": lambda: gpu.generator.initial_seed(),
        "get_rng_state": lambda *_: gpu.generator.get_state(),
        "get_rng_state_all": lambda: [gpu.generator.get_state()],
        "set_rng_state": lambda state, *_: gpu.generator.set_state(state),
        "set_rng_state_all": lambda states: gpu.generator.set_state(states[0]),
    }


def _cuda(gpu: PretendGPU) -> dict[str, Any]:
    """What is to be found in torch.cuda."""
    facts = SimpleNamespace(
        name="Pretend GPU", total_memory=gpu.memory, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )

    def set_stream(stream: Stream) -> None:
        gpu.stream = stream

    @contextmanager
    def device(*_: object) -> Iterator[None]:
        yield

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "device": device,
        "get_device_name": lambda *_: facts.name,
        "get_device_properties": lambda *_: facts,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": gpu.synchronize,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream or nullcontext(),
        "current_stream": lambda *_: gpu.stream,
        "default_stream": lambda *_: gpu.default_stream,
        "set_stream": set_stream,
        **_memory(gpu),
        **_random(gpu),
    }


def _replace(patch: pytest.MonkeyPatch, gpu: PretendGPU) -> None:
    """Put the device's own into torch, for as long as `patch` lasts."""
    for original in _device_constructors():
        if getattr(torch, original.__name__, None) is original:
            patch.setattr(torch, original.__name__, _maker(original))
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint"):
        patch.setattr(torch, f"{name}_like", _maker(getattr(torch, f"{name}_like")))
    for name in (*_LOW, *_HIGH):
        for place in (torch, torch.nn.functional):
            if hasattr(place, name):
                patch.setattr(place, name, casting(getattr(place, name), name in _LOW))
    patch.setattr(torch.Tensor, "to", move)
    patch.setattr(torch.Tensor, "cuda", lambda self, *_, **options: move(self, "cuda", **options))
    patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self if is_pinned(self) else pin(self.clone()))
    patch.setattr(torch.Tensor, "is_pinned", lambda self, *_: is_pinned(self))
    for name in ("to", "to_empty", "cuda", "cpu"):
        patch.setattr(nn.Module, name, _moving(getattr(nn.Module, name)))
    group = "_group_tensors_by_device_and_dtype"
    patch.setattr(torch._C, group, _grouping(getattr(torch._C, group)))
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(torch, "compile", _compile)
    patch.setattr(torch.nn.attention.varlen, "_select_backend", lambda *_: 1)
    patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: gpu.kind == "cuda")
    own = _cuda(gpu) if gpu.kind == "cuda" else _memory(gpu) | _random(gpu) | {"synchronize": gpu.synchronize}
    module = getattr(torch, gpu.kind)
    for name, value in own.items():
        if hasattr(module, name):
            patch.setattr(module, name, value)
    patch.setattr(torch.backends.mps, "is_available", lambda: gpu.kind == "mps")
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(gpu.kind))
    patch.setattr(torch.accelerator, "synchronize", gpu.synchronize)
    patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)


@contextmanager
def pretend(
    kind: str = "cuda", *, memory: int = 80 * GIB, compile_error: Exception | None = None
) -> Iterator[PretendGPU]:
    """A device of this kind ("cuda" or "mps") with this much memory, in bytes; `compile_error` fails what is compiled.

    Afterwards torch is as it was. Raises AssertionError where a real card would have refused something or computed
    nonsense, even if the code under test has caught that error.
    """
    global _present
    assert _present is None, "one pretend device at a time"
    gpu = PretendGPU(kind, memory, compile_error)
    settings = _Settings()
    with pytest.MonkeyPatch.context() as patch:
        _present = gpu
        try:
            gpu.default_stream = Stream()
            _replace(patch, gpu)
            yield gpu
        finally:
            _present = None
            settings.restore()
    assert not gpu.faults, "\n".join(["the device was misused:", *dict.fromkeys(gpu.faults)])


class _Settings:
    """Switches of torch that code for GPUs turns."""

    def __init__(self) -> None:
        self.precision = torch.get_float32_matmul_precision()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.convolutions = torch.backends.cudnn.allow_tf32

    def restore(self) -> None:
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.allow_tf32 = self.convolutions
