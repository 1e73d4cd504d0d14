"""Which sizes a widened model gets: the shape of a real model of about as many parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from foretell.core.errors import InputError
from foretell.models.native.arch import Arch, LayerArch

# parameters of the body below which a width is usual, that width, layers at that width
_USUAL = (
    (30e6, 384, 8),
    (80e6, 512, 12),
    (220e6, 768, 12),
    (550e6, 1024, 24),
    (900e6, 1280, 28),
    (1.9e9, 2048, 22),
    (3e9, 2560, 28),
    (5e9, 3072, 28),
    (11e9, 4096, 32),
    (25e9, 5120, 40),
    (1e30, 8192, 80),
)
_SPLIT = ("gpt2", "gpt_neox", "phi3")  # head size = width / heads, some runtime insists
_FFN_STEP = 256  # what llama.cpp's K-quants want; also a multiple of every group size


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder; 0 = to be chosen."""

    hidden: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    ffn: int = 0

    @classmethod
    def of(cls, a: Arch) -> Shape:
        return cls(a.hidden, len(a.layers), a.heads, a.kv_heads, a.ffn)


def wider(a: Arch, s: Shape) -> Arch:
    """`a` with the sizes of `s`, all of which are given."""
    kinds = (a.layers * math.ceil(s.layers / len(a.layers)))[: s.layers]
    layers: tuple[LayerArch, ...] = a.layers + kinds[len(a.layers) :]
    return replace(a, hidden=s.hidden, layers=layers, heads=s.heads, kv_heads=s.kv_heads, ffn=s.ffn)


def choose_shape(a: Arch, parameters: float | None, wish: Shape | None = None) -> Shape:
    """A whole shape at least as large as `a` in every size, with the sizes of `wish`; the others
    such that the model has about `parameters` (without that they stay as they are).

    InputError when that cannot be: a size below the original's, heads that do not divide, a width
    that the family cannot take, fewer parameters than the original has.
    """
    wish = Shape() if wish is None else wish
    if parameters is None:
        if wish == Shape():
            raise InputError(
                "Say how big the model shall be: --params 300M, or --hidden and so on."
            )
        return _checked(a, _attention(a, _or(wish, Shape.of(a))))
    if parameters < a.parameters:
        raise InputError(
            f"--params {short(parameters)} is less than the {short(a.parameters)} the model has: "
            "widening only adds."
        )
    hidden, layers = next((h, n) for limit, h, n in _USUAL if parameters < limit)
    step = a.hidden if a.norm == "layer" else a.head_dim
    hidden = wish.hidden or max(a.hidden, math.ceil(hidden / step) * step)
    layers = wish.layers or max(layers, len(a.layers))
    shape = Shape(hidden, layers, wish.heads, wish.kv_heads, wish.ffn or a.ffn)
    shape = _attention(a, shape)
    if not wish.ffn:
        shape = replace(shape, ffn=_ffn(a, shape, parameters))
        low, high = 2 * hidden, 4 * hidden
        if not wish.layers and not low <= shape.ffn <= high:
            ffn = max(a.ffn, math.ceil(8 / 3 * hidden / _FFN_STEP) * _FFN_STEP)
            shape = _layers(a, replace(shape, ffn=ffn), parameters)
    elif not wish.layers:
        shape = _layers(a, shape, parameters)
    return _checked(a, shape)


def _or(s: Shape, other: Shape) -> Shape:
    """Sizes of `s`, those of `other` where it has none; heads are left to `_attention`."""
    return Shape(
        s.hidden or other.hidden, s.layers or other.layers, s.heads, s.kv_heads, s.ffn or other.ffn
    )


def _attention(a: Arch, s: Shape) -> Shape:
    """Heads that fill the width; four query heads a key/value head where the family groups."""
    same = s.hidden == a.hidden and not s.heads and not s.kv_heads
    if same:
        return replace(s, heads=a.heads, kv_heads=a.kv_heads)
    if s.heads:
        default = s.heads // a.groups if s.heads % a.groups == 0 else a.kv_heads
        return replace(s, kv_heads=s.kv_heads or max(default, a.kv_heads))
    groups = max(4, a.groups) if a.groups > 1 else 1
    full = s.hidden // a.head_dim  # heads that fill the width
    fits = [k for k in range(a.kv_heads, full + 1) if full % k == 0 and full // k >= a.groups]
    kv = s.kv_heads or min(fits, key=lambda k: abs(k - full / groups), default=a.kv_heads)
    return replace(s, heads=max(a.groups, full // kv) * kv, kv_heads=kv)


def _ffn(a: Arch, s: Shape, parameters: float) -> int:
    """The MLP's width that comes nearest to `parameters`."""
    count = 3 if a.gated else 2
    rest = wider(a, replace(s, ffn=0)).parameters
    each = count * s.hidden * s.layers
    step = _FFN_STEP if s.hidden >= 512 else 64
    return max(math.ceil(a.ffn / step) * step, round((parameters - rest) / each / step) * step)


def _layers(a: Arch, s: Shape, parameters: float) -> Shape:
    one = wider(a, replace(s, layers=len(a.layers)))
    fixed = replace(one, layers=()).parameters
    each = (one.parameters - fixed) / len(a.layers)
    return replace(s, layers=max(len(a.layers), round((parameters - fixed) / each)))


def _checked(a: Arch, s: Shape) -> Shape:
    old = Shape.of(a)
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn"):
        before, after = getattr(old, name), getattr(s, name)
        if after < before:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {after} is less than the model's {before}: it only adds.")
    if s.heads % s.kv_heads:
        raise InputError(f"{s.heads} heads do not divide over {s.kv_heads} key/value heads.")
    if s.heads // s.kv_heads < a.groups:
        raise InputError(
            f"{s.heads} heads over {s.kv_heads} key/value heads are {s.heads // s.kv_heads} to "
            f"one; the model has {a.groups}, and a key/value head cannot lose readers: ask for "
            "fewer --kv-heads or more --heads."
        )
    if a.norm == "layer" and s.hidden % a.hidden:
        raise InputError(
            f"The norms of {a.family} subtract a mean, so its width can only be multiplied: choose "
            f"--hidden {a.hidden * max(1, round(s.hidden / a.hidden))}."
        )
    if a.family in _SPLIT and s.heads * a.head_dim != s.hidden:
        raise InputError(
            f"{a.family} splits its width among the heads, so --heads must be "
            f"{s.hidden // a.head_dim} for --hidden {s.hidden}."
        )
    return s


def parse_count(text: str) -> float:
    """'300M', '1.5B', '12345' -> a number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = math.nan
    if not 0 < value < 1e13:
        raise InputError(f"--params '{text}' is no number of parameters such as 300M or 1.5B.")
    return value


def short(count: float) -> str:
    """275000000 -> '275M'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
