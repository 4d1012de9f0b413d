"""BERT's encoder over packed texts, from the weights of transformers' own modules.

The same values as transformers' forward pass (tests compare them), in few operations: in bfloat16 the weights are
cast where they are used, activations stay bfloat16 from layer to layer, and normalisation computes in float32. On
CPUs in bfloat16 the layers are `litune.towers.fused`'s, where it can be compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from litune.towers import fused
from litune.towers.dropout import dropout
from litune.towers.packing import Packed, attention

ROBERTA_LIKE = {"roberta", "xlm-roberta", "camembert"}
"""BERT whose positions begin after the padding token's number."""
BERT_LIKE = {"bert", *ROBERTA_LIKE}


def bert_encode(model: Any, packed: Packed) -> Float[Tensor, "R T W"]:
    """The last hidden states of a transformers BERT or RoBERTa model: post-LayerNorm, absolute positions.

    Where `runs_fused`, texts must lie in one row (`Packed.in_line`): between others' tokens there may be no gaps.

    Under autocast (to bfloat16) the result is bfloat16, otherwise of the weights' own type.
    """
    config = model.config
    device = packed.ids.device.type
    dtype, in_c = layers_dtype(model, device), runs_fused(model, device)
    with torch.autocast(device, enabled=False):
        positions = packed.positions
        if config.model_type in ROBERTA_LIKE:
            positions = positions + config.pad_token_id + 1
        embeddings = model.embeddings
        x = (
            embeddings.word_embeddings(packed.ids)
            + embeddings.position_embeddings(positions)
            + embeddings.token_type_embeddings.weight[0]
        )
        p, p_attention = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        x = _norm(embeddings.LayerNorm, x)
        if in_c:
            assert len(packed.ids) == 1
            return fused.encode_layers(model, x.flatten(0, 1).to(dtype), packed.first, packed.lengths).view_as(x)
        x = dropout(x, p, embeddings.training).to(dtype)
        for layer in model.encoder.layer:
            attend, out = layer.attention.self, layer.attention.output
            qkv = _linear(x, attend.query, attend.key, attend.value)
            mixed = attention(qkv, config.num_attention_heads, packed, p_attention if layer.training else 0.0)
            mixed = _linear(mixed, out.dense)
            x = _norm(out.LayerNorm, x + dropout(mixed, p, layer.training))
            wide = layer.intermediate.intermediate_act_fn(_linear(x, layer.intermediate.dense))
            x = _norm(layer.output.LayerNorm, x + dropout(_linear(wide, layer.output.dense), p, layer.training))
    return x


def layers_dtype(model: Any, device: str) -> torch.dtype:
    """What the layers compute in: autocast's type, otherwise the weights' own."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.embeddings.word_embeddings.weight.dtype
    return dtype


def runs_fused(model: Any, device: str) -> bool:
    """Whether `litune.towers.fused` takes the layers: then texts should lie one after the other (`Packed.in_line`)."""
    config = model.config
    depth, rest = divmod(config.hidden_size, config.num_attention_heads)
    even = rest == 0 and depth % fused.LANES == 0 and config.intermediate_size % fused.LANES == 0
    fits = config.hidden_act == "gelu" and even
    weights = model.embeddings.LayerNorm.weight.dtype
    bfloat16 = device == "cpu" and weights == torch.float32 and layers_dtype(model, device) == torch.bfloat16
    return fits and bfloat16 and fused.library() is not None


def _linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The layers' outputs, side by side: one matrix product."""
    weights, biases = ([getattr(layer, name).to(x.dtype) for layer in layers] for name in ("weight", "bias"))
    if len(layers) == 1:
        return F.linear(x, weights[0], biases[0])
    return F.linear(x, torch.cat(weights), torch.cat(biases))


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    # CPUs normalise bfloat16 by float32 weights; elsewhere both are of one type.
    weight, bias = (w if x.device.type == "cpu" else w.to(x.dtype) for w in (layer.weight, layer.bias))
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
