from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from litune.errors import ConfigError
from litune.schedules import rate_share
from litune.tuning.optim import decays, make_optimizer, parameter_groups, set_rate, stepping

KINDS = ("adamw", "lion", "adafactor")
SHAPES = {
    "logit_scale": (),
    "bias": (40,),
    "small": (8, 50),  # not factored
    "tall": (70, 33),
    "wide": (32, 64),
    "kernel": (40, 3, 48),
    "image.patches": (48, 5, 40),
    "token_embedding": (64, 32),
}
PEAK, DECAY, STEPS, WARMUP = 0.01, 0.02, 6, 2
RATES = [("wide", 0.5), ("logit_*", 3.0), ("w*", 7.0)]


def new_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=random)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> torch.Tensor:
    """A seeded gradient with rows and columns of unlike size, and one row that is zero as for an unseen token."""
    values = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1000 * step + len(name)))
    for axis, size in enumerate(SHAPES[name]):
        values *= torch.linspace(0.1, 2, size).view([-1 if a == axis else 1 for a in range(values.ndim)])
    if name == "token_embedding":
        values[3] = 0
    return values


def new_optimizer(kind: str, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    groups = parameter_groups(parameters.items(), learning_rate=PEAK, weight_decay=DECAY, rates=RATES)
    return make_optimizer(kind, groups)


def tune(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_rate(optimizer, rate_share(step, STEPS, warmup=WARMUP), image_share=0.25)
        for name, p in parameters.items():
            p.grad = gradient(name, step)
        assert len(stepping(optimizer)) == len(parameters)
        optimizer.step()


# The definitions, one parameter at a time, in float64. Each returns the update that the rate multiplies.


def reference_adamw(state: dict[str, Any], g: np.ndarray, t: int) -> np.ndarray:
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    return (state["m"] / (1 - 0.9**t)) / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)


def reference_lion(state: dict[str, Any], g: np.ndarray, t: int) -> np.ndarray:
    m = state.get("m", np.zeros_like(g))
    state["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * g)


def reference_adafactor(state: dict[str, Any], g: np.ndarray, t: int) -> np.ndarray:
    beta2 = min(0.999, 1 - t**-0.8)
    axes = sorted(np.argsort(g.shape, kind="stable")[-2:])
    if g.ndim >= 2 and min(g.shape[a] for a in axes) >= 32:
        # As outer products: V[…, i, …, j, …] = R[i] C[j] / mean R.
        square = np.moveaxis(g, axes, (-2, -1)) ** 2 + 1e-30
        state["r"] = beta2 * state.get("r", 0) + (1 - beta2) * square.mean(-1)
        state["c"] = beta2 * state.get("c", 0) + (1 - beta2) * square.mean(-2)
        v = np.einsum("...i,...j->...ij", state["r"], state["c"]) / state["r"].mean(-1)[..., None, None]
        v = np.moveaxis(v, (-2, -1), axes)
    else:
        v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * (g**2 + 1e-30)
    m = 0.8984375 * state.get("m", np.zeros_like(g)) + 0.1 * g / np.sqrt(v)  # 0.9 as a bfloat16
    state["m"] = torch.as_tensor(m).bfloat16().double().numpy()  # stored in bfloat16; the update is not rounded
    return m


REFERENCES: dict[str, Callable[[dict[str, Any], np.ndarray, int], np.ndarray]] = {
    "adamw": reference_adamw,
    "lion": reference_lion,
    "adafactor": reference_adafactor,
}


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(kind: str) -> None:
    """Six steps in float64 from the definitions, with warm-up, cosine, decay, and rates by name."""
    parameters = new_parameters()
    optimizer = new_optimizer(kind, parameters)
    tune(optimizer, parameters, 0, STEPS)
    for name, start in new_parameters().items():
        rate = {"wide": 0.5, "logit_scale": 3.0, "image.patches": 0.25}.get(name, 1.0)
        decay = DECAY if name in ("small", "tall", "wide", "kernel", "image.patches") else 0.0
        state: dict[str, Any] = {}
        p = start.detach().double().numpy()
        for step in range(STEPS):
            share = rate_share(step, STEPS, warmup=WARMUP)
            update = REFERENCES[kind](state, gradient(name, step).double().numpy(), step + 1)
            image_share = 0.25 if name == "image.patches" else 1.0
            p = p - PEAK * rate * share * update - DECAY * share * image_share * p * bool(decay)
        # Means, as a sign (Lion) or a bfloat16 (Adafactor) may now and then round the other way in float32.
        moved = np.abs(p - start.detach().numpy()).mean()
        off = np.abs(parameters[name].detach().double().numpy() - p).mean()
        assert off < 1e-5 * moved + 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_a_parameter(kind: str) -> None:
    parameters = new_parameters()
    optimizer = new_optimizer(kind, parameters)
    tune(optimizer, parameters, 0, 1)
    tall = {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[parameters["tall"]].items()}
    full, scalar = ((70, 33), torch.float32), ((), torch.float32)
    assert (
        tall
        == {
            "adamw": {"step": scalar, "exp_avg": full, "exp_avg_sq": full},
            "lion": {"exp_avg": full},
            "adafactor": {
                "step": scalar,
                "momentum": ((70, 33), torch.bfloat16),
                "rows": ((1, 33), torch.float32),
                "columns": ((70, 1), torch.float32),
            },
        }[kind]
    )


def test_adafactors_cap() -> None:
    """β2 reaches 0.999 at t = 5623; from there on a new squared gradient counts one in a thousand."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer("adafactor", parameter_groups([("p", p)], learning_rate=1.0, weight_decay=0.0))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["step"].fill_(99_999.0)
    optimizer.state[p]["square"].fill_(1.0)
    p.grad = torch.full((3,), 3.0)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["square"], torch.tensor(1 + 0.001 * (9 - 1)), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_bit_identical(kind: str) -> None:
    """As checkpoints do it: every value of a parameter's state saved as a tensor, and put back into a new optimizer."""
    straight = new_parameters()
    tune(new_optimizer(kind, straight), straight, 0, STEPS)

    before = new_parameters()
    optimizer = new_optimizer(kind, before)
    tune(optimizer, before, 0, 3)
    saved = {n: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for n, p in before.items()}
    after = {name: nn.Parameter(p.detach().clone()) for name, p in before.items()}
    optimizer = new_optimizer(kind, after)
    for name, p in after.items():
        optimizer.state[p] = {k: v.to(p.device) for k, v in saved[name].items()}
    tune(optimizer, after, 3, STEPS)
    for name, p in straight.items():
        assert torch.equal(p, after[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [1e-3, 5e-2])
def test_weight_decay_follows_the_schedule_not_the_rate(kind: str, rate: float) -> None:
    """With a zero gradient a matrix shrinks by share × decay, whatever its learning rate (METHOD, section 6)."""
    model = nn.ModuleDict({"image": nn.Linear(3, 3), "text": nn.Linear(3, 3)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), learning_rate=rate, weight_decay=0.01, rates=[("text.*", 0.1)])
    optimizer = make_optimizer(kind, groups)
    set_rate(optimizer, 0.5, image_share=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    assert torch.allclose(after["text.weight"], before["text.weight"] * (1 - 0.5 * 0.01), rtol=1e-6)
    assert torch.allclose(after["image.weight"], before["image.weight"] * (1 - 0.25 * 0.01), rtol=1e-6)
    assert torch.equal(after["text.bias"], before["text.bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_is_locked_for_now_stands_still(kind: str) -> None:
    """No decay, no step of its momentum, and none of its gradient in the norm; once unlocked it starts afresh."""
    parameters = {name: p for name, p in new_parameters().items() if name in ("image.patches", "tall")}
    optimizer = new_optimizer(kind, parameters)
    image, text = parameters["image.patches"], parameters["tall"]
    start = image.detach().clone()
    for step in range(2):
        set_rate(optimizer, 1.0, image_share=0.0)
        for name, p in parameters.items():
            p.grad = gradient(name, step)
        assert stepping(optimizer) == [text]
        assert image.grad is None
        optimizer.step()
    assert torch.equal(image, start)
    assert image not in optimizer.state
    tune(optimizer, parameters, 2, 4)
    fresh = {"image.patches": nn.Parameter(start.clone())}
    tune(new_optimizer(kind, fresh), fresh, 2, 4)
    assert torch.equal(image, fresh["image.patches"])


def test_groups() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("body", "text_head", "locked", "image", "image_head")})
    model["locked"].requires_grad_(False)
    model["token_embedding"] = nn.Embedding(4, 2)
    groups = parameter_groups(
        model.named_parameters(),
        learning_rate=1e-3,
        weight_decay=1e-4,
        rates=[("image.bias", 0.0), ("text_head.*", 4.0), ("text_*", 9.0), ("BODY.*", 9.0)],
    )
    by_name = {name: group for group in groups for name in group["names"]}
    assert set(by_name) == {
        "body.weight", "body.bias", "text_head.weight", "text_head.bias", "image.weight", "image_head.weight",
        "image_head.bias", "token_embedding.weight",
    }  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    assert by_name["text_head.weight"]["peak"] == pytest.approx(4e-3)
    assert by_name["text_head.weight"]["weight_decay"] == pytest.approx(1e-4 / 4e-3)
    assert by_name["body.weight"]["weight_decay"] == pytest.approx(0.1)
    assert by_name["body.bias"]["weight_decay"] == 0
    assert by_name["token_embedding.weight"]["weight_decay"] == 0
    assert {name for name, group in by_name.items() if group["unlock"]} == {"image.weight"}


def test_what_decays() -> None:
    """Patches' kernels do, called as in timm and in transformers; tables do not, T5's of relative positions neither."""
    four, two = nn.Parameter(torch.zeros(2, 3, 4, 4)), nn.Parameter(torch.zeros(2, 3))
    for name in ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", "patch_embedding.weight"):
        assert decays(f"image.network.model.{name}", four)
    for name in ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight"):
        assert not decays(f"text.model.{name}", two)
    assert decays("text.model.encoder.block.0.layer.0.SelfAttention.q.weight", two)


def test_unknown_optimizer() -> None:
    with pytest.raises(ConfigError, match="no optimizer 'adafactr': perhaps you meant 'adafactor'"):
        make_optimizer("adafactr", [])


class Reads(TorchDispatchMode):
    """Counts what a processor would wait for a GPU for: the value of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_no_value(kind: str) -> None:
    matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in ((40, 48), (7,)))
    groups = parameter_groups([("a", matrix), ("b", vector)], learning_rate=1e-3, weight_decay=1e-4)
    optimizer = make_optimizer(kind, groups)
    set_rate(optimizer, 0.5)
    for _ in range(2):
        for parameter in (matrix, vector):
            parameter.grad = torch.full_like(parameter, 0.1)
        with Reads() as reads:
            optimizer.step()
        assert reads.count == 0
    assert (matrix < 1).all()
