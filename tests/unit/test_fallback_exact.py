"""The stock-torch runner: with quantised weights, and with floats when asked, a row's logits are
the same to the last bit in any batch, tree, chunking and number of threads."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.models.native import exact
from foretell.models.native.arch import Arch, LayerArch, Rope
from foretell.models.native.exact import FloatRows, in_pieces, normed, row_sums
from foretell.models.native.integer import IntegerProducts, QWeight, widened
from foretell.models.native.runner import NativeModel
from foretell.models.quant.formats import FORMATS, dequantise, quantise, quantise_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers_bitexact import NAMES, differences, random_arch

KINDS = (torch.float32, torch.bfloat16, *FORMATS.values())


class Threaded(NativeModel):
    """With the switch that the helpers turn."""

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread_after() -> Any:
    yield
    torch.set_num_threads(1)


def random_model(r: random.Random, kind: Any) -> Any:
    arch, seed = random_arch(r), r.randrange(1 << 20)
    return Threaded.random(arch, kind, seed, names=NAMES, deterministic=True)


def run(kind: Any, seeds: range) -> int:
    wrong = 0
    for seed in seeds:
        r = random.Random(seed)
        wrong += differences(random_model(r, kind), r, lambda r=r: r.choice([1, 1, 1, 2]))
    return wrong


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_do_not_depend_on_their_company(kind: Any) -> None:
    assert run(kind, range(4)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_do_not_depend_on_their_company_more(kind: Any) -> None:
    assert run(kind, range(100, 200)) == 0


def text_logits(model: NativeModel, ids: np.ndarray, chunk: int) -> Tensor:
    cache, found = model.new_cache(), []
    for at in range(0, len(ids), chunk):
        part = ids[at : at + chunk]
        with model.open([cache]) as txn:
            segment = Segment(part, np.arange(at, at + len(part)))
            found.append(model.forward(PackedBatch([segment]), txn).logits)
            txn.commit([range(len(part))])
    return torch.cat(found)


@pytest.mark.parametrize("kind", [torch.float32, FORMATS["int8"], FORMATS["int4"]], ids=str)
def test_wide_layers_in_chunks_and_threads(kind: Any) -> None:
    """Widths at which the library splits its work, and enough rows that torch shares them out."""
    layers = (LayerArch(0, 40),)
    arch = Arch(300, 1100, 4, 2, 32, 1536, layers, (Rope(32),), act="gelu", attn_cap=20.0)
    model = NativeModel.random(arch, kind, deterministic=True)
    ids = np.random.default_rng(0).integers(0, 300, 70)
    whole = text_logits(model, ids, 70)
    torch.set_num_threads(2)
    assert torch.equal(text_logits(model, ids, 66), whole)
    assert torch.equal(text_logits(model, ids[:5], 1), whole[:5])


def test_default_floats_are_not_touched() -> None:
    model = NativeModel.random(Arch.llama(61, 32, 1, 4, 2, 64))
    assert not model.exact
    assert model.mm is torch.mm


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, *FORMATS.values()], ids=str)
def test_the_exact_path_computes_the_same_function(kind: Any) -> None:
    """Against the plain path: with the same weights, or for integers with the dequantised ones and
    activations that a float64 model would have, as near as quantised activations come."""
    for seed in range(6):
        r = random.Random(seed)
        arch = random_arch(r)
        ids = np.array([r.randrange(arch.vocab) for _ in range(20)])
        exact = NativeModel.random(arch, kind, seed, names=NAMES, deterministic=True)
        floats = kind if isinstance(kind, torch.dtype) else torch.float32
        plain = NativeModel.random(arch, floats, seed, names=NAMES)
        got, want = (text_logits(m, ids, 20) for m in (exact, plain))
        error = float((got - want).norm() / want.norm())
        assert error < (2e-5 if isinstance(kind, torch.dtype) else 0.6 if kind.bits == 4 else 0.12)


def test_quantised_forward_is_that_of_its_integers() -> None:
    """Layer by layer in float64 with the model's own integers and the same rounding of rows."""
    arch = Arch.llama(61, 64, 1, 2, 2, 96, tied=False)
    model = NativeModel.random(arch, FORMATS["int4"])
    x = torch.randn(7, 64)
    for weight in (model.layers[0].gate_up, model.head):
        q, scale = quantise_rows(x)
        want = (q.double() * scale[:, None]) @ dequantise(weight.parts[0]).double().t()
        assert torch.allclose(model.mm(x, weight).double(), want, rtol=1e-6, atol=1e-6)
    assert [p.bits for w in model._matrices() for p in w.parts] == [4, 4, 4, 4, 8]


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
@pytest.mark.parametrize("inputs", [96, 128, 1152])
def test_products(form: Any, inputs: int) -> None:
    g = torch.Generator().manual_seed(inputs)
    w = quantise(torch.randn(70, inputs, generator=g), form)
    x = torch.randn(150, inputs, generator=g) * torch.logspace(-20, 10, 150)[:, None]
    x[3] = 0
    products = IntegerProducts(torch.device("cpu"))
    whole = products.mm(x, QWeight([w]))
    q, scale = quantise_rows(x)
    want = (q.double() * scale[:, None].double()) @ dequantise(w).double().t()
    assert torch.allclose(
        whole.double() / scale.double().clamp(min=1e-30)[:, None],
        want / scale.double().clamp(min=1e-30)[:, None],
        rtol=1e-5,
        atol=1e-3,
    )
    for rows in (1, 2, 3, 16, 64, 65):
        assert torch.equal(products.mm(x[:rows], QWeight([w])), whole[:rows])
    products.dot = widened  # what runs where torch's integer product cannot be used
    assert torch.equal(products.mm(x, QWeight([w])), whole)
    two = QWeight([w.rows(slice(0, 30)), w.rows(slice(30, 70))])
    assert torch.equal(products.mm(x, two), whole)
    acc = torch.ones_like(whole)
    assert torch.equal(products.addmm_(acc, x, two, 0.5), 1 + whole * 0.5)


def test_integers_at_their_extremes() -> None:
    x = torch.full((5, 4096), 127, dtype=torch.int8)
    w = torch.full((33, 4096), -127, dtype=torch.int8)
    w[:, ::3] = -128
    want = (x.long() @ w.long().t()).float()
    assert torch.equal(IntegerProducts(torch.device("cpu")).dot(x, w.t()).float(), want)
    assert torch.equal(widened(x, w.t()), want)


@pytest.mark.parametrize("width", [1, 2, 7, 64, 100, 1000])
def test_row_sums(width: int) -> None:
    x = torch.randn(5, width, dtype=torch.float64)
    assert torch.allclose(row_sums(x)[:, 0], x.sum(1))
    wide = torch.nn.functional.layer_norm(x, (width,), None, None, 1e-5)
    assert torch.allclose(normed(x, 1e-5, centred=True), wide)


def gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("function", [torch.nn.functional.silu, gelu_tanh], ids=["silu", "gelu"])
def test_pieces_do_not_see_their_neighbours(function: Any) -> None:
    """Vector loops and their scalar tails differ in about one number of a hundred."""
    x = torch.randn(100_001, generator=torch.Generator().manual_seed(0))
    exact = in_pieces(function)
    whole = exact(x)
    assert torch.allclose(whole, function(x), atol=1e-6)
    assert torch.equal(torch.cat([exact(part) for part in x.split(33)]), whole)
    torch.set_num_threads(3)  # cuts where no vector ends
    for _ in range(2):
        assert torch.equal(exact(x), whole)


@pytest.mark.parametrize("kind", [torch.float32, FORMATS["int8"]], ids=str)
def test_a_tree_leaves_its_rows_where_they_were(kind: Any) -> None:
    """The last row's path is laid over the first branch's rows, and the first branch is kept."""
    model = NativeModel.random(Arch.llama(61, 32, 2, 4, 2, 64), kind, deterministic=True)
    ancestors = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
    tree = Segment(np.array([7, 8, 9, 10]), np.array([0, 1, 1, 2]), ancestors)
    cache = model.new_cache()
    with model.open([cache]) as txn:
        model.forward(PackedBatch([tree]), txn)
        txn.commit([[0, 1]])
    with model.open([cache]) as txn:
        row = Segment(np.array([11]), np.array([2]))
        got = model.forward(PackedBatch([row]), txn).logits
    assert torch.equal(got, text_logits(model, np.array([7, 8, 11]), 3)[2:])


@pytest.mark.parametrize("agree", [True, False])
def test_products_get_one_thread_where_threads_change_them(
    agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "threads_agree", lambda threads: agree)
    torch.set_num_threads(2)
    seen = []

    @exact.alike()
    def fails() -> None:
        seen.append(torch.get_num_threads())
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert seen == [2 if agree else 1]
    assert torch.get_num_threads() == 2


def test_float_rows_settle_for_what_the_machine_allows() -> None:
    """A library whose products depend on the number of rows: one row at a time is what is left."""

    class Fickle(FloatRows):
        def _wide(self, x: Tensor, w: Tensor) -> Tensor:
            return super()._wide(x, w) + (len(x) if self.height > 1 else 0)

    rows = Fickle(torch.float32)
    w, x = torch.randn(20, 30), torch.randn(9, 20)
    rows.settle([w])
    assert rows.height == 1
    assert torch.equal(rows.mm(x, w)[4:5], rows.mm(x[4:5], w))
    good = FloatRows(torch.float32)
    good.settle([w])
    assert good.height > 1
    assert torch.allclose(good.mm(x, w), x @ w, atol=1e-5)


def test_deterministic_needs_a_cpu() -> None:
    with pytest.raises(InputError, match="need a CPU"):
        NativeModel.random(Arch.llama(61, 32, 1, 4, 2, 64), device="meta", deterministic=True)
