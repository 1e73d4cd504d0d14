"""Draft as much as pays on this machine, for this batch, now; nothing where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from foretell.control.length.company import decided
from foretell.control.length.estimates import Habits, Line, Record, Written, widths
from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import (
    Budget,
    BuildContext,
    CostModel,
    Draw,
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

    Expected tokens come from what verdicts have shown (`estimates.Habits` of all sequences, each
    one's own `Record`), which includes how often the drafter finds anything. Seconds are the cost
    model's for the target's forward of all rows, plus what drafting so many levels and verifying so
    many rows lately took. Levels are admitted in order of tokens per row, over all sequences, and
    the best cut is taken (`allocate`). A choice is kept for `every` steps in unchanged company and
    left only for one that promises `MARGIN` more. A sequence that is given nothing drafts now and
    then all the same, so that a change is noticed: at most `PROBES` of the time goes there.

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
    PROBES = 0.015
    DEPTH = 1  # levels of a probe

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
        self.habits: dict[Draw, Habits] = {}
        self.drafting: dict[int, Line] = {}  # seconds by levels, for 1, 2-3, 4-7, .. sequences
        self.verifying = Line(flat=True)  # seconds by rows
        self.views: list[SeqView] = []
        self.asked: list[int] = []
        self.steps = 0
        self.age = 0  # steps since the choice was made
        self.rate = 0.0  # tokens per second it promises
        self.credit = 0.0  # seconds that probes may take
        self.probing = False
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
        if self.cost is None:
            return [Budget(UNLIMITED, min(FALLBACK, self.tokens))] * len(views)
        same = len(views) == len(self.views) and all(
            a is b for a, b in zip(views, self.views, strict=True)
        )
        self.views, self.probing = list(views), False
        records = [self._record(v) for v in views]
        self.age, self.steps = self.age + 1, self.steps + 1
        if not same or self.age >= min(self.every, self.steps // 4):
            self._choose(records, same)
        levels = [r.tokens for r in records]
        if 0 in levels:
            self._probe(records, levels)
        room = [v.params.max_tokens - (len(v.tokens) - v.prompt_len) - 1 for v in views]
        self.asked = [min(k, max(0, r)) for k, r in zip(levels, room, strict=True)]
        awake = [r for r, k in zip(records, self.asked, strict=True) if k]
        self.clean = all(r.drafted and r.idle <= 4 for r in awake)
        for r, k in zip(records, self.asked, strict=True):
            r.idle = 0 if k else r.idle + 1
            r.drafted = r.drafted or k > 0
        return [Budget(UNLIMITED if k else 0, k) for k in levels]

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        deepest = 0
        for (view, tree, verdict), asked in zip(
            decided(self.views, trees, verdicts), self.asked, strict=False
        ):
            if asked:
                record, drafted = self._record(view), widths(tree)
                record.observe(asked, len(drafted), verdict)
                record.habits.observe(asked, drafted, verdict)
                deepest = max(deepest, len(drafted))
        awake = sum(k > 0 for k in self.asked)
        if self.draft is not None or not timings.decoding:
            return
        self.verifying.observe(timings.rows, timings.verify)
        if not awake:
            return
        if self.probing:  # what it cost beyond the plan: a prompt to read, a sleep to make up for
            self.credit -= max(0.0, timings.draft - self.draft_seconds(max(1, deepest), awake))
        if self.clean:
            self.drafting.setdefault(awake.bit_length(), Line()).observe(deepest, timings.draft)

    def draft_seconds(self, levels: int, sequences: int) -> float:
        """Drafting so many levels for so many sequences; 0 while nobody knows."""
        if self.draft is not None:
            return self.draft * levels
        if not levels or not self.drafting:
            return 0.0
        bucket = sequences.bit_length()
        return self.drafting[min(self.drafting, key=lambda b: abs(b - bucket))].at(levels)

    def _record(self, view: SeqView) -> Record:
        if view.effort is None:
            habits = self.habits.get(view.draw)
            if habits is None:
                habits = self.habits[view.draw] = Habits(self.tokens)
            view.effort = Record(habits)
        return view.effort

    def _choose(self, records: Sequence[Record], same: bool) -> None:
        most = self.tokens if self.draft is not None or self.drafting else min(START, self.tokens)
        curves = [r.curve(most) for r in records]
        gain = np.stack([c[0] for c in curves])
        rows = np.stack([c[1] for c in curves])
        found = curves[0][2] if len(curves) == 1 else 1.0
        time = self._forward(len(records), float(rows.sum()) / found, found)
        levels, rate = allocate(gain, rows, time, self.draft_seconds)
        if same:
            old = [min(r.tokens, most) for r in records]
            self.rate = promise(old, gain, rows, time, self.draft_seconds)
        if not same or rate > (1 + self.MARGIN) * self.rate:
            self.rate = rate
            for record, k in zip(records, levels, strict=True):
                record.tokens = k
        self.age = 0

    def _forward(self, sequences: int, extra: float, found: float) -> Callable:
        """Seconds of a target forward and its verification, by the expected rows. With one sequence
        it is a forward with all of the draft, or (1 - found) one without any."""
        assert self.cost is not None, "asked only where there are costs"
        context = sum(v.cached for v in self.views)
        marks = np.unique(np.round(sequences + np.geomspace(1, 1 + extra, 24) - 1)).astype(int)
        cost = [
            self.cost.seconds(int(n), context, sequences) + self.verifying.at(float(n))
            for n in marks
        ]

        def seconds(rows: np.ndarray) -> np.ndarray:
            full = np.interp(sequences + (rows - sequences) / found, marks, cost)
            return (1 - found) * cost[0] + found * full

        return seconds

    def _probe(self, records: Sequence[Record], levels: list[int]) -> None:
        """Let the sequence that has been idle longest draft, when the credit pays for it."""
        assert self.cost is not None, "asked only where there are costs"
        context, n, drafts = sum(v.cached for v in self.views), len(levels), sum(map(bool, levels))
        depth = min(self.DEPTH, self.tokens)
        base = n + sum(levels)
        before = self.cost.seconds(base, context, n) + self.verifying.at(base)
        price = (
            self.cost.seconds(base + depth, context, n)
            + self.verifying.at(base + depth)
            - before
            + self.draft_seconds(max(depth, *levels), drafts + 1)
            - self.draft_seconds(max(levels), drafts)
        )
        self.credit = min(self.credit + self.PROBES * before, max(price, 0.0))
        if self.credit < price:
            return
        idle = [i for i, k in enumerate(levels) if k == 0]
        # one that never drafted makes a draft model read its whole prompt first
        chosen = max(idle, key=lambda i: (records[i].drafted, records[i].idle))
        levels[chosen] = depth
        self.probing = True
        self.credit -= price


def allocate(
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[int, int], float],
) -> tuple[list[int], float]:
    """Levels of each of B sequences with the most expected tokens per second, and that rate.

    gain, rows [B, K]: emitted tokens and forward rows that each level adds on average;
    forward(rows [n]) -> seconds [n] of the step's target forward; draft(levels, sequences) ->
    seconds of drafting. A level's tokens per row count as no better than those of the level above,
    so that what is admitted is always a number of levels. O(K B K) after one sort.
    """
    count, most = gain.shape
    worth = np.minimum.accumulate(gain / np.maximum(rows, 1e-9), 1)
    worth[gain < 1e-6] = 0.0
    who, level = np.divmod(np.arange(count * most), most)
    order = np.lexsort((level, -worth.ravel()))
    order = order[worth.ravel()[order] > 0]
    best, rate = [0] * count, count / float(forward(np.array([float(count)]))[0])
    for deep in range(1, most + 1):
        slots = order[level[order] < deep]
        if not len(slots) or level[slots].max() < deep - 1:
            break
        tokens = count + gain.ravel()[slots].cumsum()
        awake = (level[slots] == 0).cumsum()
        table = np.array([draft(deep, int(n)) for n in range(1, awake[-1] + 1)])
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
    draft: Callable[[int, int], float],
) -> float:
    """Expected tokens per second of given levels, as in `allocate`."""
    chosen = np.arange(gain.shape[1]) < np.asarray(levels)[:, None]
    total = np.array([len(levels) + float(rows[chosen].sum())])
    seconds = float(forward(total)[0])
    if max(levels) > 0:
        seconds += draft(max(levels), sum(k > 0 for k in levels))
    return (len(levels) + float(gain[chosen].sum())) / seconds
