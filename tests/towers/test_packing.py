from __future__ import annotations

import numpy as np
import pytest
import torch

from litune.data.tokenizers import Tokens
from litune.towers.packing import attention, first_fit, in_rows, pool


def ragged(lengths: list[int]) -> Tokens:
    random = np.random.default_rng(0)
    return Tokens(random.integers(5, 50, sum(lengths)), np.array(lengths))


@pytest.mark.parametrize("lengths", [[1], [16] * 5, [12] * 9, list(range(1, 17)) * 3, [70, 3, 3, 41]])
def test_every_text_is_whole_and_alone(lengths: list[int]) -> None:
    tokens = ragged(lengths)
    packed = in_rows(tokens)
    flat, texts = packed.ids.flatten(), packed.texts.flatten()
    for i in range(len(lengths)):
        places = range(int(packed.first[i]), int(packed.first[i]) + lengths[i])
        assert flat[list(places)].tolist() == tokens.take(np.array([i])).ids.tolist()
        assert packed.positions.flatten()[list(places)].tolist() == list(range(lengths[i]))
        assert (texts == i).nonzero()[:, 0].tolist() == list(places)
        assert places[0] // packed.ids.shape[1] == places[-1] // packed.ids.shape[1]  # in one row
    assert int((texts >= 0).sum()) == sum(lengths)


def test_captions_fill_their_rows() -> None:
    """With lengths as captions have them, little is lost to gaps."""
    lengths = np.random.default_rng(1).normal(12, 2.5, 512).round().clip(4, 16).astype(int)
    packed = in_rows(ragged(lengths.tolist()))
    assert lengths.sum() / packed.ids.numel() > 0.9


def test_first_fit_overfills_no_row() -> None:
    lengths = np.random.default_rng(2).integers(1, 17, 300)
    first, rows = first_fit(lengths, 32)
    used = np.zeros(rows * 32, dtype=int)
    for start, length in zip(first, lengths, strict=True):
        used[start : start + length] += 1
    assert used.max() == 1


def test_attention_and_its_gradient_are_those_of_each_text_alone() -> None:
    torch.manual_seed(0)
    lengths = [5, 16, 1, 9, 9, 30]
    packed = in_rows(ragged(lengths))
    rows, width = packed.ids.shape
    qkv = torch.randn(rows, width, 36, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(rows * width, 12, dtype=torch.float64) * (packed.texts.flatten() >= 0)[:, None]
    out = attention(qkv, 3, packed)
    (found,) = torch.autograd.grad((out.flatten(0, 1) * weights).sum(), qkv)
    total = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(lengths):
        place = slice(int(packed.first[i]), int(packed.first[i]) + length)
        q, k, v = (x.unflatten(-1, (3, 4)).transpose(0, 1) for x in qkv.flatten(0, 1)[place].chunk(3, dim=-1))
        alone = (torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v).transpose(0, 1).flatten(1)
        assert torch.allclose(out.flatten(0, 1)[place], alone, rtol=1e-12)
        total = total + (alone * weights[place]).sum()
    (expected,) = torch.autograd.grad(total, qkv)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_dropout_in_attention_is_the_same_mask_both_ways() -> None:
    """Attention is linear in its values: the gradient must use the very weights of the forward pass."""
    packed = in_rows(ragged([16, 9, 4]))
    qkv = torch.randn(*packed.ids.shape, 24, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = attention(qkv, 2, packed, dropout=0.4)
    torch.manual_seed(3)
    assert torch.equal(out, attention(qkv, 2, packed, dropout=0.4))
    assert not torch.allclose(out, attention(qkv, 2, packed, dropout=0.0))
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), qkv)
    values = slice(16, 24)
    assert torch.allclose((gradient * qkv)[..., values].sum(), (out * weight).sum())


@pytest.mark.parametrize("how", ["first", "mean", "last"])
def test_pool(how: str) -> None:
    lengths = [3, 1, 14, 20]
    packed = in_rows(ragged(lengths))
    hidden = torch.randn(*packed.ids.shape, 6)
    found = pool(hidden, packed, how)
    for i, length in enumerate(lengths):
        own = hidden.flatten(0, 1)[int(packed.first[i]) : int(packed.first[i]) + length]
        assert torch.allclose(found[i], {"first": own[0], "mean": own.mean(0), "last": own[-1]}[how])
