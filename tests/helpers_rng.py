"""Random numbers that are watched while they are drawn."""

from __future__ import annotations

from collections import Counter

import torch

from foretell.core.rng import Purpose, SeqRng


def watched(used: Counter) -> type[SeqRng]:
    """A `SeqRng` that counts in `used` how often the noise of each key is drawn."""

    class Watched(SeqRng):
        __slots__ = ()

        def uniform(self, position, purpose, index=0, salt=0):
            used[purpose, position, index, salt] += 1
            return super().uniform(position, purpose, index, salt)

        def race(self, positions, purpose, vocab, device="cpu", salt=0):
            for t in positions:
                used[purpose, t, "row", salt] += 1
            return super().race(positions, purpose, vocab, device, salt)

        def race_at(self, positions, purpose, ids, salts=None):
            for t, salt in zip(positions, salts or [0] * len(positions), strict=True):
                used[purpose, t, "row", salt] += 1
            return super().race_at(positions, purpose, ids, salts)

        def pick(self, p, position, purpose=Purpose.RESIDUAL):
            row = purpose, position, "row", 0
            before = used[row]
            said = super().pick(p, position, purpose)
            used[row] = before + 1  # whether or not it asked `race`
            return said

    return Watched


def used_twice(used: Counter) -> list:
    return [key for key, n in used.items() if n > 1]


class Unlucky:
    """Refuses whatever it is asked about, and insists on something being left to pick from."""

    def flip(self, p: float, w: float, position: int, index: int) -> bool:
        return False

    def pick(self, p: torch.Tensor, position: int) -> int:
        assert torch.isfinite(p).all()
        assert p.sum() > 0
        return int(p.argmax())
