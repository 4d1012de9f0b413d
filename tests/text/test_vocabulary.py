from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from litune.text.vocabulary import TunedRows

USED = np.array([0, 3, 4, 9])


def both() -> tuple[nn.Embedding, TunedRows]:
    torch.manual_seed(0)
    table = nn.Embedding(12, 5)
    return table, TunedRows(table, USED)


def test_in_training_the_rows_in_use_are_the_tables_own() -> None:
    table, rows = both()
    ids = torch.from_numpy(USED)[torch.tensor([[2, 0, 0], [1, 3, 2]])]
    for one in (table, rows):
        one(ids).square().sum().backward()
    assert torch.equal(rows(ids), table(ids))
    assert torch.equal(rows.weight.grad, table.weight.grad[torch.from_numpy(USED)])
    with pytest.raises(IndexError):
        rows(torch.tensor([1]))


def test_in_evaluation_every_row_is_there() -> None:
    table, rows = both()
    assert torch.equal(rows.eval()(torch.arange(12)), table.weight)
    assert torch.equal(rows.state_dict()["weight"], table.weight)


def test_all_of_it_lies_where_the_table_lies() -> None:
    """The meta device, like a GPU, refuses to be mixed with the processor's tensors."""
    rows = TunedRows(nn.Embedding(12, 5, device="meta"), USED)
    assert {t.device.type for t in (*rows.parameters(), *rows.buffers())} == {"meta"}
    for training in (True, False):
        assert rows.train(training)(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 5)
