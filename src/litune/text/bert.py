"""BERT's encoder over packed texts, from the weights of transformers' own modules.

It gives the values of transformers' forward pass (tests compare them) in fewer operations: in bfloat16, weights are
cast where they are used, activations stay bfloat16 between layers, and normalisation computes in float32. On CPUs in
bfloat16, the layers are those of `litune.text.fused` if it can be compiled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from litune.text import fused
from litune.text.dropout import dropout
from litune.text.packing import Line, Rows, attention, flash_pays, through

ROBERTA_LIKE = {"roberta", "xlm-roberta", "camembert"}
"""Kinds of BERT whose positions start after the id of the padding token."""
BERT_LIKE = {"bert", *ROBERTA_LIKE}


def bert_encode(model: Any, packed: Rows) -> Float[Tensor, "R T W"]:
    """The last hidden states of a transformers BERT or RoBERTa model: post-LayerNorm, absolute positions.

    The model must have gone through `teach_packing`, and texts must be packed as `reads_line` says, for bfloat16 under
    autocast. The result is bfloat16 under autocast, otherwise of the weights' type.
    """
    config, embeddings = model.config, model.embeddings
    device = packed.ids.device.type
    dtype = embeddings.word_embeddings.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        positions = packed.positions
        if config.model_type in ROBERTA_LIKE:
            positions = positions + config.pad_token_id + 1
        x = (
            embeddings.word_embeddings(packed.ids)
            + embeddings.position_embeddings(positions)
            + embeddings.token_type_embeddings.weight[0]
        )
        x = _norm(embeddings.LayerNorm, x)
        p = config.hidden_dropout_prob
        if in_c(packed):
            assert dtype == torch.bfloat16
            x = fused.drop(x.to(dtype), p, embeddings.training)
        else:
            x = dropout(x, p, embeddings.training).to(dtype)
        return through(model.encoder.layer, x, packed)


def teach_packing(model: Any) -> None:
    """Let the layers of a transformers BERT read packed texts, `layer(x, packed=…)`; parameter names don't change."""
    for layer in model.encoder.layer:
        theirs: Any = type(layer)
        layer.__class__ = _packing_class(theirs)


class _PackedLayer:
    """A post-LayerNorm BERT layer. Without `packed`, it runs transformers' own forward pass."""

    attention: Any
    intermediate: Any
    output: Any
    training: bool

    def forward(self, x: Tensor, *args: Any, packed: Rows | None = None, **kwargs: Any) -> Any:
        """The layer's output [R, T, W], of the input's type."""
        if packed is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        attend, out, inner, outer = self.attention.self, self.attention.output, self.intermediate, self.output
        heads = attend.num_attention_heads
        p, p_attention = (outer.dropout.p, attend.dropout.p) if self.training else (0.0, 0.0)
        if in_c(packed):
            return fused.encode_layer(self, x.squeeze(0), packed.first, packed.lengths, heads, p, p_attention)[None]
        mixed = attention(_linear(x, attend.query, attend.key, attend.value), heads, packed, p_attention)
        x = _norm(out.LayerNorm, x + dropout(_linear(mixed, out.dense), p))
        wide = inner.intermediate_act_fn(_linear(x, inner.dense))
        return _norm(outer.LayerNorm, x + dropout(_linear(wide, outer.dense), p))


@cache
def _packing_class(theirs: type) -> type:
    return type(f"Packed{theirs.__name__}", (_PackedLayer, theirs), {})


def in_c(packed: Rows) -> bool:
    """Whether `litune.text.fused` runs the layers: for a line of texts on the CPU."""
    return isinstance(packed, Line) and packed.ids.device.type == "cpu"


def reads_line(model: Any, lengths: Int[np.ndarray, " N"], device: torch.device, bfloat16: bool) -> bool:
    """Whether this model should read texts of these lengths concatenated on this device (see `Line`).

    On a CPU that is whether `litune.text.fused` can run its layers, on a GPU whether `flash_attention` pays.
    """
    config, weights = model.config, model.embeddings.LayerNorm.weight.dtype
    depth, rest = divmod(config.hidden_size, config.num_attention_heads)
    if device.type == "cpu":
        even = rest == 0 and depth % fused.LANES == 0 and config.intermediate_size % fused.LANES == 0
        fits = config.hidden_act == "gelu" and even and weights == torch.float32
        return bfloat16 and fits and fused.library() is not None
    return flash_pays(lengths, device, depth, torch.bfloat16 if bfloat16 else weights)


def _linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The layers' outputs, concatenated: one matrix product."""
    weights, biases = ([getattr(layer, name).to(x.dtype) for layer in layers] for name in ("weight", "bias"))
    if len(layers) == 1:
        return F.linear(x, weights[0], biases[0])
    return F.linear(x, torch.cat(weights), torch.cat(biases))


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    # CPUs normalise bfloat16 with float32 weights; other devices need the same type.
    weight, bias = (w if x.device.type == "cpu" else w.to(x.dtype) for w in (layer.weight, layer.bias))
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
