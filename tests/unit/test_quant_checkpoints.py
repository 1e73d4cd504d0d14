"""Checkpoints that are stored quantised: each layout built by hand from its published format."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.protocols import TargetModel
from foretell.models.load import load_model
from foretell.models.native.weights import Checkpoint
from foretell.models.quant.checkpoints import (
    QuantisedCheckpoint,
    integers,
    open_checkpoint,
    scheme_of,
    unpack,
)
from foretell.models.quant.formats import INT4, INT4_G128, INT8, dequantise

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_checkpoint import tiny_checkpoint

Numbers = dict[str, tuple[Tensor, Tensor]]  # matrix -> integers [out, in], scales [out, groups]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_KERNELS", "off")


def numbers(weights: dict[str, Tensor], bits: int, group: int) -> Numbers:
    """Integers and float16 scales for every matrix of the layers."""
    found: Numbers = {}
    for name, w in weights.items():
        if name.split(".")[-2] not in MATRICES:
            continue
        n, k = w.shape
        x = w.reshape(n, -1, group or k)
        scale = (x.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        q = (x / scale.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        found[name.removesuffix(".weight")] = (q.view(n, k).to(torch.int32), scale)
    return found


def words(numbers: Tensor, bits: int) -> Tensor:
    """[n, m] of 0..2^bits - 1 -> [n, m bits / 32] int32, the first number in the lowest bits."""
    each = 32 // bits
    wide = numbers.to(torch.int64).view(len(numbers), -1, each)
    packed = sum(wide[:, :, i] << (bits * i) for i in range(each))
    return torch.as_tensor(packed).to(torch.uint32).view(torch.int32)


def compressed(found: Numbers, bits: int, group: int) -> tuple[dict[str, Tensor], dict]:
    tensors = {}
    for stem, (q, scale) in found.items():
        tensors[stem + ".weight_packed"] = words(q + 2 ** (bits - 1), bits)
        tensors[stem + ".weight_scale"] = scale.bfloat16()
        tensors[stem + ".weight_shape"] = torch.tensor(q.shape)
        found[stem] = (q, scale.bfloat16())
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "actorder": None,
    }
    return tensors, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def w8a8(found: Numbers, bits: int, group: int) -> tuple[dict[str, Tensor], dict]:
    tensors, config = compressed(found, bits, group)
    for stem, (q, _) in found.items():
        del tensors[stem + ".weight_packed"], tensors[stem + ".weight_shape"]
        tensors[stem + ".weight"] = q.to(torch.int8)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    return tensors, config | {"format": "int-quantized"}


def gptq(
    found: Numbers, bits: int, group: int, form: str = "gptq", zero: int | None = None
) -> tuple[dict[str, Tensor], dict]:
    tensors = {}
    for stem, (q, scale) in found.items():
        n, k = q.shape
        middle = 2 ** (bits - 1)
        stored = (middle - (form == "gptq")) if zero is None else zero
        tensors[stem + ".qweight"] = words((q + middle).t().contiguous().t(), bits).t().contiguous()
        tensors[stem + ".qzeros"] = words(torch.full((scale.shape[1], n), stored), bits)
        tensors[stem + ".scales"] = scale.t().contiguous()
        tensors[stem + ".g_idx"] = (torch.arange(k) // (group or k)).to(torch.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": True}
    return tensors, config | {"desc_act": False, "checkpoint_format": form}


def awq(found: Numbers, bits: int, group: int) -> tuple[dict[str, Tensor], dict]:
    tensors, order = {}, [0, 2, 4, 6, 1, 3, 5, 7]  # which column each nibble holds
    for stem, (q, scale) in found.items():
        n, k = q.shape
        columns = (q.t() + 8).reshape(k, n // 8, 8)[:, :, order].reshape(k, n)
        tensors[stem + ".qweight"] = words(columns, bits)
        tensors[stem + ".qzeros"] = words(torch.full((scale.shape[1], n), 8), bits)
        tensors[stem + ".scales"] = scale.t().contiguous()
    config = {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True}
    return tensors, config | {"version": "gemm"}


def build(
    folder: Path, layout: Callable[..., Any], bits: int = 4, group: int = 32, **more: Any
) -> Numbers:
    """A tiny checkpoint in a layout; returns the numbers that went into it."""
    tiny_checkpoint(folder, tied=False)
    file = folder / "model.safetensors"
    weights = load_file(file)
    found = numbers(weights, bits, group)
    tensors, config = layout(found, bits, group, **more)
    kept = {k: v for k, v in weights.items() if k.removesuffix(".weight") not in found}
    save_file({k: v.contiguous() for k, v in (kept | tensors).items()}, file)
    change(folder, lambda c: c | {"quantization_config": config})
    return found


def change(folder: Path, edit: Callable[[dict], dict]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def quantisation(folder: Path, **values: Any) -> None:
    change(folder, lambda c: c | {"quantization_config": c["quantization_config"] | values})


def source(folder: Path) -> QuantisedCheckpoint:
    found = open_checkpoint(folder, json.loads((folder / "config.json").read_text()))
    assert isinstance(found, QuantisedCheckpoint)
    return found


def logits(model: TargetModel) -> Tensor:
    with model.open([model.new_cache()]) as txn:
        segment = Segment(np.arange(2, 14), np.arange(12))
        return model.forward(PackedBatch([segment]), txn).logits


LAYOUTS = [
    (compressed, 4, 32, {}),
    (compressed, 4, 0, {}),
    (compressed, 8, 32, {}),
    (compressed, 8, 0, {}),
    (w8a8, 8, 0, {}),
    (gptq, 4, 32, {}),
    (gptq, 4, 16, {}),
    (gptq, 4, 32, {"form": "gptq_v2"}),
    (gptq, 8, 0, {}),
    (gptq, 8, 32, {"form": "gptq_v2"}),
    (awq, 4, 32, {}),
]


def label(case: Any) -> str:
    return getattr(case, "__name__", str(case)) if not isinstance(case, dict) else ""


@pytest.mark.parametrize(("layout", "bits", "group", "more"), LAYOUTS, ids=label)
def test_layouts(tmp_path: Path, layout: Callable, bits: int, group: int, more: dict) -> None:
    found = build(tmp_path, layout, bits, group, **more)
    read = source(tmp_path)
    assert len(found) == 14
    for stem, (q, scale) in found.items():
        name, shape = stem + ".weight", (q.shape[0], q.shape[1])
        width = shape[1] // scale.shape[1]
        want = q * scale.float().repeat_interleave(width, 1)
        assert read.has(name)
        assert torch.equal(read.get(name, shape), want)
        stored = read.quantised(name, shape)
        if width % 32 == 0 and (bits == 4 or scale.shape[1] == 1):
            assert stored is not None
            assert stored.bits == bits
            assert torch.equal(stored.q.int(), q)
            assert torch.equal(dequantise(stored), want)
        else:
            assert stored is None
    assert read.quantised("lm_head.weight", (61, 32)) is None
    assert read.get("lm_head.weight", (61, 32)).dtype == torch.float32


@pytest.mark.parametrize(("layout", "bits", "group", "more"), LAYOUTS, ids=label)
def test_models_run_on_the_stored_integers(
    tmp_path: Path, layout: Callable, bits: int, group: int, more: dict
) -> None:
    found = build(tmp_path, layout, bits, group, **more)
    assert scheme_of(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    model: Any = load_model(tmp_path)
    assert model.format.bits == bits
    o = found["model.layers.1.self_attn.o_proj"]
    exact = 8 if bits == 8 else 4
    usable = group in (0, 32) and (bits == 4 or o[1].shape[1] == 1)
    if usable:
        assert torch.equal(model.layers[1].o.parts[0].q.int(), o[0])
    assert model.layers[1].o.parts[0].bits == (exact if usable else 8)
    assert model.head.parts[0].bits == 8  # it was left in floats
    whole = load_model(tmp_path, dtype="float32")
    a, b = logits(model), logits(whole)
    assert float((a - b).norm() / b.norm()) < 0.06  # activations and the head in 8 bits
    plain = tmp_path / "plain"
    tiny_checkpoint(plain, tied=False)
    weights = load_file(plain / "model.safetensors")
    for stem, (q, scale) in found.items():
        width = q.shape[1] // scale.shape[1]
        weights[stem + ".weight"] = q * scale.float().repeat_interleave(width, 1)
    save_file(weights, plain / "model.safetensors")
    assert torch.equal(logits(load_model(plain, dtype="float32")), b)


def test_what_else_can_be_asked_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    build(tmp_path / "eight", w8a8, 8, 0)
    build(tmp_path / "four", gptq, 4, 32)
    name, shape = "model.layers.0.self_attn.q_proj.weight", (32, 32)
    eight, four = source(tmp_path / "eight"), source(tmp_path / "four")
    assert integers(eight, name, shape, INT4).bits == 4  # requantised: fewer bits were asked for
    assert integers(four, name, shape, INT8).bits == 4  # the stored ones are what there is
    assert integers(four, "lm_head.weight", (61, 32), INT4).bits == 8
    assert integers(eight, "lm_head.weight", (61, 32), INT4).bits == 4
    assert integers(Checkpoint(tiny_checkpoint(tmp_path / "f")), name, shape, INT4).bits == 4
    assert logits(load_model(tmp_path / "eight", dtype="int4")).isfinite().all()


def test_a_row_that_is_one_group(tmp_path: Path) -> None:
    """Scales by channel run as the widest group that fits, each scale several times."""
    build(tmp_path, compressed, 4, 0)
    stored = source(tmp_path).quantised("model.layers.0.mlp.down_proj.weight", (32, 64))
    assert stored is not None
    assert stored.group == 64
    scheme = scheme_of(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    assert scheme is not None
    assert scheme.form is INT4_G128


def test_an_older_gptq_checkpoint(tmp_path: Path) -> None:
    found = build(tmp_path, gptq)
    config = json.loads((tmp_path / "config.json").read_text())
    own = config.pop("quantization_config")
    del own["quant_method"], own["checkpoint_format"]
    (tmp_path / "quantize_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = load_model(tmp_path)
    q = found["model.layers.0.mlp.down_proj"][0]
    assert torch.equal(model.layers[0].down.parts[0].q.int(), q)


def test_a_model_whose_layers_are_partly_floats(tmp_path: Path) -> None:
    """An ignore list that cuts through a stack of matrices that are multiplied together."""
    found = build(tmp_path, compressed)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    stem = "model.layers.0.self_attn.k_proj"
    q, scale = found[stem]
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{stem}.{part}"]
    tensors[stem + ".weight"] = q * scale.float()
    save_file(tensors, file)
    model: Any = load_model(tmp_path)
    assert [p.bits for p in model.layers[0].qkv.parts] == [4, 8, 4]
    whole = logits(load_model(tmp_path, dtype="float32"))
    assert float((logits(model) - whole).norm() / whole.norm()) < 0.06


def edited(folder: Path, part: str, edit: Callable[[Tensor], Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, file)


REFUSED: dict[str, tuple[Callable[..., Any], Callable[[Path], None], str]] = {
    "method": (gptq, lambda f: quantisation(f, quant_method="magic"), r"foretell\[hf\]"),
    "gptq 3 bits": (gptq, lambda f: quantisation(f, bits=3), "GPTQ weights of 3 bits"),
    "gptq asymmetric": (gptq, lambda f: quantisation(f, sym=False), "asymmetric"),
    "gptq marlin": (gptq, lambda f: quantisation(f, checkpoint_format="marlin"), "'marlin'"),
    "gptq zeros": (gptq, lambda f: edited(f, "qzeros", lambda t: t + 1), "asymmetric"),
    "gptq wrong version": (
        gptq,
        lambda f: quantisation(f, checkpoint_format="gptq_v2"),
        "asymmetric",
    ),
    "gptq order": (
        gptq,
        lambda f: edited(f, "g_idx", lambda t: t + torch.arange(len(t), dtype=t.dtype) % 2),
        "act-order",
    ),
    "gptq scales": (gptq, lambda f: edited(f, "scales", lambda t: t / 0), "not finite"),
    "gptq groups": (gptq, lambda f: edited(f, "scales", lambda t: t[:, :5]), "do not fit|shape"),
    "gptq shape": (gptq, lambda f: edited(f, "qweight", lambda t: t[1:]), "its shape is"),
    "gptq dtype": (gptq, lambda f: edited(f, "qweight", lambda t: t.short()), "int16"),
    "awq zeros": (awq, lambda f: edited(f, "qzeros", lambda t: t - 1), "asymmetric"),
    "awq gemv": (awq, lambda f: quantisation(f, version="gemv"), "'gemv'"),
    "awq 8 bits": (awq, lambda f: quantisation(f, bits=8), "AWQ weights of 8 bits"),
    "format": (w8a8, lambda f: quantisation(f, format="float-quantized"), "'float-quantized'"),
    "cache": (w8a8, lambda f: quantisation(f, kv_cache_scheme={"num_bits": 8}), "their cache"),
    "rotated": (w8a8, lambda f: quantisation(f, transform_config={"a": 1}), "rotate"),
    "sparse": (w8a8, lambda f: quantisation(f, sparsity_config={"format": "24"}), "sparse"),
    "no groups": (w8a8, lambda f: quantisation(f, config_groups={}), "config_groups"),
    "scale missing": (
        compressed,
        lambda f: edited(f, "weight_scale", lambda t: t[:3]),
        "do not fit",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_one_sentence(tmp_path: Path, case: str) -> None:
    layout, damage, says = REFUSED[case]
    build(tmp_path, layout, *((8, 0) if layout is w8a8 else (4, 32)))
    damage(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        load_model(tmp_path, backend="native")
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("weights", "inputs", "says"),
    [
        ({"symmetric": False}, {}, "asymmetric"),
        ({"num_bits": 3}, {}, "3 bits"),
        ({"type": "float"}, {}, "type float"),
        ({"strategy": "block"}, {}, "'block'"),
        ({"dynamic": True}, {}, "dynamically"),
        ({}, {"dynamic": False}, "activations"),
        ({}, {"num_bits": 4}, "activations"),
        ({}, {"symmetric": False}, "activations"),
        ({}, {"strategy": "tensor"}, "activations"),
    ],
)
def test_compressed_variants_that_are_refused(
    tmp_path: Path, weights: dict, inputs: dict, says: str
) -> None:
    build(tmp_path, w8a8, 8, 0)
    group = {"weights": WEIGHTS | weights, "input_activations": TOKENS | inputs}
    quantisation(tmp_path, config_groups={"group_0": group})
    with pytest.raises(InputError, match=says):
        load_model(tmp_path, backend="native")


def test_unpack() -> None:
    q = torch.randint(0, 16, (3, 16))
    assert torch.equal(unpack(words(q, 4), 4).long(), q)
    q = torch.randint(0, 256, (3, 8))
    assert torch.equal((unpack(words(q, 8), 8) - 128).long(), q - 128)
