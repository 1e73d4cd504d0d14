"""Who runs in the next step, and with how many rows.

Continuous batching: a waiting sequence joins as soon as its rows fit, in order of arrival.
Decoding sequences come first in every step; what is left of the step's rows goes to prompt chunks.
When rows run out the youngest sequence is preempted: its rows are dropped and computed again later.
The oldest one always fits (`add` refuses what never could), so something always moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from foretell.core.errors import InputError
from foretell.core.protocols import KVCache, Load
from foretell.engine.sequence import Sequence


@dataclass(slots=True)
class Turn:
    """One sequence's part of a step."""

    seq: Sequence
    feed: int  # pending ids to feed
    decode: bool  # all of them: the last row predicts the next token, drafts may follow


@dataclass(slots=True)
class Kept:
    """The rows of a finished sequence, kept for prompts that begin alike."""

    tokens: list[int]
    cache: KVCache


class Scheduler:
    """Plans steps over a cache of `rows` rows.

    max_batch: most sequences that run at once; step_rows: most prompt rows of one step;
    new_cache(rows) makes an empty cache; reuse: whether caches can be copied and cut.
    """

    SHARE = 8  # fewer shared prompt ids than this are not worth a copy
    KEEP = 4  # finished caches kept for reuse

    def __init__(
        self,
        rows: int,
        max_batch: int,
        step_rows: int,
        new_cache: Callable[[int], KVCache],
        reuse: bool = True,
    ) -> None:
        self.rows, self.max_batch, self.step_rows = rows, max_batch, step_rows
        self.new_cache, self.reuse = new_cache, reuse
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.kept: deque[Kept] = deque()
        self.on_admit: Callable[[Sequence], None] = lambda seq: None
        self.on_evict: Callable[[Sequence], None] = lambda seq: None

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; InputError when even an empty cache could not hold it."""
        if seq.most_rows > self.rows:
            raise InputError(
                f"The request needs up to {seq.most_rows} cache rows (prompt and output) and the "
                f"cache has {self.rows}: lower max_tokens, shorten the prompt, or raise kv_rows."
            )
        self.waiting.append(seq)

    @property
    def used(self) -> int:
        return sum(s.rows for s in self.running) + self.spare

    @property
    def free(self) -> int:
        return self.rows - self.used

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def spare(self) -> int:
        """Rows of kept caches: given up as soon as anybody needs them."""
        return sum(len(k.tokens) for k in self.kept)

    def load(self) -> Load:
        return Load(len(self.running), len(self.waiting), self.free + self.spare)

    def plan(self) -> list[Turn]:
        """The turns of the next step, never empty unless the scheduler is idle."""
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
                    continue
            turns.append(Turn(seq, feed, feed == seq.pending))
            planned += feed
            budget -= feed if prompt else 0
        return turns

    def retire(self, seq: Sequence) -> None:
        """Forget a finished (or aborted) sequence; its rows may serve a later prompt."""
        if seq in self.waiting:
            self.waiting.remove(seq)
        if seq not in self.running:
            return
        self.running.remove(seq)
        cache = seq.cache
        self._drop(seq)
        if self.reuse and cache is not None and cache.n >= self.SHARE:
            self.kept.append(Kept(seq.tokens[: cache.n], cache))
            while len(self.kept) > self.KEEP:
                self.kept.popleft()

    def shed(self, rows: int) -> bool:
        """Drop kept caches, oldest first, until `rows` rows are free; False if they never are."""
        while rows > self.free and self.kept:
            self.kept.popleft()
        return rows <= self.free

    def clear_kept(self) -> None:
        self.kept.clear()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            seq = self.waiting[0]
            need = len(seq.tokens) + 1
            reserved = sum(s.pending for s in self.running)
            if self.running and need > self.free + self.spare - reserved:
                return  # in order: nobody overtakes the head of the queue
            self.waiting.popleft()
            seq.cache = self.new_cache(seq.most_rows)
            self.running.append(seq)
            self._reuse(seq)
            self.on_admit(seq)

    def _make_room(self, seq: Sequence, rows: int, turns: list[Turn]) -> bool:
        """See that `rows` rows are free: drop kept caches, then preempt the youngest sequences
        that are younger than `seq` and have no turn yet. False: `seq` waits for older ones."""
        while not self.shed(rows):
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
        self.waiting.appendleft(seq)

    def _drop(self, seq: Sequence) -> None:
        self.on_evict(seq)
        seq.cache = None
        seq.view.cached = 0

    def _reusable(self, seq: Sequence) -> int:
        """Most rows that `seq` may take over from other caches."""
        if not self.reuse or seq.params.prompt_logprobs is not None:
            return 0
        return len(seq.tokens) - 1  # the last id must be fed: its row predicts the next

    def _reuse(self, seq: Sequence, planned: int = 0) -> None:
        """Copy the longest prefix that a running or a kept cache already holds, if `planned` rows
        of this step leave room for it."""
        best, source = self.SHARE - 1, None
        limit = self._reusable(seq)
        if limit < self.SHARE:
            return
        for other in self.running:
            if other is not seq and other.cache is not None:
                n = min(shared(seq.tokens, other.tokens), other.rows, limit)
                if n > best:
                    best, source = n, other.cache
        for kept in self.kept:
            n = min(shared(seq.tokens, kept.tokens), limit)
            if n > best:
                best, source = n, kept.cache
        if source is not None and seq.cache is not None and best > seq.rows:
            if not self.shed(planned + best - seq.rows):
                return
            seq.cache.truncate(0)
            seq.cache.copy_prefix(source, best)
            seq.stats.reused = best
            seq.view.cached = best

    def _waits(self, seq: Sequence, planned: int) -> bool:
        """Whether an older sequence is about to compute rows that `seq` can copy; if there is
        nothing to wait for, `seq` takes the rows that are there."""
        limit = self._reusable(seq)
        if limit < self.SHARE:
            return False
        for other in self.running:
            if other is seq:
                break
            n = min(shared(seq.tokens, other.tokens), limit)
            if n >= self.SHARE and n > seq.rows and n > other.rows:
                return True
        self._reuse(seq, planned)
        return False


def shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning of two id lists."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # a[:low] == b[:low]; slices compare at C speed
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
