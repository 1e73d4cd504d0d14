"""Checkpoints that are stored quantised, as a `Source`: compressed-tensors, GPTQ and AWQ.

Read are those whose weights are symmetric integers with scales along the inputs, in order:

* compressed-tensors `int-quantized` (W8A8, dynamic per-token activations) and `pack-quantized`
  (4 or 8 bits, by group or channel): `weight` or `weight_packed` [out, in / 8] int32, lowest bits
  first and offset by 2^(bits - 1); `weight_scale` [out, groups];
* GPTQ, 4 or 8 bits, no act-order: `qweight` [in / 8, out], `qzeros` [groups, out / 8], `scales`
  [groups, out], `g_idx` [in]. The first format stores zero points less one, `gptq_v2` as they are;
* AWQ `gemm`, 4 bits: `qweight` [in, out / 8] and `qzeros` [groups, out / 8], whose nibbles hold the
  columns 0 2 4 6 1 3 5 7, and `scales` [groups, out]. Zero points must all be 8.

Everything else is refused with one sentence. Matrices that such a checkpoint leaves in floats (the
output head, ignore lists) become int8 when the model runs on integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.models.native.weights import Checkpoint, Source, read_json
from foretell.models.quant.formats import (
    GROUPS,
    INT4,
    INT4_G64,
    INT4_G128,
    INT8,
    QTensor,
    WeightFormat,
    dequantise,
    quantise,
)

Config = Mapping[str, Any]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where columns 0..7 lie among the nibbles of a word
_PARTS = ("weight_packed", "qweight")  # what a packed matrix has instead of `weight`
_PACKAGES = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint is quantised."""

    method: str  # compressed-tensors, gptq or awq
    bits: int
    group: int  # inputs that share a scale; 0 = all
    offset: int = 0  # gptq: what is added to stored zero points

    @property
    def form(self) -> WeightFormat:
        """The format its integers run in."""
        if self.bits == 8:
            return INT8
        if self.group == 0 or self.group % 128 == 0:
            return INT4_G128
        return INT4_G64 if self.group % 64 == 0 else INT4


def scheme_of(config: Config, folder: Path) -> Scheme | None:
    """What config.json (or an older GPTQ checkpoint's quantize_config.json) says; None for a
    checkpoint of floats. InputError says why foretell's own runner does not read it."""
    found = config.get("quantization_config")
    if not found and (folder / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"} | read_json(
            folder / "quantize_config.json", "how the weights are quantised"
        )
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise InputError(f"{folder}: quantization_config in config.json is not an object.")
    method = str(found.get("quant_method", "")).lower()
    if method == "compressed-tensors":
        return _compressed(found)
    if method == "gptq":
        return _gptq(found)
    if method == "awq":
        return _awq(found)
    raise InputError(
        f"foretell's own runner does not read weights quantised by '{method or 'nobody named'}': "
        "install 'foretell[hf]' and load them through transformers (backend 'hf'), or use the "
        "unquantised checkpoint with --dtype int8 or int4."
    )


def readable(config: Config, folder: Path) -> bool:
    """Whether foretell's own runner takes these weights. Raises InputError where it does not and
    transformers lacks the package that would."""
    try:
        scheme_of(config, folder)
    except InputError:
        method = str((config.get("quantization_config") or {}).get("quant_method", "")).lower()
        package = _PACKAGES.get(method)
        if package is not None and find_spec(package) is None:
            raise
        return False
    return True


def open_checkpoint(folder: Path, config: Config) -> Source:
    """The tensors of a checkpoint directory."""
    scheme = scheme_of(config, folder)
    return Checkpoint(folder) if scheme is None else QuantisedCheckpoint(folder, scheme)


def integers(
    source: Source,
    name: str,
    shape: tuple[int, int],
    form: WeightFormat,
    *,
    transposed: bool = False,
    head: bool = False,
) -> QTensor:
    """A matrix [out, in] for a model in `form`: the checkpoint's own integers where it has some of
    at most as many bits, else its floats quantised. What a quantised checkpoint left in floats, or
    stores in groups that int8 has not, becomes int8. transposed: floats are stored [in, out]."""
    stored = source.quantised(name, shape)
    if stored is not None and stored.bits <= form.bits:
        return stored
    if isinstance(source, QuantisedCheckpoint):
        transposed = transposed and not source.packed(name)
        if source.scheme.bits <= form.bits:
            form = INT8
    floats = source.get(name, shape[::-1] if transposed else shape)
    return quantise(floats.t() if transposed else floats, form, head=head, name=name)


class QuantisedCheckpoint:
    """A `Source` over a quantised checkpoint; tensors it left alone are as in any other."""

    def __init__(self, folder: Path, scheme: Scheme) -> None:
        self.scheme, self.base = scheme, Checkpoint(folder)

    def packed(self, name: str) -> bool:
        """Whether a matrix `...weight` is stored as integers."""
        stem = name.removesuffix(".weight")
        if any(self.base.has(f"{stem}.{part}") for part in _PARTS):
            return True
        return self.base.has(stem + ".weight_scale") and self.base.has(name)

    def has(self, name: str) -> bool:
        return self.base.has(name) or self.packed(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Floats; of a matrix stored as integers the numbers they stand for."""
        if not (name.endswith(".weight") and self.packed(name)):
            return self.base.get(name, shape)
        q, scale = self._read(name, (shape[0], shape[1]))
        return dequantise(QTensor(q, scale, shape[1] // scale.shape[1]))

    def quantised(self, name: str, shape: tuple[int, int]) -> QTensor | None:
        if not self.packed(name):
            return None
        q, scale = self._read(name, shape)
        groups = scale.shape[1]
        if self.scheme.bits == 8:
            return QTensor(q, scale[:, 0].contiguous()) if groups == 1 else None
        width = shape[1] // groups
        for group in GROUPS:
            if width % group == 0:  # a group of 256, or a whole row: its scale several times
                return QTensor(q, scale.repeat_interleave(width // group, 1), group)
        return QTensor(q, scale[:, 0].contiguous()) if groups == 1 else None

    def release(self) -> None:
        self.base.release()

    def _read(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(integers [out, in] int8, scales [out, groups] float32), zero points taken off."""
        stem, (n, k) = name.removesuffix(".weight"), shape
        read = self._compressed if self.scheme.method == "compressed-tensors" else self._packed
        q, scale = read(stem, n, k)
        if scale.ndim != 2 or scale.shape[0] != n or k % scale.shape[1]:
            raise self._wrong(stem, "its scales do not fit its shape")
        if not bool(torch.isfinite(scale).all()):
            raise self._wrong(stem, "its scales are not finite")
        order = self._order(stem)
        if order is not None:
            plain = torch.arange(k) // (k // scale.shape[1])
            if not torch.equal(order.long().cpu(), plain):
                raise _refuse("weights in activation order (act-order, desc_act)")
        return q, scale

    def _order(self, stem: str) -> Tensor | None:
        for part in ("g_idx", "weight_g_idx"):
            if self.base.has(f"{stem}.{part}"):
                order = self.base.raw(f"{stem}.{part}")
                return None if bool((order < 0).all()) else order  # -1: unused
        return None

    def _compressed(self, stem: str, n: int, k: int) -> tuple[Tensor, Tensor]:
        if self.base.has(stem + ".weight_packed"):
            words = self._raw(stem, "weight_packed", (n, -(-k * self.scheme.bits // 32)))
            q = (unpack(words, self.scheme.bits)[:, :k]) - (1 << (self.scheme.bits - 1))
        else:
            q = self._raw(stem, "weight", (n, k))
            if q.dtype != torch.int8:
                raise self._wrong(stem, f"it is stored as {q.dtype}")
            q = q.clone()
        if self.base.has(stem + ".weight_zero_point") and bool(
            self.base.raw(stem + ".weight_zero_point").any()
        ):
            raise _refuse("asymmetric weights (zero points)")
        scale = self.base.raw(stem + ".weight_scale").float()
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(n, 1)
        return q, (scale[:, None] if scale.ndim == 1 else scale).contiguous()

    def _packed(self, stem: str, n: int, k: int) -> tuple[Tensor, Tensor]:
        """GPTQ and AWQ."""
        bits, middle = self.scheme.bits, 1 << (self.scheme.bits - 1)
        each = 32 // bits
        scale = self.base.raw(stem + ".scales").float().t().contiguous()
        groups = scale.shape[-1]
        zeros = unpack(self._raw(stem, "qzeros", (groups, n // each)), bits).to(torch.int16)
        if bool(((zeros & (2 * middle - 1)) + self.scheme.offset != middle).any()):
            raise _refuse("asymmetric weights (zero points)")
        if self.scheme.method == "gptq":
            words = self._raw(stem, "qweight", (k // each, n))
            q = unpack(words.t().contiguous(), bits)
        else:
            words = self._raw(stem, "qweight", (k, n // each))
            q = unpack(words, bits).view(k, n // 8, 8)[:, :, AWQ_ORDER].view(k, n).t().contiguous()
        return q - middle, scale

    def _raw(self, stem: str, part: str, shape: tuple[int, int]) -> Tensor:
        tensor = self.base.raw(f"{stem}.{part}")
        if tuple(tensor.shape) != shape:
            raise self._wrong(
                f"{stem}.{part}", f"its shape is {list(tensor.shape)}, not {list(shape)}"
            )
        return tensor

    def _wrong(self, stem: str, why: str) -> InputError:
        return InputError(
            f"'{stem}' in {self.base.folder} is not what its quantization_config says ({why}): "
            "the two do not belong together."
        )


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] of 32 / bits numbers each, the first in the low bits -> int8 [n, m 32 / bits].
    4-bit numbers come as 0..15, 8-bit ones wrapped to -128..127: less 128 they are right again."""
    if words.dtype != torch.int32:
        raise InputError(f"Packed weights are stored as {words.dtype}, not int32: damaged.")
    pieces = words.contiguous().view(torch.uint8)
    if bits == 8:
        return pieces.view(torch.int8)
    return torch.stack([pieces & 15, pieces >> 4], -1).view(len(words), -1).view(torch.int8)


def _refuse(what: str) -> InputError:
    return InputError(
        f"foretell does not read {what}: use the unquantised checkpoint with --dtype int8 or int4, "
        "or one that is quantised symmetrically (docs/quantisation.md)."
    )


def _compressed(found: Config) -> Scheme:
    known = ("int-quantized", "pack-quantized", "naive-quantized", "mixed-precision")
    if found.get("format", known[0]) not in known:
        raise _refuse(f"compressed-tensors of the format '{found.get('format')}'")
    for key, what in (
        ("kv_cache_scheme", "checkpoints that quantise their cache"),
        ("transform_config", "checkpoints that rotate their weights"),
    ):
        if found.get(key):
            raise _refuse(what)
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refuse(f"sparse weights ('{sparsity}')")
    schemes = set()
    for group in (found.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        schemes.add(_compressed_weights(weights))
        inputs = group.get("input_activations")
        if inputs is not None and not (
            inputs.get("type", "int") == "int"
            and inputs.get("num_bits") == 8
            and inputs.get("dynamic") is True
            and inputs.get("symmetric", True)
            and inputs.get("strategy", "token") == "token"
        ):
            raise _refuse("activations that are not quantised dynamically to 8 bits by token")
        if group.get("output_activations"):
            raise _refuse("quantised outputs")
    if len(schemes) != 1:
        raise _refuse(
            "a mixture of weight formats" if schemes else "an empty list of config_groups"
        )
    return schemes.pop()


def _compressed_weights(weights: Config) -> Scheme:
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if weights.get("type", "int") != "int" or bits not in (4, 8):
        raise _refuse(f"weights of the type {weights.get('type')} with {bits} bits")
    if not weights.get("symmetric", True):
        raise _refuse("asymmetric weights (zero points)")
    if weights.get("dynamic"):
        raise _refuse("weights that are quantised dynamically")
    if strategy not in ("channel", "group", "tensor"):
        raise _refuse(f"scales by '{strategy}'")
    group = int(weights.get("group_size") or 0) if strategy == "group" else 0
    return Scheme("compressed-tensors", bits, max(0, group))


def _gptq(found: Config) -> Scheme:
    bits, form = found.get("bits"), str(found.get("checkpoint_format") or "gptq").lower()
    if bits not in (4, 8):
        raise _refuse(f"GPTQ weights of {bits} bits")
    if not found.get("sym", True):
        raise _refuse("asymmetric weights (zero points)")
    if form not in ("gptq", "gptq_v2") or found.get("is_marlin_format"):
        raise _refuse(f"GPTQ weights in the layout '{form}'")
    group = int(found.get("group_size") or 0)
    return Scheme("gptq", bits, max(0, group), 1 if form == "gptq" else 0)


def _awq(found: Config) -> Scheme:
    bits = found.get("bits", found.get("w_bit"))
    version = str(found.get("version") or "gemm").lower()
    if bits != 4:
        raise _refuse(f"AWQ weights of {bits} bits")
    if version != "gemm":
        raise _refuse(f"AWQ weights in the layout '{version}'")
    group = int(found.get("group_size", found.get("q_group_size")) or 0)
    return Scheme("awq", 4, max(0, group))
