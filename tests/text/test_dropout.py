from __future__ import annotations

import pytest
import torch

from litune.text.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.full((400, 1001), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    zero = y == 0
    p = round(256 * p) / 256
    # 400,400 draws: four standard errors.
    assert abs(zero.double().mean().item() - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert torch.equal(y[~zero].unique(), torch.tensor([2.0], dtype=dtype).mul(1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad == 0, zero)
    # Neither neighbours nor the next draw know of each other.
    together = (zero[:, 1:] & zero[:, :-1]).double().mean().item()
    assert abs(together - p * p) < 0.005
    assert abs((zero & (dropout(x, p) == 0)).double().mean().item() - p * p) < 0.005


def test_dropout_follows_torchs_seed() -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    one = dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(one, dropout(x, 0.3))
    assert not torch.equal(one, dropout(x, 0.3))


def test_dropout_off() -> None:
    x = torch.ones(10)
    assert dropout(x, 0.3, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(10))
