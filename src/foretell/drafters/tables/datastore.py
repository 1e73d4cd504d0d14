"""A file of tokens and their suffix array, read through the page cache.

Layout: 8 bytes magic, 8 bytes length of the JSON header (little endian), the header, then, aligned
to 64 bytes, for every shard its tokens (big endian: byte order is token order) and its suffix
array (uint32). `vocab` separates documents, so it is larger than any token.
"""

from __future__ import annotations

import json
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from foretell.core.errors import InputError

MAGIC = b"FTLSTORE"
VERSION = 1
SORTED = 32  # tokens by which suffixes are in order
ALIGN = 64


def suffix_order(
    tokens: np.ndarray, length: int = SORTED, tell: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Starts of all suffixes of `tokens` [n], sorted by their first `length` tokens (a power of
    two); the end of the text comes before any token. uint32 [n].

    Prefix doubling: with ranks of the first k tokens known, pairs of ranks k apart sort the first
    2 k. Only suffixes that are not alone in their rank are sorted again. About 45 bytes a token
    (fewer than 2**31 of them). tell: called with the tokens that need no more sorting.
    """
    n = len(tokens)
    order = np.argsort(tokens, kind="stable").astype(np.int32)  # 16-bit keys: a radix sort
    # A group of equal suffixes has the place of its first member as rank, so groups keep places.
    rank = np.empty(n, np.int32)
    rank[order] = _first_places(tokens[order], np.arange(n, dtype=np.int32))
    k = 1
    while k < length:
        by_place = rank[order]
        twin = np.zeros(n + 1, bool)
        twin[1:-1] = by_place[1:] == by_place[:-1]
        places = np.flatnonzero(twin[1:] | twin[:-1]).astype(np.int32)
        del by_place, twin
        tell(n - len(places))
        if not len(places):
            break
        members = order[places]
        keys = members.astype(np.int64) + k
        after = np.where(keys < n, rank[np.minimum(keys, n - 1)] + 1, 0)
        keys[:] = rank[members]
        keys <<= 32
        keys |= after
        del after
        by_key = np.argsort(keys)
        members, keys = members[by_key], keys[by_key]
        del by_key
        order[places] = members
        rank[members] = _first_places(keys, places)
        k *= 2
    tell(n)
    return order.astype(np.uint32)


def _first_places(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For every entry of sorted `keys` the place of the first that is equal; `places` ascend."""
    fresh = np.ones(len(keys), bool)
    fresh[1:] = keys[1:] != keys[:-1]
    return np.maximum.accumulate(np.where(fresh, places, 0))


class StoreWriter:
    """Writes shards to an open file; the header goes in front when all are known.

    The file begins with room for the header, so that a shard can be dropped from memory once
    written.
    """

    ROOM = 1 << 16

    def __init__(self, file: IO[bytes], vocab: int, facts: dict[str, Any]) -> None:
        self.file, self.vocab, self.facts = file, vocab, facts
        self.width = 2 if vocab < 1 << 16 else 4
        self.shards: list[dict[str, int]] = []
        file.write(bytes(self.ROOM))

    def add(self, tokens: np.ndarray, tell: Callable[[int], None] = lambda done: None) -> None:
        """One shard: token ids, with `vocab` between documents."""
        if not len(tokens):
            return
        tokens = tokens.astype(np.uint16 if self.width == 2 else np.uint32)
        order = suffix_order(tokens, SORTED, tell)
        begins = tokens[order] < self.vocab  # a match never begins with a separator: those are last
        order = order[begins]
        shard = {"tokens": len(tokens), "suffixes": len(order)}
        shard["text"] = self._put(tokens.astype(f">u{self.width}"))
        shard["order"] = self._put(order.astype("<u4"))
        self.shards.append(shard)

    def _put(self, values: np.ndarray) -> int:
        at = self.file.tell()
        self.file.write(bytes(-at % ALIGN))
        at = self.file.tell()
        values.tofile(self.file)
        return at

    def finish(self) -> None:
        header = {
            "version": VERSION,
            "vocab": self.vocab,
            "width": self.width,
            "sorted": SORTED,
            "shards": self.shards,
            **self.facts,
        }
        text = json.dumps(header).encode()
        if len(text) > self.ROOM - 16:
            raise InputError("The datastore has too many shards: give fewer files, or raise shard.")
        self.file.seek(0)
        self.file.write(MAGIC + len(text).to_bytes(8, "little") + text)


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


def heaviest_prefixes(
    rows: np.ndarray, nodes: int, vocab: int, branching: int = 1 << 30, ordered: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The `nodes` most frequent prefixes of `rows` [r, d] as a tree: tokens, parents (-1 = root),
    levels, and how often each followed its parent; [n] each, parents first, the heavier of two
    siblings first. A token >= vocab ends its row. branching: most children of a node; ordered:
    equal prefixes are neighbours, as in the rows of one suffix array."""
    if not ordered:
        rows = rows[np.lexsort(rows.T[::-1])]
    r, d = rows.shape
    alive = np.logical_and.accumulate(rows < vocab, axis=1)
    change = np.ones((r, d), bool)
    change[1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    change = change.T  # [d, r]: level by level
    ident = np.cumsum(change.ravel()).reshape(d, r) - 1
    level, row = np.nonzero(change)
    bounds = np.append(np.flatnonzero(change.ravel()), d * r)
    count = np.diff(bounds)  # runs end where the next begins; every level begins anew
    parent = np.where(level > 0, ident[level - 1, row], -1)
    fits = alive.T[level, row]
    if branching < len(count):
        order = np.lexsort((np.arange(len(count)), -count, parent))
        place = np.arange(len(order)) - np.searchsorted(parent[order], parent[order])
        narrow = np.empty(len(order), bool)
        narrow[order] = place < branching
        for a in range(d):  # a child goes with its parent
            at = np.flatnonzero(level == a)
            fits[at] &= narrow[at] & ((parent[at] < 0) | fits[parent[at]])
    order = np.flatnonzero(fits)
    order = order[np.lexsort((order, level[order], -count[order]))][:nodes]
    order = order[np.lexsort((order, -count[order], level[order]))]
    index = np.full(len(count) + 1, -1)
    index[order] = np.arange(len(order))
    above = np.where(parent[order] < 0, r, count[parent[order]])
    tokens = rows[row[order], level[order]]
    return tokens, index[parent[order]], level[order] + 1, count[order] / above
