"""What ranks do together, in three gloo processes, of which two then form a group of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.forked import quick_python
from torch import Tensor, nn

from litune import distributed
from litune.errors import ConfigError, MissingExtraError
from litune.tuning.losses import Ids, MoreImages, sigmoid_loss, softmax_loss
from litune.vectors import normalize

ROWS = {2: [5, 2], 3: [4, 0, 3]}  # pairs of each rank
MORE = {2: [3, 1], 3: [1, 2, 1]}  # further images of each rank
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOSSES = ("softmax", "softmax, masked", "softmax, more images", "softmax, one way", "sigmoid", "sigmoid, masked")


def loss_and_gradients(name: str, rows: slice, more_rows: slice, negatives: Any = "global") -> tuple[Tensor, ...]:
    """A loss of these rows of seven pairs, and the gradients of what made their features."""
    torch.manual_seed(0)
    raw_images, raw_texts, raw_more = (torch.randn(n, 4, dtype=torch.float64) for n in (7, 7, 4))
    heads = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -3.0))
    images, texts = (normalize(x[rows] @ h) for x, h in zip((raw_images, raw_texts), heads, strict=True))
    ids = Ids(torch.tensor([0, 1, 1, 2, 3, 4, 5])[rows], torch.tensor([0, 1, 2, 3, 3, 0, 6])[rows])
    more = MoreImages(
        normalize(raw_more[more_rows] @ heads[0].detach()),
        torch.tensor([7, 1, 9, 5])[more_rows],
        torch.tensor([[8, -1], [9, -1], [6, 0], [-1, -1]])[more_rows],
    )
    settings: dict[str, Any] = {"chunk": 3, "negatives": negatives}
    if "masked" in name or "more" in name:
        settings["ids"] = ids
    if "more" in name:
        settings["more_images"] = more
    if "one way" in name:
        settings["image_to_text"] = 1.0
    parameters = [*heads, scale]
    if name.startswith("sigmoid"):
        loss = sigmoid_loss(images, texts, scale, bias, **settings)
        parameters.append(bias)
    else:
        loss = softmax_loss(images, texts, scale, **settings)
    return loss.detach(), *torch.autograd.grad(loss, parameters)


def share(counts: list[int], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def work(rank: int, folder: Path, ports: dict[int, int]) -> None:
    """What one process does; it writes what it saw."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for size, port in ports.items():
        if rank >= size:
            continue
        os.environ.update(zip(NAMES, (str(rank), str(size), str(rank), "127.0.0.1", str(port)), strict=True))
        distributed.start("cpu")
        distributed.start("cpu")  # is there already
        rows, more_rows = share(ROWS[size], rank), share(MORE[size], rank)
        seen: dict[str, Any] = {
            "place": (distributed.rank(), distributed.world_size(), distributed.is_main()),
            "objects": distributed.gather_objects({"rank": rank}),
            "word": distributed.broadcast_object(f"from {rank}"),
            "equal rows": distributed.gather_rows(torch.full((2, 3), rank)),
            "rows": distributed.gather_rows(torch.full((ROWS[size][rank], 2), float(rank), requires_grad=True)),
            "own rows": distributed.sum_own_rows(torch.arange(14.0).view(7, 2) + rank, ROWS[size]),
            "sums": summed(rank),
            "first": broadcast(rank),
            "gradients": gradients(rank, size),
            "told": [told(rank, size, where) for where in range(size + 1)],
        }
        try:
            distributed.gather_rows(torch.zeros(1, 2 + rank))
        except ValueError as why:
            seen["unequal widths"] = str(why)
        for name in LOSSES:
            for negatives in ("global", "local"):
                seen[f"{name}, {negatives}"] = loss_and_gradients(name, rows, more_rows, negatives)
        distributed.barrier()
        torch.save(seen, folder / f"{size}-{rank}.pt")
        distributed.stop()
        assert distributed.world_size() == 1


def summed(rank: int) -> list[Tensor]:
    distributed.BUCKET = 7  # so that there are several
    whole, wide = torch.full((2, 3), float(rank)), torch.full((9,), 1.0, requires_grad=True)
    tensors = [whole.T, torch.tensor(rank), torch.tensor(2.0), wide, torch.zeros(0)]
    distributed.sum_(tensors)
    return [whole, *(tensor.detach() for tensor in tensors[1:])]


def broadcast(rank: int) -> list[Tensor]:
    tensors = [torch.full((2, 3), float(rank)).T, torch.tensor(rank), torch.full((9,), 1.0 + rank, requires_grad=True)]
    distributed.broadcast_(tensors)
    return [tensor.detach() for tensor in tensors]


class Net(nn.Module):
    """Parameters of several sizes and dtypes; the second is used by even ranks alone, the last by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(5, 5) for _ in range(4))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        for i, weight in enumerate(self.weights):
            x = (x @ weight).tanh() if i != 1 or rank % 2 == 0 else x
        return (x.double() * self.scale).square().sum()


def gradients(rank: int, size: int) -> list[Any]:
    """In each of three steps, the gradients that `GradientSums` makes, and what `sum_` makes of them, by name.

    Of two backward passes the last one alone is armed. In the last step, rank 1 has none at all.
    """
    distributed.AHEAD = 30  # so that there are several buckets
    sums = distributed.GradientSums(list((summed := Net()).parameters()))
    plain, found = Net(), []
    for step in range(3):
        torch.manual_seed(size * step + rank)
        inputs = [torch.randn(3, 5) for _ in range(2)]
        for net in (summed, plain):
            net.zero_grad()
            last = [] if (step, rank) == (2, 1) else inputs
            for number, x in enumerate(last):
                if net is summed and number == 1:
                    sums.arm()
                net(x, rank).backward()
            if net is summed and not last:
                sums.arm()
        sums.wait()
        had = distributed.gather_objects({name for name, p in plain.named_parameters() if p.grad is not None})
        having = {name: p for name, p in plain.named_parameters() if any(name in one for one in had)}
        for p in having.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        distributed.sum_([p.grad for p in having.values()])
        found.append(
            tuple({k: p.grad for k, p in net.named_parameters() if p.grad is not None} for net in (summed, plain))
        )
    summed.zero_grad()
    loss = summed(inputs[0], rank)
    sums.arm()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as why:
        found.append(str(why))
    sums.wait()
    return found


def told(rank: int, size: int, where: int) -> str:
    """What a rank hears where rank `where` raises an error; where none does, what it found itself."""

    def work() -> str:
        if rank == where:
            raise MissingExtraError(f"rank {rank}", "package", "extra")
        return f"done by {rank}"

    try:
        return distributed.together(work)
    except MissingExtraError as why:
        return str(why)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank saw, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = {3: free_port(), 2: free_port()}
    code = "from pathlib import Path; from tests.test_distributed import work; work({}, Path({!r}), {})"
    commands = [[quick_python(), "-c", code.format(rank, str(folder), ports)] for rank in range(3)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, env=variables) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in ROWS}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("size", ROWS)
def test_ranks(seen: dict[int, list[dict[str, Any]]], size: int) -> None:
    for rank, found in enumerate(seen[size]):
        assert found["place"] == (rank, size, rank == 0)
        assert found["objects"] == [{"rank": r} for r in range(size)]
        assert found["word"] == "from 0"


@pytest.mark.parametrize("size", ROWS)
def test_rows(seen: dict[int, list[dict[str, Any]]], size: int) -> None:
    ranks = torch.arange(size)
    own = (size * torch.arange(14.0).view(7, 2) + ranks.sum()).split(ROWS[size])
    for rank, found in enumerate(seen[size]):
        assert found["equal rows"].equal(ranks.repeat_interleave(2)[:, None].expand(-1, 3))
        gathered = ranks.repeat_interleave(torch.tensor(ROWS[size])).float()
        assert found["rows"].equal(gathered[:, None].expand(-1, 2))
        assert not found["rows"].requires_grad
        assert found["own rows"].equal(own[rank])
        assert found["unequal widths"].startswith(f"rows are {[2 + r for r in range(size)]} wide on the ranks")


@pytest.mark.parametrize("size", ROWS)
def test_sums(seen: dict[int, list[dict[str, Any]]], size: int) -> None:
    total = sum(range(size))
    for found in seen[size]:
        whole, count, number, wide, empty = found["sums"]
        assert whole.equal(torch.full((2, 3), float(total)))
        assert (count.item(), count.dtype) == (total, torch.int64)
        assert number.item() == 2 * size
        assert wide.equal(torch.full((9,), float(size)))
        assert empty.numel() == 0


@pytest.mark.parametrize("size", ROWS)
def test_broadcast(seen: dict[int, list[dict[str, Any]]], size: int) -> None:
    for found in seen[size]:
        whole, count, wide = found["first"]
        assert whole.equal(torch.zeros(3, 2))
        assert (count.item(), count.dtype) == (0, torch.int64)
        assert wide.equal(torch.ones(9))


@pytest.mark.parametrize("size", ROWS)
def test_gradients_summed_during_the_backward_pass(seen: dict[int, list[dict[str, Any]]], size: int) -> None:
    for found in seen[size]:
        *steps, refused = found["gradients"]
        assert "second backward pass after GradientSums.arm" in refused
        for ahead, afterwards in steps:
            assert ahead.keys() == afterwards.keys() == {*(f"weights.{i}" for i in range(4)), "scale"}
            for name, gradient in ahead.items():
                if size == 2:  # of more, the order of additions depends on the place in a message
                    assert gradient.equal(afterwards[name]), name
                torch.testing.assert_close(gradient, afterwards[name])
        assert steps[0][0]["scale"] != steps[1][0]["scale"]


@pytest.mark.parametrize("size", ROWS)
def test_an_error_of_one_is_raised_on_all(seen: dict[int, list[dict[str, Any]]], size: int) -> None:
    for rank, found in enumerate(seen[size]):
        *errors, done = found["told"]
        assert done == f"done by {rank}"
        for where, message in enumerate(errors):
            assert message.startswith(f"rank {where} needs the package 'package'")


@pytest.mark.parametrize(
    ("device", "cards", "shared", "backend", "own"),
    [
        ("auto", 2, "0", "cpu:gloo,cuda:nccl", 1),
        ("cpu", 2, "0", "gloo", None),
        ("cuda", 1, "1", "gloo", 0),
        ("cuda", 1, "0", None, None),
    ],
)
def test_what_carries_tensors(
    device: str, cards: int, shared: str, backend: str | None, own: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL where each of two ranks has a GPU, gloo alone on the CPU and where they share one."""
    chosen: list[int] = []
    monkeypatch.setenv(distributed.SHARE_GPU, shared)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if backend is None:
        with pytest.raises(ConfigError, match="LOCAL_RANK=1, but there are 1 GPUs: one rank per GPU .LITUNE_SHARE_GPU"):
            distributed._pick_backend(device, 1)
        return
    assert distributed._pick_backend(device, 1) == backend
    assert chosen == ([] if own is None else [own])


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_one_rank(seen: dict[int, list[dict[str, Any]]], size: int, name: str) -> None:
    expected = loss_and_gradients(name, slice(None), slice(None))
    check(seen[size], f"{name}, global", expected)


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_local_losses(seen: dict[int, list[dict[str, Any]]], size: int, name: str) -> None:
    # The mean over pairs of what each rank would find for its own rows alone.
    parts = [
        [n / 7 * x for x in loss_and_gradients(name, share(ROWS[size], rank), share(MORE[size], rank))]
        for rank, n in enumerate(ROWS[size])
        if n
    ]
    expected = tuple(sum(xs[1:], xs[0]) for xs in zip(*parts, strict=True))
    check(seen[size], f"{name}, local", expected)
    assert expected[0] < 0.99 * loss_and_gradients(name, slice(None), slice(None))[0]  # fewer negatives


def check(ranks: list[dict[str, Any]], key: str, expected: tuple[Tensor, ...]) -> None:
    """Each rank has the loss; the gradients are there in sum."""
    for found in ranks:
        assert found[key][0].item() == pytest.approx(expected[0].item(), rel=1e-12)
    for k, gradient in enumerate(expected[1:], start=1):
        total = torch.stack([found[key][k] for found in ranks]).sum(0)
        assert (total - gradient).abs().max() <= 1e-10 * gradient.abs().max()


def test_one_process_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    error = MissingExtraError("what", "package", "extra")
    distributed.start()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    rows = torch.rand(3, 2, requires_grad=True)
    assert distributed.row_counts(rows) == [3]
    assert distributed.gather_rows(rows).equal(rows)
    assert not distributed.gather_rows(rows).requires_grad
    assert distributed.sum_own_rows(rows, [3]) is rows
    before = rows.detach().clone()
    distributed.sum_([rows])
    assert rows.equal(before)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    distributed.broadcast_([rows])
    sums = distributed.GradientSums([parameter := nn.Parameter(torch.ones(2))])
    sums.arm()
    parameter.sum().backward()
    sums.wait()
    assert parameter.grad is not None
    assert parameter.grad.equal(torch.ones(2))
    assert distributed.together(lambda: "a") == "a"
    with pytest.raises(MissingExtraError) as caught:
        distributed.from_main(lambda: (_ for _ in ()).throw(error))
    assert caught.value is error
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None, "LOCAL_RANK": None}, "half a process group, without LOCAL_RANK, MASTER_PORT: start"),
        ({"WORLD_SIZE": "two"}, "a number that is none .*WORLD_SIZE=two"),
        ({"RANK": "2"}, "must be below WORLD_SIZE .RANK=2, WORLD_SIZE=2"),
        ({}, "can't be joined .RANK=0.*EADDRINUSE"),
    ],
)
def test_broken_environment(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        values = dict(zip(NAMES, ("0", "2", "0", "127.0.0.1", str(taken.getsockname()[1])), strict=True))
        for name, value in (values | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=message):
            distributed.start("cpu")
    assert distributed.world_size() == 1
