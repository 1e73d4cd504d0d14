"""On the kernels a node's logits are the same to the last bit in whatever company it is run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell import kernels
from foretell.core.batch import PackedBatch
from foretell.models.native.arch import Arch
from foretell.models.native.fused import FusedModel
from helpers_bitexact import KINDS, chain, differences, random_model

pytestmark = pytest.mark.skipif(kernels.load() is None, reason=str(kernels.why_not()))


def name(kind: Any) -> str:
    return str(kind).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS, ids=name)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), threads=st.lists(st.sampled_from([1, 2]), min_size=1))
def test_a_node_alone_and_in_company(kind: Any, seed: int, threads: list[int]) -> None:
    """Random model, histories, trees with dead nodes, batch, chunks, threads."""
    r = random.Random(seed)
    model = random_model(r, kind)
    turns = iter(threads * 100)
    for _ in range(2):
        assert differences(model, r, lambda: next(turns)) == 0


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_long_prompts_in_chunks(kind: Any) -> None:
    """Lengths at which rows are shared out in blocks and tiles: 300 rows at once, in pieces, and
    one by one at the end."""
    model = FusedModel.random(Arch.llama(61, 64, 2, 4, 2, 96), kind, 3)
    ids = [i * 7 % 61 for i in range(300)]
    whole = None
    for sizes in ([300], [299, 1], [129, 100, 71], [17] * 17 + [11], [280] + [1] * 20):
        for threads in (1, 2):
            model.set_threads(threads)
            cache, rows = model.new_cache(), []
            for n in sizes:
                with model.open([cache]) as txn:
                    part = chain(ids[cache.n : cache.n + n], cache.n)
                    rows.append(model.forward(PackedBatch([part]), txn).logits)
                    txn.commit([range(n)])
            logits = torch.cat(rows)
            whole = logits if whole is None else whole
            assert torch.equal(logits, whole), (sizes, threads)


def test_garbage_of_other_branches_does_not_leak() -> None:
    """A sibling whose activations are not finite changes nothing."""
    model = FusedModel.random(Arch.llama(61, 32, 2, 4, 2, 48), torch.float32, 5)
    batch = PackedBatch([chain([1, 2, 3], 0)])
    cache = model.new_cache()
    with model.open([cache]) as txn:
        model.forward(batch, txn)
        txn.commit([range(3)])

    def tree(embeds: dict[int, torch.Tensor] | None) -> torch.Tensor:
        import numpy as np

        from foretell.core.batch import Segment

        ancestors = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
        segment = Segment(np.array([4, 5, 6, 7]), np.array([3, 3, 4, 4]), ancestors, None, embeds)
        with model.open([cache]) as txn:
            return model.forward(PackedBatch([segment]), txn).logits

    clean, dirty = tree(None), tree({0: torch.full((32,), torch.nan)})
    assert torch.equal(clean[[1, 2]], dirty[[1, 2]])
    assert dirty[[0, 3]].isnan().all()
