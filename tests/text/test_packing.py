from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from litune.text import packing
from litune.text.packing import (
    Line,
    Rows,
    attention,
    by_length,
    first_fit,
    flash_attention,
    in_line,
    in_rows,
    line_attention,
    pool,
    with_places,
)
from litune.text.tokenizers import Tokens


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


@pytest.mark.parametrize("width", [1, 7, 32, 48])
def test_first_fit_is_that_of_one_text_at_a_time(width: int) -> None:
    random = np.random.default_rng(width)
    for count in (0, 1, 2, 30, 300):
        lengths = random.integers(1, random.integers(1, width, endpoint=True), count, endpoint=True)
        first, rows = first_fit(lengths, width)
        open_rows: list[tuple[int, int]] = []  # free places and the row's number, the one that was left last at the end
        for text in np.argsort(-lengths, kind="stable"):
            fitting = [one for one in open_rows if one[0] >= lengths[text]]
            if not fitting:
                fitting = [(width, len(open_rows))]
                open_rows.append(fitting[0])
            free, row = next(one for one in reversed(fitting) if one[0] == min(fitting)[0])
            assert first[text] == row * width + width - free
            open_rows.remove((free, row))
            open_rows.append((free - int(lengths[text]), row))
        assert rows == len(open_rows)


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


@pytest.mark.parametrize("lengths", [[1], [16] * 5, list(range(1, 17)) * 30, [70, 3, 3, 41]])
def test_a_line_has_texts_one_after_the_other_and_cuts_over_all_of_it(lengths: list[int]) -> None:
    tokens = ragged(lengths)
    line = in_line(tokens)
    used = sum(lengths)
    assert line.ids[0, :used].tolist() == tokens.ids.tolist()
    assert line.texts[0].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * (
        line.ids.shape[1] - used
    )
    assert line.cuts.dtype == torch.int32
    assert line.cuts[: len(lengths) + 1].tolist() == [0, *np.cumsum(lengths)]
    assert line.cuts[-1] == line.ids.shape[1]  # the kernel writes every token, the gap's too
    assert line.cuts.diff().min() >= 0
    assert line.cuts.diff().max() <= line.longest


def test_lines_of_like_batches_are_of_one_shape() -> None:
    random = np.random.default_rng(0)
    lines = [in_line(ragged(random.integers(8, 17, 16_384).tolist())) for _ in range(4)]
    assert len({(line.ids.shape, line.cuts.shape, line.longest) for line in lines}) <= 2


def stretch_by_stretch(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, longest: int, dropout: float) -> Tensor:
    """What `flash_attention` computes."""
    assert dropout == 0
    parts = [x.split(cuts.diff().tolist()) for x in (q, k, v)]
    found = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one)) for one in zip(*parts, strict=True)]
    return torch.cat([one.transpose(0, 1) for one in found])


def test_attention_in_a_line_is_that_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "flash_attention", stretch_by_stretch)
    torch.manual_seed(0)
    tokens = ragged([5, 16, 1, 9, 9, 30])
    values = torch.randn(int(tokens.lengths.sum()), 36, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(values), 12, dtype=torch.float64)
    found = []
    for packed in (in_line(tokens), in_rows(tokens)):
        there = packed.texts.flatten() >= 0
        order = packed.texts.flatten()[there].argsort(stable=True)
        place = there.nonzero()[:, 0][order]
        qkv = torch.zeros(there.numel(), 36, dtype=torch.float64).index_copy(0, place, values)
        qkv = qkv.view(*packed.ids.shape, 36)
        out = line_attention(qkv, 3, packed, 0.0) if isinstance(packed, Line) else attention(qkv, 3, packed)
        assert out.shape == (*packed.ids.shape, 12)
        own = out.flatten(0, 1)[place]
        found.append((own, *torch.autograd.grad((own * weights).sum(), values)))
    for line, rows in zip(*found, strict=True):
        assert torch.allclose(line, rows, rtol=1e-10, atol=1e-13)


def test_the_kernel_takes_what_it_is_given() -> None:
    """Its arguments, by torch's own description of it, forward and backward: no processor has the kernel."""
    packed = in_line(ragged([5, 16, 1]))
    qkv = torch.randn(packed.ids.shape[1], 3, 2, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = flash_attention(*qkv.unbind(1), packed.cuts.to("meta"), packed.longest, 0.1)
    assert out.shape == (packed.ids.shape[1], 2, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("lay_out", [in_rows, in_line])
def test_the_mean_by_gathers_is_the_mean(lay_out: Callable[[Tokens], Rows]) -> None:
    """Values and gradients, whatever stands in the gaps."""
    packed = lay_out(ragged([3, 1, 14, 20, 7]))
    hidden = torch.randn(*packed.ids.shape, 6, dtype=torch.float64)
    hidden[packed.texts < 0] = torch.nan
    weights = torch.randn(5, 6, dtype=torch.float64)
    found = []
    for one in (packed, with_places(packed)):
        leaf = (hidden if one.places is not None else hidden.nan_to_num(1e9)).clone().requires_grad_()
        means = pool(leaf, one, "mean")
        found.append((means, *torch.autograd.grad((means * weights).sum(), leaf)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_groups_are_rectangles_of_one_length() -> None:
    tokens = ragged([3, 5, 3, 1, 5, 3])
    groups = by_length(tokens)
    assert [one.shape for one in groups.ids] == [(1, 1), (3, 3), (2, 5)]
    texts = [row.tolist() for one in groups.ids for row in one]
    expected = [tokens.take(np.array([i])).ids.tolist() for i in range(6)]
    assert [texts[i] for i in groups.order] == expected
