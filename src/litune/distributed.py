"""Several processes that tune one model: torch.distributed behind a few functions.

A process is a rank. Each function is called by all ranks alike, and in the same order. Without a process group there
is one rank, and each is an identity: what is written for many ranks runs in one process as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F

from litune.errors import ConfigError, LituneError
from litune.files import claim

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
BUCKET = 2**24  # elements that `sum_` sends at once
# How long a rank waits for another: while rank 0 evaluates, or has hours left to embed. That a process has ended is
# noticed at once all the same, by torchrun.
PATIENCE = timedelta(days=7)


def start(device: str = "auto") -> None:
    """Join the process group that torchrun's environment variables describe; without them, do nothing.

    Tensors on the CPU go through gloo. Where there is CUDA and `device` is not "cpu", the current CUDA device is that
    of LOCAL_RANK, and its tensors go through NCCL. Raises `ConfigError` for variables that describe no group, and
    where the group can't be joined.
    """
    if _grouped() or not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys():
        return
    remedy = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run in one process"
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(f"the environment describes half a process group, without {', '.join(missing)}: {remedy}")
    told = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
    try:
        own, ranks, local, _ = (int(os.environ[name]) for name in VARIABLES if name != "MASTER_ADDR")
    except ValueError:
        raise ConfigError(f"the environment's process group has a number that is none ({told}): {remedy}") from None
    if not (0 <= own < ranks and 0 <= local < ranks):
        raise ConfigError(f"the environment's ranks must be below WORLD_SIZE ({told}): {remedy}")
    if not dist.is_available():
        raise ConfigError(f"this torch has no torch.distributed ({told}): {remedy}")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise ConfigError(f"LOCAL_RANK={local}, but there are {torch.cuda.device_count()} GPUs: one rank per GPU")
    try:
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as why:
        raise ConfigError(f"the process group can't be joined ({told}): {why}") from why


def leave(code: int) -> None:
    """End this process at once, where it is one of a group: at a usual exit the group's threads may abort it."""
    if _grouped():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop() -> None:
    """Leave the process group, if there is one."""
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
    """Return when all ranks have come here."""
    gather_objects(None)  # through gloo, where dist.barrier would take NCCL and ask for a device


def row_counts(rows: Shaped[Tensor, "n D"]) -> list[int]:
    """The n of every rank, in rank order; raises `ValueError` on every rank where they differ in D."""
    if not _grouped():
        return [len(rows)]
    shapes = torch.empty(world_size() * 2, dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(shapes, torch.tensor(rows.shape, device=rows.device))
    counts, widths = shapes.view(-1, 2).T.tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"rows are {widths} wide on the ranks: they must be of one width to be gathered")
    return list(counts)


def gather_rows(rows: Shaped[Tensor, "n D"]) -> Shaped[Tensor, "N D"]:
    """The rows of all ranks, in rank order; n may differ from rank to rank. Gradients do not flow through it."""
    if not _grouped():
        return rows.detach()
    counts = row_counts(rows)
    most = max(counts)
    padded = F.pad(rows.detach(), (0, 0, 0, most - len(rows))).contiguous()
    found = padded.new_empty(len(counts) * most, rows.shape[1])
    dist.all_gather_into_tensor(found, padded)
    if min(counts) == most:
        return found
    return torch.cat([block[:n] for block, n in zip(found.split(most), counts, strict=True)])


def sum_own_rows(rows: Shaped[Tensor, "N D"], counts: Sequence[int]) -> Shaped[Tensor, "n D"]:
    """The sum over ranks of each one's [N D], of which this rank gets its own `counts[rank]` rows."""
    if not _grouped():
        return rows
    if rows.is_cuda and len(set(counts)) == 1:
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
    if not _grouped():
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, cut where the dtype or the device changes or a bucket is full."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        alike = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(t.numel() for t in bucket) + tensor.numel() <= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def gather_objects(item: T) -> list[T]:
    """The picklable objects of all ranks, in rank order."""
    if not _grouped():
        return [item]
    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, item)
    return found  # type: ignore[return-value]


def broadcast_object(item: T) -> T:
    """Rank 0's picklable object, on every rank."""
    if not _grouped():
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, where alone it runs; what it raises there is raised on every rank."""
    found: T | None = None
    error: LituneError | None = None
    if is_main():
        try:
            found = function()
        except LituneError as why:
            error = why
    error = broadcast_object(error)
    if error is not None:
        raise error
    return broadcast_object(found)  # type: ignore[return-value]


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
    """Where each rank's part of `count` things begins, and the end: contiguous, nearly equal, cut at whole units.

    Rank 0 has one unit at least, if there is one; others may have none.
    """
    units, ranks = -(-count // unit), world_size()
    return [min(count, -(-units * r // ranks) * unit) for r in range(ranks + 1)]


def own_part(count: int, unit: int = 1) -> range:
    """The part of `count` things that is this rank's (see `bounds`)."""
    cuts = bounds(count, unit)
    return range(cuts[rank()], cuts[rank() + 1])


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
