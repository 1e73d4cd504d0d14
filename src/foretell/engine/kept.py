"""Rows of finished sequences, kept for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from foretell.core.protocols import KVCache

BLOCK = 8  # ids that are looked up at once: shorter beginnings are not worth a copy
CLOSEST = 4  # entries that are compared id by id


@dataclass(slots=True, eq=False)
class Kept:
    """The rows of one finished sequence."""

    tokens: list[int]  # one a row
    cache: KVCache
    hashes: list[int] = field(default_factory=list)  # of the first 1, 2, .. blocks


class KeptRows:
    """A store of caches in order of use, found by what their texts begin with.

    Every beginning of a whole number of blocks has one entry in a table, keyed by a rolling hash:
    a lookup costs one hash for each block that is there, however many caches are kept. Hashes only
    suggest; ids are compared before a row is used.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._entries: dict[Kept, None] = {}  # least recently used first
        self._table: dict[int, dict[Kept, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Kept:
        """By order of use; -1 is the last one used."""
        return list(self._entries)[index]

    def add(self, tokens: list[int], cache: KVCache) -> None:
        """Keep a cache of rows for `tokens`; of two texts that continue one another the longer."""
        entry = Kept(tokens, cache, list(block_hashes(tokens)))
        for other in self._close(entry.hashes):
            n = min(len(other.tokens), len(tokens))
            if other.tokens[:n] == tokens[:n]:
                if len(other.tokens) > n:
                    return self.touch(other)
                self.drop(other)
        self._entries[entry] = None
        self.rows += len(tokens)
        for h in entry.hashes:
            self._table.setdefault(h, {})[entry] = None

    def find(self, tokens: Sequence[int], limit: int) -> tuple[int, Kept | None]:
        """The entry that shares most of the first `limit` ids, and how many; (0, None) if none
        shares a block."""
        best, found = 0, None
        for entry in self._close(block_hashes(tokens[:limit])):
            n = min(shared(tokens, entry.tokens), limit)
            if n > best:
                best, found = n, entry
        return (best, found) if best >= BLOCK else (0, None)

    def touch(self, entry: Kept) -> None:
        """It was used."""
        if entry in self._entries:
            del self._entries[entry]
            self._entries[entry] = None

    def drop(self, entry: Kept) -> None:
        del self._entries[entry]
        self.rows -= len(entry.tokens)
        for h in entry.hashes:
            holders = self._table[h]
            del holders[entry]
            if not holders:
                del self._table[h]

    def drop_oldest(self) -> None:
        """Give up the one that was not used for longest; KeyError when there is none."""
        if not self._entries:
            raise KeyError("nothing is kept")
        self.drop(next(iter(self._entries)))

    def clear(self) -> None:
        self._entries.clear()
        self._table.clear()
        self.rows = 0

    def _close(self, hashes: Iterator[int] | Sequence[int]) -> list[Kept]:
        """The latest entries among those that share most blocks."""
        holders: dict[Kept, None] = {}
        for h in hashes:
            here = self._table.get(h)
            if here is None:
                break
            holders = here
        latest = reversed(holders)
        return [entry for entry, _ in zip(latest, range(CLOSEST), strict=False)]


def block_hashes(tokens: Sequence[int]) -> Iterator[int]:
    """A hash of the first 1, 2, .. whole blocks."""
    h = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        h = hash((h, *tokens[end - BLOCK : end]))
        yield h


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two id lists."""
    n = min(len(a), len(b))
    step, at = 64, 0
    while at < n and a[at : at + step] == b[at : at + step]:  # slices compare at C speed
        at += step
        step = min(4096, 2 * step)
    if at >= n:
        return n
    low, high = at, min(n, at + step)  # a[:low] == b[:low]
    if a[low:high] == b[low:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
