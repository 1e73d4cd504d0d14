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
from foretell.models.native.fused import FusedModel, refusal
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import RandomSource, read_config, stored_dtype
from foretell.models.quant.checkpoints import readable, scheme_of
from foretell.models.quant.formats import FORMATS, WeightFormat

LARGE = 1_500_000_000  # parameters from which bfloat16 is kept on a CPU
_DTYPES = ("float32", "bfloat16", "float16")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_model(
    path: str | Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    deterministic: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> TargetModel:
    """A model from a checkpoint directory, a hub id (`org/name`), or (None) the bundled one.

    dtype: float32, bfloat16, float16, int8, int4, int4-g128 (docs/quantisation.md) or auto (the
    format of a quantised checkpoint; else the checkpoint's own on a GPU; on a CPU float32, unless a
    bfloat16 checkpoint has more than 1.5 billion parameters).
    device: cpu, cuda, cuda:1 or auto. backend: native, hf or auto.
    deterministic: only a path on which a row's logits are the same to the last bit in any company.
    progress: called with (fraction done, what is being done). Raises InputError.

    On a CPU the compiled kernels run the model where they can (`FORETELL_KERNELS`), else torch.
    """
    folder = find_checkpoint(path)
    config = read_config(folder)
    if backend not in ("auto", "native", "hf"):
        raise InputError(f"There is no backend '{backend}': choose native or hf.")
    where = choose_device(device)
    known = config.get("model_type") in FAMILIES and readable(config, folder)
    if backend == "native" or (backend == "auto" and known):
        arch, _ = describe(config)
        scheme = scheme_of(config, folder)
        stored = stored_dtype(config) if scheme is None else scheme.form
        kind = choose_dtype(dtype, stored, arch.parameters, where)
        if fused(arch, kind, where):
            return cast(TargetModel, FusedModel.load(folder, kind, progress))
        return cast(TargetModel, NativeModel.load(folder, kind, where, progress, deterministic))
    if deterministic:
        raise InputError(
            "Results that do not depend on the batch need foretell's own runner on a CPU: leave "
            "out deterministic, or use a model that backend 'native' runs."
        )
    if find_spec("transformers") is None:
        describe(config)  # says what is unknown and names the extra
        raise InputError("backend 'hf' needs transformers: pip install 'foretell[hf]'.")
    from foretell.models.hf import HFModel

    kind = choose_dtype(dtype, stored_dtype(config), 0, where)
    if isinstance(kind, WeightFormat):
        raise InputError(
            f"dtype {kind} needs foretell's own runner (backend 'native'), which does not run this "
            "model: use float32 or bfloat16."
        )
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
    floats = torch.float32 if isinstance(kind, WeightFormat) else kind
    source, name = RandomSource(seed, 1.0, floats), f"random-{arch.family}"
    if fused(arch, kind, where):
        return cast(TargetModel, FusedModel(arch, LLAMA_NAMES, source, kind, name, progress))
    return cast(TargetModel, NativeModel(arch, LLAMA_NAMES, source, kind, where, name, progress))


def fused(arch: Arch, kind: torch.dtype | WeightFormat, device: torch.device) -> bool:
    """Whether the compiled kernels run a model (their first use may compile them)."""
    return device.type == "cpu" and refusal(arch, kind) is None


def bundled_model() -> Path:
    """The checkpoint directory that ships in the package."""
    return Path(__file__).parent.parent / "assets" / "base"


def find_checkpoint(path: str | Path | None) -> Path:
    """The directory behind a path or a hub id (fetched, or taken from the local hub cache); None is
    the bundled model."""
    if path is None:
        return bundled_model()
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
    dtype: str, stored: torch.dtype | WeightFormat, parameters: int, device: torch.device
) -> torch.dtype | WeightFormat:
    """stored: what the checkpoint holds."""
    if dtype == "auto":
        if device.type != "cpu" or isinstance(stored, WeightFormat):
            return stored
        keep = stored == torch.bfloat16 and parameters > LARGE
        return torch.bfloat16 if keep else torch.float32
    if dtype in FORMATS:
        return FORMATS[dtype]
    if dtype not in _DTYPES:
        known = ", ".join((*_DTYPES, *FORMATS))
        raise InputError(f"There is no dtype '{dtype}': choose {known} or auto.")
    return getattr(torch, dtype)
