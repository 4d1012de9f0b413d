"""The released LiT checkpoints as they are described, and what they compute, in NumPy float64: nothing of litune.

`layout` is an independent description of the keys and shapes; `Reference` computes features from a file's own keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VIT = {"Ti": (192, 12, 768, 3), "S": (384, 12, 1536, 6), "B": (768, 12, 3072, 12), "L": (1024, 24, 4096, 16)}
BERT = {"base": (768, 12, 3072, 12), "large": (1024, 24, 4096, 16)}


@dataclass(frozen=True)
class Names:
    """A prefix of all keys, and how a block's parts are called."""

    prefix: str = ""
    attention: str = "MultiHeadDotProductAttention_0"
    norm: str = "LayerNorm_1"
    mlp: str = "MlpBlock_0"


OLD = Names("", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")


def layout(
    image: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    *,
    bert: bool,
    patch: int = 16,
    size: int = 224,
    vocabulary: int,
    positions: int,
    dim: int,
    image_head: bool = False,
    second_positions: bool = False,
    names: Names | None = None,
) -> dict[str, tuple[int, ...]]:
    """Every key of a file with its shape."""
    names = names or Names()
    width, depth, mlp, heads = image
    shapes: dict[str, tuple[int, ...]] = {
        "t": (1,),
        "img/cls": (1, 1, width),
        "img/embedding/kernel": (patch, patch, 3, width),
        "img/embedding/bias": (width,),
        "img/Transformer/posembed_input/pos_embedding": (1, 1 + (size // patch) ** 2, width),
        "img/Transformer/encoder_norm/scale": (width,),
        "img/Transformer/encoder_norm/bias": (width,),
    }
    for i in range(depth):
        shapes |= block(f"img/Transformer/encoderblock_{i}", width, mlp, heads, names)
    if image_head:
        shapes |= {"img/head/kernel": (width, dim), "img/head/bias": (dim,)}
    width, depth, mlp, heads = text
    if bert:
        embedder = "txt/BertEncoder_0/embedder/embedders_%s_ids/embedding"
        shapes |= {
            embedder % "token": (vocabulary, width),
            embedder % "position": (positions, width),
            embedder % "segment": (2, width),
            "txt/BertEncoder_0/layer_norm/scale": (width,),
            "txt/BertEncoder_0/layer_norm/bias": (width,),
        }
        for i in range(depth):
            layer = f"txt/BertEncoder_0/encoder_block/layer_sequence/layers_{i}"
            kernels = {
                "attention_block/attention_layer/query": (width, width),
                "attention_block/attention_layer/key": (width, width),
                "attention_block/attention_layer/value": (width, width),
                "attention_block/dense_layer": (width, width),
                "mlp_block/mlp/dense_layer": (width, mlp),
                "mlp_block/dense_layer": (mlp, width),
            }
            for name, shape in kernels.items():
                shapes |= {f"{layer}/{name}/kernel": shape, f"{layer}/{name}/bias": shape[1:]}
            for name in ("attention_block/layer_norm", "mlp_block/layer_norm"):
                shapes |= {f"{layer}/{name}/scale": (width,), f"{layer}/{name}/bias": (width,)}
    else:
        shapes |= {"txt/Embed_0/embedding": (vocabulary, width), "txt/pos_embedding": (1, positions, width)}
        if second_positions:
            shapes["txt/Encoder_0/pos_embedding"] = (1, positions, width)
        for i in range(depth):
            shapes |= block(f"txt/Encoder_0/encoderblock_{i}", width, mlp, heads, names)
        shapes |= {"txt/Encoder_0/encoder_norm/scale": (width,), "txt/Encoder_0/encoder_norm/bias": (width,)}
    shapes |= {"txt/head/kernel": (width, dim), "txt/head/bias": (dim,)}
    return {names.prefix + key: shape for key, shape in shapes.items()}


def block(at: str, width: int, mlp: int, heads: int, names: Names) -> dict[str, tuple[int, ...]]:
    """The keys of one block of a Vision Transformer."""
    each = width // heads
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("LayerNorm_0", names.norm):
        shapes |= {f"{at}/{norm}/scale": (width,), f"{at}/{norm}/bias": (width,)}
    for name in ("query", "key", "value"):
        one = f"{at}/{names.attention}/{name}"
        shapes |= {f"{one}/kernel": (width, heads, each), f"{one}/bias": (heads, each)}
    shapes |= {f"{at}/{names.attention}/out/kernel": (heads, each, width), f"{at}/{names.attention}/out/bias": (width,)}
    shapes |= {f"{at}/{names.mlp}/Dense_0/kernel": (width, mlp), f"{at}/{names.mlp}/Dense_0/bias": (mlp,)}
    shapes |= {f"{at}/{names.mlp}/Dense_1/kernel": (mlp, width), f"{at}/{names.mlp}/Dense_1/bias": (width,)}
    return shapes


def released(name: str) -> dict[str, tuple[int, ...]]:
    """The layout of one of the five released files."""
    bert = {"vocabulary": 30522, "positions": 512, "bert": True}
    own = {"vocabulary": 16000, "positions": 16, "bert": False}
    return {
        "LiT-B16B": lambda: layout(VIT["B"], BERT["base"], dim=768, image_head=True, **bert),
        "LiT-B16B_2": lambda: layout(VIT["B"], BERT["base"], dim=768, **bert),
        "LiT-L16L": lambda: layout(VIT["L"], BERT["large"], dim=1024, **bert),
        "LiT-L16S": lambda: layout(VIT["L"], VIT["S"], dim=1024, **own),
        "LiT-L16Ti": lambda: layout(VIT["L"], VIT["Ti"], dim=1024, **own),
    }[name]()


def random_values(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Values of trained networks' size: every kernel keeps the variance of what goes through it."""
    random = np.random.default_rng(seed)
    values = {}
    for key, shape in shapes.items():
        value = random.standard_normal(shape, dtype=np.float32)
        if key.endswith("t") and shape == (1,):
            value = np.full(1, math.log(12.5), np.float32)
        elif key.endswith("kernel"):
            inputs = math.prod(shape[:-1]) if "out/kernel" in key or "img/embedding" in key else shape[0]
            value *= np.float32(1.2 / math.sqrt(inputs))
        elif key.endswith("scale"):
            value = 1 + np.float32(0.2) * value
        elif key.endswith("bias"):
            value *= np.float32(0.2)
        values[key] = value
    return values


def write(file: Path, values: dict[str, np.ndarray]) -> Path:
    """A .npz file with the keys sorted level by level."""
    np.savez(file, **{key: values[key] for key in sorted(values, key=lambda key: key.split("/"))})
    return file


class Reference:
    """What a file's model computes, from its own keys, in float64."""

    def __init__(self, values: dict[str, np.ndarray], names: Names | None = None, size: int = 224) -> None:
        self.names = names or Names()
        self.values = {k.removeprefix(self.names.prefix): v.astype(np.float64) for k, v in values.items()}
        self.size = size

    def image(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Features of uint8 pictures [H, W, 3] of any size."""
        x = np.stack([resize(p, self.size) for p in pictures]).astype(np.float64) / 127.5 - 1
        kernel = self["img/embedding/kernel"]
        n, p = len(x), len(kernel)
        grid = self.size // p
        x = x.reshape(n, grid, p, grid, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, grid * grid, p * p * 3)
        x = x @ kernel.reshape(p * p * 3, -1) + self["img/embedding/bias"]
        x = np.concatenate([np.repeat(self["img/cls"], n, 0), x], 1)
        x = x + self["img/Transformer/posembed_input/pos_embedding"]
        x = self.encoder(x, "img/Transformer")[:, 0]
        return normalized(self.dense(x, "img/head") if "img/head/kernel" in self.values else x)

    def text(self, ids: np.ndarray) -> np.ndarray:
        """Features of token ids [N, T]: padded with 0 for BERT, with the end token for the others."""
        if "txt/Embed_0/embedding" in self.values:
            x = self["txt/Embed_0/embedding"][ids] + self["txt/pos_embedding"]
            if "txt/Encoder_0/pos_embedding" in self.values:
                x = x + self["txt/Encoder_0/pos_embedding"]
            x = self.encoder(x, "txt/Encoder_0")[:, -1]
        else:
            x = self.bert(ids)[:, 0]
        return normalized(self.dense(x, "txt/head"))

    def scores(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return images @ texts.T * np.exp(self["t"][0])

    def encoder(self, x: np.ndarray, at: str) -> np.ndarray:
        """Pre-LayerNorm blocks and the last LayerNorm, epsilon 1e-6."""
        i = 0
        while f"{at}/encoderblock_{i}/LayerNorm_0/scale" in self.values:
            here = f"{at}/encoderblock_{i}"
            y = self.norm(x, f"{here}/LayerNorm_0", 1e-6)
            attention = f"{here}/{self.names.attention}"
            q, k, v = (
                np.einsum("ntd,dhk->nhtk", y, self[f"{attention}/{name}/kernel"])
                + self[f"{attention}/{name}/bias"][None, :, None]
                for name in ("query", "key", "value")
            )
            weights = softmax(np.einsum("nhtk,nhsk->nhts", q, k) / math.sqrt(q.shape[-1]))
            mixed = np.einsum("nhts,nhsk->nhtk", weights, v)
            x = x + np.einsum("nhtk,hkd->ntd", mixed, self[f"{attention}/out/kernel"]) + self[f"{attention}/out/bias"]
            y = self.norm(x, f"{here}/{self.names.norm}", 1e-6)
            y = gelu(self.dense(y, f"{here}/{self.names.mlp}/Dense_0"))
            x = x + self.dense(y, f"{here}/{self.names.mlp}/Dense_1")
            i += 1
        assert i > 0
        return self.norm(x, f"{at}/encoder_norm", 1e-6)

    def bert(self, ids: np.ndarray) -> np.ndarray:
        """Post-LayerNorm, epsilon 1e-12; tokens that are 0 are masked."""
        at = "txt/BertEncoder_0"
        tables = [self[f"{at}/embedder/embedders_{name}_ids/embedding"] for name in ("token", "position", "segment")]
        x = self.norm(tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][0], f"{at}/layer_norm", 1e-12)
        mask = np.where(ids == 0, -np.inf, 0.0)[:, None, None]
        n, t, width = x.shape
        i = 0
        while f"{at}/encoder_block/layer_sequence/layers_{i}/mlp_block/dense_layer/kernel" in self.values:
            here = f"{at}/encoder_block/layer_sequence/layers_{i}"
            q, k, v = (
                self.dense(x, f"{here}/attention_block/attention_layer/{name}")
                .reshape(n, t, width // 64, 64)
                .transpose(0, 2, 1, 3)
                for name in ("query", "key", "value")
            )
            mixed = softmax(q @ k.transpose(0, 1, 3, 2) / 8 + mask) @ v
            mixed = self.dense(mixed.transpose(0, 2, 1, 3).reshape(n, t, width), f"{here}/attention_block/dense_layer")
            x = self.norm(x + mixed, f"{here}/attention_block/layer_norm", 1e-12)
            y = self.dense(gelu(self.dense(x, f"{here}/mlp_block/mlp/dense_layer")), f"{here}/mlp_block/dense_layer")
            x = self.norm(x + y, f"{here}/mlp_block/layer_norm", 1e-12)
            i += 1
        assert i > 0
        return x

    def __getitem__(self, key: str) -> np.ndarray:
        return self.values[key]

    def dense(self, x: np.ndarray, key: str) -> np.ndarray:
        return x @ self[f"{key}/kernel"] + self[f"{key}/bias"]

    def norm(self, x: np.ndarray, key: str, epsilon: float) -> np.ndarray:
        centered = x - x.mean(-1, keepdims=True)
        variance = (centered**2).mean(-1, keepdims=True)
        return centered / np.sqrt(variance + epsilon) * self[f"{key}/scale"] + self[f"{key}/bias"]


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """A uint8 picture [H, W, 3] as uint8 [size, size, 3]: bilinear, half-pixel centres, not antialiased, cut off."""
    for axis in (0, 1):
        matrix = bilinear(picture.shape[axis], size)
        picture = np.moveaxis(np.tensordot(matrix, picture.astype(np.float64), (1, axis)), 0, axis)
    return np.floor(picture + 1e-9).astype(np.uint8)


def bilinear(before: int, after: int) -> np.ndarray:
    """The weights [after, before] of a triangle filter, one source pixel wide, around each point."""
    points = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(before)))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalized(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
