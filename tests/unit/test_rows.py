"""The largest entries of rows, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretell.core.feedback import Rows
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
    assert topk_rows(x, 8)[1].tolist() == [[*range(8)], [500, 2900, *range(6)]]


@pytest.mark.parametrize(("n", "vocab", "k"), [(17, 5000, 8), (9, 4097, 8), (5, 2048, 3)])
def test_ties_everywhere(n: int, vocab: int, k: int) -> None:
    """Few different values, the largest ones behind the last whole line of lanes too."""
    rng = np.random.default_rng(vocab)
    for _ in range(10):
        x = torch.from_numpy(rng.integers(0, 40, (n, vocab)).astype("f4"))
        x[0, vocab - 1] = 41.0
        values, columns = topk_rows(x, k)
        expected = x.sort(dim=-1, descending=True, stable=True)
        assert (values == expected.values[:, :k].numpy()).all()
        assert (columns == expected.indices[:, :k].numpy()).all()


@pytest.mark.parametrize("vocab", [9, 3000])
def test_some_of_the_rows(vocab: int) -> None:
    x = torch.randn(6, vocab)
    for at in ([4], [5, 0, 2], [0, 1, 2, 3, 5, 4], []):
        values, columns = topk_rows(x, 4, np.array(at, np.int64))
        want = topk_rows(x[at], 4)
        assert (values == want[0]).all()
        assert (columns == want[1]).all()


def test_more_than_there_is_and_nothing() -> None:
    x = torch.randn(2, 40)
    assert (topk_rows(x, 64)[1] == x.sort(descending=True).indices.numpy()).all()
    assert topk_rows(torch.empty(0, 3000), 8)[1].shape == (0, 8)


@pytest.mark.parametrize("vocab", [7, 3000])
def test_a_nan_is_no_candidate(vocab: int) -> None:
    x = torch.arange(2.0 * vocab).reshape(2, vocab)
    x[1, vocab - 2] = float("nan")
    columns = topk_rows(x, 3)[1].tolist()
    assert columns[0] == [vocab - 1, vocab - 2, vocab - 3]
    assert columns[1] == [vocab - 1, vocab - 3, vocab - 4]
    assert argmax_rows(x) == [vocab - 1, vocab - 2]


def test_the_largest_of_a_nodes_row() -> None:
    """One node or several, rows in any order, none for some nodes."""
    packed = torch.randn(5, 100)
    packed[2, [7, 60]] = 9.0
    rows = Rows(packed, np.array([-1, 3, 0, 2, 4]))
    want = packed.argmax(-1).tolist()
    assert want[2] == 7
    for node in (1, 2, 3, 4):
        assert rows.argmax([node]) == [want[rows.row[node]]]
    assert rows.argmax([3, 1]) == [want[2], want[3]]
    for missing in ([0], [1, 0]):
        with pytest.raises(KeyError):
            rows.argmax(missing)
