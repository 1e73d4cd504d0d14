"""Reads a datastore: where a text occurs, and how it goes on there."""

from __future__ import annotations

import json
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foretell.core.errors import InputError
from foretell.drafters.tables.datastore.layout import MAGIC, VERSION


@dataclass(slots=True)
class Shard:
    """One suffix array over the mapped bytes."""

    text: memoryview  # token bytes
    order: memoryview  # uint32
    tokens: np.ndarray  # [n] of the file's own big-endian type

    def first(self, key: bytes, width: int) -> int:
        """Place in the suffix array of the first suffix that begins with `key`; -1 = none does."""
        text, size, order = self.text, len(key), self.order

        def head(start: int) -> bytes:
            at = start * width
            return text[at : at + size].tobytes()

        place = bisect_left(order, key, key=head)
        return place if place < len(order) and head(order[place]) == key else -1

    def last(self, key: bytes, width: int, first: int) -> int:
        """The place behind the last suffix that begins with `key`, given that of the first."""
        text, size = self.text, len(key)
        return bisect_right(
            self.order,
            key,
            first,
            key=lambda start: text[start * width : start * width + size].tobytes(),
        )


class Datastore:
    """A finished store, mapped read-only."""

    def __init__(self, path: Path | str) -> None:
        """Raises InputError when the file is no datastore, a broken one, or of another version."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise InputError(f"The datastore {path} cannot be read ({e.strerror}).") from None
        except ValueError:  # an empty file cannot be mapped
            raise InputError(f"{path} is empty: build it with foretell build-datastore.") from None
        data = memoryview(self._map)
        if bytes(data[:8]) != MAGIC:
            raise InputError(f"{path} is no datastore: build one with foretell build-datastore.")
        try:
            size = int.from_bytes(data[8:16], "little")
            self.header: dict[str, Any] = json.loads(bytes(data[16 : 16 + size]))
            if self.header["version"] != VERSION:
                raise InputError(
                    f"{path} is a datastore of version {self.header['version']}, this program "
                    f"reads version {VERSION}: build it again with foretell build-datastore."
                )
            self.vocab, self.width = int(self.header["vocab"]), int(self.header["width"])
            self.sorted = int(self.header["sorted"])
            self.shards = [self._shard(data, s) for s in self.header["shards"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"The datastore {path} is broken or incomplete: build it again."
            ) from None
        self.tokens = sum(len(s.tokens) for s in self.shards)

    def _shard(self, data: memoryview, at: dict[str, int]) -> Shard:
        text = data[at["text"] : at["text"] + at["tokens"] * self.width]
        order = data[at["order"] : at["order"] + 4 * at["suffixes"]]
        if len(text) != at["tokens"] * self.width or len(order) != 4 * at["suffixes"]:
            raise ValueError
        return Shard(text, order.cast("I"), np.frombuffer(text, f">u{self.width}"))

    def matches(
        self, suffix: Sequence[int], longest: int, shortest: int
    ) -> tuple[int, list[tuple[Shard, int, int]]]:
        """Length of the longest suffix of `suffix` that occurs, between the two bounds, and where
        (ranges of suffix arrays); (0, []) when there is none."""
        longest = min(longest, len(suffix))
        key = np.asarray(suffix[len(suffix) - longest :], f">u{self.width}").tobytes()
        w = self.width
        best, found = 0, []
        for shard in self.shards:
            lo, hi = max(shortest, best), longest  # what occurs is monotone in the length
            n, place = 0, -1
            while lo <= hi:
                m = (lo + hi + 1) // 2 if n else lo
                at = shard.first(key[len(key) - m * w :], w)
                if at >= 0:
                    n, place, lo = m, at, m + 1
                elif n:
                    hi = m - 1
                else:
                    break
            if not n:
                continue
            if n > best:
                best, found = n, []
            if n == best:
                found.append((shard, place, shard.last(key[len(key) - n * w :], w, place)))
        return best, found

    def continuations(
        self, found: list[tuple[Shard, int, int]], skip: int, depth: int, most: int
    ) -> np.ndarray:
        """[r, depth] int64: the tokens after `skip` matched ones at up to about `most` places,
        evenly spread; `vocab` and what follows it mark the end of a document or of the text."""
        total = sum(last - first for _, first, last in found)
        stride = max(1, total // most)
        parts = []
        for shard, first, last in found:
            starts = np.array(shard.order[first:last:stride], np.int64) + skip
            at = starts[:, None] + np.arange(depth)
            n = len(shard.tokens)
            rows = shard.tokens[np.minimum(at, n - 1)].astype(np.int64)
            rows[at >= n] = self.vocab
            parts.append(rows)
        return np.concatenate(parts)
