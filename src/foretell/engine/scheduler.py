"""Who runs in the next step, and with how many rows.

Continuous batching: a waiting sequence joins as soon as its rows fit, in order of arrival.
Decoding sequences come first in every step; what is left of the step's rows goes to prompt chunks,
and what those leave to prompts that still grow. When rows run out, rows of finished sequences go
first (the least recently used), then those of growing prompts, then the youngest sequence is
preempted: its rows are dropped and computed again later. The oldest one always fits (`add` refuses
what never could), so something always moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from foretell.core.errors import InputError, NoRollback
from foretell.core.protocols import KVCache, Load
from foretell.engine.kept import BLOCK, KeptRows, shared
from foretell.engine.sequence import Sequence

AHEAD = 256  # rows a growing prompt's cache has room for beyond what is there


@dataclass(slots=True)
class Turn:
    """One sequence's part of a step."""

    seq: Sequence
    feed: int  # pending ids to feed
    decode: bool  # all of them: the last row predicts the next token, drafts may follow


class Scheduler:
    """Plans steps over a cache of `rows` rows.

    max_batch: most sequences that run at once; step_rows: most prompt rows of one step;
    new_cache(rows) makes an empty cache; reuse: whether caches can be copied and cut; ahead: rows a
    new cache has room for beyond its prompt, None = all it can come to hold (memory that is only
    taken when it is written).
    """

    SHARE = BLOCK  # fewer shared prompt ids than this are not worth a copy

    def __init__(
        self,
        rows: int,
        max_batch: int,
        step_rows: int,
        new_cache: Callable[[int], KVCache],
        reuse: bool = True,
        ahead: int | None = None,
    ) -> None:
        self.rows, self.max_batch, self.step_rows = rows, max_batch, step_rows
        self.new_cache, self.reuse, self.ahead = new_cache, reuse, ahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.growing: list[Sequence] = []  # prompts that are not complete, in order of arrival
        self.warm: list[Sequence] = []  # those among the waiting that have rows already
        self.kept = KeptRows()
        self.on_admit: Callable[[Sequence], None] = lambda seq: None
        self.on_evict: Callable[[Sequence], None] = lambda seq: None
        self.preempted = self.copied = 0  # sequences, rows; since the start
        self._admitted = 0

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; InputError when even an empty cache could not hold it. It may bring a
        cache of rows for the beginning of its prompt."""
        self.check(seq)
        self.waiting.append(seq)
        if seq.cache is not None:
            self.warm.append(seq)

    def check(self, seq: Sequence) -> None:
        """InputError when even an empty cache could not hold it."""
        if seq.most_rows > self.rows:
            raise InputError(
                f"The request needs up to {seq.most_rows} cache rows (prompt and output) and the "
                f"cache has {self.rows}: lower max_tokens, shorten the prompt, or raise kv_rows."
            )

    def grow(self, seq: Sequence) -> None:
        """Read the prompt of an `open` sequence as it grows."""
        self.growing.append(seq)

    def replace(self, seq: Sequence, tokens: list[int]) -> int:
        """Another prompt for a growing sequence: rows of the common beginning stay. Returns how
        many rows were dropped."""
        keep = min(shared(seq.tokens, tokens), max(0, len(tokens) - 1))
        had = seq.rows
        if seq.cache is not None and had > keep:
            try:
                seq.cache.truncate(keep)
            except NoRollback:
                seq.cache = None
        seq.tokens[:] = tokens
        seq.view.cached = seq.rows
        return had - seq.rows

    def release(self, seq: Sequence) -> KVCache | None:
        """The prompt of a growing sequence is complete (or nobody wants it): its cache, if any."""
        if seq in self.growing:
            self.growing.remove(seq)
        cache, seq.cache = seq.cache, None
        return cache

    @property
    def used(self) -> int:
        return sum(s.rows for s in self.running) + self.spare + self.set_aside

    @property
    def free(self) -> int:
        return self.rows - self.used

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def spare(self) -> int:
        """Rows of kept caches: given up as soon as anybody needs them."""
        return self.kept.rows

    @property
    def set_aside(self) -> int:
        """Rows of growing prompts, and of complete ones that wait."""
        return sum(s.rows for s in self.growing) + sum(s.rows for s in self.warm)

    def load(self) -> Load:
        return Load(len(self.running), len(self.waiting), self.free + self.spare)

    def plan(self) -> list[Turn]:
        """The turns of the next step, never empty unless there is nothing to do."""
        self._admit()
        turns: list[Turn] = []
        planned = 0  # rows this step will add
        budget = self.step_rows
        free = self.free
        decoding = [s for s in self.running if s.pending == 1]
        filling = [s for s in self.running if s.pending > 1]
        for seq in [*decoding, *filling]:
            if seq.cache is None:  # preempted a moment ago
                continue
            prompt = seq.pending > 1
            if prompt:
                if budget <= 0 or self._waits(seq, planned):
                    continue
                free = self.free  # it may have copied rows
            feed = min(seq.pending, budget) if prompt else 1
            if planned + feed > free:
                fits = self._make_room(seq, planned + feed, turns)
                free = self.free
                if not fits:
                    # Those who decode left less than the chunk: the oldest takes that and moves.
                    if seq is not self.running[0] or planned >= free:
                        continue
                    feed = free - planned
            turns.append(Turn(seq, feed, feed == seq.pending))
            planned += feed
            budget -= feed if prompt else 0
        if self.growing and budget > 0:
            self._read_ahead(turns, planned, budget)
        return turns

    def retire(self, seq: Sequence, keep: bool = True) -> None:
        """Forget a finished (or aborted) sequence; its rows may serve a later prompt."""
        if seq in self.waiting:
            self.waiting.remove(seq)
            self._cool(seq)
        if seq not in self.running:
            return
        self.running.remove(seq)
        cache = seq.cache
        try:
            self._drop(seq)
        finally:
            seq.leaders = []
            if keep and cache is not None:
                self.keep(seq.tokens, cache)

    def keep(self, tokens: list[int], cache: KVCache) -> None:
        """Rows that nobody runs on any more, for prompts that begin alike."""
        n = cache.n
        if not self.reuse or n < self.SHARE:
            return
        if getattr(cache, "capacity", 0) > n + n // 2 + 64:  # room that is not needed any more
            smaller = self.new_cache(n)
            smaller.copy_prefix(cache, n)
            cache = smaller
        self.kept.add(tokens[:n], cache)
        self.shed(0)

    def shed(self, rows: int) -> bool:
        """Drop kept caches, least recently used first, until `rows` rows are free; False if they
        never are."""
        free = self.free
        while rows > free and len(self.kept):
            before = self.kept.rows
            self.kept.drop_oldest()
            free += before - self.kept.rows
        return rows <= free

    def clear_kept(self) -> None:
        self.kept.clear()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            seq = self.waiting[0]
            need = len(seq.tokens) + 1 - seq.rows
            reserved = sum(s.pending for s in self.running)
            others = self.set_aside - seq.rows
            if self.running and need > self.free + self.spare + others - reserved:
                return  # in order: nobody overtakes the head of the queue
            self.waiting.popleft()
            self._admitted += 1
            seq.order = self._admitted
            if seq.cache is None:
                seq.cache = self._fresh(seq)
            elif seq in self.warm:
                self.warm.remove(seq)
            self.running.append(seq)
            self._find_leaders(seq)
            self._reuse(seq)
            seq.view.cached = seq.rows
            self.on_admit(seq)

    def _fresh(self, seq: Sequence) -> KVCache:
        most = seq.most_rows
        return self.new_cache(
            most if self.ahead is None else min(most, len(seq.tokens) + self.ahead)
        )

    def _make_room(self, seq: Sequence, rows: int, turns: list[Turn]) -> bool:
        """See that `rows` rows are free: drop kept caches, then those of growing prompts, then
        preempt the youngest sequences that are younger than `seq` and have no turn yet. False:
        `seq` waits for older ones."""
        while not self.shed(rows):
            aside = [s for s in [*self.warm, *self.growing] if s.rows]
            if aside:
                self._cool(aside[-1])
                aside[-1].stats.preempted += 1
                self.preempted += 1
                continue
            younger = self.running[self.running.index(seq) + 1 :]
            taken = [t.seq for t in turns]
            victim = next((s for s in reversed(younger) if s not in taken), None)
            if victim is None:
                return False
            self.preempt(victim)
        return True

    def preempt(self, seq: Sequence) -> None:
        """Drop a running sequence's rows and put it at the head of the queue."""
        self.running.remove(seq)
        self._drop(seq)
        seq.stats.preempted += 1
        self.preempted += 1
        self.waiting.appendleft(seq)

    def _cool(self, seq: Sequence) -> None:
        """Drop the rows of one that does not run."""
        seq.cache, seq.view.cached = None, 0
        if seq in self.warm:
            self.warm.remove(seq)

    def _drop(self, seq: Sequence) -> None:
        try:
            self.on_evict(seq)
        finally:
            seq.cache = None
            seq.view.cached = 0

    def _read_ahead(self, turns: list[Turn], planned: int, budget: int) -> None:
        """Rows of growing prompts, all but the last id: with what the step has left, and never in
        the way of those who wait or decode."""
        promised = sum(len(s.tokens) + 1 - s.rows for s in self.waiting)
        promised += sum(s.pending for s in self.running) - planned
        for seq in self.growing:
            if budget <= 0:
                return
            if seq.cache is None and len(seq.tokens) > 1:
                seq.cache = self._fresh(seq)
                self._reuse(seq, planned)
            feed = min(seq.pending - 1, budget)
            if feed <= 0 or planned + feed + max(0, promised) > self.free + self.spare:
                continue
            if self.shed(planned + feed):
                turns.append(Turn(seq, feed, False))
                planned += feed
                budget -= feed

    def _reusable(self, seq: Sequence) -> int:
        """Most rows that `seq` may take over from other caches."""
        if not self.reuse or seq.params.prompt_logprobs is not None:
            return 0
        return len(seq.tokens) - 1  # the last id must be fed: its row predicts the next

    def _find_leaders(self, seq: Sequence) -> None:
        """Who else begins like `seq`, among those admitted before it."""
        seq.leaders = []
        limit = self._reusable(seq)
        if limit < self.SHARE:
            return
        for other in self.running:
            if other is not seq and other.tokens[: self.SHARE] == seq.tokens[: self.SHARE]:
                seq.leaders.append((other, min(shared(seq.tokens, other.tokens), limit)))

    def _reuse(self, seq: Sequence, planned: int = 0) -> None:
        """Copy the longest prefix that a running or a kept cache already holds, if `planned` rows
        of this step leave room for it."""
        limit = self._reusable(seq)
        if limit < self.SHARE or seq.cache is None:
            return
        best, entry = self.kept.find(seq.tokens, limit) if len(self.kept) else (0, None)
        source = entry.cache if entry is not None else None
        best = max(best, self.SHARE - 1)
        for other, common in self._alike(seq):
            if min(common, other.rows) > best:
                best, source, entry = min(common, other.rows), other.cache, None
        if source is None or best <= seq.rows:
            return
        if entry is not None:
            self.kept.touch(entry)
        if not self.shed(planned + best - seq.rows):
            return
        seq.cache.truncate(0)
        seq.cache.copy_prefix(source, best)
        seq.stats.reused = best
        seq.view.cached = best
        self.copied += best

    def _alike(self, seq: Sequence) -> list[tuple[Sequence, int]]:
        """Sequences with a cache that begin like `seq`, and how many ids they share."""
        if not seq.open:
            found = [(s, n) for s, n in seq.leaders if s.cache is not None]
            growing = self.growing
        else:
            found, growing = [], [*self.running, *self.growing]
        limit = self._reusable(seq)
        for other in growing:
            if other is not seq and other.cache is not None:
                n = min(shared(seq.tokens, other.tokens), limit)
                if n >= self.SHARE:
                    found.append((other, n))
        return found

    def _waits(self, seq: Sequence, planned: int) -> bool:
        """Whether an older sequence is about to compute rows that `seq` can copy; if there is
        nothing to wait for, `seq` takes the rows that are there."""
        if not seq.leaders:
            return False
        for other, n in seq.leaders:
            older = other.cache is not None and other.order < seq.order
            if older and n >= self.SHARE and n > seq.rows and n > other.rows:
                return True
        self._reuse(seq, planned)
        return False
