"""Integer formats, the cache of packed weights, and what `foretell lab quality` measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretell import kernels
from foretell.cli.main import main
from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.protocols import TargetModel
from foretell.lab import quality
from foretell.models.load import load_model
from foretell.models.native import fused
from foretell.models.native.arch import Arch
from foretell.models.native.weights import write_random_checkpoint
from foretell.models.quant import content, store
from foretell.models.quant.content import file_hash, store_key
from foretell.models.quant.formats import (
    FORMATS,
    INT4,
    INT4_G128,
    INT8,
    QTensor,
    dequantise,
    format_for,
    quantise,
    quantise_int4,
    quantise_int8,
    quantise_rows,
    stack,
)
from foretell.models.quant.store import StoreWriter, open_store
from foretell.models.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint


def absmax4(w: Tensor, group: int) -> Tensor:
    """The plain rule: absmax / 7."""
    x = w.view(len(w), -1, group)
    scale = x.abs().amax(-1, keepdim=True) / 7
    return ((x / scale).round() * scale).view_as(w)


# -- formats


def test_int8_is_absmax_over_127_to_the_nearest_even() -> None:
    w = torch.tensor([[127.0, -126.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.27, 0.0, 0.02]])
    q, scale = quantise_int8(w)
    assert scale.tolist() == [1.0, 0.0, pytest.approx(0.02)]
    assert q.tolist() == [[127, -126, 0, 2], [0, 0, 0, 0], [-127, 64, 0, 1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([INT8, INT4, INT4_G128]), st.floats(-12, 12))
def test_error_is_at_most_half_a_step(seed: int, form: object, power: float) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 256, generator=g) * 2.0**power
    t = quantise(w, form)  # type: ignore[arg-type]
    step = t.scale.abs().repeat_interleave(t.group or 256, -1).view(5, -1)
    error = (dequantise(t) - w).abs()
    if t.bits == 8:
        assert bool((error <= 0.5001 * step).all())
    else:
        clipped = (t.q == 7) | (t.q == -8)
        assert bool((error <= 0.51 * step)[~clipped].all())
        assert bool((error <= 2.1 * step).all())
    assert bool(torch.isfinite(t.scale).all())
    assert int(t.q.min()) >= (-127 if t.bits == 8 else -8)
    assert t.q.dtype == torch.int8
    assert t.half or t.bits == 8


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_beats_absmax_over_seven(group: int) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    q, scale = quantise_int4(w, group)
    error = (dequantise(QTensor(q, scale, group)) - w).square().sum()
    assert float(error / (absmax4(w, group) - w).square().sum()) < 0.75


def test_int4_uses_its_range_and_keeps_zero_groups() -> None:
    w = torch.zeros(2, 64)
    w[1, 32:] = torch.linspace(-1, 1, 32)
    w[0, 5] = 3.0
    t = quantise(w, INT4)
    assert t.scale.shape == (2, 2)
    assert t.scale[0, 1] == t.scale[1, 0] == 0
    assert dequantise(t)[0, 5] == pytest.approx(3.0, rel=1e-3)
    assert int(t.q.max()) == 7
    assert bool((dequantise(t)[0, :5] == 0).all())


@pytest.mark.parametrize("value", [1e30, 1e6, 1e-6, 1e-30, 1e-42])
def test_weights_beyond_float16(value: float) -> None:
    w = torch.full((3, 64), value)
    t = quantise(w, INT8)
    assert torch.allclose(dequantise(t), w, rtol=1e-2 if value > 1e-40 else 1, atol=0)
    with pytest.raises(InputError, match="use dtype int8"):
        quantise(w, INT4)
    w[0, 0] = 1.0  # some small groups are no reason
    assert bool((dequantise(quantise(w.clamp(max=1.0), INT4)) <= 1.01).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_weights_that_are_not_finite_are_refused(bad: float, form: object) -> None:
    w = torch.randn(3, 64)
    w[1, 7] = bad
    with pytest.raises(InputError, match=r"'w\.weight' holds weights that are not finite"):
        quantise(w, form, name="w.weight")  # type: ignore[arg-type]


def test_which_format_a_matrix_gets() -> None:
    assert format_for(INT4_G128, 256) is INT4_G128
    assert format_for(INT4_G128, 192).group == 64
    assert format_for(INT4_G128, 96).group == 32
    assert format_for(INT4, 256).group == 32
    assert format_for(INT4, 48) is INT8
    assert format_for(INT4, 256, head=True) is INT8
    assert format_for(INT8, 256) is INT8


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_blocks_orders_and_dtypes_change_nothing(form: object) -> None:
    w = torch.randn(3000, 256, dtype=torch.float32).bfloat16()
    whole = quantise(w, form)  # type: ignore[arg-type]
    order = torch.randperm(3000)
    mixed = quantise(w.float(), form, rows=order)  # type: ignore[arg-type]
    assert torch.equal(mixed.q, whole.q[order])
    assert torch.equal(mixed.scale, whole.scale[order])
    assert torch.equal(whole.rows(order).q, mixed.q)
    again = stack([whole.rows(slice(0, 10)), whole.rows(slice(10, 3000))])
    assert torch.equal(dequantise(again), dequantise(whole))


def test_rows_of_activations() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -0.5], [1e-42, 0.0], [3e38, -3e38]])
    q, scale = quantise_rows(x)
    assert q.tolist() == [[0, 0], [127, -64], [0, 0], [127, -127]]
    assert scale[1] == pytest.approx(1 / 127)
    assert bool(torch.isfinite(scale).all())


# -- the cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORETELL_CACHE_GB", raising=False)
    monkeypatch.setenv("FORETELL_KERNELS", "off")  # they would be compiled for this cache
    return tmp_path / "cache" / "weights"


def some_tensors() -> dict[str, Tensor]:
    return {
        "a": torch.randint(0, 255, (7, 13), dtype=torch.uint8),
        "b": torch.randn(33).bfloat16(),
        "empty": torch.zeros(0, 5),
        "c": torch.randn(3, 5).t(),
        "one": torch.tensor(4.5),
    }


def write(key: str, tensors: dict[str, Tensor], **about: str) -> bool:
    with StoreWriter(key, about) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.commit()


def test_what_is_written_is_mapped_aligned() -> None:
    tensors = some_tensors()
    assert open_store("k") is None
    assert write("k", tensors, model="m")
    found = open_store("k")
    assert found is not None
    assert list(found) == list(tensors)
    assert found.about == {"model": "m"}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not tensor.numel() or found[name].data_ptr() % 64 == 0
    found["a"][0, 0] += 1  # a private mapping: the file stays as it is
    again = open_store("k")
    assert again is not None
    assert torch.equal(again["a"], tensors["a"])


@pytest.mark.parametrize("how", ["cut", "table", "magic", "version", "empty", "key", "longer"])
def test_a_damaged_file_is_ignored(folder: Path, how: str) -> None:
    write("k", some_tensors())
    path = folder / "k.weights"
    data = bytearray(path.read_bytes())
    if how == "key":
        path.rename(folder / "other.weights")
        assert open_store("other") is None
        return
    at = {"table": len(data) - 3, "magic": 0, "version": 8}.get(how)
    if at is not None:
        data[at] ^= 1
    path.write_bytes({"cut": data[:-1], "empty": b"", "longer": data + b"x"}.get(how, data))
    assert open_store("k") is None
    assert write("k", some_tensors())
    assert open_store("k") is not None


def test_an_interrupted_writer_leaves_nothing(folder: Path) -> None:
    def interrupted() -> None:
        with StoreWriter("k") as writer:
            writer.add("a", torch.ones(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(folder.iterdir()) == []
    assert open_store("k") is None


@pytest.mark.parametrize("when", ["write", "fsync", "rename"])
def test_a_full_disk_is_one_warning_and_no_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, when: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with StoreWriter("k") as writer:
        writer.add("a", torch.ones(5))
        if when == "write":
            writer.file.close()
            writer.file = type("Full", (), {"seek": full, "write": full, "close": lambda s: None})()
        elif when == "fsync":
            monkeypatch.setattr(os, "fsync", full)
        else:
            monkeypatch.setattr(Path, "replace", full)
        writer.add("b", torch.ones(5))
        writer.add("c", torch.ones(5))
        assert not writer.commit()
    said = capfd.readouterr().err
    assert said.count("No space left on device") == 1
    assert said.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "file"))
    assert not write("k", some_tensors())
    assert capfd.readouterr().err.count("\n") == 1
    assert open_store("k") is None


def test_what_was_used_longest_ago_goes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, key in enumerate("abc"):
        write(key, {"x": torch.zeros(25_000)}, model=key)
        os.utime(folder / f"{key}.weights", (i, i))
    old = folder / ".dead.1.2.part"
    old.write_bytes(b"")
    os.utime(old, (1, 1))
    open_store("a")
    assert [c.about["model"] for c in store.cached()] == ["a", "c", "b"]
    monkeypatch.setenv("FORETELL_CACHE_GB", "0.00035")
    write("d", {"x": torch.zeros(25_000)})
    assert {p.name[0] for p in folder.iterdir()} == {"a", "c", "d"}
    assert open_store("b") is None
    assert not old.exists()


def test_a_model_beyond_the_bound_and_a_cache_switched_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    write("k", some_tensors())
    monkeypatch.setenv("FORETELL_CACHE_GB", "0.00001")
    assert not write("big", {"x": torch.zeros(25_000)})
    assert "FORETELL_CACHE_GB" in capfd.readouterr().err
    monkeypatch.setenv("FORETELL_CACHE_GB", "0")
    assert open_store("k") is None
    assert not write("k", some_tensors())
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("FORETELL_CACHE_GB", "many")
    assert open_store("k") is not None


def test_lab_cache(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write("k", some_tensors(), model="tiny", dtype="int8")
    assert main(["lab", "cache"]) == 0
    assert "tiny, int8" in capsys.readouterr().out
    assert main(["lab", "cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["model"] == "tiny"
    assert main(["lab", "cache", "--clear"]) == 0
    assert open_store("k") is None
    assert list(folder.glob("*.weights")) == []


# -- keys


def test_the_key_follows_content_not_names(tmp_path: Path) -> None:
    a = tiny_checkpoint(tmp_path / "a")
    key = store_key(a, "int8")
    assert key == store_key(tiny_checkpoint(tmp_path / "b"), "int8")
    assert key != store_key(a, "int4")
    file = a / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][3, 3] += 1
    before = file.stat()
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert store_key(a, "int8") != key


def test_a_hash_is_remembered_while_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, calls = tmp_path / "x.safetensors", []
    file.write_bytes(b"abc" * 1000)
    real = content._hash
    monkeypatch.setattr(content, "_hash", lambda p: calls.append(p) or real(p))
    first = file_hash(file)
    assert file_hash(file) == first
    assert len(calls) == 2  # changed within the last seconds: times prove nothing yet
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 60)
    file_hash(file)
    file_hash(file)
    assert len(calls) == 3
    file.write_bytes(b"abd" * 1000)
    assert file_hash(file) != first


def test_a_hash_covers_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK", 1000)
    data, seen = bytearray(4500), set()
    for at in (None, 0, 999, 1000, 2345, 4499):
        changed = bytearray(data)
        if at is not None:
            changed[at] = 1
        (tmp_path / "x").write_bytes(changed)
        seen.add(content._hash(tmp_path / "x"))
    (tmp_path / "x").write_bytes(data + b"\0")
    seen.add(content._hash(tmp_path / "x"))
    assert len(seen) == 7


# -- models and quality


def test_dtypes_reach_the_model(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path)
    with pytest.raises(InputError, match="int4-g128"):
        load_model(model, dtype="int5")
    sizes = [load_model(model, dtype=d).spec.weight_bytes for d in ("float32", "int8")]
    assert sizes[1] < 0.35 * sizes[0]


def some_logits(model: TargetModel) -> Tensor:
    with model.open([model.new_cache()]) as txn:
        return model.forward(PackedBatch([Segment(np.arange(9), np.arange(9))]), txn).logits


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_weights_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.delenv("FORETELL_CACHE")  # the compiled kernels stay where they are
    monkeypatch.delenv("FORETELL_KERNELS")
    for module in (store, content):
        monkeypatch.setattr(module, "cache_folder", lambda part: tmp_path / "cache")
    if kernels.load() is None:
        pytest.skip(str(kernels.why_not()))
    model = tiny_checkpoint(tmp_path / "m", tied=False)
    made = some_logits(load_model(model, dtype=dtype))
    (entry,) = store.cached()
    assert entry.about == {"model": "m", "format": dtype}
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_collect", lambda *_: pytest.fail("packed again"))
        assert torch.equal(some_logits(load_model(model, dtype=dtype)), made)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    save_file(weights, model / "model.safetensors")
    assert not torch.equal(some_logits(load_model(model, dtype=dtype)), made)
    assert len(store.cached()) == 2


MEMORY = """
import sys, threading, time, torch
from foretell.models.load import load_model

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

torch.set_num_threads(1)
before, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype=sys.argv[2])
running = False
watcher.join()
print(peak - before, model.spec.weight_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kernels_setting", ["off", "auto"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantising_needs_little_memory_on_top(
    tmp_path: Path, dtype: str, kernels_setting: str
) -> None:
    """Peak of anonymous memory against max(shard, quantised weights)."""
    arch = Arch.llama(32000, 512, 12, 8, 2, 1536, tied=False)
    write_random_checkpoint(tmp_path / "m", arch, torch.bfloat16)
    shard = (tmp_path / "m" / "model.safetensors").stat().st_size
    environment = dict(os.environ) | {"FORETELL_KERNELS": kernels_setting, "FORETELL_CACHE_GB": "0"}
    environment.pop("FORETELL_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "m"), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    peak, weights = map(int, run.stdout.split())
    assert peak <= 1.3 * max(shard, weights)


def test_windows_predict_every_token_but_the_first(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = quality.Text("t", ["hello world", "x", "more text"])
    found = quality.windows(text, tokenizer, 1000, 4)
    assert [tokenizer.decode(w) for w in found] == ["hello", "o wor", "rld", "more ", " text"]
    assert sum(len(w) - 1 for w in quality.windows(text, tokenizer, 6, 4)) == 6
    with pytest.raises(InputError, match="empty"):
        quality.windows(quality.Text("t", ["x"]), tokenizer, 10, 4)


def test_quality_is_the_cross_entropy(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, vocab=258)
    byte_tokenizer(model)
    text = "The quick brown fox jumps over the lazy dog. " * 3
    found = quality.measure(
        model, [quality.Text("t", [text])], ["int8", "float32", "int4"], tokens=100, width=30
    )["t"]
    assert [q.dtype for q in found] == ["int8", "float32", "int4"]
    eight, whole, four = found
    assert whole.agreement == 1
    assert whole.kl == 0
    assert 0 < eight.kl < four.kl
    assert eight.agreement > four.agreement - 0.05
    tokenizer = Tokenizer.load(model)
    ids = tokenizer.encode(text)[:101]
    nats = 0.0
    for begin in range(0, 100, 30):
        window = ids[begin : begin + 31]
        logp = quality._log_probs(load_model(model, dtype="float32"), [window])
        nats -= float(logp[np.arange(len(window) - 1), window[1:]].sum())
    assert whole.bits_per_byte == pytest.approx(nats / np.log(2) / len(text.encode()[1:101]))


def test_lab_quality(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_checkpoint(tmp_path / "m", vocab=258)
    byte_tokenizer(model)
    text = tmp_path / "t.txt"
    text.write_text("some text that is scored")
    words = ["lab", "quality", "--model", str(model), "--text", str(text), "--dtypes", "int8"]
    assert main([*words, "--json", "--quiet"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["texts"]["t.txt"]
    assert row["dtype"] == "int8"
    assert 0 <= row["agreement"] <= 1
    assert main(words) == 0
    assert "bits/byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dtypes", "int3"], "int3"),
        (["--dtypes", ","], "names no format"),
        (["--tokens", "0"], "--tokens"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--no-stdlib"], "nothing to score"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_words_are_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["lab", "quality", *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_lab_without_a_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["lab"]) == 2
    assert "quality" in capsys.readouterr().out
    assert main(["lab", "--help"]) == 0
    assert main(["lab", "qualty"]) == 2
    assert "did you mean 'quality'" in capsys.readouterr().err
