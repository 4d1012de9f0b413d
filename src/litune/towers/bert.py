"""BERT's encoder over packed texts, from the weights of transformers' own modules.

The same values as transformers' forward pass (tests compare them), as few operations: in bfloat16 the weights are
cast where they are used, activations stay bfloat16 from layer to layer, and normalisation computes in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from litune.towers.dropout import dropout
from litune.towers.packing import Packed, attention

ROBERTA_LIKE = {"roberta", "xlm-roberta", "camembert"}
"""BERT whose positions begin after the padding token's number."""
BERT_LIKE = {"bert", *ROBERTA_LIKE}


def bert_encode(model: Any, packed: Packed) -> Float[Tensor, "R T W"]:
    """The last hidden states of a transformers BERT or RoBERTa model: post-LayerNorm, absolute positions.

    Under autocast (to bfloat16) the result is bfloat16, otherwise of the weights' own type.
    """
    config = model.config
    device = packed.ids.device.type
    table = model.embeddings.word_embeddings
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.weight.dtype
    with torch.autocast(device, enabled=False):
        positions = packed.positions
        if config.model_type in ROBERTA_LIKE:
            positions = positions + config.pad_token_id + 1
        embeddings = model.embeddings
        x = table(packed.ids) + embeddings.position_embeddings(positions) + embeddings.token_type_embeddings.weight[0]
        p, p_attention = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        x = dropout(_norm(embeddings.LayerNorm, x), p, embeddings.training).to(dtype)
        for layer in model.encoder.layer:
            attend, out = layer.attention.self, layer.attention.output
            qkv = _linear(x, attend.query, attend.key, attend.value)
            mixed = attention(qkv, config.num_attention_heads, packed, p_attention if layer.training else 0.0)
            mixed = _linear(mixed, out.dense)
            x = _norm(out.LayerNorm, x + dropout(mixed, p, layer.training))
            wide = layer.intermediate.intermediate_act_fn(_linear(x, layer.intermediate.dense))
            x = _norm(layer.output.LayerNorm, x + dropout(_linear(wide, layer.output.dense), p, layer.training))
    return x


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
