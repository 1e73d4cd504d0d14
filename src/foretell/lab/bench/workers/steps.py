"""When tokens came out: the same clock for every system. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any


class Steps:
    """Created right before a system is called; `add(n)` when n tokens of a sequence come out.

    For a batch, the first token is out when every sequence has one.
    """

    def __init__(self, sequences: int = 1) -> None:
        self.sizes: list[list[int]] = [[] for _ in range(sequences)]  # tokens of each step
        self.firsts: list[float] = [0.0] * sequences
        self.out = 0
        self.first_tokens = 0  # tokens out when the last sequence had its first one
        self.start = perf_counter()
        self.end = self.start

    def add(self, n: int, sequence: int = 0) -> None:
        now = perf_counter()
        if n < 1:
            return
        self.out += n
        if not self.sizes[sequence]:
            self.firsts[sequence] = now - self.start
            self.first_tokens = self.out
        self.sizes[sequence].append(n)
        self.end = now

    def stop(self) -> None:
        """The call has returned."""
        self.end = perf_counter()

    def result(self, ids: Sequence[Sequence[int]], **more: Any) -> dict[str, Any]:
        """seconds: the whole call; first_s: until every sequence had a token; ttft_s: the mean over
        sequences; histogram[k]: steps that brought k drafted tokens and one of the target's."""
        return {
            "ids": [list(i) for i in ids],
            "seconds": self.end - self.start,
            "first_s": max(self.firsts),
            "ttft_s": sum(self.firsts) / len(self.firsts),
            "first_tokens": self.first_tokens,
            **self.counts([n for sizes in self.sizes for n in sizes]),
            **more,
        }

    @staticmethod
    def counts(sizes: Sequence[int]) -> dict[str, Any]:
        histogram = [0] * max(sizes, default=1)
        for n in sizes:
            histogram[n - 1] += 1
        above = [sum(histogram[i + 1 :]) for i in range(len(histogram) - 1)]
        return {"steps": len(sizes), "histogram": histogram, "per_position": above}
