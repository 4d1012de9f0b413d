"""Writes the golden files in tests/golden, each computed by the original implementation; nothing of litune is used.

The tests only read the files. To write them anew, from the repository's root:

    python3 -m venv /tmp/golden
    /tmp/golden/bin/pip install tensorflow-cpu==2.21.0 tensorflow-text==2.21.1 sentencepiece==0.2.1 \
        jax==0.10.2 flax==0.12.8 optax==0.2.8
    PYTHONPATH=. /tmp/golden/bin/python scripts/make_golden.py
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import re
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
import tensorflow as tf
import tensorflow_text
from tests.golden.cases import (
    CASES,
    NAMES,
    SHAPES,
    STEPS,
    TEMPLATES,
    TEXTS,
    WARMUP,
    WIDTHS,
    gradient,
    picture,
    shots_data,
    small_release,
    start,
    sums,
    token_ids,
)

BIG_VISION = "0127fb6b337ee2a27bf4e54dea79cff176527356"
PROMPTS = "big_vision/evaluators/proj/image_text/prompt_engineering.py"
HERE = Path(__file__).parents[1] / "tests" / "golden"


def write(name: str, made_by: str, **values: Any) -> None:
    """One golden file, with what it was made by."""
    text = json.dumps({"made_by": made_by, **values}, ensure_ascii=True, indent=None)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def wordpiece() -> None:
    """Ids of tensorflow_text's BertTokenizer, with letters and a few words as its vocabulary."""
    basic = tensorflow_text.BertTokenizer(
        tf.lookup.StaticVocabularyTable(tf.lookup.KeyValueTensorInitializer(["a"], np.array([0], np.int64)), 1)
    )._basic_tokenizer.lower_case
    letters = sorted({c for text in basic(tf.constant(TEXTS)).numpy() for c in text.decode() if c.isprintable()})
    letters = [c for c in letters if not c.isspace() and c not in "☃字"]  # these stay unknown
    words = ["the", "cafe", "strasse", "fi", "##sh", "##ing", "don", "中"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    vocabulary += [piece for c in letters for piece in (c, f"##{c}") if piece not in words]
    (HERE / "vocab.tmp").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = tensorflow_text.BertTokenizer(str(HERE / "vocab.tmp"), token_out_type=tf.int32, lower_case=True)
    ids = tokenizer.tokenize(tf.constant(TEXTS)).merge_dims(1, 2).to_list()
    (HERE / "vocab.tmp").unlink()
    write("wordpiece.json", f"tensorflow_text {tensorflow_text.__version__}", vocabulary=vocabulary, ids=ids)


def pieces() -> None:
    """Ids of tensorflow_text's SentencepieceTokenizer, cut and padded with the end token as LiT does it."""
    out = io.BytesIO()
    sentences = [f"a red box {i} and the blue ring ... or two?? {'.' * (i % 4)}" for i in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=out, vocab_size=60, normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    tokenizer = tensorflow_text.SentencepieceTokenizer(model=out.getvalue(), add_eos=True)
    texts = ["a red box", "the ring.....", "is it??? or.......", "", " two  spaces ", "one </s> more", *sentences[:3]]
    rows = [row[:11] + [1] * (12 - len(row[:11])) for row in tokenizer.tokenize(tf.constant(texts)).to_list()]
    model = base64.b64encode(out.getvalue()).decode()
    made_by = f"tensorflow_text {tensorflow_text.__version__}"
    write("pieces.json", made_by, model=model, texts=texts, max_tokens=12, ids=rows)


def resize() -> None:
    """Digests of pictures scaled by tf.image.resize and cast to uint8."""
    found = {}
    for height, width, size in CASES:
        scaled = tf.image.resize(tf.constant(picture(height, width)), [size, size], method="bilinear", antialias=False)
        found[f"{height}x{width}to{size}"] = hashlib.sha256(tf.cast(scaled, tf.uint8).numpy().tobytes()).hexdigest()
    write("resize.json", f"tensorflow {tf.__version__}", sha256=found)


def prompts() -> None:
    """Class names and templates by big_vision's canonicalize_text, kept as its zero-shot evaluator calls it."""
    with urlopen(f"https://raw.githubusercontent.com/google-research/big_vision/{BIG_VISION}/{PROMPTS}") as answer:
        module = ast.parse(answer.read())
    # The function alone: the module imports tensorflow_datasets and more.
    module.body = [one for one in module.body if isinstance(one, ast.FunctionDef) and one.name == "canonicalize_text"]
    space: dict[str, Any] = {"re": re, "string": string}
    exec(compile(module, PROMPTS, "exec"), space)
    written = {
        "names": [space["canonicalize_text"](one, keep_punctuation_exact_string=",") for one in NAMES],
        "templates": [space["canonicalize_text"](one, keep_punctuation_exact_string="{}") for one in TEMPLATES],
    }
    write("prompts.json", f"big_vision {BIG_VISION[:12]}, {PROMPTS}", **written)


def adafactor() -> Any:
    """The Adafactor of "Scaling Vision Transformers" as a composition of optax's parts."""

    def beta2(step: Any, exponent: float) -> Any:
        return jnp.minimum(0.999, 1.0 - (jnp.array(step, jnp.float32) + 1.0) ** -exponent)

    return optax.chain(
        optax.scale_by_factored_rms(
            factored=True, decay_rate=0.8, min_dim_size_to_factor=32, epsilon=1e-30, decay_rate_fn=beta2
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def optimizers() -> None:
    """Where each optimizer leads in STEPS steps: clipping, the optimizer, rate, decay, schedule, in this order."""
    warm = optax.linear_schedule(1 / WARMUP, 1.0, WARMUP - 1)
    schedule = optax.join_schedules([warm, optax.cosine_decay_schedule(1.0, STEPS - WARMUP)], [WARMUP])
    decayed = {name: name.startswith("kernel") for name in SHAPES}
    found = {}
    for kind, core in {
        "adamw": optax.scale_by_adam(),
        "lion": optax.scale_by_lion(b1=0.9, b2=0.99),
        "adafactor": adafactor(),
    }.items():
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            core,
            optax.scale(0.01),
            optax.add_decayed_weights(0.02, decayed),
            optax.scale_by_schedule(schedule),
            optax.scale(-1.0),
        )
        parameters = {name: jnp.asarray(start(name)) for name in SHAPES}
        state = optimizer.init(parameters)
        update = jax.jit(optimizer.update)
        for step in range(STEPS):
            updates, state = update({name: jnp.asarray(gradient(name, step)) for name in SHAPES}, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
        found[kind] = {name: sums(np.asarray(value) - start(name)) for name, value in parameters.items()}
    write("optimizers.json", f"optax {optax.__version__}, jax {jax.__version__}", moved=found)


def few_shots() -> None:
    """Accuracy of the few-shot regression of big_vision's fewshot_lsr, written out in jax, float32 as there."""

    @partial(jax.jit, static_argnums=2)
    def accuracy(train: tuple[Any, Any], test: tuple[Any, Any], classes: int) -> Any:
        mean, deviation = train[0].mean(0), train[0].std(0) + 1e-5
        x, z = (
            jnp.pad((one - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0) for one in (train[0], test[0])
        )
        matrix = x.T @ x + 2.0**10 * jnp.eye(x.shape[1])
        weights = jnp.linalg.solve(matrix, x.T @ (2.0 * jax.nn.one_hot(train[1], classes) - 1.0))
        return ((z @ weights).argmax(1) == test[1]).mean()

    found = {}
    for width in WIDTHS:
        x, y, test, own = shots_data(width)
        found[str(width)] = []
        for seed in range(3):
            random = np.random.default_rng(seed)
            rows = np.concatenate([random.permutation(np.where(y == c)[0])[:10] for c in range(int(y.max()) + 1)])
            found[str(width)].append(float(accuracy((x[rows], y[rows]), (test, own), int(y.max()) + 1)))
    write("few_shots.json", f"jax {jax.__version__}", accuracy=found)


class MlpBlock(nn.Module):
    """Two dense layers with the tanh GELU between."""

    mlp: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Of tokens [B, T, W], as many."""
        y = nn.gelu(nn.Dense(self.mlp)(x))
        return nn.Dense(x.shape[-1])(y)


class Block(nn.Module):
    """A block with the norms first."""

    mlp: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Of tokens [B, T, W], as many."""
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
        return x + MlpBlock(self.mlp)(nn.LayerNorm()(x))


class Encoder(nn.Module):
    """Blocks and the last norm."""

    depth: int
    mlp: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Of tokens [B, T, W], as many."""
        for i in range(self.depth):
            x = Block(self.mlp, self.heads, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Bert(nn.Module):
    """BERT of the released files: dense projections of (width, width), heads 64 wide, the norms last."""

    depth: int
    mlp: int

    @nn.compact
    def __call__(self, values: dict[str, Any], ids: Any) -> Any:
        """The first token's state [B, W], by the layers of flax.linen applied with `values` under their keys."""

        def at(key: str) -> dict[str, Any]:
            short = {"scale", "bias", "kernel", "embedding"}
            here = {k: v for k, v in ((k, values.get(f"txt/BertEncoder_0/{key}/{k}")) for k in short) if v is not None}
            assert here, key
            return {"params": here}

        def dense(x: Any, key: str) -> Any:
            return nn.Dense(at(key)["params"]["bias"].shape[0]).apply(at(key), x)

        def norm(x: Any, key: str) -> Any:
            return nn.LayerNorm(epsilon=1e-12).apply(at(key), x)

        def embed(x: Any, name: str) -> Any:
            table = at(f"embedder/embedders_{name}_ids")
            return nn.Embed(*table["params"]["embedding"].shape).apply(table, x)

        positions = jnp.arange(ids.shape[1])[None]
        x = embed(ids, "token") + embed(positions, "position") + embed(jnp.zeros_like(ids), "segment")
        x = norm(x, "layer_norm")
        mask = nn.make_attention_mask(jnp.ones_like(ids), ids != 0)
        for i in range(self.depth):
            layer = f"encoder_block/layer_sequence/layers_{i}"
            q, k, v = (
                dense(x, f"{layer}/attention_block/attention_layer/{name}").reshape(*x.shape[:2], -1, 64)
                for name in ("query", "key", "value")
            )
            mixed = nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
            x = norm(x + dense(mixed, f"{layer}/attention_block/dense_layer"), f"{layer}/attention_block/layer_norm")
            y = dense(nn.gelu(dense(x, f"{layer}/mlp_block/mlp/dense_layer")), f"{layer}/mlp_block/dense_layer")
            x = norm(x + y, f"{layer}/mlp_block/layer_norm")
        return x[:, 0]


def nested(values: dict[str, np.ndarray], under: str) -> dict[str, Any]:
    """Flax's tree of parameters out of flat keys."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith(under):
            *way, last = key.removeprefix(under).split("/")
            here = tree
            for part in way:
                here = here.setdefault(part, {})
            here[last] = jnp.asarray(value)
    return {"params": tree}


def unit(z: Any) -> list[list[float]]:
    """Features of length one, to eight places."""
    z = z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
    return np.round(np.asarray(z, np.float64), 8).tolist()


def released() -> None:
    """Features of two small files of the released layout, by Flax's own layers in float32."""
    found = {}
    for kind in ("bert", "pieces"):
        values, facts = small_release(kind)
        width, depth, mlp, heads = facts["image"]
        pixels = np.stack([picture(*one) for one in facts["pictures"]]).astype(np.float32) / 127.5 - 1
        patch = facts["patch"]
        x = nn.Conv(width, (patch, patch), strides=(patch, patch), padding="VALID").apply(
            nested(values, "img/embedding/"), pixels
        )
        x = x.reshape(len(x), -1, width)
        x = jnp.concatenate([jnp.tile(values["img/cls"], [len(x), 1, 1]), x], 1)
        x = x + values["img/Transformer/posembed_input/pos_embedding"]
        tree = nested({k: v for k, v in values.items() if "posembed_input" not in k}, "img/Transformer/")
        images = Encoder(depth, mlp, heads).apply(tree, x)[:, 0]
        if "img/head/kernel" in values:
            images = nn.Dense(facts["dim"]).apply(nested(values, "img/head/"), images)
        width, depth, mlp, heads = facts["text"]
        ids = jnp.asarray(token_ids(kind))
        if kind == "bert":
            texts = Bert(depth, mlp).apply({}, {k: jnp.asarray(v) for k, v in values.items()}, ids)
        else:
            x = nn.Embed(*values["txt/Embed_0/embedding"].shape).apply(nested(values, "txt/Embed_0/"), ids)
            x = x + values["txt/pos_embedding"]
            texts = Encoder(depth, mlp, heads).apply(nested(values, "txt/Encoder_0/"), x)[:, -1]
        texts = nn.Dense(facts["dim"]).apply(nested(values, "txt/head/"), texts)
        found[kind] = {"images": unit(images), "texts": unit(texts)}
    write("released.json", f"flax {flax_version()}, jax {jax.__version__}", features=found)


def flax_version() -> str:
    """Of the package."""
    from importlib.metadata import version

    return version("flax")


MAKERS: tuple[Callable[[], None], ...] = (wordpiece, pieces, resize, prompts, optimizers, few_shots, released)

if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    for maker in MAKERS:
        maker()
