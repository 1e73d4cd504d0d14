"""What the target thought after each n-gram: its top-k distribution, averaged over visits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLOT = 160  # bytes of a dict entry with its two int objects, and of a slot's visit count
FRESH = 8  # visits after which the mean goes on as a running one


class LogitNgrams:
    """n-gram (`min_n`..`max_n` tokens) -> the `k` likeliest next tokens and their probabilities.

    Never more than `limit` bytes: the n-gram written longest ago goes first. Arrays are reserved at
    once but cost memory only where they are written.
    """

    __slots__ = ("bits", "ids", "k", "max_n", "min_n", "places", "probs", "slots", "visits")

    def __init__(self, vocab: int, k: int, min_n: int, max_n: int, limit: int) -> None:
        self.bits, self.k, self.min_n, self.max_n = vocab.bit_length(), k, min_n, max_n
        self.slots = max(1, limit // (SLOT + 8 * k))
        self.ids = np.zeros((self.slots, k), np.int32)
        self.probs = np.zeros((self.slots, k), np.float32)  # 0 = no further token
        self.visits = np.zeros(self.slots, np.int32)
        self.places: dict[int, int] = {}  # n-gram -> slot, in order of the last write

    @property
    def nbytes(self) -> int:
        """Memory it holds, estimated from above."""
        return len(self.places) * (SLOT + 8 * self.k)

    def key(self, gram: Sequence[int]) -> int:
        """One number for an n-gram: its tokens behind a leading 1."""
        key = 1
        for t in gram:
            key = key << self.bits | t
        return key

    def find(self, context: Sequence[int]) -> int:
        """Slot of the longest known n-gram that `context` ends with; -1 when there is none."""
        mask = key = 0
        found = -1
        for n in range(1, min(self.max_n, len(context)) + 1):
            key |= context[-n] << mask
            mask += self.bits
            if n >= self.min_n:
                slot = self.places.get(key | 1 << mask, -1)
                if slot >= 0:
                    found = slot
        return found

    def put(self, context: Sequence[int], ids: np.ndarray, probs: np.ndarray) -> None:
        """Average the distribution (ids, probs [k], likeliest first) into every n-gram that
        `context` ends with."""
        for n in range(self.min_n, min(self.max_n, len(context)) + 1):
            slot, known = self._slot(self.key(context[len(context) - n :]))
            if known and self.visits[slot]:
                self._average(slot, ids, probs)
            else:
                self._write(slot, ids, probs)
            self.visits[slot] += 1

    def learn(self, text: Sequence[int]) -> None:
        """What followed in a text stands in for what the target thought, where that is not known;
        a first visit replaces it."""
        for n in range(self.min_n, self.max_n + 1):
            seen: dict[int, dict[int, int]] = {}
            for end in range(n, len(text)):
                row = seen.setdefault(self.key(text[end - n : end]), {})
                row[text[end]] = row.get(text[end], 0) + 1
            for key, row in seen.items():
                if key not in self.places:
                    best = sorted(row.items(), key=lambda cw: (-cw[1], cw[0]))[: self.k]
                    slot, _ = self._slot(key)
                    ids, counts = np.array(best).T
                    self._write(slot, ids, counts / counts.sum())
                    self.visits[slot] = 0

    def _slot(self, key: int) -> tuple[int, bool]:
        slot = self.places.pop(key, -1)
        known = slot >= 0
        if not known:
            slot = len(self.places)
            if slot == self.slots:
                slot = self.places.pop(next(iter(self.places)))
            self.visits[slot] = 0
        self.places[key] = slot
        return slot, known

    def _write(self, slot: int, ids: np.ndarray, probs: np.ndarray) -> None:
        self.ids[slot, : len(ids)] = ids
        self.probs[slot] = 0
        self.probs[slot, : len(probs)] = probs

    def _average(self, slot: int, ids: np.ndarray, probs: np.ndarray) -> None:
        weight = 1 / (min(int(self.visits[slot]), FRESH) + 1)
        old = (self.probs[slot] * (1 - weight)).tolist()
        mean = {t: p for t, p in zip(self.ids[slot].tolist(), old, strict=True) if p > 0}
        for t, p in zip(ids.tolist(), (probs * weight).tolist(), strict=True):
            mean[t] = mean.get(t, 0.0) + p
        best = sorted(mean.items(), key=lambda tp: (-tp[1], tp[0]))[: self.k]
        best = [tp for tp in best if tp[1] > 0]
        self._write(slot, np.array([t for t, _ in best]), np.array([p for _, p in best]))
