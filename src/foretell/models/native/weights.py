"""Checkpoint directories: safetensors (one file or shards), or pytorch_model.bin.

Files are mapped, read-only and without locks; a tensor is a view of the mapping until it is copied
into its place, and `release` drops the pages it touched, so loading never holds two copies.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.models.native.arch import Arch
from foretell.models.quant.formats import QTensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_AGAIN = "download or copy the checkpoint again"


class Source(Protocol):
    """Where named tensors come from: a checkpoint, or a random generator."""

    def has(self, name: str) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored. InputError when it is missing or has another shape."""
        ...

    def quantised(self, name: str, shape: tuple[int, int]) -> QTensor | None:
        """The integers of a matrix [out, in] that is stored as such, in a format of
        quant/formats.py; None when it is stored as floats, or can only be had as floats."""
        ...

    def release(self) -> None:
        """The tensors got so far have been copied: give their pages back."""
        ...


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; InputError with one sentence otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} has no {path.name} ({what}): give the directory of a checkpoint."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"{path} cannot be read ({e}): {_AGAIN}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object: {_AGAIN}.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory."""
    if not folder.is_dir():
        raise InputError(f"There is no directory {folder}: give the path of a checkpoint.")
    return read_json(folder / "config.json", "the model's description")


@dataclass(slots=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte in the file
    end: int


class SafetensorsFile:
    """One mapped safetensors file: 8 bytes of header length, a JSON header, the tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as f:
                # a private mapping costs nothing and lets torch see it as writable memory
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as e:
            raise InputError(f"{path} cannot be read ({e}): {_AGAIN}.") from None
        try:
            (length,) = struct.unpack("<Q", self.map[:8])
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(self.map[8 : 8 + length])
            header.pop("__metadata__", None)
            self.entries = {k: _entry(k, v, 8 + length, size) for k, v in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
            raise InputError(
                f"{path} is not a whole safetensors file ({_reason(e)}): {_AGAIN}."
            ) from None

    def get(self, name: str) -> Tensor:
        e = self.entries[name]
        count = (e.end - e.begin) // e.dtype.itemsize
        if count == 0:
            return torch.empty(e.shape, dtype=e.dtype)
        return torch.frombuffer(self.map, dtype=e.dtype, count=count, offset=e.begin).view(e.shape)

    def release(self) -> None:
        self.map.madvise(mmap.MADV_DONTNEED)


def _entry(name: str, item: Mapping[str, Any], start: int, size: int) -> _Entry:
    if item["dtype"] not in _DTYPES:
        return _Entry(torch.uint8, (0,), 0, 0)  # an integer buffer; nobody asks for it
    dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
    begin, end = item["data_offsets"]
    if start + end > size:
        raise ValueError("its end is missing")
    if begin < 0 or end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"the size of {name} contradicts its shape")
    return _Entry(dtype, shape, start + begin, start + end)


def _reason(e: Exception) -> str:
    return f"its header cannot be read, {type(e).__name__}" if "line" in str(e) else str(e)


class TorchFile:
    """pytorch_model.bin, read with `weights_only` and mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # torch raises many kinds
            first = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
            raise InputError(f"{path} cannot be read ({first}): {_AGAIN}.") from None

    def get(self, name: str) -> Tensor:
        return self.entries[name].detach()

    def release(self) -> None:
        """torch gives no handle on its mapping; the kernel drops clean pages when it must."""


class Checkpoint:
    """All tensors of a checkpoint directory by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, SafetensorsFile | TorchFile] = {}
        for stem, kind in (
            ("model.safetensors", SafetensorsFile),
            ("pytorch_model.bin", TorchFile),
        ):
            shards = self._shards(folder, stem)
            if shards:
                for shard in shards:
                    file = kind(folder / shard)
                    self.files.update(dict.fromkeys(file.entries, file))
                return
        raise InputError(
            f"{folder} has no weights: expected model.safetensors, its shards with an index, "
            "or pytorch_model.bin."
        )

    @staticmethod
    def _shards(folder: Path, stem: str) -> list[str]:
        index = folder / f"{stem}.index.json"
        if (folder / stem).exists():
            return [stem]
        if not index.exists():
            return []
        table = read_json(index, "the list of weight files").get("weight_map")
        if not isinstance(table, dict):
            raise InputError(f"{index} has no 'weight_map': {_AGAIN}.")
        shards = sorted(set(table.values()))
        for shard in shards:
            if not (folder / shard).exists():
                raise InputError(f"{index} names {shard}, which is missing: {_AGAIN}.")
        return shards

    def has(self, name: str) -> bool:
        return name in self.files

    def raw(self, name: str) -> Tensor:
        """A tensor of any dtype and shape."""
        file = self.files.get(name)
        if file is None:
            raise InputError(
                f"{self.folder} lacks the tensor '{name}': it is incomplete, or its config.json "
                "belongs to another model."
            )
        return file.get(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.raw(name)
        if not tensor.is_floating_point():
            raise InputError(
                f"'{name}' in {self.files[name].path} is not stored as floating-point numbers: "
                "use a checkpoint that is not quantised."
            )
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"'{name}' in {self.files[name].path} has the shape {list(tensor.shape)} where "
                f"config.json implies {list(shape)}: the two belong to different models."
            )
        return tensor

    def quantised(self, name: str, shape: tuple[int, int]) -> QTensor | None:
        return None

    def release(self) -> None:
        for file in set(self.files.values()):
            file.release()


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a checkpoint's config.json states (float32 when it states none)."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    known = (torch.float32, torch.bfloat16, torch.float16)
    return dtype if dtype in known else torch.float32


class RandomSource:
    """Random weights, made when they are asked for: matrices with entries of variance
    gain^2 / fan-in, norms near one, biases near zero. A name and a seed give the same tensor in
    whatever order tensors are asked for."""

    def __init__(self, seed: int = 0, gain: float = 1.0, dtype: torch.dtype = torch.float32):
        self.seed, self.gain, self.dtype = seed, gain, dtype

    def has(self, name: str) -> bool:
        return not name.startswith("lm_head.bias")

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        g = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 20) ^ self.seed)
        x = torch.randn(shape, generator=g, dtype=torch.float32)
        if len(shape) == 2:
            x *= self.gain * shape[1] ** -0.5
        else:
            x = 0.05 * x + (1.0 if "norm" in name and not name.endswith("bias") else 0.0)
        return x.to(self.dtype)

    def quantised(self, name: str, shape: tuple[int, int]) -> QTensor | None:
        return None

    def release(self) -> None:
        """Nothing is mapped."""


def write_random_checkpoint(
    folder: Path, arch: Arch, dtype: torch.dtype = torch.float32, seed: int = 0, gain: float = 1.0
) -> None:
    """A Llama checkpoint directory (tests, benchmarks) with the weights of
    `NativeModel.random(arch, dtype, seed)`; transformers loads it, too."""
    from safetensors.torch import save_file

    source = RandomSource(seed, gain, dtype)
    h, d = arch.hidden, arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab, h),
        "model.norm.weight": (h,),
    }
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab, h)
    for i in range(len(arch.layers)):
        at = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", arch.heads * d, h),
            ("self_attn.k_proj", arch.kv_heads * d, h),
            ("self_attn.v_proj", arch.kv_heads * d, h),
            ("self_attn.o_proj", h, arch.heads * d),
            ("mlp.gate_proj", arch.ffn, h),
            ("mlp.up_proj", arch.ffn, h),
            ("mlp.down_proj", h, arch.ffn),
        ):
            shapes[f"{at}{name}.weight"] = (rows, columns)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (
            h,
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab,
        "hidden_size": h,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": len(arch.layers),
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": d,
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.eps,
        "rope_theta": arch.ropes[0].theta,
        "tie_word_embeddings": arch.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    weights = {name: source.get(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
