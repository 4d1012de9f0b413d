from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litune.text import fused
from litune.text.registry import make_text_tower, parse_text_spec
from litune.text.tokenizers import Tokens

ROUNDING = 2.0**-8
"""The largest relative error of rounding to bfloat16, and as much again for the float32 behind it."""


@pytest.fixture(autouse=True)
def compiled_functions() -> None:
    if platform.system() != "Linux" or not shutil.which("cc"):
        pytest.skip("there is no C compiler")


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew in the test, and after it."""
    fused.library.cache_clear()
    yield
    fused.library.cache_clear()


def draw(*shape: int) -> Tensor:
    """Random bfloat16 values with gradients."""
    return torch.randn(shape).bfloat16().requires_grad_()


def check(found: Callable[..., Tensor], formula: Callable[..., Tensor], *values: Tensor, tolerance: float) -> None:
    """Values and all gradients of `found` are those of `formula` in float64, by their norms."""
    exact = [value.detach().double().requires_grad_() for value in values]
    ours, theirs = found(*values), formula(*exact)
    assert ours.shape == theirs.shape
    assert close(ours, theirs, tolerance)
    weight = torch.randn(ours.shape).bfloat16()
    gradients = torch.autograd.grad((ours * weight).float().sum(), values)
    expected = torch.autograd.grad((theirs * weight.double()).sum(), exact)
    for gradient, other in zip(gradients, expected, strict=True):
        assert close(gradient, other, tolerance)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found.double() - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("rows", [1, 32, 77])
def test_gelu(rows: int) -> None:
    check(
        lambda x, bias: fused._Gelu.apply(x.clone(), bias),
        lambda x, bias: F.gelu(x + bias),
        draw(rows, 48),
        torch.randn(48, requires_grad=True),
        tolerance=ROUNDING,
    )


def test_gelu_far_out() -> None:
    """The tails, where the error function is nearly ±1, keep their relative precision."""
    x = torch.linspace(-5, 9, 1024).bfloat16()[None]
    found = fused._Gelu.apply(x.clone(), torch.zeros(1024)).double()
    expected = F.gelu(x.double())
    assert (found - expected).abs().le(0.01 * expected.abs() + 1e-7).all()
    wild = torch.tensor([[float("inf"), -200.0, 3e38, float("nan")] * 4]).bfloat16()
    found = fused._Gelu.apply(wild, torch.zeros(16))[0]
    assert found[0] == float("inf")
    assert abs(found[1]) < 1e-30
    assert found[2] > 2.9e38
    assert found[3].isnan()


@pytest.mark.parametrize("width", [16, 112])
def test_add_norm(width: int) -> None:
    norm = nn.LayerNorm(width, eps=1e-5)
    gamma, beta = torch.randn(width, requires_grad=True), torch.randn(width, requires_grad=True)

    def ours(x: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        found: Tensor = fused._AddNorm.apply(x, y, bias, gamma, beta, norm.eps, 0.0)
        return found

    def formula(x: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(x + y + bias, (width,), gamma, beta, norm.eps)

    check(
        ours,
        formula,
        draw(45, width),
        draw(45, width),
        torch.randn(width, requires_grad=True),
        gamma,
        beta,
        tolerance=2 * ROUNDING,
    )


@pytest.mark.parametrize(("width", "widths"), [(96, (32,)), (32, (96,)), (32, (32, 32, 32)), (70, (50, 33))])
def test_matmul(width: int, widths: tuple[int, ...]) -> None:
    weights = [torch.randn(out, width, requires_grad=True) for out in widths]
    check(
        fused.matmul,
        lambda x, *weights: torch.cat([x @ weight.T for weight in weights], dim=1),
        draw(65, width),
        *weights,
        tolerance=2 * ROUNDING,
    )


def test_what_goes_on_beside_a_matmul() -> None:
    """The gradients of both ways are added, and either may be missing."""
    weight = torch.randn(64, 64, requires_grad=True)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        beside, product = fused.branch(x, weight)
        return product + 2 * beside

    check(both, lambda x, weight: x @ weight.T + 2 * x, draw(40, 64), weight, tolerance=2 * ROUNDING)
    x = draw(40, 64)
    fused.branch(x, weight)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.eq(1).all()
    assert weight.grad is None


def test_matmul_of_locked_weights() -> None:
    """A locked weight gets no gradient, and what is below it still does."""
    x, weight = draw(8, 16), torch.randn(24, 16)
    fused.matmul(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("depth", [16, 32, 48, 64])
@pytest.mark.parametrize("lengths", [[1], [5, 16, 1, 13], [17, 32, 3], [70, 2]])
def test_attention(depth: int, lengths: list[int]) -> None:
    heads, filling = 2, 3
    width = heads * depth
    bounds = np.cumsum([0, *lengths])

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = fused._FusedAttention.apply(
            qkv, bias, torch.from_numpy(bounds[:-1]), torch.tensor(lengths), heads, 0.0
        )
        return found

    def formula(qkv: Tensor, bias: Tensor) -> Tensor:
        texts = []
        for i, length in enumerate(lengths):
            parts = (qkv + bias)[bounds[i] : bounds[i] + length].unflatten(1, (3, heads, depth)).permute(1, 2, 0, 3)
            q, k, v = parts
            texts.append((torch.softmax(q @ k.mT / depth**0.5, -1) @ v).transpose(0, 1).flatten(1))
        return torch.cat([*texts, torch.zeros(filling, width, dtype=qkv.dtype)])

    bias = torch.randn(3 * width, requires_grad=True)
    check(ours, formula, draw(sum(lengths) + filling, 3 * width), bias, tolerance=2 * ROUNDING)


def test_attention_holds_large_scores() -> None:
    qkv = torch.full((4, 48), 100.0).bfloat16()
    found = fused._FusedAttention.apply(qkv, torch.zeros(48), torch.tensor([0]), torch.tensor([4]), 1, 0.0)
    assert torch.equal(found, torch.full((4, 16), 100.0).bfloat16())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_embeddings(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((300, 96), 2.0).bfloat16().requires_grad_()
    out = fused._Drop.apply(x, p)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert abs((out == 0).double().mean().item() - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert torch.equal(out, 2 * gradient)
    assert torch.equal(gradient[gradient != 0].unique(), torch.tensor([1 / (1 - p)]).bfloat16())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(0)
    rows, width = 400, 1008
    zeros, ones = torch.zeros(rows, width).bfloat16(), torch.ones(rows, width).bfloat16().requires_grad_()
    added = []
    for _ in range(2):
        out = fused._AddNorm.apply(zeros, ones, torch.zeros(width), torch.ones(width), torch.zeros(width), 1e-5, p)
        added.append(out.grad_fn.saved_tensors[0])
    zero = added[0] == 0
    assert abs(zero.double().mean().item() - p) < 4 * (p * (1 - p) / zero.numel()) ** 0.5
    assert torch.equal(added[0][~zero].unique(), torch.tensor([1 / (1 - p)]).bfloat16())
    # Neither neighbours, nor rows, nor the next draw know of each other.
    others = ((zero[:, 1:], zero[:, :-1]), (zero[1:], zero[:-1]), (zero, added[1] == 0))
    for one, other in others:
        assert abs((one & other).double().mean().item() - p * p) < 0.005
    torch.manual_seed(1)
    out = fused._AddNorm.apply(zeros, ones, torch.zeros(width), torch.ones(width), torch.zeros(width), 1e-5, p)
    dropped = out.grad_fn.saved_tensors[0] == 0
    (gradient,) = torch.autograd.grad((out * torch.randn(rows, width)).sum(), ones)
    assert torch.equal(gradient == 0, dropped)


def test_dropout_in_attention_is_the_same_mask_both_ways() -> None:
    """Attention is linear in its values: the gradient must use the very weights of the forward pass."""
    qkv = draw(29, 96)
    first, lengths = torch.tensor([0, 16, 25]), torch.tensor([16, 9, 4])

    def attend(p: float) -> Tensor:
        torch.manual_seed(3)
        found: Tensor = fused._FusedAttention.apply(qkv, torch.zeros(96), first, lengths, 2, p)
        return found

    out = attend(0.4)
    assert torch.equal(out, attend(0.4))
    assert not torch.allclose(out, attend(0.0))
    weight = torch.randn(out.shape).bfloat16()
    (gradient,) = torch.autograd.grad((out * weight).float().sum(), qkv)
    by_values = (gradient.double() * qkv.double())[:, 64:].sum()
    assert torch.allclose(by_values, (out.double() * weight.double()).sum(), rtol=0.02, atol=0.5)


def test_equal_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    x, y = draw(333, 64), draw(333, 64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        out = fused._AddNorm.apply(x, y, torch.ones(64), torch.ones(64), torch.zeros(64), 1e-5, 0.2)
        found.append((out, torch.autograd.grad(out.float().square().sum(), (x, y))))
    torch.set_num_threads(1)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("switch", ["1", "0"])
def test_the_tower_and_its_gradient_are_transformers_own(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, fresh: None, switch: str
) -> None:
    """With the compiled functions and without, in bfloat16, against float32 of transformers."""
    monkeypatch.setenv(fused.SWITCH, switch)
    switched_off = fused.library() is None
    assert switched_off == (switch == "0")
    tower = make_text_tower(parse_text_spec(f"hf:{tiny_bert}"), vocab_size=60, max_tokens=32, dropout=0.0)
    lengths = np.array([3, 9, 16, 1, 30])
    tokens = Tokens(np.random.default_rng(0).integers(5, 50, lengths.sum()), lengths)
    weight = torch.randn(len(lengths), tower.width)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = tower(tower.pack(tokens, torch.device("cpu"), bfloat16=True))
    (vectors * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    texts = np.split(tokens.ids, np.cumsum(lengths)[:-1])
    hidden = [tower.model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0] for ids in texts]
    pooled = torch.stack([one[0] if tower.pooling == "first" else one.mean(0) for one in hidden])
    (pooled * weight).sum().backward()
    assert close(vectors, pooled.detach().double(), 0.02)
    assert len(gradients) == sum(p.grad is not None for p in tower.parameters())
    squares = {
        name: (gradients[name] - p.grad).square().sum() for name, p in tower.named_parameters() if name in gradients
    }
    whole = sum(p.grad.square().sum() for p in tower.parameters() if p.grad is not None)
    assert sum(squares.values()) < 0.03**2 * whole


def test_compiled_once_and_without_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quicker = [flag.replace("-O3", "-O2") for flag in fused.FLAGS]  # all passes that warn, in less than half the time
    monkeypatch.setattr(fused, "FLAGS", (*quicker, "-Wall", "-Wextra", "-Werror"))
    file = fused.compiled(["cc"])
    assert list(tmp_path.rglob("*.*")) == [file]
    assert "compiling" in capsys.readouterr().err
    before = file.stat().st_mtime_ns
    assert fused.compiled(["cc"]) == file
    assert file.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""
    ctypes.CDLL(str(file))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fused.compiled(["cc"]).exists()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "cc --no-such-option"])
def test_no_compiler_is_said_and_does_no_harm(
    compiler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh: None
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert fused.library() is None
    assert fused.library() is None
    assert capsys.readouterr().err.count("install gcc") == 1
