from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from litune.towers.compiling import SWITCH, compile_modules


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[nn.Linear]:
    monkeypatch.delenv(SWITCH, raising=False)
    return [nn.Linear(3, 3) for _ in range(2)]


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: str | Callable[..., Callable[..., object]]) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=backend))


def test_compiled_layers_give_the_same(layers: list[nn.Linear], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled_by(monkeypatch, counting)
    x = torch.randn(4, 3)
    expected = [layer(x) for layer in layers]
    assert compile_modules(layers, lambda: [layer(x) for layer in layers], "the tower")
    assert [torch.equal(layer(x), one) for layer, one in zip(layers, expected, strict=True)] == [True, True]
    assert len(graphs) == 1  # one for both
    assert set(layers[0].state_dict()) == {"weight", "bias"}


def test_a_compiler_that_fails_is_one_line_and_no_harm(
    layers: list[nn.Linear], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> Callable[..., object]:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    compiled_by(monkeypatch, broken)
    x = torch.randn(4, 3)
    expected = layers[1](x)
    assert not compile_modules(layers, lambda: layers[1](x), "the tower")
    said = " ".join(capsys.readouterr().err.split())
    assert "the tower runs without torch.compile" in said
    assert "Failed to find C compiler" in said
    assert torch.equal(layers[1](x), expected)


def test_switched_off(layers: list[nn.Linear], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    compiled_by(monkeypatch, "no such backend")
    assert not compile_modules(layers, lambda: layers[0](torch.randn(4, 3)), "the tower")
