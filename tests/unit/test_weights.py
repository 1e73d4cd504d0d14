"""Checkpoint directories: every layout loads, every damage is one sentence, memory stays low."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.models.load import load_model, random_model
from foretell.models.native.arch import Arch
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import SafetensorsFile, write_random_checkpoint

ARCH = Arch.llama(61, 24, 3, 6, 2, 20, tied=False)
IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


def logits(model: NativeModel) -> torch.Tensor:
    with model.open([model.new_cache()]) as txn:
        return model.forward(PackedBatch([Segment(IDS, np.arange(len(IDS)))]), txn).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "m", ARCH, torch.float32, seed=5)
    return tmp_path / "m"


def test_a_written_checkpoint_equals_the_random_model(folder: Path) -> None:
    expected = logits(random_model(ARCH, dtype="float32", seed=5))
    assert logits(load_model(folder, dtype="float32")).equal(expected)
    close = {"rtol": 1e-4, "atol": 1e-4}  # torch's operations round in another order
    torch.testing.assert_close(expected, logits(NativeModel.random(ARCH, seed=5)), **close)


def test_transformers_reads_what_we_write(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)[None]).logits[0]
    torch.testing.assert_close(logits(load_model(folder)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["shards", "bin", "bin shards", "no prefix"])
def test_other_layouts(folder: Path, layout: str) -> None:
    expected = logits(load_model(folder))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    suffix = "bin" if "bin" in layout else "safetensors"
    stem = "pytorch_model" if "bin" in layout else "model"
    save = torch.save if "bin" in layout else save_file
    if "shards" in layout:
        table = {}
        for i in range(2):
            part = {k: v for j, (k, v) in enumerate(sorted(weights.items())) if j % 2 == i}
            name = f"{stem}-{i + 1:05}-of-00002.{suffix}"
            save(part, folder / name)
            table |= dict.fromkeys(part, name)
        index = folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    elif layout == "no prefix":
        save({k.removeprefix("model."): v for k, v in weights.items()}, folder / f"{stem}.{suffix}")
    else:
        save(weights, folder / f"{stem}.{suffix}")
    assert logits(load_model(folder)).equal(expected)


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_stored_dtypes(folder: Path, stored: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    expected = logits(load_model(folder))
    save_file({k: v.to(stored) for k, v in weights.items()}, folder / "model.safetensors")
    difference = (logits(load_model(folder, dtype="float32")) - expected).abs().max()
    assert difference < 0.15
    if stored != torch.float64:
        low = logits(load_model(folder, dtype="bfloat16"))
        assert low.dtype == torch.float32
        assert (low - expected).abs().max() < 0.3


def damage(folder: Path, how: str) -> Path:
    file, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(file) if "tensor" in how or "shape" in how or "integer" in how else {}
    if how == "no directory":
        return folder / "nowhere"
    if how == "a file":
        return file
    if how == "no config":
        config.unlink()
    elif how == "bad config":
        config.write_text('{"model_type": ')
    elif how == "empty config":
        config.write_text("[]")
    elif how == "config lacks a key":
        config.write_text('{"model_type": "llama"}')
    elif how == "no weights":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "empty file":
        file.write_bytes(b"")
    elif how == "garbage":
        file.write_bytes(b"not a checkpoint at all, sorry" * 10)
    elif how == "bad header":
        file.write_bytes((20).to_bytes(8, "little") + b"{" * 200)
    elif how == "missing shard":
        file.unlink()
        table = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    elif how == "bad index":
        file.unlink()
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "bad bin":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"nonsense")
    elif how == "missing tensor":
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file)
    elif how == "wrong shape":
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(20, 25)
        save_file(weights, file)
    elif how == "integer weights":
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = torch.zeros(20, 24, dtype=torch.int8)
        save_file(weights, file)
    elif how == "quantised":
        content = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}
        config.write_text(json.dumps(content))
    elif how == "unknown family":
        config.write_text('{"model_type": "martian"}')
    elif how == "odd heads":
        content = json.loads(config.read_text()) | {"num_key_value_heads": 4}
        config.write_text(json.dumps(content))
    elif how == "unknown rope":
        content = json.loads(config.read_text()) | {"rope_scaling": {"rope_type": "spiral"}}
        config.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no directory", "no directory"),
        ("a file", "is a file: give the directory"),
        ("no config", "has no config.json"),
        ("bad config", "config.json cannot be read"),
        ("empty config", "does not hold a JSON object"),
        ("config lacks a key", "lacks 'num_attention_heads'"),
        ("no weights", "has no weights"),
        ("truncated", "model.safetensors is not a whole safetensors file"),
        ("empty file", "model.safetensors cannot be read"),
        ("garbage", "model.safetensors is not a whole safetensors file"),
        ("bad header", "model.safetensors is not a whole safetensors file"),
        ("missing shard", "model-00001-of-00002.safetensors, which is missing"),
        ("bad index", "has no 'weight_map'"),
        ("bad bin", "pytorch_model.bin cannot be read"),
        ("missing tensor", "lacks the tensor 'model.layers.1.mlp.up_proj.weight'"),
        ("wrong shape", r"has the shape \[20, 25\] where config.json implies \[20, 24\]"),
        ("integer weights", "not stored as floating-point"),
        ("quantised", r"foretell\[hf\]"),
        ("unknown family", r"'martian'.*foretell\[hf\]"),
        ("odd heads", "does not divide"),
        ("unknown rope", "'spiral'"),
    ],
)
def test_damage_is_one_sentence(folder: Path, how: str, says: str) -> None:
    path = damage(folder, how)
    with pytest.raises(InputError, match=says) as caught:
        load_model(path, backend="native")
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 400


@pytest.mark.parametrize("option", [{"dtype": "int3"}, {"device": "tpu9"}, {"backend": "gguf"}])
def test_unknown_options(folder: Path, option: dict) -> None:
    with pytest.raises(InputError, match="There is no"):
        load_model(folder, **option)


def test_too_long_a_text_for_learned_positions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=5)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="longer than the 5 positions"):
        logits(load_model(tmp_path))


def test_progress_is_reported(folder: Path) -> None:
    seen: list[tuple[float, str]] = []
    load_model(folder, progress=lambda done, what: seen.append((done, what)))
    steps = [done for done, _ in seen]
    assert len(steps) >= 3
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert any(what == "layer 3 of 3" for _, what in seen)


def test_release_keeps_the_values(folder: Path) -> None:
    file = SafetensorsFile(folder / "model.safetensors")
    before = file.get("model.norm.weight").clone()
    view = file.get("model.norm.weight")
    file.release()
    assert view.equal(before)


MEASURE = """
import sys, threading, time, torch
from foretell.models.load import load_model

def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # libraries are loaded before we count
base = peak = rss()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.001)
t = threading.Thread(target=watch); t.start()
model = load_model(sys.argv[1], dtype=sys.argv[2], device="cpu")
done = True; t.join()
print(peak - base, rss() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("tied", [True, False])
def test_loading_never_holds_two_copies(
    tmp_path: Path, stored: str, wanted: str, tied: bool
) -> None:
    arch = Arch.llama(20000, 1024, 7, 16, 4, 2816, tied=tied)  # about 100 million numbers
    scale = arch.parameters / 1e6 * (2 if wanted == "bfloat16" else 4) / 1.048576
    write_random_checkpoint(tmp_path, arch, getattr(torch, stored))
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), wanted],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, _ = map(float, out.stdout.split())
    assert peak < scale + 150, f"peak {peak:.0f} MiB for {scale:.0f} MiB of weights"
