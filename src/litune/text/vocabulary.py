"""A token table of which only the rows in use are tuned.

A row that no caption uses never gets a gradient, and as tables have no weight decay (litune.tuning.optim.decays), no
optimizer changes it. Left out of the parameters, it needs no gradient, no moments and no update: on some thousand
captions that is most of a small tower's optimizer time. The result is exact (except with Adafactor and fewer than 32
rows in use, which it factors only as part of the whole table).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class TunedRows(nn.Module):
    """An embedding [V, W] of which the rows `used` [U] are a parameter and the others fixed.

    Its state dict is that of the whole `nn.Embedding`.
    """

    position: Tensor
    rest: Tensor

    def __init__(self, table: nn.Embedding, used: np.ndarray) -> None:
        super().__init__()
        size, device = len(table.weight), table.weight.device
        order = np.concatenate([used, np.setdiff1d(np.arange(size), used)])
        position = np.empty(size, dtype=np.int64)
        position[order] = np.arange(size)
        self.register_buffer("position", torch.from_numpy(position).to(device), persistent=False)
        whole = table.weight.detach()[torch.from_numpy(order).to(device)]
        self.weight = nn.Parameter(whole[: len(used)].clone(), requires_grad=table.weight.requires_grad)
        self.register_buffer("rest", whole[len(used) :].clone(), persistent=False)
        self.train(table.training)

    def forward(self, ids: Int[Tensor, ...]) -> Float[Tensor, "... W"]:
        """The rows of these tokens; in training all of them must be in use."""
        # The choice of table must not depend on the ids: on a GPU that would force a synchronisation.
        table = self.weight if self.training else torch.cat([self.weight, self.rest])
        return F.embedding(self.position[ids], table)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        whole = torch.cat([self.weight, self.rest])[self.position]
        destination[f"{prefix}weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        whole = state_dict[f"{prefix}weight"]
        with torch.no_grad():
            sorted_rows = torch.empty_like(whole).index_copy_(0, self.position.to(whole.device), whole)
            self.weight.copy_(sorted_rows[: len(self.weight)])
            self.rest.copy_(sorted_rows[len(self.weight) :])
