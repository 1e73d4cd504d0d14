"""Randomness keyed by (seed, absolute position, purpose), never by batch slot or call order.

A counter-based generator: key -> splitmix64 stream. Entry x of a noise row belongs to token id x,
so the noise of a token does not depend on the vocabulary's padding, on which rows are computed
together, or on the device (integer arithmetic; only the final logarithm is a float operation).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from foretell.core.rows import argmax_rows

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a number is for; two purposes never share noise."""

    TARGET = 1  # the noise of plain sampled decoding and of `replay`
    ACCEPT = 2  # accept/reject flips of rejection rules
    RESIDUAL = 3  # the draw that ends a rejection walk
    DRAFT = 4  # a drafter's own draws
    FORK = 5  # seeds of the n samples of one request


def mix(x: int) -> int:
    """splitmix64's finaliser on 64-bit integers."""
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def fresh_seed() -> int:
    """A seed from the operating system, 63 bits."""
    return int.from_bytes(os.urandom(8), "little") >> 1


class SeqRng:
    """The random numbers of one sequence.

    Every draw names its absolute position (the index, in the sequence, of the token it helps to
    decide) and its purpose. Two draws that may happen for one position under one purpose differ in
    `index` (siblings) or `salt` (the round's base position, so that a drafter that is asked twice
    about a position never reuses noise that an earlier round has already looked at).
    """

    __slots__ = ("_recent", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed & _MASK
        # The drafter and the verifier read the same TARGET rows within one step.
        self._recent: dict[tuple[int, int, str], Tensor] = {}

    def key(self, position: int, purpose: Purpose, salt: int = 0) -> int:
        k = mix((self.seed + _GOLDEN * int(purpose)) & _MASK)
        k = mix((k + _GOLDEN * (position + 1)) & _MASK)
        return mix((k + _GOLDEN * (salt + 1)) & _MASK)

    def fork(self, index: int) -> int:
        """Seed of sample `index` of a request with n > 1; sample 0 keeps the request's seed."""
        return self.seed if index == 0 else self.key(index, Purpose.FORK) >> 1

    def uniform(self, position: int, purpose: Purpose, index: int = 0, salt: int = 0) -> float:
        """One uniform in (0, 1), 52 bits (with one more the largest would round to 1)."""
        z = mix((self.key(position, purpose, salt) + _GOLDEN * (index + 1)) & _MASK)
        return ((z >> 12) + 0.5) * 2.0**-52

    def flip(self, p: float, w: float, position: int, index: int) -> bool:
        """Accept with probability min(1, p / w): the test of every rejection rule."""
        return self.uniform(position, Purpose.ACCEPT, index) * w < p

    def pick(self, p: Tensor, position: int, purpose: Purpose = Purpose.RESIDUAL) -> int:
        """Draw one index from the unnormalised distribution p [V]: the argmax of p over the row of
        noise that `race` gives, most of which is never computed on a CPU."""
        where = (position, p.shape[-1], str(p.device))
        noise = self._recent.get(where) if purpose is Purpose.TARGET else None
        if noise is None and where[2] == "cpu" and p.element_size() == 4:
            return _winner_on_host(p.numpy(), self.key(position, purpose))
        if noise is None:
            noise = self.race([position], purpose, p.shape[-1], p.device)[0]
        return argmax_rows((p / noise)[None])[0]

    def race_at(
        self,
        positions: Sequence[int],
        purpose: Purpose,
        ids: np.ndarray,
        salts: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Single entries of the rows that `race` gives on a CPU: (i, j) is that of position i (and
        its salt) and token ids[i, j]; ids [n, k] -> [n, k] float32."""
        salts = salts or [0] * len(positions)
        keys = [self.key(t, purpose, s) for t, s in zip(positions, salts, strict=True)]
        return _noise_at(np.array(keys, np.uint64)[:, None], ids)

    def race(
        self,
        positions: Sequence[int],
        purpose: Purpose,
        vocab: int,
        device: object = "cpu",
        salt: int = 0,
    ) -> Tensor:
        """Exponential noise E [len(positions), vocab] float32, one row a position.

        ``argmax(p / E)`` is a draw from p; it equals ``argmax(log p + Gumbel)`` with
        ``Gumbel = -log E``. The k largest are a draw of k without replacement, in draw order.
        """
        import torch

        if purpose is not Purpose.TARGET or salt:
            return _race([self.key(t, purpose, salt) for t in positions], vocab, str(device))
        recent = self._recent
        wanted = [(t, vocab, str(device)) for t in positions]
        missing = [w for w in wanted if w not in recent]
        if missing:
            if len(recent) > _KEEP:
                recent.clear()
                missing = wanted
            fresh = _race([self.key(t, purpose) for t, *_ in missing], vocab, str(device))
            recent.update(zip(missing, fresh, strict=True))
            if len(missing) == len(wanted):
                return fresh
        return torch.stack([recent[w] for w in wanted])


class DrafterRng(SeqRng):
    """The same numbers but for a drafter's own draws, which are those of part `index` of a drafter
    that owns `rng`: several that draw for one sequence in one step must not share their noise.
    Parts may be made of parts."""

    __slots__ = ("own",)

    def __init__(self, rng: SeqRng, index: int) -> None:
        super().__init__(rng.seed)
        self._recent = rng._recent
        above = rng.own if isinstance(rng, DrafterRng) else 0
        self.own = mix((above + _GOLDEN * (index + 1)) & _MASK)

    def key(self, position: int, purpose: Purpose, salt: int = 0) -> int:
        k = super().key(position, purpose, salt)
        return mix(k ^ self.own) if purpose is Purpose.DRAFT else k


_KEEP = 16  # rows of recent noise a sequence holds on to


def _race(keys: Sequence[int], vocab: int, device: str) -> Tensor:
    """[len(keys), vocab] float32: -log of the splitmix64 uniform of (key, token id)."""
    import torch

    if device == "cpu":
        return torch.from_numpy(_race_on_host(keys, vocab))
    ids = _token_offsets(vocab, device)
    z = (
        torch.tensor([_signed(k) for k in keys], dtype=torch.int64, device=ids.device)[:, None]
        + ids
    )
    z ^= (z >> 30).bitwise_and_((1 << 34) - 1)
    z *= _signed(_M1)
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= _signed(_M2)
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    u = (z >> 12).bitwise_and_((1 << 52) - 1).to(torch.float64)
    return u.add_(0.5).mul_(2.0**-52).log_().neg_().to(torch.float32)


def _race_on_host(keys: Sequence[int], vocab: int) -> np.ndarray:
    """The same by numpy, whose 64-bit multiplications are vectorised: half the time."""
    steps = _host_offsets(vocab)
    out = np.empty((len(keys), vocab), np.float32)
    for row, key in zip(out, keys, strict=True):
        _exponential(_scrambled(steps + np.uint64(key)), row)
    return out


def _noise_at(keys: np.ndarray | np.uint64, ids: np.ndarray) -> np.ndarray:
    """Noise of single tokens, float32; keys uint64, of a shape that goes with that of ids."""
    z = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    z += keys
    return _exponential(_scrambled(z), np.empty(z.shape, np.float32))


def _scrambled(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, in place, but for its last step (which leaves the upper 31 bits)."""
    part = z >> np.uint64(30)
    z ^= part
    z *= np.uint64(_M1)
    np.right_shift(z, np.uint64(27), out=part)
    z ^= part
    z *= np.uint64(_M2)
    return z


def _exponential(z: np.ndarray, out: np.ndarray) -> np.ndarray:
    """-log of the uniform that `_scrambled` bits stand for; z is overwritten."""
    z ^= z >> np.uint64(31)
    z >>= np.uint64(12)
    u = z.astype(np.float64)
    u += 0.5
    u *= 2.0**-52
    np.log(u, out=u)
    return np.negative(u, out=out, casting="same_kind")


def _winner_on_host(p: np.ndarray, key: int) -> int:
    """``argmax(p / E)`` for p [V] float32 and the row E of `key`, to the bit, lowest index first.

    E = -log u is at least 1 - u, so no token scores more than p / (1 - u). With those bounds for
    the whole row, and the score of the token whose bound is highest, hardly ever more than one
    token is left to take a logarithm of.
    """
    seed = np.uint64(key)
    z = _scrambled(_host_offsets(len(p)) + seed)
    np.invert(z, out=z)
    z >>= np.uint64(33)  # 31 bits of 1 - u; the lower ones are not finished
    bound = z.view(np.int64).astype(np.float32)
    bound += np.float32(2.0**-23)  # less than what the lower ones are at least
    np.divide(p, bound, out=bound)
    first = int(bound.argmax())
    score = p[first] / _noise_at(seed, np.array([first]))[0]
    if not 0 < score < np.inf:
        return int((p / _race_on_host([key], len(p))[0]).argmax())
    reach = score * np.float32(2.0**-31 * (1 - 1e-5))  # room for the rounding of all of it
    highest, bound[first] = bound[first], 0
    if bound.max() < reach:
        return first
    bound[first] = highest
    among = np.flatnonzero(bound >= reach)
    scores = p[among] / _noise_at(seed, among)
    return int(among[scores.argmax()])


@lru_cache(maxsize=16)
def _host_offsets(vocab: int) -> np.ndarray:
    return np.arange(1, vocab + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


@lru_cache(maxsize=16)
def _token_offsets(vocab: int, device: str) -> Tensor:
    """(id + 1) * golden for every token id, [vocab] int64."""
    import torch

    golden = torch.arange(1, vocab + 1, dtype=torch.int64) * _signed(_GOLDEN)
    return golden.to(device)
