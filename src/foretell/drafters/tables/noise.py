"""Single entries of the noise rows that `SeqRng.race` would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foretell.core.rng import Purpose, SeqRng

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def race_at(
    rng: SeqRng,
    positions: Sequence[int],
    purpose: Purpose,
    ids: np.ndarray,
    salts: Sequence[int] | None = None,
) -> np.ndarray:
    """Exponential noise of chosen tokens: entry (i, j) is ``rng.race([positions[i]], purpose, V,
    salt=salts[i])[0, ids[i, j]]``, without computing the other V - k. ids [n, k] -> [n, k] float32.
    """
    salts = salts or [0] * len(positions)
    keys = [rng.key(t, purpose, s) for t, s in zip(positions, salts, strict=True)]
    with np.errstate(over="ignore"):
        z = np.array(keys, np.uint64)[:, None] + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _M1
        z = (z ^ (z >> np.uint64(27))) * _M2
        z ^= z >> np.uint64(31)
    u = ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return (-np.log(u)).astype(np.float32)
