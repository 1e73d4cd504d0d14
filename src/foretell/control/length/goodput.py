"""Draft as much as pays on this machine, for this batch, now; nothing where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from foretell.control.length.company import decided
from foretell.control.length.estimates import Habits, Record, Seen, Written, curves, widths
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


class Goodput:
    """For every sequence the number of levels, 0 included, that maximises the expected tokens per
    second of the whole step.

    Expected tokens come from what verdicts have shown (`estimates.Habits` of all sequences with
    the same drafter and way of drawing, each one's own `Record`), which includes how often the
    drafter finds anything. Seconds are the cost model's for the target's forward of all rows, as
    real steps have tilted it, plus what drafting so many levels lately took (`steptime.StepTime`).
    Levels are admitted in order of tokens per row, over all sequences, and the best cut is taken
    (`allocate`). A choice is kept for `every` steps (later for more, where nothing
    changes) or until the company has changed by a quarter, and left only for one that promises
    `MARGIN` more; newcomers do as most do. Sequences that are given nothing draft now and then all
    the same, and where all draft a step now and then does without, for at most `PROBES` of the
    time: what the other way would cost and bring is measured, not guessed.

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

    MARGIN = 0.03
    PROBES = 0.01
    DEPTH, STEPS = 1, 2  # levels and steps of a probe
    NAP = 4  # steps without drafts after which catching up takes no time to speak of
    PATIENCE = 4  # so many choices that change nothing, and they come this much more seldom
    CROWD = 32  # with more sequences not every step is learned from
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
        self.patience = every  # steps until the next choice
        self.quiet = 0  # choices that changed nothing
        self.last_plain = 0  # steps since nobody drafted
        self.plain_price = 0.0  # seconds that a step without drafts would lose
        self.learns = draft is None
        self.rate = 0.0  # tokens per second it promises
        self.credit = 0.0  # seconds that probes may take
        self.earned = self.price = 0.0  # seconds a step brings it, and a probe lately cost
        self.again: list[Record] = []  # who goes on with a probe
        self.probing = 0.0  # seconds that this step's probe was expected to draft for
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
        self.views, self.probing = list(views), 0.0
        records = [self._record(v) for v in views]
        self.age, self.steps = self.age + 1, self.steps + 1
        limits = [min(self.tokens, v.most_drafts) for v in views]
        if self._is_due(records):
            self._choose(records, limits)
        else:
            self._welcome(records)
        levels = [min(r.tokens, k) for r, k in zip(records, limits, strict=True)]
        levels = self._look_around(records, levels, limits)
        room = [v.params.max_tokens - (len(v.tokens) - v.prompt_len) - 1 for v in views]
        self.asked = [min(k, max(0, r)) for k, r in zip(levels, room, strict=True)]
        self.clean = True
        for r, k in zip(records, self.asked, strict=True):
            if k:
                self.clean = self.clean and r.drafted and r.idle <= self.NAP
                r.idle, r.drafted = 0, True
            else:
                r.idle += 1
        return [Budget(UNLIMITED if k else 0, k) for k in levels]

    def _look_around(
        self, records: Sequence[Record], levels: list[int], limits: Sequence[int]
    ) -> list[int]:
        """Now and then the other way, so that what it would cost and bring is known: drafts of
        those that have none, or a step without any."""
        self.credit += self.earned
        self.last_plain += 1
        again, self.again = self.again, []
        if again:  # the second step of a probe is like any other
            for i, r in enumerate(records):
                if any(r is a for a in again):
                    levels[i] = max(levels[i], min(self.DEPTH, limits[i]))
        elif any(k == 0 < limit for k, limit in zip(levels, limits, strict=True)):
            if self.credit >= self.price:  # as it was when it was last asked for
                self._probe(records, levels, limits)
                self.credit = min(self.credit, self.price)
        elif self.learns and self.last_plain >= self.SELDOM and self.credit >= self.plain_price:
            self.credit, levels = 0.0, [0] * len(levels)
        if not any(levels):
            self.last_plain = 0
        return levels

    def _is_due(self, records: Sequence[Record]) -> bool:
        """Whether to choose anew: after `every` steps (sooner in the beginning), when the company
        has grown or shrunk by a quarter, and for the first of all."""
        if self.age >= min(self.patience, self.steps // 4):
            return True
        moved = abs(len(records) - self.chosen_for)
        return 4 * moved > self.chosen_for or not any(r.met for r in records)

    def _welcome(self, records: Sequence[Record]) -> None:
        """Newcomers do as most of those do whose drafts are like theirs."""
        for r in records:
            if not r.met:
                known = sorted(o.tokens for o in records if o.met and o.habits is r.habits)
                r.tokens = known[len(known) // 2] if known else 0
                r.met = bool(known)

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        if self.time is None:
            return
        awake, levels = sum(k > 0 for k in self.asked), 0
        crowd = 1 + len(self.views) // self.CROWD
        if awake and (self.probing or self.steps % crowd == 0):
            levels = self._learn(trees, verdicts)
        elif crowd > 1:
            awake = 0  # so many verdicts a step that some of the steps teach enough
        if self.probing:  # what it cost beyond the plan: a prompt to read, a sleep to make up for
            self.credit -= max(0.0, timings.draft - self.probing)
            awake = awake if self.clean else 0  # a probe says nothing about the next drafts' time
        self.time.observe(timings, levels, awake, self.clean)

    def _learn(self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict]) -> int:
        """From the verdicts of a step; returns the levels of the deepest draft."""
        deepest = 0
        told: dict[int, tuple[Habits, list[Seen]]] = {}
        for (view, tree, verdict), asked in zip(
            decided(self.views, trees, verdicts), self.asked, strict=False
        ):
            if asked:
                record, drafted = self._record(view), widths(tree)
                record.observe(asked, len(drafted), verdict)
                seen = told.setdefault(id(record.habits), (record.habits, []))[1]
                seen.append((asked, drafted, verdict))
                deepest = max(deepest, len(drafted))
        for habits, seen in told.values():
            habits.observe_all(seen)
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
        gain[np.arange(most) >= np.array(limits)[:, None]] = 0.0
        found = float(seen[0]) if len(records) == 1 else 1.0
        forward = self._forward(len(records), float(rows.sum()) / found, found)
        levels, rate = allocate(gain, rows, forward, self.time.drafting)
        self._welcome(records)
        old = [min(r.tokens, most, k) for r, k in zip(records, limits, strict=True)]
        self.rate = promise(old, gain, rows, forward, self.time.drafting)
        self.quiet += 1
        if rate > (1 + self.MARGIN) * self.rate or not all(r.met for r in records):
            self.rate, self.quiet = rate, 0
            for record, k in zip(records, levels, strict=True):
                record.tokens, record.met = k, True
        self.patience = self.every * (self.PATIENCE if self.quiet > self.PATIENCE else 1)
        self.age, self.chosen_for = 0, len(records)
        n = len(records)
        self.earned = self.PROBES * n / max(self.rate, 1e-12)
        plain = float(forward(np.array([float(n)]))[0])
        self.plain_price = max(0.0, plain - n / max(self.rate, 1e-12))

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

    def _probe(self, records: Sequence[Record], levels: list[int], limits: Sequence[int]) -> None:
        """Let idle sequences draft for two steps, when the credit pays for it: those that have
        drafted before, and one that has not (it makes a draft model read its whole prompt first).
        In the first step they catch up; the second shows what drafting takes."""
        assert self.time is not None, "asked only where there are costs"
        idle = [i for i, k in enumerate(levels) if k == 0 < limits[i]]
        chosen = [i for i in idle if records[i].drafted]
        fresh = [i for i in idle if not records[i].drafted]
        if fresh:
            chosen.append(min(fresh, key=lambda i: len(self.views[i].tokens)))
        context, n, base = sum(v.cached for v in self.views), len(levels), len(levels) + sum(levels)
        before, after = self.time.forward([base, base + len(chosen) * self.DEPTH], context, n)
        awake = sum(map(bool, levels))
        drafting = self.time.drafting(max(self.DEPTH, *levels), awake + len(chosen))
        self.price = price = self.STEPS * (
            float(after - before) + drafting - self.time.drafting(max(levels), awake)
        )
        if self.credit < price:
            return
        for i in chosen:
            levels[i] = self.DEPTH
        self.again = [records[i] for i in chosen]
        self.probing = max(drafting, 1e-9)
        self.credit -= price


def allocate(
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[int, Any], Any],
) -> tuple[list[int], float]:
    """Levels of each of B sequences with the most expected tokens per second, and that rate.

    gain, rows [B, K]: emitted tokens and forward rows that each level adds on average;
    forward(rows [n]) -> seconds [n] of the step's target forward; draft(levels, sequences [n])
    -> seconds [n] of drafting. A level's tokens per row count as no better than those of the level
    above, so that what is admitted is always a number of levels. O(K B K) after one sort.
    """
    count, most = gain.shape
    worth = np.minimum.accumulate(gain / np.maximum(rows, 1e-9), 1)
    worth[gain < 1e-6] = 0.0
    who, level = np.divmod(np.arange(count * most), most)
    order = np.lexsort((level, -worth.ravel()))
    order = order[worth.ravel()[order] > 0]
    best, rate = [0] * count, count / float(forward(np.array([float(count)]))[0])
    if count == 1:
        tokens, levels = 1 + gain[0].cumsum(), range(1, most + 1)
        seconds = forward(1 + rows[0].cumsum()) + np.array([draft(k, 1) for k in levels])
        rates = np.where(gain[0] < 1e-6, 0.0, tokens / seconds)
        i = int(rates.argmax())
        return ([i + 1], float(rates[i])) if rates[i] > rate else (best, rate)
    for deep in range(1, most + 1):
        slots = order[level[order] < deep]
        if not len(slots) or level[slots].max() < deep - 1:
            break
        tokens = count + gain.ravel()[slots].cumsum()
        awake = (level[slots] == 0).cumsum()
        table = np.broadcast_to(draft(deep, np.arange(1, awake[-1] + 1)), awake[-1])
        seconds = forward(count + rows.ravel()[slots].cumsum()) + table[awake - 1]
        i = int((tokens / seconds).argmax())
        if tokens[i] / seconds[i] > rate:
            rate = float(tokens[i] / seconds[i])
            best = np.bincount(who[slots[: i + 1]], minlength=count).tolist()
    return best, rate


def promise(
    levels: Sequence[int],
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[int, Any], Any],
) -> float:
    """Expected tokens per second of given levels, as in `allocate`."""
    chosen = np.arange(gain.shape[1]) < np.asarray(levels)[:, None]
    total = np.array([len(levels) + float(rows[chosen].sum())])
    seconds = float(forward(total)[0])
    if max(levels) > 0:
        seconds += draft(max(levels), sum(k > 0 for k in levels))
    return (len(levels) + float(gain[chosen].sum())) / seconds
