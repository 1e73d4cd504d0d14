"""The largest entries of rows, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretell.core.rows import argmax_rows, topk_rows


@pytest.mark.parametrize("vocab", [1, 7, 255, 1024, 1025, 4096, 32000])
@pytest.mark.parametrize("k", [1, 2, 8, 33, 100])
def test_topk_is_what_a_sort_finds(vocab: int, k: int) -> None:
    k = min(k, vocab)
    x = torch.from_numpy(np.random.default_rng(vocab * k).normal(size=(3, vocab)).astype("f4"))
    values, columns = topk_rows(x, k)
    expected = x.sort(dim=-1, descending=True, stable=True)
    assert (values == expected.values[:, :k].numpy()).all()
    assert (columns == expected.indices[:, :k].numpy()).all()


def test_rows_of_a_larger_tensor_and_infinities() -> None:
    x = torch.full((4, 5000), float("-inf"))
    x[:, 4999] = 1.0
    x[:, 17] = 2.0
    part = x[1:3, 10:]
    values, columns = topk_rows(part, 2)
    assert values.tolist() == [[2.0, 1.0]] * 2
    assert columns.tolist() == [[7, 4989]] * 2
    assert argmax_rows(part) == [7, 7]


def test_ties_go_to_the_lowest_column() -> None:
    x = torch.zeros(2, 3000)
    x[1, [500, 2900]] = 1.0
    assert argmax_rows(x) == [0, 500]
    assert topk_rows(x, 2)[1][1].tolist() == [500, 2900]
