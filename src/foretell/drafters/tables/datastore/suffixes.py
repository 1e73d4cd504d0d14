"""Suffix arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def suffix_order(
    tokens: np.ndarray, length: int, tell: Callable[[int], None] = lambda done: None
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
