"""Writes a datastore."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from foretell.core.errors import InputError
from foretell.drafters.tables.datastore.layout import ALIGN, MAGIC, SORTED, VERSION
from foretell.drafters.tables.datastore.suffixes import suffix_order


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
