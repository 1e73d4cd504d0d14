"""Rows of token ids out of corpora: encoding, a stream a corpus, a mixture of streams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from foretell.lab.train.corpora import Corpus
from foretell.lab.train.tokenizer import END_OF_TEXT, special_id

FUNCTION_START_SHARE = 0.3  # of the definitions inside a file, drawn anew every epoch


class TokenStream:
    """Training rows of one corpus, without repetition inside an epoch.

    Every epoch lays the documents out anew (their order, and for code which definitions start a
    document of their own), cuts the line into rows, and deals the rows in a random order. The
    layout depends only on (seed, epoch), so `position` is all a checkpoint needs.
    """

    def __init__(
        self, ids: np.ndarray, ends: np.ndarray, starts: np.ndarray, eot: int, seed: int
    ) -> None:
        self.ids, self.ends = ids, ends  # ids of all segments; where each ends
        self.starts = starts  # a segment: 1 opens a document, 0 reads on, 2 may do either
        self.eot, self.seed = eot, seed
        self._laid_out: tuple[int, int] | None = None
        self.rewind()

    def rewind(self) -> None:
        self.position = [0, 0, 0]  # epoch, next row, row length the epoch was cut for

    def _lay_out(self, epoch: int, length: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        opens = (self.starts == 1) | (
            (self.starts == 2) & (rng.random(len(self.starts)) < FUNCTION_START_SHARE)
        )
        firsts = np.flatnonzero(opens)
        lasts = np.append(firsts[1:], len(self.starts))
        begins = np.concatenate(([0], self.ends[:-1]))
        separator = np.array([self.eot], dtype=self.ids.dtype)
        parts = []
        for i in rng.permutation(len(firsts)):
            parts += [separator, self.ids[begins[firsts[i]] : self.ends[lasts[i] - 1]]]
        line = np.concatenate(parts)
        if len(line) < length + 1:
            line = np.tile(line, -(-(length + 1) // len(line)))
        rows = (len(line) - 1) // length
        offset = rng.integers(0, (len(line) - 1) - rows * length + 1)
        self._line, self._offset = line, offset
        self._order = rng.permutation(rows)
        self._laid_out = (epoch, length)

    def take(self, count: int, length: int) -> np.ndarray:
        """The next rows, `[count, length + 1]`: each row's last id is the next row's first."""
        out = np.empty((count, length + 1), dtype=np.int64)
        for i in range(count):
            epoch, row, cut = self.position
            if cut not in (0, length):  # rows of another length cannot go on in the same cut
                epoch, row = epoch + 1, 0
            if self._laid_out != (epoch, length):
                self._lay_out(epoch, length)
            start = self._offset + self._order[row] * length
            out[i] = self._line[start : start + length + 1]
            row += 1
            self.position = [epoch, row, length]
            if row == len(self._order):
                self.position = [epoch + 1, 0, length]
        return out


@dataclass
class Domain:
    """One corpus ready to train on and to be measured by."""

    name: str
    weight: float
    stream: TokenStream
    held_out: np.ndarray  # ids, every segment behind an end-of-text


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, weight: float, seed: int) -> Domain:
    segments = [segment for document in corpus.train for segment in document]
    starts = np.concatenate(
        [[1] + [2 if corpus.is_code else 0] * (len(document) - 1) for document in corpus.train]
    )
    eot = special_id(tokenizer, END_OF_TEXT)
    encoded = [e.ids for e in tokenizer.encode_batch_fast(segments)]
    ids = np.concatenate([np.asarray(e, dtype=np.uint16) for e in encoded])
    ends = np.cumsum([len(e) for e in encoded])
    held_out = [[eot, *e.ids] for e in tokenizer.encode_batch_fast(corpus.held_out)]
    return Domain(
        corpus.name,
        weight,
        TokenStream(ids, ends, starts, eot, seed),
        np.concatenate([np.asarray(e, dtype=np.int64) for e in held_out]),
    )


class Mixture:
    """Batches that hold every domain in its share: each row goes to whoever is owed most.

    Starts at the first row of every stream.
    """

    def __init__(self, domains: list[Domain]) -> None:
        self.domains = domains
        total = sum(d.weight for d in domains)
        self.shares = [d.weight / total for d in domains]
        self.credit = [0.0] * len(domains)
        for domain in domains:
            domain.stream.rewind()

    def batch(self, rows: int, length: int) -> np.ndarray:
        """`[rows, length + 1]` token ids."""
        counts = [0] * len(self.domains)
        for _ in range(rows):
            self.credit = [c + s for c, s in zip(self.credit, self.shares, strict=True)]
            chosen = self.credit.index(max(self.credit))
            self.credit[chosen] -= 1
            counts[chosen] += 1
        taken = [d.stream.take(n, length) for d, n in zip(self.domains, counts, strict=True)]
        return np.concatenate(taken)

    def state(self) -> dict:
        return {"credit": self.credit, "positions": [d.stream.position for d in self.domains]}

    def restore(self, state: dict) -> None:
        self.credit = list(state["credit"])
        for domain, position in zip(self.domains, state["positions"], strict=True):
            domain.stream.position = list(position)
