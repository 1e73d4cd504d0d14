"""Draft as much as pays on this machine, for this batch, now; nothing where it does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import numpy as np

from foretell.control.length.allocate import allocate, other_way, promise, together
from foretell.control.length.company import decided
from foretell.control.length.estimates import Habits, Record, Written, curves, widths
from foretell.control.length.fixed import UNLIMITED
from foretell.control.length.steptime import StepTime
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import (
    Budget,
    BuildContext,
    CostModel,
    Load,
    SeqView,
    Timings,
)
from foretell.core.tree import TokenTree

FALLBACK = 4  # levels, where nothing is known about costs
START = 2  # most levels while the time of a draft is unknown
NOTHING = Budget(0, 0)


class Goodput:
    """For every sequence the number of levels, 0 included, that maximises the expected tokens per
    second of the whole step.

    Expected tokens come from what verdicts have shown (`estimates.Habits` of all sequences with
    the same drafter and way of drawing, each one's own `Record`), which includes how often the
    drafter finds anything. Seconds are the cost model's for the target's forward of all rows, as
    real steps have tilted it, plus what drafting so many levels lately took (`steptime.StepTime`).
    One length for all is chosen, and lengths of their own where these promise `OWN` more: levels
    in order of tokens per row, over all sequences, up to the best cut (`allocate`). A choice is
    kept for `every` steps (later for more, where nothing changes) or until the company has changed
    by a quarter, and left only for one that promises `MARGIN` more; newcomers do as most do. What
    the other way would cost and bring is measured, not guessed: sequences that are given nothing
    draft now and then all the same, and where all draft a step now and then does without. What that
    is expected to lose is at most `PROBES` of the time and `CREDIT` tokens in the beginning; where
    both ways are nearly as good it happens all the time.

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
    PROBES = 0.01
    CREDIT = 6.0
    DEBT = 2.0  # steps that a probe may turn out to have lost: an interruption does not count whole
    EXPLORERS = 4  # sequences of a probe: each must catch up first
    STEPS = 3  # of a probe: in the first one drafters catch up, the others are like any other
    SPELL = 2  # steps without drafts for their own sake; the first finds cold caches
    NAP = 4  # steps without drafts after which catching up takes no time to speak of
    PATIENCE = 4  # so many choices that change nothing, and they come this much more seldom
    CROWD = 32  # with more sequences not every step is learned from
    SOME = 4  # where nobody drafts one of so many steps is learned from
    SELDOM = 16  # steps between two that go without drafts for their own sake

    def __init__(
        self,
        cost: CostModel | None = None,
        tokens: int = 12,
        every: int = 8,
        draft: float | None = None,
    ) -> None:
        for key, value in (("tokens", tokens), ("every", every)):
            if value < 1:
                raise InputError(f"goodput:{key}={value} makes no sense: it is at least 1.")
        if draft is not None and draft < 0:
            raise InputError(f"goodput:draft={draft} makes no sense: drafting takes some time.")
        if cost is None:
            warnings.warn(
                f"goodput knows no costs here, so it drafts {min(FALLBACK, tokens)} levels: "
                "give it target=.. and draft=..",
                stacklevel=2,
            )
        self.cost, self.tokens, self.every, self.draft = cost, tokens, every, draft
        self.time = None if cost is None else StepTime(cost, draft)
        self.habits: dict[Any, Habits] = {}  # by way of drawing and drafter
        self.views: list[SeqView] = []
        self.asked: list[int] = []
        self.chosen_for = 0  # sequences in the last choice
        self.age = self.steps = 0  # steps since the choice was made, and in all
        self.told = 0  # steps that `time` knows of
        self.fresh = 0  # sequences that draft for the first time
        self.patience = every  # steps until the next choice
        self.quiet = 0  # choices that changed nothing
        self.last_plain = 0  # steps since nobody drafted
        self.spell = 0  # steps without drafts that are still to come
        self.plain_price = 0.0  # seconds that a step without drafts would lose
        self.learns = draft is None
        self.rate = 0.0  # tokens per second it promises
        self.credit = math.inf  # seconds that probes may lose; the first choice cuts it to size
        self.earned = self.price = 0.0  # seconds a step brings it, and a probe is expected to lose
        self.depth = 1  # levels of a probe
        self.again: list[Record] = []  # who probes
        self.more = 0  # steps of the probe that are still to come, and this one
        self.probing = 0.0  # seconds that this step's probe was expected to draft for
        self.nothing: list[Budget] = []  # the last budgets, where they were all nothing
        self.clean = False  # whether this step's draft has no prompt and no long sleep to catch up

    @classmethod
    def build(
        cls,
        context: BuildContext | None,
        tokens: int = 12,
        every: int = 8,
        target: str = "",
        draft: float | None = None,
    ) -> Goodput:
        cost = context.cost if context is not None else None
        if target:
            try:
                given = [float(x) for x in target.split("/")]
            except ValueError:
                given = [0.0]
            if min(given) <= 0:
                raise InputError(
                    f"goodput:target={target}: write what forwards of 1, 2, 4, 8, .. rows take, "
                    "positive numbers with slashes between them, for example 10/10/10/12/14."
                )
            cost = Written(given)
        return cls(cost, tokens, every, draft)

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        if self.time is None:
            return [Budget(UNLIMITED, min(FALLBACK, self.tokens))] * len(views)
        if self._is_calm(views):
            return self.nothing
        self.views, self.probing = list(views), 0.0
        arrivals = sum(v.effort is None for v in views)
        records = [v.effort or self._record(v) for v in views]
        self.age, self.steps = self.age + 1, self.steps + 1
        self.time.went_by(self.steps - self.told, arrivals)
        self.told = self.steps
        most = self.tokens
        limits = [min(most, v.most_drafts) if v.control else most for v in views]
        if self._is_due(records):
            self._choose(records, limits)
        else:
            self._welcome(records)
        levels = [r.tokens if r.tokens < k else k for r, k in zip(records, limits, strict=True)]
        levels = self._look_around(records, levels, limits)
        self.clean, self.fresh, self.asked, budgets = True, 0, [], []
        for r, k, v in zip(records, levels, views, strict=True):
            if k:
                self.clean = self.clean and r.drafted and self.steps - r.last <= self.NAP
                self.fresh += not r.drafted
                r.last, r.drafted = self.steps, True
                room = v.params.max_tokens - len(v.tokens) + v.prompt_len - 1
                self.asked.append(min(k, max(0, room)))
                budgets.append(Budget(UNLIMITED, k))
            else:
                self.asked.append(0)
                budgets.append(NOTHING)
        self.nothing = [] if any(self.asked) or self.spell else budgets
        return budgets

    def _is_calm(self, views: Sequence[SeqView]) -> bool:
        """Whether nobody drafts and nothing is to be thought about: most steps of a full server,
        which are to cost nothing."""
        if len(views) != len(self.nothing) or not all(map(is_, views, self.views)):
            return False
        if self.age + 1 >= min(self.patience, self.steps // 4) or self.more > 1:
            return False
        if self.price <= self.credit + self.earned:
            return False
        self.credit += self.earned
        self.age, self.steps = self.age + 1, self.steps + 1
        return True

    def _look_around(
        self, records: Sequence[Record], levels: list[int], limits: Sequence[int]
    ) -> list[int]:
        """Now and then the other way, so that what it would cost and bring is known: drafts of
        those that have none, or a step without any."""
        assert self.time is not None, "asked only where there are costs"
        self.credit += self.earned
        self.last_plain += 1
        if self.more:
            self.more -= 1
        again = self.again if self.more else []
        idle = [i for i, k in enumerate(levels) if k == 0 < limits[i]]
        if again:
            for i in idle:
                if any(records[i] is a for a in again):
                    levels[i] = min(self.depth, limits[i])
        elif idle:
            if self.credit >= self.price:
                self._probe(records, levels, limits, self._explorers(records, idle))
        elif self.learns and self.last_plain >= self.SELDOM and self.credit >= self.plain_price:
            self.credit -= self.plain_price
            self.spell = self.SPELL
        elif self.steps % self.every == 0 and self.time.one_sided(len(levels)):
            levels = [k - 1 or min(2, n) for k, n in zip(levels, limits, strict=True)]
        if self.spell:
            self.spell, levels = self.spell - 1, [0] * len(levels)
        self.last_plain = 0 if self.spell or not any(levels) else self.last_plain
        return levels

    def _explorers(self, records: Sequence[Record], idle: Sequence[int]) -> list[int]:
        """Those that have drafted before, and one that has not (it makes a draft model read its
        whole prompt first)."""
        known = [i for i in idle if records[i].drafted]
        chosen = sorted(known, key=lambda i: -records[i].last)[: self.EXPLORERS]
        fresh = [i for i in idle if not records[i].drafted]
        if fresh:
            chosen.append(min(fresh, key=lambda i: len(self.views[i].tokens)))
        return chosen

    def _probe(
        self,
        records: Sequence[Record],
        levels: list[int],
        limits: Sequence[int],
        chosen: Sequence[int],
    ) -> None:
        """Idle sequences draft for some steps; the credit pays."""
        assert self.time is not None, "asked only where there are costs"
        for i in chosen:
            levels[i] = min(self.depth, limits[i])
        self.again, self.more = [records[i] for i in chosen], self.STEPS
        self.probing = max(float(self.time.drafting(max(levels), sum(map(bool, levels)))), 1e-9)
        self.credit -= self.price

    def _is_due(self, records: Sequence[Record]) -> bool:
        """Whether to choose anew: after `every` steps (sooner in the beginning), when the company
        has grown or shrunk by a quarter, and for the first of all."""
        if self.age >= min(self.patience, self.steps // 4):
            return True
        moved = abs(len(records) - self.chosen_for)
        return 4 * moved > self.chosen_for or not any(r.met for r in records)

    def _welcome(self, records: Sequence[Record]) -> None:
        """Newcomers do as most of those do whose drafts are like theirs."""
        if all(r.met for r in records):
            return
        for r in records:
            if not r.met:
                known = sorted(o.tokens for o in records if o.met and o.habits is r.habits)
                r.tokens = known[len(known) // 2] if known else 0
                r.met = bool(known)

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        if self.time is None or (self.nothing and self.steps % self.SOME):
            return
        awake, levels = sum(k > 0 for k in self.asked), 0
        crowd = 1 + len(self.views) // self.CROWD
        if awake and (self.probing or self.steps % crowd == 0):
            levels = self._learn(trees, verdicts)
        elif crowd > 1:
            awake = 0  # so many verdicts a step that some of the steps teach enough
        if self.probing:  # what it cost beyond the plan: a prompt to read, a sleep to make up for
            self.credit -= max(0.0, timings.draft - self.probing)
        cold = bool(self.probing) or (self.spell > 0 and self.spell == self.SPELL - 1)
        self.time.observe(timings, levels, awake, self.fresh, self.clean, not cold)

    def _learn(self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict]) -> int:
        """From the verdicts of a step; returns the levels of the deepest draft."""
        deepest = 0
        for (view, tree, verdict), asked in zip(
            decided(self.views, trees, verdicts), self.asked, strict=False
        ):
            if asked:
                record, drafted = self._record(view), widths(tree)
                record.observe(asked, len(drafted), verdict)
                record.habits.observe(asked, drafted, verdict)
                deepest = max(deepest, len(drafted))
        return deepest

    def _record(self, view: SeqView) -> Record:
        if view.effort is None:
            kind = (view.draw, view.control.drafter if view.control is not None else None)
            if kind not in self.habits:
                self.habits[kind] = Habits(self.tokens)
            view.effort = Record(self.habits[kind])
        return view.effort

    def _choose(self, records: Sequence[Record], limits: Sequence[int]) -> None:
        assert self.time is not None, "asked only where there are costs"
        most = self.tokens if self.time.known else min(START, self.tokens)
        gain, rows, seen = curves(records, most)
        beyond = np.arange(most) >= np.array(limits)[:, None]
        gain[beyond] = rows[beyond] = 0.0
        found = float(seen[0]) if len(records) == 1 else 1.0
        forward = self._forward(len(records), float(rows.sum()) / found, found)
        self._welcome(records)
        old = [min(r.tokens, most, k) for r, k in zip(records, limits, strict=True)]
        rates = together(gain, rows, forward, self.time.drafting)
        levels, rate = [int(rates.argmax())] * len(records), float(rates.max())
        plain = len(records) / float(rates[0])
        self.rate = float(rates[old[0]])
        if len(records) > 1:
            own, own_rate = allocate(gain, rows, forward, self.time.drafting)
            if own_rate > (1 + self.OWN) * rate:
                levels, rate = own, own_rate
            self.rate = promise(old, gain, rows, forward, self.time.drafting)
        self.quiet += 1
        if rate > (1 + self.MARGIN) * self.rate or not all(r.met for r in records):
            self.rate, self.quiet = rate, 0
            for record, k in zip(records, levels, strict=True):
                record.tokens, record.met = k, True
        self.patience = self.every * (self.PATIENCE if self.quiet > self.PATIENCE else 1)
        self.age, self.chosen_for = 0, len(records)
        self._price(records, limits, most, forward, plain)

    def _price(
        self,
        records: Sequence[Record],
        limits: Sequence[int],
        most: int,
        forward: Callable,
        plain: float,
    ) -> None:
        """What the other way is expected to lose, and what may be lost for it. most: levels that
        `forward` knows; plain: seconds of a step without drafts."""
        assert self.time is not None, "asked only where there are costs"
        n = len(records)
        step = n / max(self.rate, 1e-12)  # seconds that the tokens of plain decoding are worth
        full = self.CREDIT * step / n
        self.credit = max(min(self.credit, max(full, self.price)), -self.DEBT * step)
        self.earned = self.PROBES * step
        levels = [min(r.tokens, k) for r, k in zip(records, limits, strict=True)]
        idle = [i for i, k in enumerate(levels) if k == 0 < limits[i]]
        if idle:
            who = self._explorers(records, idle)
            gain, rows, _ = curves(records, most, hope=False)
            draft = self.time.drafting
            self.depth, loss = other_way(levels, who, gain, rows, forward, draft, self.rate)
            self.price = self.STEPS * max(0.0, loss)
        else:
            self.plain_price = self.SPELL * max(0.0, plain - step)

    def _forward(self, sequences: int, extra: float, found: float) -> Callable:
        """Seconds of a target forward and its verification, by the expected rows. With one sequence
        it is a forward with all of the draft, or (1 - found) one without any."""
        assert self.time is not None, "asked only where there are costs"
        context = sum(v.cached for v in self.views)
        marks, cost = self.time.forward_curve(sequences, context, extra)

        def seconds(rows: np.ndarray) -> np.ndarray:
            full = np.interp(sequences + (rows - sequences) / found, marks, cost)
            return (1 - found) * cost[0] + found * full

        return seconds
