"""The step with draft and target side by side.

While the target's forward runs, a second thread lets the drafter go on behind the block that is
being verified (PEARL's post-verify), or behind the committed text when there is no block (its
pre-verify: the target meanwhile computes the next token on its own). When the forward is done the
thread is waited for, and the verdict decides:

- the whole block stood and the target's next token is the first one of the new block: the rest of
  the new block is verified in the next step, which needs no drafting before it;
- otherwise the new block is dropped, and the next step has none.

The target's own token decides on the first token of a new block, by equality: that is what
verification does for greedy and replay, and where drafts are drawn from q it is one more token that
the target says itself. What is left of the block was drawn given that very token and nothing has
looked at it, so every rule stays lossless. Everything else is the ordinary step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from threading import Thread
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.feedback import Rows, Verdict
from foretell.core.protocols import (
    Budget,
    CostModel,
    Drafter,
    LengthPolicy,
    NodeMasks,
    SeqView,
    TargetModel,
)
from foretell.core.tree import TokenTree
from foretell.engine.loop import Engine, _in_order, _room
from foretell.engine.scheduler import Scheduler, Turn
from foretell.engine.sequence import Sequence, TokenEvent


@dataclass(slots=True)
class Ahead:
    """A block that was drafted behind text that was not committed yet."""

    seq: Sequence
    known: int  # ids that were committed
    text: list[int]  # those, and the block that was being verified
    tree: TokenTree | None = None  # the new block, below `text`


class PipelinedEngine(Engine):
    """An `Engine` whose drafter works while the target does."""

    def __init__(
        self,
        model: TargetModel,
        drafter: Drafter,
        policy: LengthPolicy,
        scheduler: Scheduler,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__(model, drafter, policy, scheduler, cost)
        if not hasattr(drafter, "imagine"):
            raise InputError(
                f"The policy '{policy.name}' needs a drafter that can go on from text that is not "
                f"committed yet, which '{drafter.name}' cannot: use --draft draft-model."
            )
        if getattr(drafter, "model", None) is model:
            raise InputError(
                f"The policy '{policy.name}' runs drafter and target at the same time, so they "
                "cannot be one model: choose another draft model, or another policy."
            )
        self._ahead: dict[int, Ahead] = {}  # by id of the sequence
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def step(self) -> list[TokenEvent]:
        try:
            return super().step()
        finally:  # also when the target's forward failed or was interrupted
            if self._thread is not None:
                self._thread.join()
                self._thread = self._failure = None
                self._ahead.clear()

    def _end(self, seq: Sequence) -> None:
        self._ahead.pop(id(seq), None)
        super()._end(seq)

    def _draft(self, turns: Seq[Turn]) -> list[TokenTree]:
        """The blocks that are ready; starts drafting those behind them."""
        decoding = [t.seq for t in turns if t.decode]
        trees: dict[int, TokenTree] = {}
        if decoding:
            load, share = self._share(turns, decoding)
            budgets = self.policy.budgets([s.view for s in decoding], load)
            work: list[tuple[Ahead, SeqView, Budget]] = []
            for seq, budget in zip(decoding, budgets, strict=True):
                most = seq.view.most_drafts
                block = self._ready(seq, min(share, _room(seq) - 1, most))
                trees[id(seq)] = block
                self._note(seq, budget, budget.clamp(nodes=most, depth=most), block, share)
                drafts = block.tokens[block.n_context :].tolist()
                behind = Ahead(seq, len(seq.tokens), [*seq.tokens, *drafts])
                room = _room(seq) - len(drafts) - 1  # for the new block without its first token
                view = imagined(seq.view, drafts)
                room = min(room, most)
                limit = budget.clamp(
                    nodes=1 << 30, depth=min(budget.depth, room + 1 if room > 0 else 0), branching=1
                )
                work.append((behind, view, limit))
            self._ahead = {id(w[0].seq): w[0] for w in work}
            if any(not budget.none for _, _, budget in work):
                self._thread = Thread(target=self._imagine, args=(work,), name="drafter")
                self._thread.start()
        return _in_order(turns, trees)

    def _ready(self, seq: Sequence, most: int) -> TokenTree:
        """What is left of the block drafted in the last step, where the text went its way."""
        ahead, pending = self._ahead.pop(id(seq), None), seq.view.pending
        plain = TokenTree.context(pending)
        if ahead is None or ahead.tree is None or most <= 0:
            return plain
        fresh = ahead.tree.tokens[ahead.tree.n_context :].tolist()
        used = len(seq.tokens) - len(ahead.text)
        if used <= 0 or seq.tokens != [*ahead.text, *fresh[:used]]:
            return plain  # at used <= 0 some draft was refused, or the text ended with the block
        return rest(ahead.tree, pending, used, most)

    def _imagine(self, work: list[tuple[Ahead, SeqView, Budget]]) -> None:
        """The other thread: a new block for every sequence."""
        try:
            start = perf_counter()
            with torch.inference_mode():
                trees = self._go_on(work)
            for (ahead, _, _), tree in zip(work, trees, strict=True):
                ahead.tree = tree
            deepest = max(tree.drafted for tree in trees)
            told: Any = getattr(self.policy, "drafted", None)
            if told is not None:
                told(deepest, perf_counter() - start)
        except BaseException as failure:  # raised again in the main thread
            self._failure = failure

    def _go_on(self, work: list[tuple[Ahead, SeqView, Budget]]) -> list[TokenTree]:
        imagine: Any = getattr(self.drafter, "imagine")  # noqa: B009  # checked at start-up
        return imagine(
            [ahead.seq.draft for ahead, _, _ in work],
            [view for _, view, _ in work],
            [budget for _, _, budget in work],
            [ahead.known for ahead, _, _ in work],
        )

    def _meet(self) -> None:
        """Wait for the drafter; its errors come out here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._ahead.clear()
            raise failure

    def _verify(
        self, turn: Turn, tree: TokenTree, logits: Rows, masks: NodeMasks | None, hidden: Any
    ) -> Verdict:
        self._meet()  # before anything that the drafter reads is changed
        return super()._verify(turn, tree, logits, masks, hidden)


def imagined(view: SeqView, drafts: list[int]) -> SeqView:
    """The view of a sequence whose block was accepted."""
    if not drafts:
        return replace(view, tokens=list(view.tokens))

    def warp(logits: Tensor, paths: Seq[Seq[int]]) -> Tensor:
        return view.warp(logits, [[*drafts, *path] for path in paths])

    return replace(view, tokens=[*view.tokens, *drafts], warp=warp)


def rest(tree: TokenTree, pending: list[int], used: int, most: int) -> TokenTree:
    """A drafted chain without its first `used` tokens, at most `most` long, below `pending`."""
    first = tree.n_context + used
    nodes = list(range(first, min(len(tree), first + most)))
    if not nodes:
        return TokenTree.context(pending)
    q = None
    if tree.q is not None and tree.qrow is not None and tree.qrow[nodes].min() >= 0:
        q = tree.q[tree.qrow[nodes].tolist()]
    score = None if tree.score is None else tree.score[nodes].tolist()
    return TokenTree.chain(pending, tree.tokens[nodes].tolist(), q=q, score=score)
