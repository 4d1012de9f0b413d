"""Several processes that tune one model: torch.distributed behind a few functions.

A process is a rank. All ranks call each function, in the same order. Without a process group there is one rank, and
each function is an identity: code for many ranks runs in one process as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from litune.claims import claim
from litune.errors import ConfigError, LituneError
from litune.failing import MainRankError, Watch

T = TypeVar("T")
AnyTensor = TypeVar("AnyTensor", bound=Tensor)

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHARE_GPU = "LITUNE_SHARE_GPU"
"""The environment variable that lets several ranks share a GPU, to test on one GPU what is meant for two."""
BUCKET = 2**24  # elements that `sum_` and `broadcast_` send at once
AHEAD = 2**22  # elements that `GradientSums` sends at once
# How long a rank waits for another: while rank 0 evaluates, or has hours left to embed. torchrun still notices at once
# that a process has ended.
PATIENCE = timedelta(days=7)

_watch: Watch | None = None


def start(device: str = "auto") -> None:
    """Join the process group that torchrun's environment variables describe; without them, do nothing.

    Tensors on the CPU go through gloo. Where there is CUDA and `device` is not "cpu", the current CUDA device is
    set to LOCAL_RANK's, and its tensors go through NCCL; with `SHARE_GPU` set, ranks can share a device, and tensors go
    through gloo and the CPU, since NCCL wants a device for each rank. From then on, a rank that fails ends all. Raises
    `ConfigError` for variables that describe no group, and where the group can't be joined.
    """
    global _watch
    if _grouped() or not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys():
        return
    remedy = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run in one process"
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(f"the environment describes half a process group, without {', '.join(missing)}: {remedy}")
    given = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
    try:
        number, ranks, local, _ = (int(os.environ[name]) for name in VARIABLES if name != "MASTER_ADDR")
    except ValueError:
        raise ConfigError(f"the environment's process group has a number that is none ({given}): {remedy}") from None
    if not (0 <= number < ranks and 0 <= local < ranks):
        raise ConfigError(f"the environment's ranks must be below WORLD_SIZE ({given}): {remedy}")
    if not dist.is_available():
        raise ConfigError(f"this torch has no torch.distributed ({given}): {remedy}")
    backend = _pick_backend(device, local)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        _watch = Watch(number) if ranks > 1 else None
    except (RuntimeError, ValueError) as why:
        raise ConfigError(f"the process group can't be joined ({given}): {why}") from why


def _pick_backend(device: str, local: int) -> str:
    """The backend that carries tensors between ranks; also sets the current CUDA device, where there is one."""
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    cards, shared = torch.cuda.device_count(), os.environ.get(SHARE_GPU) == "1"
    if local >= cards and not shared:
        raise ConfigError(
            f"LOCAL_RANK={local}, but there are {cards} GPUs: one rank per GPU ({SHARE_GPU}=1 lets ranks share one, "
            "slowly, for a check)"
        )
    torch.cuda.set_device(local % cards)
    return "gloo" if shared else "cpu:gloo,cuda:nccl"


def leave(line: str, why: str, code: int) -> None:
    """End this process and, in a group, the others, which are told `why`; `line` is printed."""
    if _watch is not None:
        _watch.leave(line, why, code)


def stop() -> None:
    """Leave the process group, if there is one."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None
    if _grouped():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process among all, from 0."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes and speaks."""
    return rank() == 0


def barrier() -> None:
    """Return when all ranks have called this."""
    gather_objects(None)  # through gloo: dist.barrier would use NCCL, which needs a device


def row_counts(rows: Shaped[Tensor, "n D"]) -> list[int]:
    """The n of every rank, in rank order; raises `ValueError` on every rank where they differ in D."""
    if not _grouped():
        return [len(rows)]
    # Through the CPU: over NCCL each rank would wait for its GPU to read them.
    counts, widths = zip(*gather_objects(tuple(rows.shape)), strict=True)
    if len(set(widths)) > 1:
        raise ValueError(f"rows are {list(widths)} wide on the ranks: they must be of one width to be gathered")
    return list(counts)


def gather_rows(rows: Shaped[Tensor, "n D"], counts: Sequence[int] | None = None) -> Shaped[Tensor, "N D"]:
    """The rows of all ranks, in rank order; n may differ from rank to rank. Gradients do not flow through it.

    `counts` are their `row_counts`, if they are known already.
    """
    if not _grouped():
        return rows.detach()
    counts = row_counts(rows) if counts is None else counts
    longest = max(counts)
    padded = F.pad(rows.detach(), (0, 0, 0, longest - len(rows))).contiguous()
    gathered = padded.new_empty(len(counts) * longest, rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded)
    if min(counts) == longest:
        return gathered
    return torch.cat([block[:n] for block, n in zip(gathered.split(longest), counts, strict=True)])


def sum_own_rows(rows: Shaped[Tensor, "N D"], counts: Sequence[int]) -> Shaped[Tensor, "n D"]:
    """The sum over ranks of their [N D]; this rank gets its own `counts[rank]` rows of it."""
    if not _grouped():
        return rows
    if rows.is_cuda and len(set(counts)) == 1 and "nccl" in dist.get_backend_config():
        own = rows.new_empty(counts[rank()], rows.shape[1])
        dist.reduce_scatter_tensor(own, rows.contiguous())
        return own
    # Gloo has no reduce-scatter in older torch, and NCCL's wants equal counts.
    total = rows.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    first = sum(counts[: rank()])
    return total[first : first + counts[rank()]]


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in few messages."""
    _in_buckets(tensors, dist.all_reduce)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by that of rank 0, in few messages."""
    _in_buckets(tensors, partial(dist.broadcast, src=0))


def _in_buckets(tensors: Sequence[Tensor], send: Callable[[Tensor], Any]) -> None:
    """Apply `send`, which works in place, to the tensors, many of them in one message."""
    if not _grouped():
        return
    for bucket in _buckets(tensors, BUCKET):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        send(flat)
        for tensor, part in zip(bucket, _parts(flat, bucket), strict=True):
            tensor.detach().copy_(part)


def _parts(flat: Tensor, bucket: Sequence[Tensor]) -> Iterator[Tensor]:
    """The part of `flat` that belongs to each tensor of a bucket, in its shape."""
    parts = flat.split([tensor.numel() for tensor in bucket])
    return (part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True))


def _buckets(tensors: Iterable[AnyTensor], most: int) -> Iterator[list[AnyTensor]]:
    """The tensors in order, in a new bucket where the dtype or the device changes or a bucket is full."""
    bucket: list[AnyTensor] = []
    for tensor in tensors:
        same = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (same and sum(t.numel() for t in bucket) + tensor.numel() <= most):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class GradientSums:
    """Sums gradients over ranks while the backward pass goes on.

    Call `arm` before the last backward pass of a step and `wait` after it: then each gradient is the sum of all ranks',
    and a parameter that has none on any rank stays without. Gradients left by earlier backward passes are included in
    the sums. Between the two calls there must be no second backward pass, and no other collective operation.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # Gradients are ready in about the reverse order of the forward pass.
        self.buckets = list(_buckets(reversed(parameters), AHEAD))
        self.bucket_of = {parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket}
        self.armed = False
        self.missing: list[set[nn.Parameter]] = []
        """The parameters of each bucket whose gradients are still to come."""
        self.begun: list[tuple[Tensor, Any]] = []
        """Of the first buckets: the sums under way, and the handles to wait on."""
        if _grouped():
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(cast(Any, self._ready))

    def arm(self) -> None:
        """Announce that the next backward pass is the step's last."""
        self.armed = _grouped()
        self.missing, self.begun = [set(bucket) for bucket in self.buckets], []

    def wait(self) -> None:
        """Make each gradient the sum of all ranks'."""
        if not self.armed:
            return
        self.armed = False
        while len(self.begun) < len(self.buckets):
            self._begin()
        having = [torch.tensor([p.grad is not None for p in bucket], dtype=torch.int64) for bucket in self.buckets]
        sum_(having)  # on the CPU: no wait for a GPU
        for bucket, ranks, (flat, work) in zip(self.buckets, having, self.begun, strict=True):
            work.wait()
            for parameter, count, part in zip(bucket, ranks.tolist(), _parts(flat, bucket), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part)
                elif count:
                    parameter.grad = part.clone()
        self.begun = []

    def _ready(self, parameter: nn.Parameter) -> None:
        """Called when a backward pass has added to a gradient: begin the sums of the buckets that are complete."""
        if not self.armed:
            return
        missing = self.missing[self.bucket_of[parameter]]
        if parameter not in missing:
            raise RuntimeError("a second backward pass after GradientSums.arm: a sum may have begun without it")
        missing.remove(parameter)
        # In order: ranks may be ready in different orders, and their messages must meet.
        while len(self.begun) < len(self.buckets) and not self.missing[len(self.begun)]:
            self._begin()

    def _begin(self) -> None:
        """Send the next bucket; a missing gradient counts as zero."""
        bucket = self.buckets[len(self.begun)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.detach().reshape(-1) for gradient in gradients])
        self.begun.append((flat, dist.all_reduce(flat, async_op=True)))


def gather_objects(item: T) -> list[T]:
    """The picklable objects of all ranks, in rank order."""
    if not _grouped():
        return [item]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered  # type: ignore[return-value]


def broadcast_object(item: T) -> T:
    """Rank 0's picklable object, on every rank."""
    if not _grouped():
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(function: Callable[[], T]) -> T:
    """The result of `function`, which runs on rank 0 alone, on every rank.

    A `LituneError` is raised on every rank; of any other exception the other ranks only learn its message.
    """
    result: T | None = None
    error: Exception | None = None
    if is_main():
        try:
            result = function()
        except LituneError as why:
            error = why
        except Exception as why:
            broadcast_object((MainRankError, f"rank 0 failed: {type(why).__name__}: {why}"))
            raise
    failure = broadcast_object(_sendable(error))
    if failure is not None:
        raise error or _error(*failure)
    return broadcast_object(result)  # type: ignore[return-value]


def together(function: Callable[[], T]) -> T:
    """The result on this rank of `function`, in which no rank needs another.

    A `LituneError` on any rank is raised on every rank: all go on, or none does.
    """
    result: T | None = None
    error: LituneError | None = None
    try:
        result = function()
    except LituneError as why:
        error = why
    failures = [failure for failure in gather_objects(_sendable(error)) if failure is not None]
    if failures:
        raise error or _error(*failures[0])
    return result  # type: ignore[return-value]


def _sendable(error: Exception | None) -> tuple[type[Exception], str] | None:
    """An exception as type and message: not every exception survives pickling."""
    return None if error is None else (type(error), str(error))


def _error(kind: type[Exception], message: str) -> Exception:
    """The exception that was sent."""
    return kind.__new__(kind, message)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Rank 0 claims `folder` for all ranks. Raises `OutputBusyError` where other processes are at work on it."""
    with ExitStack() as stack:
        from_main(lambda: stack.enter_context(claim(folder)))
        yield


def sum_counts(count: int) -> int:
    """The sum over ranks of a whole number."""
    return sum(gather_objects(count))


def bounds(count: int, unit: int = 1) -> list[int]:
    """Where each rank's part of `count` items begins, and the end: contiguous, nearly equal, cut at whole units.

    Rank 0 has at least one unit, if there is one; others may have none.
    """
    units, ranks = -(-count // unit), world_size()
    return [min(count, -(-units * r // ranks) * unit) for r in range(ranks + 1)]


def own_part(count: int, unit: int = 1) -> range:
    """The part of this rank in `count` items (see `bounds`)."""
    cuts = bounds(count, unit)
    return range(cuts[rank()], cuts[rank() + 1])


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
