"""The pretend GPU itself: it refuses, counts and finds what it says, in every thread, and leaves torch as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.pretend_cuda import PretendGPU, pretend
from torch import Tensor, nn
from torch.nn import functional as F


def test_torch_is_left_as_it_was() -> None:
    names = ("empty", "tensor", "zeros_like", "matmul", "compile", "Generator", "arange")
    before = [getattr(torch, name) for name in names]
    cuda = dict(vars(torch.cuda))
    own = dict(vars(Tensor)), dict(vars(nn.Module)), dict(vars(F))
    state = torch.get_rng_state()
    with pretend():
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(5)
        torch.randn(3, device="cuda")
        torch.set_rng_state(state)
    assert [getattr(torch, name) for name in names] == before
    assert dict(vars(torch.cuda)) == cuda
    assert (dict(vars(Tensor)), dict(vars(nn.Module)), dict(vars(F))) == own
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a sum": lambda gpu, cpu: gpu + cpu,
    "a product": lambda gpu, cpu: cpu @ gpu,
    "cat": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "embedding": lambda gpu, cpu: F.embedding(cpu.long(), gpu),
    "an index on the card": lambda gpu, cpu: cpu[gpu.long()],
    "in place": lambda gpu, cpu: cpu.add_(gpu),
    "a number on the host, written": lambda gpu, cpu: cpu[0, 0].add_(gpu[0, 0]),
}


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name: str) -> None:
    """In any thread, and even where the error is caught."""
    errors = []

    def mix() -> None:
        try:
            MIXED[name](torch.zeros(2, 2, device="cuda"), torch.zeros(2, 2))
        except RuntimeError as why:
            errors.append(str(why))

    with pytest.raises(AssertionError, match="the device was misused"), pretend():
        thread = threading.Thread(target=mix)
        thread.start()
        thread.join()
        mix()
    assert len(errors) == 2
    assert "cuda:0 and cpu" in errors[0]


def test_what_may_be_mixed(gpu: PretendGPU) -> None:
    """Numbers on the host, and indices, which are copied."""
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert (x * torch.tensor(2.0)).device == torch.device("cuda:0")
    assert x.masked_fill(x > 2, torch.tensor(0.0)).is_cuda
    assert not gpu.copies
    assert x[torch.tensor([1])].cpu().tolist() == [[3, 4, 5]]
    assert sum(gpu.copies.values()) == 1


WAITS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "item": (lambda x: x.sum().item(), 1),
    "float": (lambda x: float(x[0, 0]), 1),
    "truth": (lambda x: bool((x > 0).all()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "to": (lambda x: x.to("cpu", torch.bfloat16), 1),
    "copy_": (lambda x: torch.zeros(2, 2).copy_(x), 1),
    "a mask": (lambda x: x[x > 0], 1),
    "masked_select": (lambda x: x.masked_select(x > 0), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "unique": (lambda x: x.unique(), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.ones(2, device="cuda", dtype=torch.int64), 0), 1),
    "its size known": (
        lambda x: x.repeat_interleave(torch.ones(2, device="cuda", dtype=torch.int64), 0, output_size=2), 0,
    ),
    "synchronize": (lambda x: torch.cuda.synchronize(), 1),
    "an event": (lambda x: torch.cuda.current_stream().record_event().synchronize(), 1),
    "a stream": (lambda x: torch.cuda.current_stream().synchronize(), 1),
    "pageable": (lambda x: torch.ones(2).to("cuda"), 1),
    "pinned": (lambda x: torch.ones(2).pin_memory().to("cuda"), 1),
    "pinned, without waiting": (lambda x: torch.ones(2).pin_memory()[1:].to("cuda", non_blocking=True), 0),
    "a list": (lambda x: torch.tensor([1, 2], device="cuda"), 1),
    "a filled mask": (lambda x: x.__setitem__(x > 0, 0.0), 0),
    "where": (lambda x: torch.where(x > 0, x, 0.0), 0),
    "norm": (lambda x: x.norm() + torch.linalg.vector_norm(x), 0),
    "a product": (lambda x: (x @ x).softmax(-1).sum(), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_waits(name: str, gpu: PretendGPU) -> None:
    do, expected = WAITS[name]
    do(torch.zeros(2, 2, device="cuda"))
    assert sum(gpu.waits.values()) == expected, gpu.waits
    assert sum(gpu.copies.values()) == (name in ("pageable", "a list"))


def test_numpy_is_refused(gpu: PretendGPU) -> None:
    x = torch.ones(2, device="cuda")
    for read in (lambda: x.numpy(), lambda: np.asarray(x)):
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
            read()


def test_streams() -> None:
    """What another stream writes must be waited for; memory that it reads must not be taken for something else."""
    with pytest.raises(AssertionError, match="may not have written yet"), pretend():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        with pytest.raises(RuntimeError):
            x + 1
    for recorded in (True, False):
        try:
            with pretend():
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    x = torch.ones(4, device="cuda")
                torch.cuda.current_stream().wait_stream(side)
                x.add(1)
                if recorded:
                    x.record_stream(torch.cuda.current_stream())
                del x
                with torch.cuda.stream(side):
                    torch.ones(4, device="cuda")
        except RuntimeError:
            assert not recorded
        else:
            assert recorded


def test_copies_that_are_not_waited_for(gpu: PretendGPU) -> None:
    host = torch.empty(2, pin_memory=True).copy_(torch.ones(2, device="cuda"), non_blocking=True)
    copied = torch.cuda.current_stream().record_event()
    other = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert host.isnan().all()
    copied.synchronize()
    assert host.tolist() == [1, 1]
    assert other.isnan().all(), "it began after the event"


def test_memory() -> None:
    with pretend(memory=1000) as gpu:
        x = torch.zeros(100, device="cuda")
        y = x.view(10, 10)[1:]  # the same memory
        assert (gpu.allocated, torch.cuda.mem_get_info()) == (400, (600, 1000))
        del x
        assert torch.cuda.memory_allocated() == 400
        with pytest.raises(torch.OutOfMemoryError, match="800 bytes"):
            torch.zeros(200, device="cuda")
        del y
        assert (gpu.allocated, torch.cuda.max_memory_allocated()) == (0, 400)


def test_modules_and_optimizers(gpu: PretendGPU) -> None:
    """Parameters stay the objects that they are; a step is that of the processor."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    theirs, weight = copy.deepcopy(ours), ours[0].weight
    ours.to("cuda")
    assert weight is ours[0].weight
    assert isinstance(weight, nn.Parameter)
    assert weight.device.type == "cuda"
    assert copy.deepcopy(ours)[0].weight.device.type == "cuda"
    x = torch.randn(3, 4)
    for model, given in ((ours, x.to("cuda")), (theirs, x)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(given).square().sum().backward()
        optimizer.step()
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(one.cpu(), other, atol=1e-6)


def test_random_numbers(gpu: PretendGPU) -> None:
    """The card has a generator of its own, which torch.manual_seed seeds too."""
    torch.manual_seed(1)
    x = torch.ones(50, device="cuda")
    first = F.dropout(x).cpu()
    torch.randn(3)
    torch.manual_seed(1)
    host = torch.randn(3)
    assert torch.equal(F.dropout(x).cpu(), first)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(3), host)


def test_autocast(gpu: PretendGPU) -> None:
    """As CUDA does it: products in bfloat16, sums and norms in float32."""
    layer, norm = nn.Linear(8, 8).to("cuda"), nn.LayerNorm(8).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(torch.ones(2, 8, device="cuda"))
        assert y.dtype == (y @ y.T).dtype == F.gelu(y).dtype == torch.bfloat16
        assert norm(y).dtype == y.softmax(-1).dtype == y.sum().dtype == torch.float32
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer(torch.ones(2, 8, device="cuda")).dtype == torch.float32


@pytest.mark.parametrize("bounds", [[0, 3, 4, 9], [0, 9]])
def test_text_attention(bounds: list[int], gpu: PretendGPU) -> None:
    """Values and gradients of the kernel for texts are those of attention with a mask."""
    from torch.nn.attention.varlen import varlen_attn

    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, 8, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    text = torch.bucketize(torch.arange(9), torch.tensor(bounds[1:]), right=True)
    cuts = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    varlen_attn(q, k, v, cuts, cuts, 9, 9).float().square().sum().backward()
    leaves = [x.detach().cpu().float().requires_grad_() for x in (q, k, v)]
    one, two, three = (x.transpose(0, 1) for x in leaves)
    F.scaled_dot_product_attention(one, two, three, attn_mask=text[:, None] == text).square().sum().backward()
    for ours, theirs in zip((q, k, v), leaves, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad.cpu().float(), theirs.grad, atol=0.1)


def test_sums_in_no_fixed_order(gpu: PretendGPU) -> None:
    x, index = torch.ones(3, 2, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    torch.zeros(2, 2, device="cuda").index_add_(0, index, x)
    torch.zeros(2, dtype=torch.int64, device="cuda").index_add_(0, index, index)
    assert sum(gpu.unordered.values()) == 1


def test_mps_has_no_float64() -> None:
    with pytest.raises(AssertionError, match="float64"), pretend("mps"):
        assert torch.backends.mps.is_available()
        assert torch.zeros(2, device="mps").device.type == "mps"
        with pytest.raises(RuntimeError, match="doesn't support float64"):
            torch.zeros(2, device="mps").double()
