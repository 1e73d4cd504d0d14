"""What steps have shown, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from foretell.control.length.company import decided
from foretell.control.length.goodput.habits import widths
from foretell.control.length.goodput.records import Record
from foretell.control.length.goodput.steptime import StepTime
from foretell.core.feedback import Verdict
from foretell.core.protocols import SeqView, Timings
from foretell.core.stop import PathStop
from foretell.core.tree import TokenTree


class Step(NamedTuple):
    """What a step was like and came to."""

    number: int
    views: Sequence[SeqView]  # that were given budgets, and of each
    asked: Sequence[int]  # the levels
    stops: Sequence[PathStop | None]
    drafts: Sequence[TokenTree]  # before they were cut
    trees: Sequence[TokenTree]  # of these and of those that were reading their prompts
    verdicts: Sequence[Verdict]
    timings: Timings
    fresh: int  # as in `StepTime.observe`
    clean: bool
    cold: bool
    probe: bool  # it began one


class Lessons:
    """Learns from several steps together: between two forwards each thing that is touched has to
    come from memory again, the second time it is at hand."""

    LAG = 8  # steps, fewer in the beginning
    CROWD = 32  # with more sequences not every step is learned from

    def __init__(self, time: StepTime, record: Callable[[SeqView], Record]) -> None:
        self.time, self.record = time, record
        self.heard: list[Step] = []  # that nothing was learned from yet

    def take(self, step: Step) -> None:
        self.heard.append(step)
        large = any(tree.q is not None for tree in step.trees)  # too much to be held for long
        if large or len(self.heard) >= min(self.LAG, step.number // self.LAG):
            self.learn()

    def learn(self) -> None:
        """From the steps since the last time, one after another."""
        for step in self.heard:
            awake, levels = sum(k > 0 for k in step.asked), 0
            crowd = 1 + len(step.views) // self.CROWD
            if awake and (step.probe or step.number % crowd == 0):
                levels = self._hear(step)
            elif crowd > 1:
                awake = 0  # so many verdicts a step that some of the steps teach enough
            self.time.observe(step.timings, levels, awake, step.fresh, step.clean, not step.cold)
        self.heard = []

    def _hear(self, step: Step) -> int:
        """The verdicts of a step; returns the levels of the deepest draft."""
        deepest = 0
        judged = decided(step.views, step.trees, step.verdicts)
        for i, (view, tree, verdict) in enumerate(judged):
            asked, stop = step.asked[i], step.stops[i]
            if asked:
                draft = step.drafts[i] if step.drafts else tree
                record, drafted = self.record(view), widths(draft)
                record.observe(asked, len(drafted), verdict)
                if stop is not None and stop.said:
                    asked = len(drafted)  # that there were no more says nothing of the drafter
                record.habits.observe(asked, drafted, verdict)
                record.habits.doubt.observe(tree, verdict)
                deepest = max(deepest, len(drafted))
        return deepest
