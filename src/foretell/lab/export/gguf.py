"""Write a checkpoint as a GGUF file, for llama.cpp and what is built on it.

`gguf` writes the file; the K-quants and q4_0 are llama.cpp's own, made through llama-cpp-python.
Tensors go to the file one at a time. Vectors stay float32, as llama.cpp wants them.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.lab.export.gguf_tokens import Vocabulary, read_vocabulary
from foretell.lab.export.parts import Parts, has_bias, layer_norms, matrix_shapes

PLAIN = ("f32", "f16", "bf16", "q8_0")
# llama.cpp's numbers of the formats that it makes itself
QUANTISED = MappingProxyType(
    {"q4_0": 2, "q4_K_S": 14, "q4_K_M": 15, "q5_K_M": 17, "q6_K": 18, "q3_K_M": 12}
)
DTYPES = (*PLAIN, *QUANTISED)
# family -> llama.cpp's architecture
_ARCHITECTURES = MappingProxyType(
    {
        "llama": "llama",
        "mistral": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "gemma": "gemma",
        "gemma2": "gemma2",
        "gemma3_text": "gemma3",
        "gemma3": "gemma3",
        "olmo2": "olmo2",
        "granite": "granite",
    }
)
_INTERLEAVED = ("llama", "granite")  # architectures that turn coordinates 2d and 2d + 1
Progress = Callable[[float, str], None]


def export_gguf(
    folder: Path, out: Path, dtype: str = "f16", progress: Progress | None = None
) -> Path:
    """Write the model in `folder` to the file `out`; returns it.

    dtype: one of `DTYPES`; matrices of which rows do not fill a block stay f16. The file appears
    whole or not at all. InputError for families and rotary positions that llama.cpp computes
    otherwise, and when a package is missing.
    """
    if dtype not in DTYPES:
        raise InputError(f"GGUF has no dtype '{dtype}' here: choose {', '.join(DTYPES)}.")
    if dtype in QUANTISED:
        _llama_cpp()
    writer = _Writer(Parts(Path(folder)), dtype if dtype in PLAIN else "f16")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    wide = part.with_suffix(".f16")
    try:
        writer.write(part if dtype in PLAIN else wide, progress or (lambda share, what: None))
        if dtype in QUANTISED:
            _quantise(wide, part, QUANTISED[dtype])
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
        wide.unlink(missing_ok=True)
    return out


class _Writer:
    def __init__(self, parts: Parts, dtype: str) -> None:
        self.gguf = _gguf()
        self.parts, self.dtype, a = parts, dtype, parts.arch
        check(parts)
        self.architecture = _ARCHITECTURES[a.family]
        self.architecture_id = next(
            k for k, v in self.gguf.MODEL_ARCH_NAMES.items() if v == self.architecture
        )
        self.names = self.gguf.get_tensor_name_map(self.architecture_id, len(a.layers))

    def write(self, out: Path, progress: Progress) -> None:
        g, a = self.gguf, self.parts.arch
        w = g.GGUFWriter(out, self.architecture)
        self._facts(w)
        self._vocabulary(w, read_vocabulary(self.parts.folder, a.vocab))
        kinds = []
        for name, shape in self._shapes():
            kind = self._kind(shape)
            kinds.append(kind)
            size = math.prod(g.quant_shape_to_byte_shape(shape, kind))
            if kind in (g.GGMLQuantizationType.F32, g.GGMLQuantizationType.F16):
                size = math.prod(shape) * (4 if kind == g.GGMLQuantizationType.F32 else 2)
            w.add_tensor_info(name, shape, np.dtype(np.float16), size, raw_dtype=kind)
        try:
            w.write_header_to_file()
            w.write_kv_data_to_file()
            w.write_ti_data_to_file()
            for i, ((_, tensor), kind) in enumerate(zip(self._tensors(), kinds, strict=True)):
                w.write_tensor_data(g.quantize(tensor().float().contiguous().numpy(), kind))
                self.parts.source.release()
                progress((i + 1) / len(kinds), "writing tensors")
        finally:
            w.close()

    # -- key/value section

    def _facts(self, w: Any) -> None:
        g, p, a = self.gguf, self.parts, self.parts.arch
        rope = a.ropes[0]
        windows = [layer.window for layer in a.layers if layer.window is not None]
        w.add_name(p.folder.name)
        w.add_vocab_size(a.vocab)
        # llama.cpp has no windows in these; within one they see the same
        short = windows if self.architecture in ("llama", "qwen2", "qwen3") else []
        w.add_context_length(min([a.max_positions, *short]))
        w.add_embedding_length(a.hidden)
        w.add_block_count(len(a.layers))
        w.add_feed_forward_length(a.ffn)
        w.add_head_count(a.heads)
        w.add_head_count_kv(a.kv_heads)
        w.add_key_length(a.head_dim)
        w.add_value_length(a.head_dim)
        w.add_layer_norm_rms_eps(a.eps)
        w.add_rope_dimension_count(rope.dim)
        w.add_rope_freq_base(rope.theta)
        if rope.kind == "linear":
            w.add_rope_scaling_type(g.RopeScalingType.LINEAR)
            w.add_rope_scaling_factor(rope.factor)
        if self.architecture in ("gemma2", "gemma3") and windows:
            w.add_sliding_window(windows[0])
        if a.attn_cap is not None:
            w.add_attn_logit_softcapping(a.attn_cap)
        if a.logit_cap is not None:
            w.add_final_logit_softcapping(a.logit_cap)
        if self.architecture == "granite":
            w.add_attention_scale(a.scale)
            w.add_embedding_scale(a.embed_scale)
            w.add_residual_scale(a.residual_scale)
            w.add_logit_scale(1 / a.logit_scale)
        kind = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[self.dtype]
        w.add_file_type(kind)
        w.add_quantization_version(g.GGML_QUANT_VERSION)

    def _vocabulary(self, w: Any, v: Vocabulary) -> None:
        w.add_tokenizer_model(v.kind)
        if v.kind == "no_vocab":
            return
        w.add_tokenizer_pre(v.pre)
        w.add_token_list(v.tokens)
        w.add_token_types(v.types)
        if v.merges:
            w.add_token_merges(v.merges)
        if v.scores:
            w.add_token_scores(v.scores)
            w.add_add_space_prefix(v.add_space)
        w.add_add_bos_token(v.add_bos)
        for role, token in v.ids.items():
            method = {"unk": "add_unk_token_id", "pad": "add_pad_token_id"}.get(role)
            getattr(w, method or f"add_{role}_token_id")(token)
        if v.template:
            w.add_chat_template(v.template)

    # -- tensors

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of `_tensors`."""
        for name, make in self._tensors():
            yield name, tuple(make().shape)

    def _kind(self, shape: tuple[int, ...]) -> Any:
        types = self.gguf.GGMLQuantizationType
        if len(shape) == 1:
            return types.F32
        if self.dtype == "q8_0" and shape[-1] % 32:
            return types.F16
        return {"f32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[
            self.dtype
        ]

    def _tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every tensor's name in the file, and what makes it."""
        p, a = self.parts, self.parts.arch
        yield self._name("embed"), p.embedding
        yield self._name("norm"), partial(self._norm, "norm")
        if not a.tied:
            yield self.names.get_name("lm_head") + ".weight", lambda: _there(p.head())
        if a.ropes[0].kind == "llama3":
            yield "rope_freqs.weight", self._rope_factors
        for i in range(len(a.layers)):
            for role in [*layer_norms(a), *(("q_norm", "k_norm") if a.qk_norm else ())]:
                yield self._name(role, i), partial(self._norm, role, i)
            for role in matrix_shapes(a):
                yield self._name(role, i), partial(self._matrix, role, i)
                if has_bias(a, role):
                    yield self._name(role, i, ".bias"), partial(self._bias, role, i)

    def _name(self, role: str, layer: int | None = None, kind: str = ".weight") -> str:
        name = "model." + self.parts.names.body[role].format(layer)
        found = self.names.get_name(name)
        if found is None:
            raise InputError(f"llama.cpp's {self.architecture} has no place for {name}.")
        return found + kind

    def _norm(self, role: str, layer: int | None = None) -> Tensor:
        return self.parts.norm(role, layer).float() + self.parts.arch.norm_offset

    def _matrix(self, role: str, layer: int) -> Tensor:
        return self._turned(role, self.parts.matrix(role, layer))

    def _bias(self, role: str, layer: int) -> Tensor:
        return self._turned(role, _there(self.parts.bias(role, layer)))

    def _turned(self, role: str, x: Tensor) -> Tensor:
        """Rows of q and k in the order of architectures that turn neighbours."""
        if role not in "qk" or self.architecture not in _INTERLEAVED:
            return x
        pairs = x.unflatten(0, (-1, 2, self.parts.arch.head_dim // 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    def _rope_factors(self) -> Tensor:
        """[D / 2]: what llama.cpp divides the plain frequencies by."""
        rope = self.parts.arch.ropes[0]
        exponent = torch.arange(0, rope.dim, 2).float() / rope.dim
        return rope.theta**-exponent / rope.frequencies()


def check(parts: Parts) -> None:
    """InputError for what llama.cpp computes otherwise."""
    a = parts.arch
    if a.family not in _ARCHITECTURES:
        raise InputError(
            f"{a.family} cannot be written as GGUF here: llama, mistral, qwen2, qwen3, gemma, "
            "gemma2, gemma3, olmo2 and granite can."
        )
    kinds = {r.kind for r in a.ropes} - {"default", "linear", "llama3"}
    if kinds:
        raise InputError(f"Rotary positions of the kind {kinds.pop()} cannot be written as GGUF.")
    if any(r.dim != a.head_dim for r in a.ropes):
        raise InputError("Heads that turn in part only cannot be written as GGUF.")
    if a.family in ("gemma2", "gemma3", "gemma3_text") and a.scale != a.head_dim**-0.5:
        raise InputError(
            "llama.cpp scales this family's scores with its head size, this model with another: "
            "it cannot be written as GGUF."
        )
    near = a.ropes[-1]
    if len(a.ropes) > 1 and (near.kind != "default" or near.theta != 10000.0):
        raise InputError("llama.cpp has the frequencies of near layers built in; these differ.")


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _gguf() -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "Writing GGUF needs the package gguf: pip install 'foretell[export]'."
        ) from None
    return gguf


def _llama_cpp() -> Any:
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "Only q8_0 and wider are written without llama.cpp: pip install llama-cpp-python for "
            f"{', '.join(QUANTISED)}."
        ) from None
    return llama_cpp


def _quantise(source: Path, out: Path, kind: int) -> None:
    lib = _llama_cpp()
    lib._logger.set_verbose(False)
    options = lib.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, torch.get_num_threads()
    code = lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(options))
    if code:
        raise InputError(f"llama.cpp could not quantise {source.name} (code {code}).")
