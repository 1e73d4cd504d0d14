"""A model that is a table: the logits after a prefix depend on its last tokens, by hashing.

Its cache stores token ids, so a wrong commit, a wrong ancestor mask or a wrong position is an
assertion or another text, never a small numerical difference. It implements
`core.protocols.TargetModel`; nothing of foretell.models is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import Output, PackedBatch, Segment
from foretell.core.errors import NoRollback
from foretell.core.protocols import BuildContext, Caps, ModelSpec


class TableCache:
    def __init__(self, model: TableModel) -> None:
        self.model, self.tokens = model, []
        self.open = False

    @property
    def n(self) -> int:
        return len(self.tokens)

    def reserve(self, rows: int) -> None:
        pass

    def truncate(self, n: int) -> None:
        assert not self.open, "truncated while a transaction is open"
        if n < self.n and not self.model.spec.caps.rollback:
            raise NoRollback("this cache cannot undo rows")
        del self.tokens[n:]

    def copy_prefix(self, other: TableCache, n: int) -> None:
        assert not self.tokens, "copied into a cache that is not empty"
        assert n <= other.n, "copied more rows than there are"
        self.tokens = other.tokens[:n]
        self.model.rows_copied += n

    def check(self) -> None:
        assert not self.open, "a transaction was left open"


class TableTxn:
    def __init__(self, caches: Sequence[TableCache]) -> None:
        assert len({id(c) for c in caches}) == len(caches), "a cache is in the batch twice"
        self.caches = list(caches)
        self.rows: list[list[tuple[int, list[int]]]] = [[] for _ in caches]  # token, visible rows
        self.closed = False

    @property
    def scratch(self) -> list[int]:
        return [len(r) for r in self.rows]

    def __enter__(self) -> TableTxn:
        for c in self.caches:
            assert not c.open, "two transactions over one cache"
            c.open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True
        for c in self.caches:
            c.open = False

    def advance(self, batch: PackedBatch) -> None:
        """Behind layers that were run one by one."""
        assert not self.closed
        for segment, rows in zip(batch.segments, self.rows, strict=True):
            rows += visible_rows(segment, len(rows))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        assert not self.closed, "committed twice"
        for cache, rows, path in zip(self.caches, self.rows, paths, strict=True):
            path = list(path)
            assert path == sorted(set(path)), f"a path is not strictly increasing: {path}"
            for i, r in enumerate(path):
                assert rows[r][1] == path[: i + 1], "a committed row saw other rows than its path"
            if len(path) < len(rows) and not cache.model.spec.caps.rollback:
                raise NoRollback("this cache cannot undo rows")
            cache.tokens += [rows[r][0] for r in path]
        self.__exit__()


def visible_rows(segment: Segment, used: int) -> list[tuple[int, list[int]]]:
    """Token of each row, and the transaction's rows that it sees; `used` rows came before."""
    if segment.ancestors is None:
        seen = [list(range(used + i + 1)) for i in range(len(segment))]
    else:
        assert segment.ancestors.shape == (len(segment), used + len(segment))
        seen = [np.flatnonzero(row).tolist() for row in segment.ancestors]
    assert all(rows[-1] == used + i for i, rows in enumerate(seen)), "a row does not see itself"
    return list(zip(segment.tokens.tolist(), seen, strict=True))


class TableModel:
    """logits(prefix) is a random row chosen by a hash of the last `order` tokens of the prefix."""

    def __init__(
        self,
        vocab: int = 11,
        order: int = 3,
        seed: int = 0,
        *,
        like: TableModel | None = None,
        agreement: float = 0.8,
        sharpness: float = 2.0,
        max_positions: int = 128,
        caps: Caps | None = None,
        taps: Sequence[Any] | None = None,
    ) -> None:
        caps = caps or Caps(layer_access=True)
        self.spec = ModelSpec(vocab, 4, 3, max_positions, caps, f"table-{seed}")
        self.device = torch.device("cpu")
        self.order, self.seed, self.like, self.agreement = order, seed, like, agreement
        self.sharpness = sharpness
        self.taps = taps  # the only ones that may be asked for; None = any
        self.made: dict[tuple[int, ...], Tensor] = {}
        self.partial: list[tuple[frozenset[int], tuple[int, ...]]] = []  # see `run_layers`
        self.rows_fed = self.rows_copied = self.forwards = self.logit_rows = 0
        self.widest = 0  # most rows of one forward
        self.on_forward: Callable[[PackedBatch, TableTxn], None] = lambda batch, txn: None

    def logits(self, prefix: Sequence[int]) -> Tensor:
        """[V] float32: the logits of the token after `prefix`."""
        order = max(self.order, self.like.order if self.like else 0)
        key = tuple(prefix[-order:])
        if key not in self.made:
            r = random.Random(f"{self.seed}/{key[-self.order :]}")
            own = torch.tensor([r.gauss(0, self.sharpness) for _ in range(self.spec.vocab)])
            if self.like is not None:
                shared = self.like.logits(prefix)
                own = self.agreement * shared + (1 - self.agreement) * own
            self.made[key] = own
        return self.made[key]

    def next_probs(self, prefix: Sequence[int]) -> Tensor:
        return self.logits(prefix).double().softmax(-1)

    def new_cache(self, rows: int = 0) -> TableCache:
        return TableCache(self)

    def open(self, caches: Sequence[TableCache]) -> TableTxn:
        return TableTxn(caches)

    def forward(self, batch: PackedBatch, txn: TableTxn, taps: Sequence[Any] = ()) -> Output:
        assert not txn.closed
        assert len(batch.segments) == len(txn.caches)
        assert self.taps is None or set(taps) <= set(self.taps), f"undeclared taps: {taps}"
        self.on_forward(batch, txn)
        self.forwards += 1
        self.rows_fed += batch.rows
        self.widest = max(self.widest, batch.rows)
        logits, hidden, prefixes = [], [], []
        for segment, cache, rows in zip(batch.segments, txn.caches, txn.rows, strict=True):
            assert cache.open
            assert cache.model is self, "a cache of another model"
            used, n = len(rows), len(segment)
            wanted = range(n) if segment.logits is None else segment.logits.tolist()
            assert self.spec.caps.tree or segment.ancestors is None, "a tree for a chain-only model"
            if segment.ancestors is not None:
                assert segment.ancestors.shape == (n, used + n)
            fresh = []
            for i, token in enumerate(segment.tokens.tolist()):
                assert 0 <= token < self.spec.vocab
                if segment.ancestors is None:
                    visible = list(range(used + i + 1))
                else:
                    visible = np.flatnonzero(segment.ancestors[i]).tolist()
                assert visible[-1] == used + i, "a row does not see itself last"
                rows.append((token, visible))
                prefix = cache.tokens + [rows[v][0] for v in visible]
                assert len(prefix) == segment.positions[i] + 1, "position and history disagree"
                assert len(prefix) <= self.spec.max_positions, "beyond the context"
                fresh.append(prefix)
                hidden.append(float(token))
            prefixes += fresh
            logits += [self.logits(fresh[i]) for i in wanted]
        self.logit_rows += len(logits)
        table = torch.stack(logits) if logits else torch.empty(0, self.spec.vocab)
        states = torch.tensor(hidden)[:, None].expand(-1, self.spec.hidden)
        found = dict.fromkeys(taps, states)
        for tap in taps:
            if isinstance(tap, int) and 0 < tap <= self.spec.layers:
                found[tap] = self._states(frozenset(range(tap)), prefixes)
        # Every other time, so that both ways to the argmax take part in everything that is tested.
        best = table.numpy().argmax(-1) if self.forwards % 2 else None
        return Output(table, found, best)

    def run_layers(
        self, hidden: Tensor, batch: PackedBatch, txn: TableTxn, layers: Sequence[int]
    ) -> Tensor:
        """A state names its prefix and the layers that ran: [index, -1, -1, -1] into `partial`."""
        assert not txn.closed
        assert list(layers) == sorted(set(layers)), "layers in order, each once"
        assert all(0 <= i < self.spec.layers for i in layers)
        assert hidden.shape == (batch.rows, 4)
        prefixes = []
        for segment, cache, rows in zip(batch.segments, txn.caches, txn.rows, strict=True):
            assert cache.open
            assert cache.model is self, "a cache of another model"
            fresh = [*rows, *visible_rows(segment, len(rows))]
            for i, (_, visible) in enumerate(fresh[len(rows) :]):
                prefix = cache.tokens + [fresh[v][0] for v in visible]
                assert len(prefix) == segment.positions[i] + 1, "position and history disagree"
                assert len(prefix) <= self.spec.max_positions, "beyond the context"
                prefixes.append(prefix)
        return self._states(frozenset(layers), prefixes)

    def _states(self, layers: frozenset[int], prefixes: list[list[int]]) -> Tensor:
        at = len(self.partial)
        self.partial += [(layers, tuple(p)) for p in prefixes]
        states = torch.full((len(prefixes), 4), -1.0)
        states[:, 0] = torch.arange(at, len(self.partial))
        return states

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens % 4, 4).float()

    def unembed(self, hidden: Tensor) -> Tensor:
        rows = [self._after_layers(*self.partial[int(h[0])]) for h in hidden if h[1] < 0]
        return torch.stack(rows) if rows else torch.zeros(len(hidden), self.spec.vocab)

    def _after_layers(self, layers: frozenset[int], prefix: tuple[int, ...]) -> Tensor:
        """The whole model's logits, mixed with noise for each layer that did not run."""
        whole = self.logits(prefix)
        for missing in sorted(set(range(self.spec.layers)) - layers):
            r = random.Random(f"{self.seed}/{missing}/{prefix[-2:]}")
            noise = torch.tensor([r.gauss(0, self.sharpness) for _ in range(self.spec.vocab)])
            whole = 0.8 * whole + 0.2 * noise
        return whole


class Letters:
    """A tokenizer whose ids are pieces of text; the text of ids is their pieces joined.

    It has what the engine needs of `models.text.tokenizer.Tokenizer`.
    """

    def __init__(self, pieces: Sequence[str], eos: int | None = None) -> None:
        self.pieces, self.eos_ids = list(pieces), frozenset(() if eos is None else (eos,))
        self.detokenizer = self

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        ids = []
        while text:
            known = [i for i, p in enumerate(self.pieces) if p and text.startswith(p)]
            if not known:
                text = text[1:]
                continue
            best = max(known, key=lambda i: len(self.pieces[i]))
            ids.append(best)
            text = text[len(self.pieces[best]) :]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids)

    def check_vocab(self, rows: int) -> None:
        assert len(self.pieces) <= rows

    # the detokenizer's side, for StreamDecoder
    def start(self, prompt_ids: Sequence[int], skip_special: bool = True) -> LetterState:
        return LetterState()

    def step(
        self, state: LetterState, token: int, skip_special: bool = True
    ) -> tuple[str, LetterState]:
        return self.pieces[token], state

    def finish(self, state: LetterState) -> str:
        return ""


class LetterState(NamedTuple):
    pending: bytes = b""
    text: str = ""


def pair(
    vocab: int = 11, seed: int = 0, draft_order: int = 2, **options: Any
) -> tuple[TableModel, BuildContext]:
    """A target, and a context from which ``draft-model`` finds a drafter that often agrees."""
    target = TableModel(vocab, seed=seed, **options)
    positions = target.spec.max_positions
    draft = TableModel(vocab, draft_order, seed + 1, like=target, max_positions=positions)
    return target, BuildContext(target, None, lambda path: draft, "the table's drafter")


class Cost:
    """A forward of n rows takes 1 + each * (n - 1)."""

    def __init__(self, each: float) -> None:
        self.each = each

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        return 1 + self.each * (rows - 1)

    def observe(self, *args: Any) -> None: ...
