"""Gradients through `Encoded`, micro-batch by micro-batch, against one backward pass through the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.conftest import random_timm_tower
from torch import Tensor, nn

from litune.image.registry import ImageTower
from litune.model.heads import make_head
from litune.model.lit import LiT
from litune.text import registry as text_towers
from litune.text.registry import VitTextTower
from litune.text.tokenizers import Tokenizer, train_tokenizer
from litune.tuning.gradient_cache import Encoded
from litune.tuning.losses import sigmoid_loss, softmax_loss

TEXTS = [f"{color} {shape}, {i} of them" for i in range(4) for color, shape in zip("abcd", "wxyz", strict=True)]
Encode = Callable[[LiT, slice], Tensor]


@pytest.fixture
def make_lit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LiT]:
    """A LiT in float64 with a small ViT for texts; images are 12 random numbers, or pictures for a tower."""
    monkeypatch.setitem(text_towers.VIT_SIZES, "Ti", (16, 2, 32, 2))
    tokenizer = Tokenizer(train_tokenizer(TEXTS, 60), "sticky_eos", 8)

    def make(text_head: str, image_head: str, dropout: float = 0.0, image: ImageTower | None = None) -> LiT:
        torch.manual_seed(0)
        width = 12 if image is None else int(image.encode(torch.zeros(1, 3, 32, 32)).shape[1])
        dim = 16 if text_head == "none" else width if image_head == "none" else 10
        text = VitTextTower("Ti", tokenizer.vocab_size, 8, dropout=dropout)
        heads = make_head(text_head, 16, dim), make_head(image_head, width, dim)
        settings = {"image_width": width, "dim": dim, "logit_scale": 2.3, "logit_bias": -3.0, "image": image}
        return LiT(text, *heads, tokenizer, **settings).double().train()

    return make


def texts_of(model: LiT, rows: slice) -> Tensor:
    return model.text_features(model.tokenizer(TEXTS[rows]))


def stored_of(model: LiT, rows: slice) -> Tensor:
    torch.manual_seed(100)
    return model.image_features(torch.randn(len(TEXTS), 12, dtype=torch.float64)[rows])


def pictures_of(model: LiT, rows: slice) -> Tensor:
    """Features of pictures, from a tower in float64 (`ImageTower.forward` gives float32)."""
    pixels = torch.rand(len(TEXTS), 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert model.image is not None
    return model.image_features(model.image.network(pixels[rows]))


def seeded(encode: Encode, model: LiT, size: int) -> list[Callable[[], Tensor]]:
    """The micro-batches, each with dropout of its own."""

    def part(start: int) -> Tensor:
        torch.manual_seed(start)
        return encode(model, slice(start, start + size))

    return [lambda start=start: part(start) for start in range(0, len(TEXTS), size)]


def loss_of(kind: str, model: LiT, images: Tensor, texts: Tensor) -> Tensor:
    if kind == "sigmoid":
        assert model.logit_bias is not None
        return sigmoid_loss(images, texts, model.scale, model.logit_bias)
    return softmax_loss(images, texts, model.scale)


def whole_gradients(kind: str, model: LiT, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    loss_of(kind, model, images, texts).backward()
    return take_gradients(model)


def cached_gradients(kind: str, model: LiT, images: Encoded, texts: Encoded) -> dict[str, Tensor]:
    loss_of(kind, model, images.features, texts.features).backward()
    texts.backward()
    images.backward()
    return take_gradients(model)


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient, by its norm (of all, where its own is next to nothing)."""
    assert found.keys() == expected.keys()
    least = 1e-3 * max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm() / max(float(g.norm()), least)) for n, g in expected.items())


def encoded(encode: Encode, model: LiT, size: int, modules: Sequence[nn.Module]) -> Encoded:
    return Encoded(seeded(encode, model, size), modules)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("text_head", "image_head"),
    [("linear", "none"), ("mlp", "none"), ("gated", "none"), ("none", "linear"), ("linear", "mlp"), ("mlp", "gated")],
)
def test_gradients_of_every_head(make_lit: Callable[..., LiT], kind: str, text_head: str, image_head: str) -> None:
    """Micro-batches of 1, 3 and 7 of 16, against the whole batch at once."""
    model = make_lit(text_head, image_head)
    rows = slice(0, len(TEXTS))
    expected = whole_gradients(kind, model, stored_of(model, rows), texts_of(model, rows))
    tuned = {name for name, _ in model.named_parameters() if kind == "sigmoid" or name != "logit_bias"}
    assert expected.keys() == tuned
    for size in (1, 3, 7, 16):
        images = encoded(stored_of, model, size, [model.image_head])
        texts = encoded(texts_of, model, size, [model.text, model.text_head])
        assert images.features.requires_grad == (image_head != "none")
        assert worst(cached_gradients(kind, model, images, texts), expected) <= 1e-10


def test_dropout_is_the_same_in_both_passes(make_lit: Callable[..., LiT]) -> None:
    """Against the same micro-batches, with the same seeds, whose graphs are all kept."""
    model = make_lit("linear", "none", dropout=0.3)
    images = stored_of(model, slice(0, 16))
    for size in (3, 7):
        kept = torch.cat([part() for part in seeded(texts_of, model, size)])
        expected = whole_gradients("softmax", model, images, kept)
        texts = encoded(texts_of, model, size, [model.text, model.text_head])
        assert torch.equal(texts.features, kept)
        locked = Encoded([lambda: images], [model.image_head])
        assert worst(cached_gradients("softmax", model, locked, texts), expected) <= 1e-10
    assert not torch.equal(texts.features, torch.cat([part() for part in seeded(texts_of, model, 3)]))


def unlocked(name: str, **options: object) -> ImageTower:
    tower = random_timm_tower(name, **options)
    tower.unlock()
    return tower


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_unlocked_image_tower(make_lit: Callable[..., LiT], kind: str) -> None:
    model = make_lit("linear", "linear", image=unlocked("test_vit", img_size=32)).eval()  # no drop-path
    rows = slice(0, len(TEXTS))
    expected = whole_gradients(kind, model, pictures_of(model, rows), texts_of(model, rows))
    assert any(name.startswith("image.") for name in expected)
    for size in (1, 3, 7):
        images = encoded(pictures_of, model, size, [model.image_head, model.image])
        texts = encoded(texts_of, model, size, [model.text, model.text_head])
        assert worst(cached_gradients(kind, model, images, texts), expected) <= 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [4, 16])
def test_batch_norm_moves_once(make_lit: Callable[..., LiT], size: int, checkpointing: bool) -> None:
    """Running statistics move as in one forward pass over the micro-batches; dropout and drop-path are on."""
    towers = [unlocked("test_resnet") for _ in range(2)]
    for tower in towers:
        for norm in (m for m in tower.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None if size == 4 else 0.1  # None: the mean of all batches, by their count
    cached, once = (make_lit("linear", "linear", image=tower) for tower in towers)
    cached.load_state_dict(once.state_dict())
    assert cached.image is not None
    assert once.image is not None
    cached.image.set_gradient_checkpointing(checkpointing)
    before = cached.image.state_dict()["network.bn1.running_mean"].clone()
    images = encoded(pictures_of, cached, size, [cached.image_head, cached.image])
    texts = encoded(texts_of, cached, 16, [cached.text, cached.text_head])
    found = cached_gradients("softmax", cached, images, texts)
    kept = torch.cat([part() for part in seeded(pictures_of, once, size)])
    expected = whole_gradients("softmax", once, kept, texts_of(once, slice(0, 16)))
    after, wanted = cached.image.state_dict(), once.image.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in after.items())
    assert not torch.equal(after["network.bn1.running_mean"], before)
    assert worst(found, expected) <= 1e-10


def test_locked_is_encoded_once(make_lit: Callable[..., LiT]) -> None:
    model = make_lit("linear", "none")
    model.text.requires_grad_(False)
    model.text_head.requires_grad_(False)
    calls = []

    def counting(model: LiT, rows: slice) -> Tensor:
        calls.append(rows)
        return texts_of(model, rows)

    texts = encoded(counting, model, 7, [model.text, model.text_head])
    assert not texts.features.requires_grad
    softmax_loss(stored_of(model, slice(0, 16)), texts.features, model.scale).backward()
    texts.backward()
    assert len(calls) == 3
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"logit_scale"}


def test_bfloat16_deviates_little(make_lit: Callable[..., LiT]) -> None:
    """Under autocast, in float32: rounding differs between micro-batches and the whole by some bfloat16 steps."""
    model = make_lit("linear", "none").float()

    def rounded(model: LiT, rows: slice) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return texts_of(model, rows)

    images = stored_of(model, slice(0, 16)).float()
    expected = whole_gradients("softmax", model, images, rounded(model, slice(0, 16)))
    texts = encoded(rounded, model, 7, [model.text, model.text_head])
    found = cached_gradients("softmax", model, Encoded([lambda: images], [model.image_head]), texts)
    assert worst(found, expected) < 0.03
