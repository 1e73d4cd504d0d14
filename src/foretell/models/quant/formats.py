"""Integer weight formats: the exact numbers, whoever multiplies with them afterwards.

Both are symmetric (zero is 0) and quantise a matrix [out, in] along its inputs:

* int8: one float32 scale an output channel, absmax / 127, integers in -127..127;
* int4: one scale for every `group` inputs of a channel, integers in -8..7. The scale minimises the
  squared error over a few candidates (`_scales4`) and is rounded to float16 before the integers are
  chosen, so storing it in 16 bits loses nothing.

Activations are quantised row by row when they are used (`quantise_rows`): absmax / 127 again. With
both sides small integers every dot product is exact whatever the order it is summed in, which is
what makes the results of these formats independent of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from foretell.core.errors import InputError

BLOCK = 1 << 18  # numbers quantised at a time: as float32 they stay in an L2 cache
GROUPS = (128, 64, 32)  # what int4 may use
# Where the largest weight of a group lands. 8 would use the range [-8, 7] exactly; less leaves the
# far ends unused, more clips them.
CANDIDATES = (7.0, 7.5, 8.0, 8.5, 9.0)
_HALF_MAX, _HALF_MIN = 65504.0, 2.0**-14  # of float16's normal numbers


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the matrices of a model are stored. group: inputs that share a scale; 0 = all."""

    name: str
    bits: int
    group: int

    def __str__(self) -> str:
        return self.name


INT8 = WeightFormat("int8", 8, 0)
INT4 = WeightFormat("int4", 4, 32)
INT4_G64 = WeightFormat("int4-g64", 4, 64)
INT4_G128 = WeightFormat("int4-g128", 4, 128)
FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {f.name: f for f in (INT8, INT4, INT4_G64, INT4_G128)}
)


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantised matrix. q [out, in] int8; scale float32, [out] where group is 0 (int8, with q in
    -127..127, or -128..127 when read from a checkpoint), else [out, in / group] (int4, q in -8..7).
    Scales may be negative; those of an int4 checkpoint need not fit float16 (`half`)."""

    q: Tensor
    scale: Tensor
    group: int = 0

    @property
    def bits(self) -> int:
        return 4 if self.group else 8

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    @property
    def half(self) -> bool:
        """Whether float16 holds the scales without loss."""
        return bool((self.scale.half().float() == self.scale).all())

    @property
    def nbytes(self) -> int:
        """As held here: a byte a weight, also for int4."""
        return self.q.nbytes + self.scale.nbytes

    def rows(self, index: Tensor | slice) -> QTensor:
        """Some output channels, or all in another order."""
        return QTensor(self.q[index], self.scale[index], self.group)

    def to(self, device: torch.device) -> QTensor:
        return QTensor(self.q.to(device), self.scale.to(device), self.group)


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Matrices over the same input below one another; they must have the same group."""
    return QTensor(
        torch.cat([p.q for p in parts]), torch.cat([p.scale for p in parts]), parts[0].group
    )


def format_for(wanted: WeightFormat, inputs: int, head: bool = False) -> WeightFormat:
    """What one matrix of a model gets. The output head of an int4 model is int8 (it costs the most
    quality and is read once a token); a width no group divides gets the next smaller group that
    does, or int8."""
    if wanted.bits == 8 or head:
        return INT8
    for group in GROUPS:
        if group <= wanted.group and inputs % group == 0:
            return next(f for f in FORMATS.values() if f.group == group)
    return INT8


def quantise(
    w: Tensor,
    wanted: WeightFormat,
    *,
    rows: Tensor | None = None,
    head: bool = False,
    name: str = "a matrix",
) -> QTensor:
    """A matrix [out, in] of any float dtype in the format the model wants, block by block.

    rows: order in which its output channels are taken; name: for the error. Raises InputError when
    a weight is not finite.
    """
    n, k = w.shape
    form = format_for(wanted, k, head)
    q = torch.empty(n if rows is None else len(rows), k, dtype=torch.int8, device=w.device)
    groups = (k // form.group,) if form.group else ()
    scale = torch.empty(len(q), *groups, dtype=torch.float32, device=w.device)
    step = max(1, BLOCK // max(1, k))
    for i in range(0, len(q), step):
        part = slice(i, i + step)
        block = (w[part] if rows is None else w[rows[part]]).float()
        if form.group:
            q[part], scale[part] = quantise_int4(block, form.group)
        else:
            q[part], scale[part] = quantise_int8(block)
    if not bool(torch.isfinite(scale).all()):
        raise InputError(
            f"'{name}' holds weights that are not finite: the checkpoint is damaged; download it "
            "again."
        )
    largest = float(scale.abs().max()) if form.group and scale.numel() else 1.0
    if largest == _HALF_MAX or (largest < _HALF_MIN and bool(w.any())):
        raise InputError(
            f"'{name}' holds weights whose scales float16 cannot hold: use dtype int8."
        )
    return QTensor(q, scale, form.group)


def quantise_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> (int8 [out, in], float32 [out]). A channel of zeros has scale 0; one
    that holds a number that is not finite has a scale that is not."""
    w = w.float()
    scale = w.abs().amax(1) / 127
    q = (w / scale[:, None]).round_().clamp_(-127, 127)
    return q.nan_to_num_(0.0, 0.0, 0.0).to(torch.int8), scale


def quantise_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> (int8 [out, in] in -8..7, float32 [out, in / group]), group | in.

    The scales are numbers that float16 holds; a group of zeros has scale 0."""
    n, k = w.shape
    x = w.float().reshape(n, k // group, group)
    scale = _scales4(x).half().float()
    scale = torch.where(scale.isinf() & x.isfinite().all(-1), _HALF_MAX * scale.sign(), scale)
    q = _integers4(x, scale)
    return q.to(torch.int8).view(n, k), scale


def _integers4(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / scale) in -8..7, zero where the scale is. x [.., group], scale [..]."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (x * inverse[..., None]).round_().clamp_(-8, 7).nan_to_num_(0.0)


def _scales4(x: Tensor) -> Tensor:
    """The scale of each group, [.., group] -> [..].

    The weight of largest magnitude is laid on -c for every candidate c, signed, so that the range's
    longer end serves it; for the integers that follow, the best scale is the least-squares one,
    s = <x, q> / <q, q>, whose squared error is |x|^2 - <x, q>^2 / <q, q>. The candidate with the
    smallest error wins."""
    at = x.abs().argmax(-1, keepdim=True)
    largest = x.gather(-1, at)[..., 0]
    best = torch.full_like(largest, -1.0)
    scale = torch.zeros_like(largest)
    for c in CANDIDATES:
        q = _integers4(x, largest / -c)
        xq, qq = (x * q).sum(-1), q.square().sum(-1)
        gain = torch.where(qq == 0, 0.0, xq * xq / qq)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, torch.where(qq == 0, 0.0, xq / qq), scale)
    return torch.where(largest.isfinite(), scale, largest)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, in] float32 -> (int8 [T, in], scale [T]), each row on its own: x is about
    q * scale. A row of zeros has scale 0."""
    largest = x.abs().amax(1)
    inverse = 127.0 / largest
    inverse = torch.where(inverse.isinf(), 0.0, inverse)
    return (x * inverse[:, None]).round_().to(torch.int8), largest / 127


def dequantise(t: QTensor) -> Tensor:
    """The float32 matrix [out, in] that a QTensor stands for."""
    if not t.group:
        return t.q * t.scale[:, None]
    n, k = t.shape
    wide = t.q.view(n, k // t.group, t.group) * t.scale[..., None]
    return wide.view(n, k)
