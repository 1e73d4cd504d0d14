"""Find a model and load it: our own runner where it knows the family, transformers otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from foretell.core.errors import InputError
from foretell.core.protocols import TargetModel
from foretell.models.native.arch import Arch
from foretell.models.native.families import FAMILIES, LLAMA_NAMES, describe
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import RandomSource, read_config, stored_dtype

LARGE = 1_500_000_000  # parameters from which bfloat16 is kept on a CPU
_DTYPES = ("float32", "bfloat16", "float16")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    progress: Callable[[float, str], None] | None = None,
) -> TargetModel:
    """A model from a checkpoint directory or a hub id (`org/name`).

    dtype: float32, bfloat16, float16 or auto (the checkpoint's own on a GPU; on a CPU float32,
    unless a bfloat16 checkpoint has more than 1.5 billion parameters).
    device: cpu, cuda, cuda:1 or auto. backend: native, hf or auto.
    progress: called with (fraction done, what is being done). Raises InputError.
    """
    folder = find_checkpoint(path)
    config = read_config(folder)
    if backend not in ("auto", "native", "hf"):
        raise InputError(f"There is no backend '{backend}': choose native or hf.")
    where = choose_device(device)
    known = config.get("model_type") in FAMILIES and not config.get("quantization_config")
    if backend == "native" or (backend == "auto" and known):
        arch, _ = describe(config)
        kind = choose_dtype(dtype, stored_dtype(config), arch.parameters, where)
        return cast(TargetModel, NativeModel.load(folder, kind, where, progress))
    if find_spec("transformers") is None:
        describe(config)  # says what is unknown and names the extra
        raise InputError("backend 'hf' needs transformers: pip install 'foretell[hf]'.")
    from foretell.models.hf import HFModel

    kind = choose_dtype(dtype, stored_dtype(config), 0, where)
    name = str(kind).removeprefix("torch.")
    return cast(TargetModel, HFModel.load(folder, name, where, progress))


def random_model(
    arch: Arch,
    *,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> TargetModel:
    """A model of random weights, by the backend that `load_model` would choose for a checkpoint
    of this shape and dtype (`foretell lab forward --random-shape`, benchmarks)."""
    where = choose_device(device)
    kind = choose_dtype(dtype, torch.bfloat16, arch.parameters, where)
    source = RandomSource(seed, 1.0, kind)
    name = f"random-{arch.family}"
    return cast(TargetModel, NativeModel(arch, LLAMA_NAMES, source, kind, where, name, progress))


def find_checkpoint(path: str | Path) -> Path:
    """The directory behind a path or a hub id (fetched, or taken from the local hub cache)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.is_file():
        raise InputError(f"{path} is a file: give the directory that holds config.json.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or folder.parent.is_dir():
        raise InputError(
            f"There is no directory {path}: give the path of a checkpoint directory or a hub id "
            "such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as e:  # the hub and the network raise many kinds
        first = (str(e).splitlines() or [""])[0].split(". ")[0].rstrip(".")[:200]
        raise InputError(
            f"'{name}' is no directory here and could not be fetched from the hub "
            f"({type(e).__name__}: {first})."
        ) from None


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise InputError(f"There is no device '{device}': choose cpu or cuda.") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InputError("This machine has no CUDA device that torch can use: choose cpu.")
    return where


def choose_dtype(
    dtype: str, stored: torch.dtype, parameters: int, device: torch.device
) -> torch.dtype:
    if dtype == "auto":
        if device.type != "cpu":
            return stored
        keep = stored == torch.bfloat16 and parameters > LARGE
        return torch.bfloat16 if keep else torch.float32
    if dtype not in _DTYPES:
        raise InputError(f"There is no dtype '{dtype}': choose {', '.join(_DTYPES)} or auto.")
    return getattr(torch, dtype)
