"""What a dense decoder looks like, as data: the runner reads this and nothing else of a family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: the first `dim` coordinates of a head turn, d pairs with d + dim / 2.

    kind: default, linear, dynamic (NTK), llama3, yarn, longrope; the formulas and the names of
    their parameters are those of Hugging Face's `rope_scaling`.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0  # positions of the pretraining, where scaling begins
    low_freq: float = 1.0  # llama3
    high_freq: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short: Sequence[float] = ()  # longrope
    long: Sequence[float] = ()
    attention: float = 1.0  # what cosine and sine are multiplied with (yarn, longrope)

    @property
    def varies(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")

    def regime(self, length: int) -> int:
        """Texts of lengths with equal regimes share their frequencies."""
        if self.kind == "longrope":
            return int(length > self.original)
        return max(length, self.original) if self.kind == "dynamic" else 0

    def frequencies(self, regime: int = 0) -> Tensor:
        """[dim / 2] float32: radians a position, in float32 as Hugging Face computes them."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        if self.kind == "dynamic":
            stretch = self.factor * max(regime, self.original) / self.original - (self.factor - 1)
            theta = self.theta * stretch ** (self.dim / (self.dim - 2))
            return 1.0 / theta**exponent
        if self.kind == "longrope":
            factors = torch.tensor(self.long if regime else self.short, dtype=torch.float32)
            return 1.0 / (factors * self.theta**exponent)
        plain = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(self.theta**exponent)
        return plain

    def _llama3(self, plain: Tensor) -> Tensor:
        """Long waves are slowed by `factor`, short ones are left alone, between them a ramp."""
        waves = 2 * math.pi / plain
        ramp = (self.original / waves - self.low_freq) / (self.high_freq - self.low_freq)
        middle = (1 - ramp) * plain / self.factor + ramp * plain
        slowed = torch.where(waves > self.original / self.low_freq, plain / self.factor, plain)
        inside = (waves >= self.original / self.high_freq) & (
            waves <= self.original / self.low_freq
        )
        return torch.where(inside, middle, slowed)

    def _yarn(self, powers: Tensor) -> Tensor:
        """Coordinates that turn often keep their frequency, the others are slowed by `factor`."""

        def bound(turns: float) -> float:
            spread = math.log(self.original / (turns * 2 * math.pi))
            return self.dim * spread / (2 * math.log(self.theta))

        low, high = bound(self.beta_fast), bound(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        span = (high - low) or 0.001  # the published code avoids a division by zero this way
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        return ramp / (self.factor * powers) + (1 - ramp) / powers


@dataclass(frozen=True, slots=True)
class LayerArch:
    """What may differ from layer to layer."""

    rope: int | None = 0  # index into Arch.ropes; None = this layer knows no positions
    window: int | None = None  # a row sees keys less than `window` positions back


@dataclass(frozen=True, slots=True)
class Arch:
    """A dense decoder. The defaults are Llama's."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: tuple[LayerArch, ...]
    ropes: tuple[Rope, ...] = ()
    max_positions: int = 2048
    family: str = "llama"

    norm: str = "rms"  # or "layer"
    eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma stores w and scales with 1 + w
    norm_bias: bool = False
    pre_norm: bool = True  # a norm before attention and one before the MLP
    post_norm: bool = False  # one after each, before the residual sum; with pre_norm: a sandwich
    qk_norm: str | None = None  # "head": over D; "full": over all heads of a row
    parallel: bool = False  # x + attention(norm x) + mlp(norm' x)

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    gated: bool = True  # act(gate x) * up x
    act: str = "silu"  # silu, gelu, gelu_tanh, gelu_quick, relu

    learned_positions: int = 0  # rows of a position table (GPT-2); 0 = none
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attn_scale: float | None = None  # None = 1 / sqrt(D)
    logit_scale: float = 1.0
    attn_cap: float | None = None  # cap * tanh(score / cap)
    logit_cap: float | None = None
    tied: bool = False  # the head is the embedding

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def parameters(self) -> int:
        """Numbers in the matrices (norms and biases left out)."""
        width = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.ffn * (3 if self.gated else 2)
        body = len(self.layers) * self.hidden * (width + mlp)
        return body + self.vocab * self.hidden * (1 if self.tied else 2)

    @classmethod
    def llama(
        cls,
        vocab: int,
        hidden: int,
        layers: int,
        heads: int,
        kv_heads: int,
        ffn: int,
        *,
        max_positions: int = 2048,
        theta: float = 10000.0,
        tied: bool = True,
        eps: float = 1e-5,
    ) -> Arch:
        """A plain Llama of the given sizes (benchmarks, tests, toys)."""
        return cls(
            vocab,
            hidden,
            heads,
            kv_heads,
            hidden // heads,
            ffn,
            (LayerArch(),) * layers,
            (Rope(hidden // heads, theta),),
            max_positions,
            tied=tied,
            eps=eps,
        )
