"""Write a checkpoint as an OpenVINO model directory, for OpenVINO GenAI's LLMPipeline.

The graph is built by `openvino_graph`; f16 is OpenVINO's own compression, int8 and int4 are NNCF's
(weights only, no data). The tokenizer is converted by openvino-tokenizers where that and
transformers are installed; without it a pipeline takes token ids.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from foretell.core.errors import InputError
from foretell.lab.export.openvino_graph import GraphBuilder
from foretell.lab.export.parts import Parts

# dtype -> NNCF's mode and options. Embedding and head of the int4 ones are int8.
COMPRESSED = MappingProxyType(
    {
        "int8": ("INT8_SYM", {}),
        "int8_asym": ("INT8_ASYM", {}),
        "int4": ("INT4_SYM", {"group_size": 32, "ratio": 1.0}),
        "int4_128": ("INT4_SYM", {"group_size": 128, "ratio": 1.0}),
        "int4_asym": ("INT4_ASYM", {"group_size": 32, "ratio": 1.0}),
    }
)
DTYPES = ("f32", "f16", *COMPRESSED)
_FILES = ("*.json", "*.model", "merges.txt", "chat_template*")
Progress = Callable[[float, str], None]


def export_openvino(
    folder: Path, out: Path, dtype: str = "int8", progress: Progress | None = None
) -> Path:
    """Write the model in `folder` to the new directory `out`; returns it.

    dtype: one of `DTYPES`. Peak memory is four bytes a parameter and the result. The directory
    appears whole or not at all. InputError for families that have no graph here, when `out` exists
    and when a package is missing.
    """
    if dtype not in DTYPES:
        raise InputError(f"OpenVINO has no dtype '{dtype}' here: choose {', '.join(DTYPES)}.")
    folder = Path(folder)
    ov, compress = _openvino(), _nncf() if dtype in COMPRESSED else None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists already: name a new folder.")
    progress = progress or (lambda share, what: None)
    parts = Parts(folder)
    model = GraphBuilder(parts, ov).build(progress)
    if compress is not None:
        mode, options = COMPRESSED[dtype]
        progress(1.0, "compressing")
        model = compress.compress_weights(
            model, mode=getattr(compress.CompressWeightsMode, mode), **options
        )
    else:
        kind = ["runtime_options", "KV_CACHE_PRECISION"]  # else 8 bits, which an f32 user minds
        model.set_rt_info(dtype, kind)
    part = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        ov.save_model(model, part / "openvino_model.xml", compress_to_fp16=dtype == "f16")
        _text_files(folder, part, parts)
        _tokenizer(folder, part, ov)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _text_files(folder: Path, out: Path, parts: Parts) -> None:
    for path in (f for pattern in _FILES for f in folder.glob(pattern)):
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    windows = [layer.window for layer in parts.arch.layers if layer.window is not None]
    if windows and min(windows) < parts.arch.max_positions:
        # paged attention drops a mask; within one window nothing is lost
        config = {**parts.config, "max_position_embeddings": min(windows)}
        (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _tokenizer(folder: Path, out: Path, ov: Any) -> None:
    """openvino_tokenizer.xml and openvino_detokenizer.xml, where they can be made."""
    if find_spec("openvino_tokenizers") is None or find_spec("transformers") is None:
        return
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return
    from openvino_tokenizers import convert_tokenizer  # pyright: ignore[reportMissingImports]
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    both = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    for name, model in zip(("tokenizer", "detokenizer"), both, strict=True):
        ov.save_model(model, out / f"openvino_{name}.xml")


def _openvino() -> Any:
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "Writing an OpenVINO model needs the package openvino: pip install 'foretell[export]'."
        ) from None
    return openvino


def _nncf() -> Any:
    try:
        import nncf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "int8 and int4 need the package nncf: pip install 'foretell[export]', or choose f16."
        ) from None
    return nncf
