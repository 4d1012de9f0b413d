from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from litune.tuning.losses import Ids, MoreImages, sigmoid_loss, softmax_loss
from litune.vectors import normalize

IMAGE_IDS = torch.tensor([0, 1, 1, 2, 3, 4, 5])  # rows 1 and 2 are captions of one image
TEXT_IDS = torch.tensor([0, 1, 2, 3, 3, 0, 6])  # rows 3 and 4, and 0 and 5, have one caption
MORE_IMAGE_IDS = torch.tensor([7, 1, 9, 5])
MORE_TEXT_IDS = torch.tensor([[8, -1], [9, -1], [6, 0], [-1, -1]])


def softmax_reference(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_to_text: float = 0.5,
    ids: tuple[Tensor, Tensor] | None = None,
    more: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss from whole matrices of scores, its masks pair by pair."""
    n = len(images)
    scores = scale * images @ texts.T
    columns = scores
    if ids is not None:
        banned = torch.tensor([[same(ids, i, j) for j in range(n)] for i in range(n)])
        scores = columns = scores.masked_fill(banned, -math.inf)
    if more is not None:
        others = scale * more[0] @ texts.T
        if ids is not None:
            text_ids, image_ids = ids[1].tolist(), ids[0].tolist()
            sees_not = [
                [text_ids[i] in caps or image_ids[i] == image for i in range(n)]
                for image, caps in zip(more[1].tolist(), more[2].tolist(), strict=True)
            ]
            others = others.masked_fill(torch.tensor(sees_not), -math.inf)
        columns = torch.cat([scores, others])
    rows = scores.logsumexp(1) - scores.diagonal()
    return (image_to_text * rows + (1 - image_to_text) * (columns.logsumexp(0) - scores.diagonal())).mean()


def same(ids: tuple[Tensor, Tensor], i: int, j: int) -> bool:
    return i != j and bool(ids[0][i] == ids[0][j] or ids[1][i] == ids[1][j])


def sigmoid_reference(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The loss as a sum over pairs."""
    n = len(images)
    total = images.new_zeros(())
    for i in range(n):
        for j in range(n):
            if ids is None or not same(ids, i, j):
                score = scale * images[i] @ texts[j] + bias
                total = total - F.logsigmoid(score if i == j else -score)
    return total / n


def features(n: int = 7, d: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n)
    images, texts = (normalize(torch.randn(n, d, dtype=torch.float64)) for _ in range(2))
    return images, texts


def more_images(d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    return normalize(torch.randn(4, d, dtype=torch.float64)), MORE_IMAGE_IDS, MORE_TEXT_IDS


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def leaves(tensors: list[Tensor], wanted: tuple[bool, ...] | None = None) -> list[Tensor]:
    return [t.clone().requires_grad_(wanted is None or wanted[k]) for k, t in enumerate(tensors)]


def assert_same(
    found: Callable[..., Tensor], expected: Callable[..., Tensor], tensors: list[Tensor], wanted: Any = None
) -> None:
    """Values to 1e-12, gradients to 1e-10 of their largest."""
    ours, theirs = leaves(tensors, wanted), leaves(tensors, wanted)
    value, reference = found(*ours), expected(*theirs)
    assert value.item() == pytest.approx(reference.item(), rel=1e-12)
    if not value.requires_grad:
        assert not reference.requires_grad
        return
    (3 * value).backward()
    (3 * reference).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-10 * b.grad.abs().max()


def test_softmax_by_hand() -> None:
    # Two pairs, orthogonal and right: each softmax is e^s / (e^s + 1).
    eye = torch.eye(2, dtype=torch.float64)
    assert softmax_loss(eye, eye, number(3.0)).item() == pytest.approx(math.log(1 + math.exp(-3)), abs=1e-12)
    # Swapped: the own score is 0, the other 3.
    assert softmax_loss(eye, eye.flip(0), number(3.0)).item() == pytest.approx(math.log(1 + math.exp(3)), abs=1e-12)
    # With the other left out, nothing is left to be told apart.
    ids = Ids(torch.tensor([0, 1]), torch.tensor([5, 5]))
    assert softmax_loss(eye, eye.flip(0), number(3.0), ids=ids).item() == 0


def test_sigmoid_by_hand() -> None:
    # Two right pairs (σ(s + b)) and two wrong ones (σ(−b)), over two.
    eye = torch.eye(2, dtype=torch.float64)
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert sigmoid_loss(eye, eye, number(3.0), number(-1.0)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("image_to_text", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("further", [False, True])
def test_softmax(chunk: int, image_to_text: float, masked: bool, further: bool) -> None:
    ids = (IMAGE_IDS, TEXT_IDS) if masked else None
    more = more_images() if further else None
    assert_same(
        lambda i, t, s: softmax_loss(
            i,
            t,
            s,
            image_to_text=image_to_text,
            ids=Ids(*ids) if ids else None,
            more_images=MoreImages(*more) if more else None,
            chunk=chunk,
        ),
        lambda i, t, s: softmax_reference(i, t, s, image_to_text, ids, more),
        [*features(), number(6.0)],
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("masked", [False, True])
def test_sigmoid(chunk: int, masked: bool) -> None:
    ids = (IMAGE_IDS, TEXT_IDS) if masked else None
    assert_same(
        lambda i, t, s, b: sigmoid_loss(i, t, s, b, ids=Ids(*ids) if ids else None, chunk=chunk),
        lambda i, t, s, b: sigmoid_reference(i, t, s, b, ids),
        [*features(), number(10.0), number(-10.0)],
    )


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("wanted", [(False, True, True), (True, False, False), (False, False, True), (False,) * 3])
def test_inputs_without_gradient(chunk: int, wanted: tuple[bool, bool, bool]) -> None:
    tensors = [*features(), number(6.0)]
    assert_same(lambda i, t, s: softmax_loss(i, t, s, chunk=chunk), softmax_reference, tensors, wanted)
    assert_same(
        lambda i, t, s, b: sigmoid_loss(i, t, s, b, chunk=chunk),
        sigmoid_reference,
        [*tensors, number(-4.0)],
        (*wanted, wanted[2]),
    )


@pytest.mark.parametrize("n", [1, 33])
def test_large_scales(n: int) -> None:
    images, texts = features(n)
    assert_same(lambda i, t, s: softmax_loss(i, t, s, chunk=8), softmax_reference, [images, texts, number(500.0)])
    sigmoid = [images, texts, number(500.0), number(-10.0)]
    assert_same(lambda i, t, s, b: sigmoid_loss(i, t, s, b, chunk=8), sigmoid_reference, sigmoid)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_gradcheck(chunk: int) -> None:
    images, texts = features(5, 2)
    images[2], texts[4] = 0, 0  # zero vectors too
    tensors = leaves([images, texts, number(4.0), number(-2.0)])
    ids, more = Ids(IMAGE_IDS[:5], TEXT_IDS[:5]), MoreImages(*more_images(2))
    for further in (None, more):
        assert torch.autograd.gradcheck(
            lambda i, t, s, further=further: softmax_loss(i, t, s, ids=ids, more_images=further, chunk=chunk),
            tensors[:3],
        )
    assert torch.autograd.gradcheck(lambda i, t, s, b: sigmoid_loss(i, t, s, b, ids=ids, chunk=chunk), tensors)


def test_zero_features() -> None:
    zeros = torch.zeros(4, 3, requires_grad=True)
    loss = softmax_loss(normalize(zeros), normalize(zeros), torch.tensor(10.0))
    assert loss.item() == pytest.approx(math.log(4))
    loss.backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_precision() -> None:
    images, texts = features(33)
    scale, bias = number(20.0), number(-5.0)
    expected = softmax_reference(images, texts, scale).item(), sigmoid_reference(images, texts, scale, bias).item()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            i, t, s, b = (x.float().requires_grad_() for x in (images, texts, scale, bias))
            found = softmax_loss(i, t, s), sigmoid_loss(i, t, s, b)
        assert [x.item() for x in found] == pytest.approx(expected, rel=1e-5)
        sum(found, torch.zeros(())).backward()
        assert i.grad is not None
        assert i.grad.dtype == torch.float32
    # Bfloat16 features are rounded, the arithmetic is not.
    half = images.bfloat16().requires_grad_()
    rounded = softmax_reference(half.detach().double(), texts, scale)
    loss = softmax_loss(half, texts.float(), scale.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(rounded.item(), rel=1e-5)
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_no_grad() -> None:
    images, texts, scale = leaves([*features(), number(6.0)])
    with torch.no_grad():
        loss = softmax_loss(images, texts, scale, chunk=3)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(softmax_reference(images, texts, scale).item(), rel=1e-12)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that is made, and how many matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                # A view of a broadcast number takes no memory.
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return made


def test_no_whole_matrix_is_made() -> None:
    n, chunk, m = 96, 8, 16
    images, texts, more = (normalize(torch.randn(k, 4)) for k in (n, n, m))
    ids = Ids(torch.arange(n), torch.arange(n) // 2)
    further = MoreImages(more, torch.arange(m) + n, torch.arange(3 * m).view(m, 3))
    for loss in (
        lambda i, t, s: softmax_loss(i, t, s, ids=ids, more_images=further, chunk=chunk),
        lambda i, t, s: sigmoid_loss(i, t, s, s, ids=ids, chunk=chunk),
    ):
        i, t, s = (x.requires_grad_() for x in (images.clone(), texts.clone(), torch.tensor(3.0)))
        with Watch() as watch:
            loss(i, t, s).backward()
        assert n * 4 < watch.largest <= chunk * (n + m)


@pytest.mark.parametrize(("chunk", "products"), [(8, 2), (4, 3 * 2)])
def test_locked_images_cost_no_gradient(chunk: int, products: int) -> None:
    # Scores and the texts' gradient for both directions; of each of several chunks, scores twice.
    images, texts = (x.float() for x in features(8))
    with Watch() as watch:
        softmax_loss(images, texts.requires_grad_(), torch.tensor(3.0, requires_grad=True), chunk=chunk).backward()
    assert watch.products == products


def test_only_one_backward() -> None:
    images, texts, scale = leaves([*features(), number(6.0)])
    (gradient,) = torch.autograd.grad(softmax_loss(images, texts, scale).square(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bad_input() -> None:
    # Past the tests' own type checks.
    softmax, sigmoid = inspect.unwrap(softmax_loss), inspect.unwrap(sigmoid_loss)
    images, texts = features()
    scale = number(3.0)
    more = MoreImages(*more_images())
    for bad in (texts[:5], texts[:, :3], texts[0]):
        with pytest.raises(ValueError, match="must be of one shape"):
            softmax(images, bad, scale)
    with pytest.raises(ValueError, match="must have no dimension"):
        sigmoid(images, texts, scale, scale.view(1))
    with pytest.raises(ValueError, match=r"both must be \[7\]"):
        sigmoid(images, texts, scale, scale, ids=Ids(IMAGE_IDS[:3], TEXT_IDS[:3]))
    with pytest.raises(ValueError, match="image_to_text is 1.5"):
        softmax(images, texts, scale, image_to_text=1.5)
    with pytest.raises(ValueError, match="chunk is 0"):
        softmax(images, texts, scale, chunk=0)
    with pytest.raises(ValueError, match="negatives are 'some'"):
        softmax(images, texts, scale, negatives="some")
    with pytest.raises(ValueError, match="the batch is empty"):
        softmax(images[:0], texts[:0], scale)
    with pytest.raises(ValueError, match=r"they must be \[M, 4\]"):
        softmax(images[:, :4], texts[:, :4], scale, more_images=more)
    with pytest.raises(ValueError, match="detach it"):
        softmax(images, texts, scale, more_images=MoreImages(images.requires_grad_(), IMAGE_IDS, TEXT_IDS[:, None]))


def test_normalize() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = normalize(z)
    assert torch.allclose(found[0], torch.tensor([0.6, 0.8], dtype=torch.float64), atol=1e-8)
    assert found[1].tolist() == [0.0, 0.0]
    found.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
