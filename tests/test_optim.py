from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from litune.optim import make_adamw, parameter_groups, set_rate, warmup_cosine


def test_schedule() -> None:
    shares = [warmup_cosine(s, 100, 10) for s in range(100)]
    assert shares[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert warmup_cosine(0, 10, 0) == 1.0


def test_weight_decay_follows_the_schedule_not_the_rate() -> None:
    """With a zero gradient a matrix shrinks by share × decay, whatever the learning rate (METHOD, section 6)."""
    for rate in (1e-3, 5e-2):
        layer = nn.Linear(3, 3)
        before = layer.weight.detach().clone(), layer.bias.detach().clone()
        groups = parameter_groups(layer.named_parameters(), learning_rate=rate, weight_decay=0.01, rates={})
        optimizer = make_adamw(groups, 0.999)
        set_rate(optimizer, 0.5)
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.allclose(layer.weight, before[0] * (1 - 0.5 * 0.01), rtol=1e-5)
        assert torch.equal(layer.bias, before[1])


def test_first_step_against_adam_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make_adamw(
        parameter_groups(layer.named_parameters(), learning_rate=0.1, weight_decay=0.0, rates={}), 0.95
    )
    set_rate(optimizer, 1.0)
    layer.weight.grad = torch.tensor([[0.3, -2.0]])
    optimizer.step()
    # Bias correction makes the first step the gradient's sign times the rate.
    assert torch.allclose(layer.weight, before - 0.1 * torch.tensor([[1.0, -1.0]]), atol=1e-5)


def test_groups() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2), "locked": nn.Linear(2, 2)})
    model["locked"].requires_grad_(False)
    model["token_embedding"] = nn.Embedding(4, 2)
    groups = parameter_groups(model.named_parameters(), learning_rate=1e-3, weight_decay=1e-4, rates={"head.": 4.0})
    by_name = {name: group for group in groups for name in group["names"]}
    assert set(by_name) == {
        "body.weight", "body.bias", "head.weight", "head.bias", "token_embedding.weight",
    }  # fmt: skip
    assert by_name["head.weight"]["peak"] == pytest.approx(4e-3)
    assert by_name["head.weight"]["weight_decay"] == pytest.approx(1e-4 / 4e-3)
    assert by_name["body.weight"]["weight_decay"] == pytest.approx(0.1)
    assert by_name["body.bias"]["weight_decay"] == 0
    assert by_name["token_embedding.weight"]["weight_decay"] == 0
