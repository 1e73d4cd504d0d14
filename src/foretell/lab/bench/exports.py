"""The same weights in the file formats of other systems, kept by the hash of the model."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.lab.bench import provenance

GGUF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "q8_0", "int4": "q4_0"}
OPENVINO = {"float32": "f32", "bfloat16": "f16", "float16": "f16", "int8": "int8", "int4": "int4"}
FORMATS = {"llamacpp": ("gguf", GGUF), "openvino": ("openvino", OPENVINO)}
CODE = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from foretell.lab.export.{module} import export_{module} as export
export(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
"""


def peer_files(
    system: str,
    folder: Path,
    draft: Path | None,
    dtype: str,
    python: str,
    cache: Path,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """{"file", "draft_file", "file_dtype"} for a system that reads another format; written by the
    peer's own interpreter when they are not in `cache` yet."""
    if system not in FORMATS:
        return {}
    module, table = FORMATS[system]
    kind = next((v for k, v in table.items() if dtype.startswith(k)), None)  # int4-g32 is int4
    if kind is None:
        raise InputError(f"There is no {module} counterpart of dtype {dtype}.")
    files = [
        _file(module, f, kind, python, cache, note) if f is not None else None
        for f in (folder, draft)
    ]
    return {"file": files[0], "draft_file": files[1], "file_dtype": kind}


def _file(
    module: str, folder: Path, kind: str, python: str, cache: Path, note: Callable[[str], None]
) -> str:
    name = f"{folder.name}-{provenance.describe_model(folder)['sha256'][:16]}-{kind}"
    path = cache / (name + (".gguf" if module == "gguf" else f"-{module}"))
    if path.exists():
        return str(path)
    cache.mkdir(parents=True, exist_ok=True)
    note(f"exporting {folder} to {path}")
    root = Path(__file__).resolve().parents[3]
    words = [python, "-c", CODE.format(module=module), str(root), str(folder), str(path), kind]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    if done.returncode or not path.exists():
        lines = [t.strip() for t in done.stderr.splitlines() if t.strip()]
        why = lines[-1].rpartition("InputError: ")[2] if lines else f"exit code {done.returncode}"
        raise InputError(f"The model could not be exported to {module} ({why.rstrip('.')}).")
    return str(path)
