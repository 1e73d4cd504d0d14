"""The step: one forward that prefills, decodes, and verifies, for any batch.

Invariants
1. ``tokens`` are all committed ids; the cache holds rows for ``tokens[:cache.n]``; the rest is
   *pending*, at least one id when ready to decode.
2. A step feeds the pending ids (CONTEXT nodes, a chain) and the drafts that hang off the last of
   them, in ONE forward. Prefill, chunked prefill, forced tokens, plain decoding and speculation are
   therefore the same step; a chunk is the first c pending ids, without drafts.
3. After verification the path's rows are committed and everything else vanishes; the bonus token is
   the new pending id.
4. What a drafter keeps is a cache over ``tokens[:k]`` for a k it knows; it catches up when asked.
5. Randomness is keyed by (sequence seed, absolute position, purpose).
6. One-hot drafts (no q row) are lossless whatever the drafter; nodes with a q row are not removed,
   only killed.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from time import perf_counter

import numpy as np
import torch

from foretell.control.processed import ProcessedRows
from foretell.core.batch import PackedBatch, Tap, segment_of
from foretell.core.errors import InputError
from foretell.core.feedback import Feedback, Rows, Verdict
from foretell.core.protocols import (
    Budget,
    CostModel,
    Drafter,
    LengthPolicy,
    Load,
    NodeMasks,
    TargetModel,
    Timings,
)
from foretell.core.tree import Kind, TokenTree
from foretell.engine.metrics import LONGEST, Totals
from foretell.engine.scheduler import Scheduler, Turn
from foretell.engine.sequence import Sequence, TokenEvent, TopLogprobs


class Engine:
    """Runs the sequences of a scheduler through a model, a drafter and a length policy."""

    def __init__(
        self,
        model: TargetModel,
        drafter: Drafter,
        policy: LengthPolicy,
        scheduler: Scheduler,
        cost: CostModel | None = None,
    ) -> None:
        caps = model.spec.caps
        if drafter.needs.layer_access and not caps.layer_access:
            raise InputError(
                f"'{drafter.name}' runs single layers of the target, which this model's adapter "
                "cannot do: choose another drafter."
            )
        if not caps.rollback and drafter.name != "none":
            raise InputError(
                "This model's cache cannot undo rows, so nothing can be drafted for it: "
                "use --draft none."
            )
        self.model, self.drafter, self.policy, self.scheduler = model, drafter, policy, scheduler
        self.cost = cost
        scheduler.on_admit = self._begin
        scheduler.on_evict = self._end
        self.timings = Timings()  # of the last step
        self._left = 0.0  # when it was over but for its books; 0 when nothing went on after it
        self.moved = False  # whether the last step had anything to run
        self.turns: list[Turn] = []  # of the last step
        self.totals = Totals()
        self.isolate = False
        """Whether a sequence whose verdict fails is dropped and the step goes on without it (a
        server), instead of the step."""
        self.failed: list[tuple[Sequence, Exception]] = []  # those of the last step

    def _begin(self, seq: Sequence) -> None:
        seq.view.cache = seq.cache
        seq.draft = self.drafter.begin(seq.view)
        if not seq.stats.start:
            seq.stats.start = perf_counter()
            self.totals.prompt += seq.view.prompt_len

    def _end(self, seq: Sequence) -> None:
        if seq.draft is not None:
            self.drafter.end(seq.draft)
            seq.draft = None
        seq.view.cache = None

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance the batch by one forward; the events of the tokens it emitted."""
        self.turns, self.failed = [], []
        self.turns = turns = self.scheduler.plan()
        self.moved = bool(turns)
        if not turns:
            self._left = 0.0
            return []
        t0 = perf_counter()
        other = t0 - self._left if self._left else 0.0
        trees = self._draft(turns)
        masks = [self._constrain(t, tree) for t, tree in zip(turns, trees, strict=True)]
        trees = self._extend(turns, trees)
        t1 = perf_counter()
        caches = [t.seq.cache for t in turns]
        batch = self._pack(turns, trees)
        context = sum(t.seq.rows for t in turns)
        self.scheduler.shed(batch.rows)  # drafts, too, take the place of kept rows
        with self.model.open(caches) as txn:  # type: ignore[arg-type]  # a running one has a cache
            out = self.model.forward(batch, txn, self._taps(turns))
            t2 = perf_counter()
            verdicts, feedback, events = [], [], []
            for i, (turn, tree) in enumerate(zip(turns, trees, strict=True)):
                logits = Rows(out.logits, _logit_rows(batch, i, tree), out.best)
                hidden = {}
                if out.hidden:
                    rows = _packed_rows(batch, i, tree)
                    hidden = {k: Rows(h, rows) for k, h in out.hidden.items()}
                verdict, said = self._decide(turn, tree, logits, masks[i], hidden)
                verdicts.append(verdict)
                events.append(said)
                path = [*range(tree.n_context), *verdict.path]
                feedback.append(Feedback(verdict.tokens, path, tree, logits, verdict, hidden))
            txn.commit([_local(tree, f.path) for tree, f in zip(trees, feedback, strict=True)])
        t3 = perf_counter()
        for turn in turns:
            turn.seq.view.cached = turn.seq.rows
        told = self._learners(turns)
        self.drafter.observe([turns[i].seq.draft for i in told], [feedback[i] for i in told])
        self.timings = Timings(
            t1 - t0,
            t2 - t1,
            t3 - t2,
            batch.rows,
            context,
            len(turns),
            all(t.decode and t.feed == 1 for t in turns),
            other,
        )
        self.policy.observe(trees, verdicts, self.timings)
        if self.cost is not None:
            self.cost.observe(batch.rows, context, len(turns), t2 - t1)
        self._count(self.timings)
        for turn in turns:
            if turn.seq.finish.reason is not None:
                turn.seq.stats.end = perf_counter()
                self.scheduler.retire(turn.seq)
        for seq, _ in self.failed:
            self.scheduler.retire(seq, keep=False)
        self._left = t3 if self.scheduler.running else 0.0
        return [e for group in events for e in group]

    def _learners(self, turns: Seq[Turn]) -> Seq[int]:
        """Which turns the drafter hears of: not those that failed, nor prompts that still grow."""
        if not self.failed and all(t.seq.draft is not None for t in turns):
            return range(len(turns))
        gone = {id(seq) for seq, _ in self.failed}
        return [i for i, t in enumerate(turns) if not t.seq.open and id(t.seq) not in gone]

    def _count(self, timings: Timings) -> None:
        totals = self.totals
        totals.steps += 1
        totals.draft_s += timings.draft
        totals.target_s += timings.target
        totals.verify_s += timings.verify

    def _draft(self, turns: Seq[Turn]) -> list[TokenTree]:
        """A tree for every turn; only turns that decode may carry drafts."""
        decoding = [t.seq for t in turns if t.decode]
        trees: dict[int, TokenTree] = {}
        if decoding:
            load, share = self._share(turns, decoding)
            branching = 1 << 30 if self.model.spec.caps.tree else 1
            wanted = self.policy.budgets([s.view for s in decoding], load)
            budgets = [
                budget.clamp(
                    nodes=min(share, seq.view.most_drafts),
                    depth=min(_room(seq) - 1, seq.view.most_drafts),
                    branching=branching,
                )
                for budget, seq in zip(wanted, decoding, strict=True)
            ]
            asked = [(s, b) for s, b in zip(decoding, budgets, strict=True) if not b.none]
            if asked:  # the others' drafters sleep
                proposed = self._propose([s for s, _ in asked], [b for _, b in asked])
                trees = {id(s): tree for (s, _), tree in zip(asked, proposed, strict=True)}
            for seq in decoding:
                if id(seq) not in trees:
                    trees[id(seq)] = TokenTree.context(seq.view.pending)
            for seq, want, budget in zip(decoding, wanted, budgets, strict=True):
                self._note(seq, want, budget, trees[id(seq)], share)
            trim = getattr(self.policy, "trim", None)
            if asked and trim is not None:
                cut = trim([trees[id(s)] for s in decoding])
                trees = {id(s): tree for s, tree in zip(decoding, cut, strict=True)}
        return _in_order(turns, trees)

    def _share(self, turns: Seq[Turn], decoding: Seq[Sequence]) -> tuple[Load, int]:
        """The load, and the free rows that each decoding sequence may fill with drafts."""
        load = self.scheduler.load()
        return load, max(0, load.free_rows - sum(t.feed for t in turns)) // len(decoding)

    def _propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """Ask the drafter; where failures are isolated and it fails, ask for each sequence alone,
        so that only those fail whose drafts do."""
        try:
            return self.drafter.propose([s.draft for s in seqs], [s.view for s in seqs], budgets)
        except Exception:
            if not self.isolate:
                raise
        trees = []
        for seq, budget in zip(seqs, budgets, strict=True):
            try:
                trees += self.drafter.propose([seq.draft], [seq.view], [budget])
            except Exception as error:
                self.failed.append((seq, error))
                trees.append(TokenTree.context(seq.view.pending))
        return trees

    def _note(
        self, seq: Sequence, want: Budget, budget: Budget, tree: TokenTree, share: int
    ) -> None:
        """Count what was decided about a sequence's draft, and why there is none."""
        drafted = len(tree) - tree.n_context
        if not budget.none:
            length = budget.depth if want.depth <= LONGEST else drafted
            why = None if drafted else "nothing" if self.drafter.shapes else "none"
        else:
            length = 0
            if seq.view.most_drafts == 0:
                why = "asked"
            elif want.none:
                why = "policy"
            else:
                why = "rows" if share == 0 else "end"
        self.totals.decided(seq.stats, length, why)

    def _constrain(self, turn: Turn, tree: TokenTree) -> NodeMasks | None:
        constraint = turn.seq.constraint
        if constraint is None:
            return None
        try:
            masks = constraint.masks(tree)
        except Exception as error:
            self._fail(turn, error)
            return None
        tree.kill(~masks.legal)
        return masks

    def _fail(self, turn: Turn, error: Exception) -> None:
        """What went wrong with one sequence is its own affair, where that is asked for."""
        if not self.isolate:
            raise error
        self.failed.append((turn.seq, error))

    def _decide(
        self,
        turn: Turn,
        tree: TokenTree,
        logits: Rows,
        masks: NodeMasks | None,
        hidden: dict[Tap, Rows],
    ) -> tuple[Verdict, list[TokenEvent]]:
        """Verify and emit."""
        if self.failed and any(seq is turn.seq for seq, _ in self.failed):
            return Verdict([], []), []
        try:
            verdict = self._verify(turn, tree, logits, masks, hidden)
            return verdict, self._emit(turn.seq, tree, verdict, logits)
        except Exception as error:
            self._fail(turn, error)
            return Verdict([], []), []

    def _extend(self, turns: Seq[Turn], trees: list[TokenTree]) -> list[TokenTree]:
        """Let rules that probe the target add riders, where there is room for them."""
        extends = [getattr(t.seq.verifier, "extend", None) if t.decode else None for t in turns]
        if not any(extends):
            return trees
        free = self.scheduler.load().free_rows - sum(map(len, trees))
        share = max(0, free) // len(turns)
        longer = []
        for turn, tree, extend in zip(turns, trees, extends, strict=True):
            deepest = turn.seq.rows + int(tree.depth.max()) + 1
            room = min(share, self.model.spec.max_positions - deepest)
            longer.append(tree if extend is None else extend(tree, turn.seq.view, max(0, room)))
        return longer

    def _taps(self, turns: Seq[Turn]) -> tuple[Tap, ...]:
        """The hidden states that the drafter and the rules of this step read."""
        wanted = dict.fromkeys(self.drafter.needs.taps)
        for turn in turns:
            if turn.decode and (needs := getattr(turn.seq.verifier, "needs", None)) is not None:
                wanted.update(dict.fromkeys(needs.taps))
        return tuple(wanted)

    def _pack(self, turns: Seq[Turn], trees: Seq[TokenTree]) -> PackedBatch:
        """Ask for logits only where somebody reads them."""
        segments = []
        for turn, tree in zip(turns, trees, strict=True):
            everything = (
                self.drafter.needs.prompt_logits or turn.seq.params.prompt_logprobs is not None
            )
            if everything and not turn.seq.open:
                wanted = None
            elif turn.decode:
                wanted = range(tree.tip, len(tree))
            else:
                wanted = ()
            segments.append(segment_of(tree, turn.seq.rows, wanted))
        return PackedBatch(segments)

    def _verify(
        self,
        turn: Turn,
        tree: TokenTree,
        logits: Rows,
        masks: NodeMasks | None,
        hidden: dict[Tap, Rows],
    ) -> Verdict:
        seq = turn.seq
        if seq.params.prompt_logprobs is not None:
            self._prompt_logprobs(seq, tree, logits)
        if not turn.decode:
            return Verdict([], [])
        p = ProcessedRows(logits, tree, seq.processors, masks, hidden)
        return seq.verifier(tree, p, seq.view.rng, len(seq.tokens))

    def _emit(
        self, seq: Sequence, tree: TokenTree, verdict: Verdict, logits: Rows
    ) -> list[TokenEvent]:
        """Stop first: what is cut here is never committed."""
        if not verdict.tokens:
            return []
        nodes, accepted, base = [tree.tip, *verdict.path], verdict.accepted, seq.said
        texts = seq.finish.take(verdict.tokens)
        if len(texts) < len(verdict.tokens):
            verdict.cut(len(texts))
        tops: Seq[TopLogprobs | None] = [None] * len(texts)
        if (n := seq.params.logprobs) is not None:
            said = zip(nodes, verdict.tokens, strict=False)
            tops = [top_logprobs(logits[node], token, n) for node, token in said]
            seq.logprobs += tops
        request, sample = seq.request, seq.sample
        events = [
            TokenEvent(request, sample, base + i, token, text, i < accepted, top)
            for i, (token, text, top) in enumerate(zip(verdict.tokens, texts, tops, strict=True))
        ]
        seq.drafted += [event.drafted for event in events]
        events[-1].finish_reason = seq.finish.reason
        seq.tokens.extend(verdict.tokens)
        if not seq.stats.steps:
            seq.stats.first = perf_counter()
            seq.stats.first_step = len(texts)
        drafts = tree.drafted
        seq.stats.add(drafts, len(texts))
        self.totals.emitted(drafts, len(texts))
        if seq.constraint is not None:
            events += self._force(seq, verdict.tokens)
        return events

    def _force(self, seq: Sequence, emitted: Seq[int]) -> list[TokenEvent]:
        """Advance the constraint; ids it leaves no choice about become pending without a draw."""
        assert seq.constraint is not None
        seq.constraint.advance(emitted)
        if seq.finish.reason is not None or seq.params.logprobs is not None:
            return []  # with logprobs every token is drawn, from a row of its own
        forced = seq.constraint.forced()[: _room(seq)]
        base = seq.said
        events = [
            TokenEvent(seq.request, seq.sample, base + i, token, text, True)
            for i, (token, text) in enumerate(
                zip(forced, seq.finish.take(forced), strict=False)  # it may end before the last
            )
        ]
        if events:
            tokens = [event.token for event in events]
            seq.tokens.extend(tokens)
            seq.drafted += [True] * len(tokens)
            self.totals.generated += len(tokens)
            seq.constraint.advance(tokens)
            events[-1].finish_reason = seq.finish.reason
        return events

    def _prompt_logprobs(self, seq: Sequence, tree: TokenTree, logits: Rows) -> None:
        if not seq.prompt_logprobs:
            seq.prompt_logprobs.append(None)  # nothing predicts the first id
        for node in range(tree.n_context):
            index = seq.rows + node + 1
            if len(seq.prompt_logprobs) <= index < seq.view.prompt_len:
                n = seq.params.prompt_logprobs or 0
                seq.prompt_logprobs.append(top_logprobs(logits[node], seq.tokens[index], n))


def top_logprobs(logits: torch.Tensor, token: int, n: int) -> TopLogprobs:
    """Log-probability of `token` and the n most likely ids, from raw logits [V]."""
    logs = logits.log_softmax(-1, dtype=torch.float32)
    best = logs.topk(min(n, logs.shape[-1]))
    return float(logs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _in_order(turns: Seq[Turn], drafts: dict[int, TokenTree]) -> list[TokenTree]:
    """A tree for every turn: its draft, by id of its sequence, or the ids it feeds."""
    return [
        drafts[id(t.seq)] if t.decode else TokenTree.context(t.seq.view.pending[: t.feed])
        for t in turns
    ]


def _room(seq: Sequence) -> int:
    """Tokens it may still emit."""
    return seq.finish.room - seq.said


def _logit_rows(batch: PackedBatch, i: int, tree: TokenTree) -> np.ndarray:
    """For every node its row among the packed logits; [N], -1 = none."""
    wanted, live, n, at = batch.segments[i].logits, tree.live, len(tree), batch.logit_offsets[i]
    first = 0 if wanted is None else tree.tip
    if len(live) == n and (wanted is None or len(wanted) == n - first):  # nearly always
        if first == at == 0:
            return live  # 0 .. n - 1
        rows = np.arange(at - first, at - first + n)
        if first:
            rows[:first] = -1
        return rows
    rows = np.full(n, -1, np.int64)
    nodes = live if wanted is None else live[wanted]
    rows[nodes] = np.arange(at, at + len(nodes))
    return rows


def _packed_rows(batch: PackedBatch, i: int, tree: TokenTree) -> np.ndarray:
    """For every node its packed row; [N], -1 = none."""
    live, at = tree.live, batch.offsets[i]
    rows = np.full(len(tree), -1, np.int64)
    rows[live] = np.arange(at, at + len(live))
    return rows


def _local(tree: TokenTree, path: Seq[int]) -> list[int]:
    """Rows, among those the tree's forward added, of the nodes in `path`."""
    if len(tree.live) == len(tree):
        return list(path)
    row = np.cumsum(tree.kind != Kind.DEAD) - 1  # DEAD nodes have no row
    return row[list(path)].tolist()
