"""How fast the server works lately."""

from __future__ import annotations

import time
from collections import deque


class Pace:
    """How fast the server works lately."""

    SECONDS = 5  # looked back

    def __init__(self) -> None:
        self._bins = [(0, 0)] * (self.SECONDS + 2)  # (second, tokens), one thread writes
        self._ends: deque[float] = deque(maxlen=64)

    def emitted(self, tokens: int) -> None:
        now = int(time.monotonic())
        place = now % len(self._bins)
        second, count = self._bins[place]
        self._bins[place] = (now, tokens + (count if second == now else 0))

    def finished(self) -> None:
        """A request ran to its end."""
        self._ends.append(time.monotonic())

    def tokens_per_second(self) -> float:
        """Over the last whole seconds and the one under way."""
        now = time.monotonic()
        first = int(now) - self.SECONDS
        seconds = [b for b in list(self._bins) if b[0] >= first and b[1]]
        if not seconds:
            return 0.0
        since = min(second for second, _ in seconds)
        return sum(tokens for _, tokens in seconds) / max(1.0, now - since)

    def wait_for(self, requests: int) -> float:
        """Seconds until so many requests are through, by the rate of the last ones; 1 to 60."""
        if len(self._ends) < 2:
            return 1.0
        took = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(60.0, max(1.0, requests * took))
