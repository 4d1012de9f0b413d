"""The released LiT checkpoints (LiT-B16B, B16B_2, L16L, L16S, L16Ti): flat `.npz` files, in and out.

Reading and writing share the list of keys in `litune.interop.layout`, so that a file is written back bit for bit.
Kernels are (in, out) there and (out, in) in litune.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from litune.errors import DataError, RunError
from litune.files import atomic
from litune.image.features import has_own_features
from litune.image.pictures import ImageTransform
from litune.image.registry import load_image_tower, weights_hash
from litune.interop.layout import Block, Design, Entry, Shape, Transformer, entries, find_design
from litune.model.heads import make_head
from litune.model.lit import LiT
from litune.text.registry import HfTextTower, TextTower, VitTextTower, build_text_tower
from litune.text.tokenizers import Tokenizer
from litune.towers.vit import vit_name, vit_size

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("V2")}
"""The dtypes of a file; NumPy has no bfloat16 and stores it as two bytes."""
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, TypeError, SyntaxError,
    tokenize.TokenError, MemoryError,
)  # fmt: skip
"""Exceptions raised when reading a damaged, truncated or locked zip file, or a damaged NumPy header."""


class Checkpoint:
    """A `.npz` file of the released layout, opened without pickle; its numbers are read one key at a time."""

    def __init__(self, file: Path) -> None:
        """Read the headers of `file`.

        Raises `DataError` where it is no such file, with the keys that are missing, left over or misshapen.
        """
        self.file = file
        try:
            self.zip = zipfile.ZipFile(file)
            self.headers = self._read_headers()
        except FileNotFoundError:
            raise DataError(f"{file} does not exist: give the path of a released checkpoint, as LiT-B16B.npz") from None
        except UNREADABLE as why:
            raise DataError(f"{file} is no whole .npz file ({_first_line(why)}): fetch it again") from None
        self.shapes = {key: shape for key, (shape, _) in self.headers.items()}
        self.design = find_design(self.shapes, file)
        self.entries = entries(self.design)
        self._check()

    def _read_headers(self) -> dict[str, tuple[Shape, np.dtype[Any]]]:
        """Shape and type of every key; raises one of `UNREADABLE`."""
        headers = {}
        for info in self.zip.infolist():
            with self.zip.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                readers = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                if version not in readers or not info.filename.endswith(".npy"):
                    raise ValueError(f"{info.filename} is no plain array")
                shape, _, dtype = readers[version](stream)
            if info.file_size < math.prod(shape) * dtype.itemsize and not dtype.hasobject:
                raise ValueError(f"{info.filename} is cut short")
            key = info.filename.removesuffix(".npy")
            if key in headers:
                raise ValueError(f"it has the key {key} twice")
            headers[key] = (shape, dtype)
        return headers

    def _check(self) -> None:
        """Raise `DataError` unless the file has exactly the keys of its design, each with its shape and type."""
        expected = {entry.key: entry.shape for entry in self.entries}
        missing = [key for key in expected if key not in self.shapes]
        left_over = [key for key in self.shapes if key not in expected]
        misshapen = [
            f"{key} has the shape {self.shapes[key]}, expected {shape}"
            for key, shape in expected.items()
            if key in self.shapes and self.shapes[key] != shape
        ]
        mistyped = [
            f"{key} holds {dtype if not dtype.hasobject else 'pickled objects'}, expected float32"
            for key, (_, dtype) in self.headers.items()
            if dtype not in DTYPES.values()
        ]
        wrong = [
            *([f"lacks {_some(missing)}"] if missing else []),
            *([f"has {_some(left_over)} too many"] if left_over else []),
            *([f"has {len(misshapen)} of another shape ({misshapen[0]})"] if misshapen else []),
            *([f"has {len(mistyped)} of another type ({mistyped[0]})"] if mistyped else []),
        ]
        if wrong:
            raise DataError(f"{self.file} is no released LiT checkpoint: it {'; it '.join(wrong)}")

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of the keys that are not float32."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {key: names[dtype] for key, (_, dtype) in self.headers.items() if dtype != DTYPES["float32"]}

    def read(self, key: str) -> np.ndarray:
        """The numbers of one key, as float32."""
        try:
            with self.zip.open(key + ".npy") as stream:
                value: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        except UNREADABLE as why:
            raise DataError(f"{self.file} is damaged at {key} ({_first_line(why)}): fetch it again") from None
        if value.dtype == DTYPES["bfloat16"]:
            return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return value.astype(np.float32)


def _first_line(why: Exception) -> str:
    return (str(why).splitlines() or [type(why).__name__])[0]


def _some(keys: list[str]) -> str:
    return f"the key {keys[0]}" if len(keys) == 1 else f"{len(keys)} keys, {keys[0]} first"


def build(design: Design, tokenizer: Tokenizer) -> LiT:
    """A model of this design, with weights yet to be loaded."""
    size = vit_name(*asdict(design.image).values())
    image = load_image_tower(f"vit:{size}/{design.patch}?size={design.image_size}&init=random")
    return LiT(
        build_text_tower(text_architecture(design)),
        make_head("linear", design.text.width, design.dim),
        make_head("linear" if design.image_head else "none", design.image.width, design.dim),
        tokenizer,
        image_width=design.image.width,
        dim=design.dim,
        logit_scale=0.0,
        image=image,
        image_provenance=image.provenance,
    )


def text_architecture(design: Design) -> dict[str, Any]:
    """The text tower of a design, in the form that `litune.text.registry.build_text_tower` takes."""
    if not design.bert:
        return {
            "kind": "vit",
            "size": vit_name(*asdict(design.text).values()),
            "vocab_size": design.vocabulary,
            "max_tokens": design.positions,
            "pooling": "last",
            "second_positions": design.second_positions,
        }
    config = {
        "model_type": "bert",
        "vocab_size": design.vocabulary,
        "hidden_size": design.text.width,
        "num_hidden_layers": design.text.depth,
        "num_attention_heads": design.text.heads,
        "intermediate_size": design.text.mlp,
        "max_position_embeddings": design.positions,
        "type_vocab_size": design.segments,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-12,
    }
    return {"kind": "hf", "config": config, "pooling": "first"}


@torch.no_grad()
def read_model(checkpoint: Checkpoint, tokenizer: Tokenizer) -> LiT:
    """The model in a file: every key used once, every parameter filled.

    Raises `DataError` where the file is damaged, or its vocabulary smaller than the tokenizer's.
    """
    design = checkpoint.design
    if tokenizer.vocab_size > design.vocabulary:
        raise DataError(
            f"the vocabulary has {tokenizer.vocab_size:,} tokens, {checkpoint.file} embeds {design.vocabulary:,}: "
            "give the vocabulary that belongs to the checkpoint"
        )
    model = build(design, tokenizer)
    state = model.state_dict()
    to_fill = {name: value.numel() for name, value in model.named_parameters()}
    for entry in checkpoint.entries:
        value = torch.from_numpy(checkpoint.read(entry.key))
        _ours(entry, state).copy_(_from_official(entry.key, value, _ours(entry, state).shape))
        to_fill[entry.name] -= value.numel()
    assert not any(to_fill.values()), to_fill
    assert model.image is not None
    model.image_provenance = model.image.provenance | {"weights": weights_hash(model.image)}
    model.origin = {
        "prefix": design.prefix,
        "image_block": asdict(design.image_block),
        "text_block": asdict(design.text_block),
        "dtypes": checkpoint.dtypes,
    }
    return model.eval()


def _ours(entry: Entry, state: dict[str, Tensor]) -> Tensor:
    """An entry's parameter, or its third of a joined one."""
    value = state[entry.name]
    return value if entry.part is None else value.chunk(3)[entry.part]


def _from_official(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    if key.endswith("img/embedding/kernel"):
        return value.permute(3, 2, 0, 1)
    return value.reshape(shape[::-1]).T if key.endswith("/kernel") else value.reshape(shape)


def _to_official(key: str, value: Tensor, shape: Shape) -> Tensor:
    if key.endswith("img/embedding/kernel"):
        return value.permute(2, 3, 1, 0)
    return (value.T if key.endswith("/kernel") else value).reshape(shape)


@torch.no_grad()
def export_npz(model: LiT, out: Path) -> None:
    """Write a model as a `.npz` file of the released layout.

    An imported model is written with the keys, types and bytes of its file. Raises `RunError` for what the layout
    can't hold: other towers or heads, a map of the image features, a bias of the loss.
    """
    design = model_design(model)
    tower = model.load_image_tower()
    state = {f"image.{name}": value for name, value in tower.state_dict().items()}
    state |= {name: value for name, value in model.state_dict().items() if not name.startswith("image.")}
    dtypes = (model.origin or {}).get("dtypes", {})
    with atomic(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        for entry in entries(design):
            ours = _ours(entry, state).detach().cpu()
            value = _to_official(entry.key, ours, entry.shape).contiguous().numpy()
            with file.open(entry.key + ".npy", "w", force_zip64=True) as stream:
                _write_array(stream, _as_type(value, dtypes.get(entry.key, "float32")))


def _as_type(value: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array as another dtype, rounded if need be."""
    if dtype == "bfloat16":
        return np.asarray(torch.from_numpy(value).bfloat16().view(torch.int16).numpy()).view(DTYPES[dtype])
    return np.asarray(value.astype(DTYPES[dtype]))


def _write_array(stream: IO[bytes], value: np.ndarray) -> None:
    np.lib.format.write_array(stream, value, allow_pickle=False)


def model_design(model: LiT) -> Design:
    """A model's design as a file, with the key names of the file that it was imported from, if any.

    Raises `RunError` where the layout can't hold the model.
    """

    def refuse(what: str) -> RunError:
        return RunError(f"a released LiT checkpoint can't hold this run: {what}; export it --to another format")

    spec = (model.image_provenance or {}).get("spec", "")
    vit = _official_vit(model) if spec.startswith(("vit:", "run:")) else None
    if vit is None:
        raise refuse(f"its image tower is {spec or 'unknown'}, not a vit: one")
    patch, (height, width) = vit.patch_embed.patch_size[0], vit.patch_embed.img_size
    if height != width:
        raise refuse(f"its pictures are {height}×{width} pixels, no square")
    if model.image_map != "none" or bool(model.center.any()):
        raise refuse("its image features are mapped (tune with --image-map none)")
    if model.logit_bias is not None:
        raise refuse("its loss has a bias (--loss sigmoid)")
    image_head, text_head = (type(head).__name__ for head in (model.image_head, model.text_head))
    if text_head != "Linear" or image_head not in ("Linear", "Identity"):
        raise refuse("its heads are not linear")
    block = vit.blocks[0]
    image = Transformer(vit.embed_dim, len(vit.blocks), block.mlp.fc1.out_features, block.attn.num_heads)
    text = _text_fields(model.text)
    if isinstance(text, str):
        raise refuse(text)
    origin = model.origin or {}
    return Design(
        image=image,
        patch=patch,
        patches=(height // patch) ** 2,
        image_head=image_head == "Linear",
        **text,
        dim=model.dim,
        prefix=origin.get("prefix", ""),
        image_block=Block(**origin.get("image_block", {})),
        text_block=Block(**origin.get("text_block", {})),
    )


def _official_vit(model: LiT) -> Any:
    """The timm module of a `vit:` tower; None of any other."""
    tower = model.load_image_tower()
    preprocess = tower.preprocess
    if isinstance(preprocess, ImageTransform) and preprocess.interpolation == "tensorflow" and has_own_features(tower):
        return getattr(tower.network, "model", None)
    return None


def _text_fields(text: TextTower) -> dict[str, Any] | str:
    """The fields of a design that describe a text tower; or the reason why the layout can't hold it."""
    if isinstance(text, VitTextTower):
        if text.pooling != "last":
            return f"its text tower pools the {text.pooling} token (--pooling last)"
        architecture = text.architecture
        return {
            "text": Transformer(*vit_size(architecture["size"])),
            "bert": False,
            "vocabulary": architecture["vocab_size"],
            "positions": architecture["max_tokens"],
            "segments": 0,
            "second_positions": bool(architecture.get("second_positions")),
        }
    config = text.model.config if isinstance(text, HfTextTower) else None
    if config is None or config.model_type != "bert":
        return "its text tower is neither BERT nor vit:"
    if config.hidden_act not in ("gelu_pytorch_tanh", "gelu_new") or config.layer_norm_eps != 1e-12:
        return f"its BERT has {config.hidden_act} and epsilon {config.layer_norm_eps}, not tanh GELU and 1e-12"
    if text.pooling != "first" or config.hidden_size != 64 * config.num_attention_heads:
        return "its BERT pools or attends otherwise than the released"
    size = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads)
    return {
        "text": Transformer(*size),
        "bert": True,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "segments": config.type_vocab_size,
        "second_positions": False,
    }
