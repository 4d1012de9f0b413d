"""Biases read off a LayerNorm's constant, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from litune.interop.fold import last_norm, without_bias


@pytest.mark.parametrize("dim", [4, 24], ids=["fewer dimensions", "more dimensions"])
def test_a_matrix_in_place_of_an_affine_map(dim: int) -> None:
    """Whatever the gains are: some are zero, or near it, in models that were tuned well."""
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(dim, 16)), random.normal(size=dim)
    tokens = random.normal(size=(5, 7, 16)).astype(np.float32)
    norm = nn.LayerNorm(16)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(random.normal(size=16)))
        norm.weight[3], norm.weight[5] = 0, 1e-7
        norm.bias.copy_(torch.from_numpy(random.normal(size=16)))

    def normalized(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()

    hidden = normalized(tokens)
    expected = [hidden[:, 0] @ weight.T + bias, hidden.mean(1) @ weight.T + bias]
    matrix = without_bias(norm, (torch.from_numpy(weight), torch.from_numpy(bias)))
    hidden = normalized(tokens)  # the norm has changed
    for pooled, right in zip((hidden[:, 0], hidden.mean(1)), expected, strict=True):
        np.testing.assert_allclose(pooled @ matrix.numpy().T, right, atol=1e-6)


def test_no_bias_needs_no_norm() -> None:
    norm = nn.LayerNorm(8)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    weight = torch.eye(8, dtype=torch.float64)
    assert torch.equal(without_bias(norm, (weight, torch.zeros(8, dtype=torch.float64))), weight)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


class Residual(nn.Module):
    """Adds a norm's output to its input: what is added to the norm's bias arrives, but the sum is no norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x)


def test_the_norm_that_pooled_outputs_come_from() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    ends = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    before = {name: value.clone() for name, value in ends.state_dict().items()}
    assert last_norm(ends, 8, lambda: ends(x)) is ends[3]
    for name, value in ends.state_dict().items():
        assert torch.equal(value, before[name])
    for other in (nn.Sequential(nn.LayerNorm(8), nn.ReLU()), Residual(), nn.Linear(8, 8)):
        assert last_norm(other, 8, lambda other=other: other(x)) is None  # type: ignore[misc]
