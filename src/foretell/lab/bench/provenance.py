"""Where figures come from: versions, commit, hashes, environment."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from foretell import __version__

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "transformers", "matplotlib")
ENVIRONMENT = (
    "FORETELL_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH_", "ATEN_", "DNNL_",
    "ONEDNN_", "CUDA_", "LD_PRELOAD", "MALLOC_", "TBB_", "OV_", "GGML_",
)  # fmt: skip


def describe_model(folder: Path) -> dict[str, Any]:
    """Path, sha256 over weights and configuration, bytes, and whether it was widened."""
    config: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_bytes())
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    files += [p for p in (folder / "config.json", folder / "tokenizer.json") if p.is_file()]
    own = config.get("foretell") if isinstance(config.get("foretell"), dict) else {}
    return {
        "path": str(folder),
        "sha256": digest(files),
        "weight_bytes": sum(p.stat().st_size for p in files if p.suffix == ".safetensors"),
        "model_type": config.get("model_type"),
        "widened_from": (own or {}).get("widened_from"),
    }


def digest(files: Iterable[Path]) -> str:
    """One sha256 over the names and bytes of files."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as f:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def versions() -> dict[str, str]:
    found = {"foretell": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """`git describe` of the checkout this package lies in; None outside of one."""
    here = Path(__file__).resolve().parent
    if "site-packages" in here.parts:
        return None  # somebody's environment, perhaps inside somebody's checkout
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--tags"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def environment() -> dict[str, str]:
    """Variables that change speed or arithmetic."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)}


def command() -> str:
    import shlex

    return shlex.join(["foretell", *sys.argv[1:]])
