"""Draft as much as pays on this machine, for this batch, now; nothing where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np

from foretell.control.length.fixed import UNLIMITED, Fixed
from foretell.control.length.goodput.allocate import allocate, promise, together
from foretell.control.length.goodput.cut import cut
from foretell.control.length.goodput.habits import Habits
from foretell.control.length.goodput.lessons import Lessons, Step
from foretell.control.length.goodput.prices import Prices, prices
from foretell.control.length.goodput.probes import Probes
from foretell.control.length.goodput.records import Record, curves, welcome
from foretell.control.length.goodput.steptime import StepTime
from foretell.core.costs import GivenCosts
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, BuildContext, CostModel, Load, SeqView, Timings
from foretell.core.stop import PathStop
from foretell.core.tree import TokenTree

FALLBACK = 4  # levels, where nothing is known about costs
START = 2  # most levels while the time of a draft is unknown
NOTHING = Budget(0, 0)


class Goodput:
    """For every sequence the number of levels, 0 included, that maximises the expected tokens per
    second of the whole step.

    Expected tokens come from what verdicts have shown (`Habits` of all sequences with the same
    drafter and way of drawing, each one's own `Record`), which includes how often the drafter finds
    anything. Seconds are the cost model's for the target's forward of all rows, as real steps have
    tilted it, plus what drafting so many levels lately took (`StepTime`). One length for all is
    chosen, and lengths of their own where these promise `OWN` more: levels in order of tokens per
    row, over all sequences, up to the best cut (`allocate`). A choice is kept for `every` steps
    (later for more, where nothing changes) or until the company has changed by a quarter, and left
    only for one that promises `MARGIN` more; newcomers do as most do. A drafter that says how
    sure it is ends a draft where going on is not worth it (`Doubt`), and of all such drafts of a
    step only the tokens are verified that are worth their rows (`cut`). What the other way would
    cost and bring is measured, not guessed (`Probes`).

    tokens: most levels. target: what a forward of 1, 2, 4, 8, .. rows takes, in any unit, instead
    of measured costs, for example ``10/10/10/12/14``; draft: what drafting a level takes, in the
    same unit. With both the choice does not depend on the clock. Outputs never depend on it where
    drafts cannot change them (greedy, replay); under rejection the law stays and a seed means the
    same only with both given, in the same company. Without any costs 4 levels are drafted.

    Paper: Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using
    Goodput" (2024), with an allocation per sequence. Promise: keeps that of the verifier.
    """

    name = "goodput"
    paper = "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput"
    summary = "for each sequence the draft length, or none, with the most tokens per second"

    MARGIN = 0.02
    OWN = 0.05  # what lengths of their own must promise more than one length for all: estimates err
    NAP = 4  # steps without drafts after which catching up takes no time to speak of
    PATIENCE = 4  # where choices change nothing they come the more seldom, at most this much
    WHOLE = 64  # of so many steps one is verified whole
    SOME = 4  # where nobody drafts one of so many steps is learned from

    def __init__(
        self, cost: CostModel, tokens: int = 12, every: int = 16, draft: float | None = None
    ) -> None:
        check(tokens, every, draft)
        self.cost, self.tokens, self.every = cost, tokens, every
        self.time = StepTime(cost, draft)
        self.probes = Probes(self.time, plain=draft is None)
        self.lessons = Lessons(self.time, self._record)
        self.habits: dict[Any, Habits] = {}  # by way of drawing and drafter
        self.views: list[SeqView] = []
        self.asked: list[int] = []
        self.steps = self.told = 0  # steps in all, and those that `time` knows of
        self.age = self.chosen_for = 0  # steps since the last choice, sequences in it
        self.patience = every  # steps until the next choice
        self.quiet = 0  # choices that changed nothing
        self.fresh = 0  # sequences that draft for the first time
        self.clean = False  # whether this step's draft has no prompt and no long sleep to catch up
        self.rate = 0.0  # tokens per second that the last choice promised
        self.prices = Prices()
        self.costs: list[float] = []  # seconds of a forward of 0, 1, 2, .. rows, now
        self.drafts: list[TokenTree] = []  # of this step, before they were cut
        self.stops: list[PathStop | None] = []  # of this step
        self.nothing: list[Budget] = []  # the last budgets, where they were all nothing

    @classmethod
    def build(
        cls,
        context: BuildContext | None,
        tokens: int = 12,
        every: int = 16,
        target: str = "",
        draft: float | None = None,
    ) -> Goodput | Fixed:
        check(tokens, every, draft)
        cost = context.cost if context is not None else None
        if target:
            cost = GivenCosts(written(target))
        if cost is not None:
            return cls(cost, tokens, every, draft)
        few = min(FALLBACK, tokens)
        warnings.warn(
            f"goodput knows no costs here, so it drafts {few} levels: "
            "give it target=.. and draft=..",
            stacklevel=2,
        )
        return Fixed(few)

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        if self._is_calm(views):
            return self.nothing
        left = len(self.views) - len(views) + sum(v.effort is None for v in views)
        self.views = list(views)
        records = [v.effort or self._record(v) for v in views]
        self.age, self.steps = self.age + 1, self.steps + 1
        self.time.went_by(self.steps - self.told, max(0, left))
        self.told = self.steps
        most = self.tokens
        limits = [min(most, v.most_drafts) if v.control else most for v in views]
        welcome(records)
        if self._is_due(records):
            self._choose(records, limits)
        levels = [r.tokens if r.tokens < k else k for r, k in zip(records, limits, strict=True)]
        vary = self.steps % self.every == 0
        levels = self.probes.look(views, records, levels, limits, vary)
        self.clean, self.fresh, budgets = True, 0, []
        self.asked, self.stops, self.drafts = [], [], []
        for r, k, v in zip(records, levels, views, strict=True):
            if k:
                self.clean = self.clean and r.drafted and self.steps - r.last <= self.NAP
                self.fresh += not r.drafted
                r.last, r.drafted = self.steps, True
                room = v.params.max_tokens - len(v.tokens) + v.prompt_len - 1
                self.asked.append(min(k, max(0, room)))
                stop = r.habits.doubt.stop(self.prices)
                budgets.append(Budget(UNLIMITED, k, stop=stop))
                self.stops.append(stop)
            else:
                self.stops.append(None)
                self.asked.append(0)
                budgets.append(NOTHING)
        self.nothing = [] if any(self.asked) or self.probes.spell else budgets
        return budgets

    def trim(self, trees: Sequence[TokenTree]) -> list[TokenTree]:
        """Cuts drafts, chains of tokens that were not drawn, down to what is worth its rows; now
        and then not, to hear of tokens that are doubted, and never those of a probe, which is to
        show what their rows cost."""
        self.drafts = list(trees)
        paths = [v.effort.habits.doubt.path(t) for v, t in zip(self.views, trees, strict=True)]
        if not self.costs or self.probes.left or self.steps % self.WHOLE == 0:
            return self.drafts
        return cut(trees, paths, self.costs, self.rate)

    def _is_calm(self, views: Sequence[SeqView]) -> bool:
        """Whether nobody drafts and nothing is to be thought about: most steps of a full server,
        which are to cost nothing."""
        if len(views) != len(self.nothing) or not all(map(is_, views, self.views)):
            return False
        if self.age + 1 >= min(self.patience, self.steps // 4) or not self.probes.rest():
            return False
        self.age, self.steps = self.age + 1, self.steps + 1
        return True

    def _is_due(self, records: Sequence[Record]) -> bool:
        """Whether to choose anew: after `every` steps (sooner in the beginning), when the company
        has grown or shrunk by a quarter, and for the first of all."""
        if self.age >= min(self.patience, self.steps // 4):
            return True
        moved = abs(len(records) - self.chosen_for)
        return 4 * moved > self.chosen_for or not any(r.met for r in records)

    def _choose(self, records: Sequence[Record], limits: Sequence[int]) -> None:
        self.lessons.learn()
        most = self.tokens if self.time.known else min(START, self.tokens)
        gain, rows, drafted, seen = curves(records, most)
        beyond = np.arange(most) >= np.array(limits)[:, None]
        # drafts of one sequence are all there or not at all; of many, about as many as expected
        n, found = len(records), float(seen[0]) if len(records) == 1 else 1.0
        context = sum(v.cached for v in self.views)
        widest = float((rows / seen[:, None]).max())
        forward = self.time.expected(n, context, n * most * widest, found)
        sure = forward if found == 1.0 else self.time.expected(n, context, n * most * widest)
        self.costs = sure(np.arange(n * (1.0 + most) + 1.0)).tolist()  # chains alone are cut
        rate = self.rate or n / self.costs[n]
        drafting = np.broadcast_to(self.time.drafting(np.arange(1, most + 1), n), most)
        rows[beyond] = drafted[beyond] = 0.0
        for _ in range(2):
            self.prices = prices(n, rows.sum(0), drafted.sum(0), forward, drafting, rate)
            gain, rows, drafted, _ = curves(records, most, self.prices)
            gain[beyond] = rows[beyond] = drafted[beyond] = 0.0
        # a level takes its time only where somebody drafts that far
        far = np.concatenate([[0.0], (1.0 - (1.0 - np.minimum(drafted, 1.0)).prod(0)).cumsum()])

        def draft(levels: Any, sequences: Any) -> Any:
            return self.time.drafting(far[levels], sequences)

        old = [min(r.tokens, most, k) for r, k in zip(records, limits, strict=True)]
        rates = together(gain, rows, forward, draft)
        levels, rate = [int(rates.argmax())] * len(records), float(rates.max())
        old_rate = float(rates[old[0]])
        if len(records) > 1:
            own, own_rate = allocate(gain, rows, forward, draft)
            if own_rate > (1 + self.OWN) * rate:
                levels, rate = own, own_rate
            old_rate = promise(old, gain, rows, forward, draft)
        self.quiet += 1
        if rate > (1 + self.MARGIN) * old_rate or not all(r.met for r in records):
            old_rate, self.quiet = rate, 0
            for record, k in zip(records, levels, strict=True):
                record.tokens, record.habits.levels, record.met = k, k, True
        self.patience = self.every * min(self.PATIENCE, 1 << self.quiet)
        self.age, self.chosen_for = 0, len(records)
        levels = [min(r.tokens, k) for r, k in zip(records, limits, strict=True)]
        self.rate = old_rate
        self.probes.settle(
            self.views, records, levels, limits, most, forward, old_rate, self.prices
        )

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        if self.nothing and self.steps % self.SOME:
            return
        cold, probe = self.probes.cold, bool(self.probes.drafting)
        self.probes.observe(timings, verdicts, self.rate)
        self.lessons.take(
            Step(
                *(self.steps, self.views, self.asked, self.stops, self.drafts),
                *(trees, verdicts, timings, self.fresh, self.clean, cold, probe),
            )
        )

    def _record(self, view: SeqView) -> Record:
        if view.effort is None:
            kind = (view.draw, view.control.drafter if view.control is not None else None)
            if kind not in self.habits:
                self.habits[kind] = Habits(self.tokens)
            view.effort = Record(self.habits[kind])
        return view.effort


def written(target: str) -> list[float]:
    """What forwards of 1, 2, 4, 8, .. rows take, as the user wrote it."""
    try:
        costs = [float(x) for x in target.split("/")]
    except ValueError:
        costs = [0.0]
    if min(costs) <= 0:
        raise InputError(
            f"goodput:target={target}: write what forwards of 1, 2, 4, 8, .. rows take, "
            "positive numbers with slashes between them, for example 10/10/10/12/14."
        )
    return costs


def check(tokens: int, every: int, draft: float | None) -> None:
    for key, value in (("tokens", tokens), ("every", every)):
        if value < 1:
            raise InputError(f"goodput:{key}={value} makes no sense: it is at least 1.")
    if draft is not None and draft < 0:
        raise InputError(f"goodput:draft={draft} makes no sense: drafting takes some time.")
