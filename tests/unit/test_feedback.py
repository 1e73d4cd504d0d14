"""Lazy rows and verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretell.core.feedback import Rows, Verdict


def test_rows_are_addressed_by_node() -> None:
    packed = torch.arange(10.0)[:, None].expand(10, 3).contiguous()
    rows = Rows(packed, np.array([4, 5, -1, 6, 2]))
    assert rows[0].tolist() == [4.0] * 3
    assert rows[[0, 1]][:, 0].tolist() == [4, 5]
    assert rows[[0, 1]].data_ptr() == packed[4].data_ptr(), "neighbours are a view, not a copy"
    assert rows[[4, 0, 3]][:, 0].tolist() == [2, 4, 6]
    assert rows[[1, 0]][:, 0].tolist() == [5, 4]
    assert rows.has(3)
    assert not rows.has(2)
    for nodes in (2, [0, 2]):
        with pytest.raises(KeyError):
            rows[nodes]


@pytest.mark.parametrize("keep", range(6))
def test_a_cut_keeps_tokens_path_and_counts_together(keep: int) -> None:
    v = Verdict([7, 8, 9], [1, 2, 3, 4], 3)
    assert v.accepted == 3
    v.cut(keep)
    assert v.tokens == [1, 2, 3, 4][:keep]
    assert v.path == [7, 8, 9][:keep]
    assert v.accepted == min(3, keep)
    assert v.checked == min(3, keep)
