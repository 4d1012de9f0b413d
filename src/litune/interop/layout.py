"""The layout of the released LiT checkpoints: their keys, with shapes and litune's parameter for each.

A file's design is read from its shapes alone (`find_design`). `entries` lists every key of such a file once, with the
parameter of litune's model that it holds.

    t                       the temperature's logarithm, (1,)
    img/…                   Vision Transformer; img/head where the images have a head
    txt/BertEncoder_0/…     BERT, or txt/Embed_0, txt/pos_embedding, txt/Encoder_0/… : a ViT-style text transformer
    txt/head                the text tower's linear head

Kernels are (in, out), attention's (width, heads, depth) or (heads, depth, width). The parts of a transformer's block
are numbered in one of two ways, and all keys may have a prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from litune.errors import DataError

PREFIXES = ("opt/target/", "params/", "")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The names of the parts of a transformer's block."""

    attention: str = "MultiHeadDotProductAttention_0"
    norm: str = "LayerNorm_1"
    """The second LayerNorm; the first one is LayerNorm_0 in every file."""
    mlp: str = "MlpBlock_0"


OTHER_NAMES = Block("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
"""The numbering of older files; each part may be named either way."""


@dataclass(frozen=True)
class Transformer:
    """The sizes of a transformer."""

    width: int
    depth: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class Design:
    """The architecture that a file's keys and shapes describe."""

    image: Transformer
    patch: int
    patches: int
    image_head: bool
    text: Transformer
    bert: bool
    vocabulary: int
    positions: int
    segments: int
    """The rows of a BERT's segment table; 0 for a ViT-style transformer."""
    second_positions: bool
    dim: int
    prefix: str = ""
    image_block: Block = Block()
    text_block: Block = Block()

    @property
    def image_size(self) -> int:
        """The height and width of pictures, in pixels."""
        return self.patch * math.isqrt(self.patches)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(entry.shape) for entry in entries(self))


@dataclass(frozen=True)
class Entry:
    """One key of a file, and litune's parameter for it."""

    key: str
    shape: Shape
    name: str
    part: int | None = None
    """The third (0 queries, 1 keys, 2 values) of a parameter that joins all three; None for others."""


def entries(design: Design) -> list[Entry]:
    """Every key of a file of this design, in the file's order: sorted, level by level."""
    unsorted = [Entry("t", (1,), "logit_scale"), *_image_entries(design), *_text_entries(design)]
    return [
        Entry(design.prefix + e.key, e.shape, e.name, e.part) for e in sorted(unsorted, key=lambda e: e.key.split("/"))
    ]


def _image_entries(design: Design) -> Iterator[Entry]:
    width, patch = design.image.width, design.patch
    ours = "image.network.model."
    yield Entry("img/cls", (1, 1, width), ours + "cls_token")
    yield Entry("img/Transformer/posembed_input/pos_embedding", (1, 1 + design.patches, width), ours + "pos_embed")
    yield Entry("img/embedding/kernel", (patch, patch, 3, width), ours + "patch_embed.proj.weight")
    yield Entry("img/embedding/bias", (width,), ours + "patch_embed.proj.bias")
    for i in range(design.image.depth):
        names = {
            "norm1": "norm1", "norm2": "norm2", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2",
            "query": "attn.qkv", "key": "attn.qkv", "value": "attn.qkv",
        }  # fmt: skip
        official = f"img/Transformer/encoderblock_{i}/"
        yield from _block(official, design.image, design.image_block, f"{ours}blocks.{i}.", names, joined=True)
    yield from _norm("img/Transformer/encoder_norm", width, ours + "norm")
    if design.image_head:
        yield from _dense("img/head", width, design.dim, "image_head")


def _text_entries(design: Design) -> Iterator[Entry]:
    yield from _bert(design) if design.bert else _text_transformer(design)
    yield from _dense("txt/head", design.text.width, design.dim, "text_head")


def _text_transformer(design: Design) -> Iterator[Entry]:
    width = design.text.width
    positions = (1, design.positions, width)
    yield Entry("txt/Embed_0/embedding", (design.vocabulary, width), "text.token_embedding.weight")
    yield Entry("txt/pos_embedding", positions, "text.position_embedding")
    if design.second_positions:
        yield Entry("txt/Encoder_0/pos_embedding", positions, "text.second_position_embedding")
    for i in range(design.text.depth):
        names = {name: name for name in ("norm1", "norm2", "out", "up", "down", "query", "key", "value")}
        official = f"txt/Encoder_0/encoderblock_{i}/"
        yield from _block(official, design.text, design.text_block, f"text.blocks.{i}.", names, joined=False)
    yield from _norm("txt/Encoder_0/encoder_norm", width, "text.norm")


def _block(
    official: str, size: Transformer, block: Block, ours: str, names: dict[str, str], *, joined: bool
) -> Iterator[Entry]:
    """A pre-LayerNorm block; `joined` if litune has its queries, keys and values in one matrix."""
    width, heads, depth = size.width, size.heads, size.width // size.heads
    yield from _norm(official + "LayerNorm_0", width, ours + names["norm1"])
    yield from _norm(official + block.norm, width, ours + names["norm2"])
    for i, name in enumerate(("query", "key", "value")):
        part = i if joined else None
        key = f"{official}{block.attention}/{name}/"
        yield Entry(key + "kernel", (width, heads, depth), f"{ours}{names[name]}.weight", part)
        yield Entry(key + "bias", (heads, depth), f"{ours}{names[name]}.bias", part)
    yield Entry(f"{official}{block.attention}/out/kernel", (heads, depth, width), f"{ours}{names['out']}.weight")
    yield Entry(f"{official}{block.attention}/out/bias", (width,), f"{ours}{names['out']}.bias")
    yield from _dense(f"{official}{block.mlp}/Dense_0", width, size.mlp, ours + names["up"])
    yield from _dense(f"{official}{block.mlp}/Dense_1", size.mlp, width, ours + names["down"])


def _bert(design: Design) -> Iterator[Entry]:
    """BERT: post-LayerNorm, with plain (in, out) kernels."""
    width, mlp = design.text.width, design.text.mlp
    official, ours = "txt/BertEncoder_0/", "text.model."
    tables = (
        ("token", design.vocabulary, "word"),
        ("position", design.positions, "position"),
        ("segment", design.segments, "token_type"),
    )
    for name, rows, own in tables:
        key = f"{official}embedder/embedders_{name}_ids/embedding"
        yield Entry(key, (rows, width), f"{ours}embeddings.{own}_embeddings.weight")
    yield from _norm(official + "layer_norm", width, ours + "embeddings.LayerNorm")
    for i in range(design.text.depth):
        layer, own = f"{official}encoder_block/layer_sequence/layers_{i}/", f"{ours}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            key = f"{layer}attention_block/attention_layer/{name}"
            yield from _dense(key, width, width, f"{own}attention.self.{name}")
        yield from _dense(layer + "attention_block/dense_layer", width, width, own + "attention.output.dense")
        yield from _norm(layer + "attention_block/layer_norm", width, own + "attention.output.LayerNorm")
        yield from _dense(layer + "mlp_block/mlp/dense_layer", width, mlp, own + "intermediate.dense")
        yield from _dense(layer + "mlp_block/dense_layer", mlp, width, own + "output.dense")
        yield from _norm(layer + "mlp_block/layer_norm", width, own + "output.LayerNorm")


def _dense(key: str, inputs: int, outputs: int, name: str) -> Iterator[Entry]:
    yield Entry(key + "/kernel", (inputs, outputs), name + ".weight")
    yield Entry(key + "/bias", (outputs,), name + ".bias")


def _norm(key: str, width: int, name: str) -> Iterator[Entry]:
    yield Entry(key + "/scale", (width,), name + ".weight")
    yield Entry(key + "/bias", (width,), name + ".bias")


def find_design(shapes: dict[str, Shape], file: Path) -> Design:
    """The design that a file's shapes describe. Raises `DataError` where it is no LiT checkpoint."""
    prefix = next(p for p in PREFIXES if not p or any(key.startswith(p) for key in shapes))
    keys = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}

    def shape(key: str, form: str) -> Shape:
        """The shape of a required key, which must have as many numbers as `form` names."""
        dims = keys.get(key)
        if dims is None:
            raise DataError(f"{file} is no released LiT checkpoint: it lacks the key {prefix}{key}")
        if len(dims) != len(form.split()) or not all(dims):
            raise DataError(
                f"{file} is no released LiT checkpoint: {prefix}{key} has the shape {dims}, expected ({form})"
            )
        return dims

    def transformer(encoder: str, block: Block) -> Transformer:
        first = f"{encoder}/encoderblock_0/"
        width, heads, _ = shape(f"{first}{block.attention}/query/kernel", "width heads depth")
        if width % heads:
            raise DataError(f"{file} is no released LiT checkpoint: {width} numbers can't be shared by {heads} heads")
        mlp = shape(f"{first}{block.mlp}/Dense_0/kernel", "width mlp")[1]
        return Transformer(width, _depth(keys, f"{encoder}/encoderblock_"), mlp, heads)

    def block(encoder: str) -> Block:
        def has(name: str) -> bool:
            return any(key.startswith(f"{encoder}/encoderblock_0/{name}/") for key in keys)

        names = zip(asdict(Block()).items(), asdict(OTHER_NAMES).values(), strict=True)
        return Block(**{part: other if has(other) else name for (part, name), other in names})

    image_block, text_block = block("img/Transformer"), block("txt/Encoder_0")
    image = transformer("img/Transformer", image_block)
    patch = shape("img/embedding/kernel", "patch patch 3 width")[0]
    patches = shape("img/Transformer/posembed_input/pos_embedding", "1 1+patches width")[1] - 1
    if math.isqrt(patches) ** 2 != patches:
        raise DataError(f"{file} is no released LiT checkpoint: {patches} patches are no square")
    bert = any(key.startswith("txt/BertEncoder_0/") for key in keys)
    embedder = "txt/BertEncoder_0/embedder/embedders_{}_ids/embedding"
    if bert:
        layers = "txt/BertEncoder_0/encoder_block/layer_sequence/layers_"
        vocabulary, width = shape(embedder.format("token"), "vocabulary width")
        mlp = shape(f"{layers}0/mlp_block/mlp/dense_layer/kernel", "width mlp")[1]
        # BERT's heads are 64 wide in every size; its flat kernels don't show their number.
        if width % 64:
            raise DataError(f"{file} is no released LiT checkpoint: a BERT's width is a multiple of 64, not {width}")
        text = Transformer(width, _depth(keys, layers), mlp, width // 64)
        positions = shape(embedder.format("position"), "positions width")[0]
        segments = shape(embedder.format("segment"), "segments width")[0]
    else:
        text = transformer("txt/Encoder_0", text_block)
        vocabulary = shape("txt/Embed_0/embedding", "vocabulary width")[0]
        positions, segments = shape("txt/pos_embedding", "1 positions width")[1], 0
    dim = shape("txt/head/kernel", "width dim")[1]
    image_head = any(key.startswith("img/head/") for key in keys)
    if not image_head and dim != image.width:
        raise DataError(
            f"{file} is no released LiT checkpoint: texts have {dim} numbers, images {image.width} and no img/head"
        )
    return Design(
        image, patch, patches, image_head, text, bert, vocabulary, positions, segments,
        "txt/Encoder_0/pos_embedding" in keys, dim, prefix, image_block, text_block,
    )  # fmt: skip


def _depth(keys: dict[str, Shape], blocks: str) -> int:
    """The number of blocks, whose keys begin with `blocks` and a number."""
    numbers = {match[1] for key in keys if (match := re.match(re.escape(blocks) + r"(\d+)/", key))}
    return len(numbers)
