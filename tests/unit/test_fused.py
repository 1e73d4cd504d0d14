"""The fused model against the torch runner and against a float64 reference of its own maths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foretell import kernels
from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.errors import InputError
from foretell.core.protocols import LayerAccess, TargetModel
from foretell.models.load import load_model
from foretell.models.native.arch import Arch, LayerArch
from foretell.models.native.families import LLAMA_NAMES
from foretell.models.native.fused import STAGES, FusedModel, refusal
from foretell.models.native.packing import layout
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import RandomSource, write_random_checkpoint
from foretell.models.quant.formats import FORMATS, WeightFormat, dequantise, quantise
from helpers_bitexact import NAMES, random_arch, random_tree

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason=str(kernels.why_not()))
ARCH = Arch.llama(61, 64, 3, 6, 2, 96, tied=False)
KINDS = (torch.float32, torch.bfloat16, FORMATS["int8"], FORMATS["int4"])


def chain(ids: Any, start: int = 0, logits: Any = None) -> Segment:
    return Segment(np.asarray(ids, np.int64), np.arange(start, start + len(ids)), None, logits)


def prefilled(model: Any, ids: Any) -> Any:
    cache = model.new_cache()
    with model.open([cache]) as txn:
        model.forward(PackedBatch([chain(ids)]), txn)
        txn.commit([range(len(ids))])
    return cache


def pair(arch: Arch = ARCH, **more: Any) -> tuple[Any, Any]:
    return NativeModel.random(arch, seed=2, **more), FusedModel.random(arch, seed=2, **more)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float32
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@needs_kernels
def test_it_is_a_model_with_layers() -> None:
    model = FusedModel.random(ARCH)
    assert isinstance(model, TargetModel)
    assert isinstance(model, LayerAccess)
    assert model.spec.row_bytes == 3 * 2 * 2 * 10 * 4
    assert FusedModel.random(ARCH, FORMATS["int8"]).spec.row_bytes == 3 * 2 * 2 * 10 * 2


@needs_kernels
@pytest.mark.parametrize("seed", range(30))
def test_random_architectures_match_the_torch_runner(seed: int) -> None:
    """Everything that `Arch` can say, with a ragged batch of a tree and a chain."""
    r = random.Random(seed)
    arch = random_arch(r)
    native, fused = pair(arch, names=NAMES)
    tree = random_tree(r, [1, 2], 10)
    outs = []
    for model in (native, fused):
        caches = [prefilled(model, range(5, 30)), prefilled(model, [3])]
        with model.open(caches) as txn:
            batch = PackedBatch([segment_of(tree, 25, None), chain([4, 5, 6], 1)])
            outs.append(model.forward(batch, txn, taps=("embed", 0, len(arch.layers), "last")))
    near(outs[1].logits, outs[0].logits)
    for tap, hidden in outs[0].hidden.items():
        near(outs[1].hidden[tap], hidden)


@needs_kernels
def test_taps_are_the_inputs_of_layers() -> None:
    native, fused = pair()
    taps = ("embed", 0, 1, 2, 3, "last")
    outs = []
    for model in (native, fused):
        with model.open([model.new_cache()]) as txn:
            outs.append(model.forward(PackedBatch([chain([5, 6, 7, 8, 9, 10])]), txn, taps))
    for tap in taps:
        near(outs[1].hidden[tap], outs[0].hidden[tap])
    assert torch.equal(outs[1].hidden[0], outs[1].hidden["embed"])
    ids = torch.tensor([5, 6, 7, 8, 9, 10])
    assert torch.equal(fused.embed(ids), outs[1].hidden["embed"])
    assert torch.equal(fused.unembed(outs[1].hidden[3]), outs[1].logits)
    with pytest.raises(InputError, match="hidden state 4"), fused.open([fused.new_cache()]) as txn:
        fused.forward(PackedBatch([chain([1])]), txn, taps=(4,))


@needs_kernels
def test_layers_one_call_after_another() -> None:
    native, fused = pair()
    tree = segment_of(random_tree(random.Random(0), [1], 9), 7, None)
    batch = PackedBatch([tree])
    expected = None
    for model in (native, fused):
        cache = prefilled(model, range(7))
        with model.open([cache]) as txn:
            x = model.embed(torch.from_numpy(tree.tokens))
            x = model.run_layers(x, batch, txn, [0])
            x = model.run_layers(x, batch, txn, [2])
            txn.advance(batch)
            assert txn.scratch == [len(tree)]
        expected = x if expected is None else expected
        near(x, expected)
    cache = prefilled(fused, range(7))
    with fused.open([cache]) as txn:
        whole = fused.forward(batch, txn)
    with fused.open([cache]) as txn:
        x = fused.run_layers(fused.embed(torch.from_numpy(tree.tokens)), batch, txn, [0, 1, 2])
        assert torch.equal(fused.unembed(x), whole.logits)
        with pytest.raises(IndexError):
            fused.run_layers(x, batch, txn, [3])


@needs_kernels
def test_vectors_instead_of_tokens() -> None:
    native, fused = pair()
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    outs = []
    for model in (native, fused):
        segment = chain([5, 6, 7])
        segment.embeds = {1: vector}
        with model.open([model.new_cache()]) as txn:
            outs.append(model.forward(PackedBatch([segment]), txn).logits)
    near(outs[1], outs[0])


@needs_kernels
def test_only_the_rows_asked_for() -> None:
    model = FusedModel.random(ARCH)
    with model.open([model.new_cache()]) as txn:
        whole = model.forward(PackedBatch([chain(range(9))]), txn).logits
    for rows in ([8], [0, 3, 8], [], [4, 4, 1]):
        with model.open([model.new_cache()]) as txn:
            batch = PackedBatch([chain(range(9), 0, np.array(rows, np.int64))])
            assert torch.equal(model.forward(batch, txn).logits, whole[rows])
    with pytest.raises(IndexError), model.open([model.new_cache()]) as txn:
        model.forward(PackedBatch([chain(range(3), 0, np.array([3]))]), txn)


@needs_kernels
def test_empty_segments_and_empty_batches() -> None:
    model = FusedModel.random(ARCH)
    caches = [model.new_cache(), prefilled(model, [1, 2]), model.new_cache()]
    with model.open(caches) as txn:
        batch = PackedBatch([chain([]), chain([3], 2), chain([])])
        assert model.forward(batch, txn).logits.shape == (1, 61)
    with model.open([]) as txn:
        assert model.forward(PackedBatch([]), txn).logits.shape == (0, 61)


@needs_kernels
@pytest.mark.parametrize("window", [None, 100])
def test_long_contexts(window: int | None) -> None:
    """Several blocks of keys and of rows."""
    arch = Arch(
        **{f: getattr(ARCH, f) for f in ARCH.__dataclass_fields__}
        | {"layers": (LayerArch(0, window), LayerArch(0))}
    )
    native, fused = pair(arch)
    ids = np.arange(700) * 5 % 61
    outs = []
    for model in (native, fused):
        cache = prefilled(model, ids[:600])
        with model.open([cache]) as txn:
            outs.append(model.forward(PackedBatch([chain(ids[600:], 600)]), txn).logits)
    near(outs[1], outs[0])


def reference(kind: WeightFormat, ids: list[int]) -> torch.Tensor:
    """[n, V]: ARCH with quantised weights and activations, the rest in float64; rows of the cache
    are bfloat16."""
    source, wide = RandomSource(2), torch.float64
    slots = layout(ARCH, kind)

    def product(x: torch.Tensor, name: str, stored: str) -> torch.Tensor:
        slot = slots[name]
        w = source.get(stored, (slot.n, slot.k))
        w = dequantise(quantise(w, kind, head=name == "head")).to(wide)
        x = x.float()
        largest = x.abs().amax(1, keepdim=True)
        return ((x * (127 / largest)).round() * (largest / 127).to(wide)).to(wide) @ w.t()

    def norm(x: torch.Tensor, stored: str) -> torch.Tensor:
        w = source.get(stored, (64,)).to(wide)
        return x / (x.square().mean(-1, keepdim=True) + ARCH.eps).sqrt() * w

    def turn(x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(len(ids)).float()[:, None] * ARCH.ropes[0].frequencies()
        c, s = angles.cos().to(wide)[:, None], angles.sin().to(wide)[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    n, x = len(ids), source.get("model.embed_tokens.weight", (61, 64)).to(wide)[ids]
    for i in range(3):
        at, own = f"model.layers.{i}.", f"layers.{i}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            product(y, own + r, f"{at}self_attn.{r}_proj.weight").view(n, -1, 10) for r in "qkv"
        )
        q, k = turn(q), turn(k).bfloat16().to(wide).repeat_interleave(3, 1)
        v = v.bfloat16().to(wide).repeat_interleave(3, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * ARCH.scale
        scores += torch.full((n, n), -torch.inf).triu(1)
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
        x = x + product(y, own + "o", at + "self_attn.o_proj.weight")
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = product(y, own + "gate", at + "mlp.gate_proj.weight")
        up = product(y, own + "up", at + "mlp.up_proj.weight")
        y = torch.nn.functional.silu(gate) * up
        x = x + product(y, own + "down", at + "mlp.down_proj.weight")
    return product(norm(x, "model.norm.weight"), "head", "lm_head.weight").float()


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integer_weights_match_float64(name: str) -> None:
    ids = [3, 14, 15, 9, 26, 5, 35, 8, 58, 41, 17]
    model = FusedModel.random(ARCH, FORMATS[name], 2)
    assert {s.format for s in model._slots.values()} == {"int8", name}
    with model.open([model.new_cache()]) as txn:
        logits = model.forward(PackedBatch([chain(ids)]), txn).logits
    near(logits, reference(FORMATS[name], ids), 2e-3)  # one bfloat16 or int8 rounded the other way
    error = (logits - reference(FORMATS[name], ids)).norm() / logits.norm()
    assert error < 5e-4


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed_tensors_are_the_model(kind: Any) -> None:
    """A model from the plan's tensors (a mapped file) is the one they were taken from."""
    first = FusedModel.random(ARCH, kind, 7)
    stored = {name: t.clone() for name, t in first.packed.items()}
    for name, t in stored.items():
        if t.data_ptr() % 64:  # the container aligns them
            room = torch.empty(t.numel() + 64 // t.itemsize, dtype=t.dtype)
            start = -room.data_ptr() % 64 // t.itemsize
            stored[name] = room[start : start + t.numel()].copy_(t)
    source = RandomSource(7, 1.0, torch.float32 if isinstance(kind, WeightFormat) else kind)
    again = FusedModel(ARCH, LLAMA_NAMES, source, kind, packed=stored)
    outs = []
    for model in (first, again):
        with model.open([model.new_cache()]) as txn:
            outs.append(model.forward(PackedBatch([chain(range(20))]), txn).logits)
    assert torch.equal(*outs)


@needs_kernels
def test_wrong_input_is_refused() -> None:
    model = FusedModel.random(ARCH)
    cache = model.new_cache()
    for ids in ([61], [-1]):
        with pytest.raises(InputError, match=r"outside 0\.\.60"), model.open([cache]) as txn:
            model.forward(PackedBatch([chain(ids)]), txn)
    assert cache.n == cache.used == 0
    short = chain([1, 2])
    short.ancestors = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="ancestors"), model.open([cache]) as txn:
        model.forward(PackedBatch([short]), txn)
    with pytest.raises(ValueError, match="one segment a cache"), model.open([cache]) as txn:
        model.forward(PackedBatch([]), txn)
    with pytest.raises(RuntimeError, match="closed"):
        model.forward(PackedBatch([chain([1])]), txn)
    placed = Arch.llama(61, 32, 1, 2, 2, 32)
    fields = {f: getattr(placed, f) for f in placed.__dataclass_fields__}
    fields |= {"learned_positions": 8, "ropes": (), "layers": (LayerArch(None),)}
    model = FusedModel.random(Arch(**fields), names=NAMES)
    with pytest.raises(InputError, match="8 positions"), model.open([model.new_cache()]) as txn:
        model.forward(PackedBatch([chain(range(9))]), txn)


@needs_kernels
def test_the_time_of_stages_is_counted() -> None:
    model = FusedModel.random(ARCH)
    model.seconds = np.zeros(len(STAGES))
    prefilled(model, range(40))
    found = dict(zip(STAGES, model.seconds.tolist(), strict=True))
    assert all(found[s] > 0 for s in ("embed", "norm", "qkv", "attention", "o", "up", "down"))
    assert sum(found.values()) < 1


def test_the_choice_of_a_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, ARCH)
    monkeypatch.setenv("FORETELL_KERNELS", "off")
    assert type(load_model(tmp_path)) is NativeModel
    assert load_model(tmp_path, deterministic=True).exact  # type: ignore[attr-defined]
    assert "FORETELL_KERNELS" in str(refusal(ARCH, torch.float32))
    monkeypatch.delenv("FORETELL_KERNELS")
    if kernels.load() is None:
        assert type(load_model(tmp_path)) is NativeModel
        return
    for dtype in ("auto", "float32", "bfloat16", "int8", "int4"):
        assert type(load_model(tmp_path, dtype=dtype, deterministic=True)) is FusedModel
    assert type(load_model(tmp_path, dtype="float16")) is NativeModel
    assert load_model(tmp_path, dtype="int8").format == "int8"  # type: ignore[attr-defined]


def test_no_promise_that_cannot_be_kept(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, ARCH)
    with pytest.raises(InputError, match="deterministic"):
        load_model(tmp_path, backend="hf", deterministic=True)
