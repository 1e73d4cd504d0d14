"""Every request chooses its drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed

OFF = -1


@dataclass(slots=True)
class ChoiceState:
    """One sequence: which part drafts for it (OFF: nobody), and that part's state."""

    part: int
    own: Any = None


class Choice(Composed):
    """Asks the part that a sequence has chosen (``of=A+B``), by its name; the first one drafts for
    those that have no wish. What a sequence did not choose does not exist for it: no state, no
    memory, no noise, so that it says and costs what it would with that drafter alone.

    A name that occurs twice is told apart by its place: ``draft-model``, ``draft-model-2``. A name
    nobody offers is the default's; the engine refuses such a request before it gets here.

    Source: what servers with a drafter per request do. Promise: that of the weakest part.
    """

    name = "choice"
    paper = ""
    summary = "the drafter that each request names, the first by default (of=A+B)"

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__(parts)
        self.offers: list[str] = []
        for part in self.parts:
            same = 1 + sum(p.name == part.name for p in self.parts[: len(self.offers)])
            self.offers.append(part.name if same == 1 else f"{part.name}-{same}")

    @classmethod
    def build(cls, context: BuildContext, of: str) -> Choice:
        return cls(cls.make_parts(context, of))

    def chosen(self, view: SeqView) -> int:
        """The part that drafts for a sequence; OFF where nothing may be drafted."""
        if view.most_drafts == 0:
            return OFF
        name = view.control.drafter if view.control is not None else None
        return self.offers.index(name) if name in self.offers else 0

    def begin(self, view: SeqView) -> ChoiceState:
        part = self.chosen(view)
        return ChoiceState(part, None if part == OFF else self.parts[part].begin(view))

    def own(self, state: ChoiceState) -> list[Any]:
        return [state.own if i == state.part else None for i in range(len(self.parts))]

    def drafted_by(self, state: ChoiceState, part: int) -> bool:
        return state.part == part

    def propose(
        self, states: Sequence[ChoiceState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        found: dict[int, TokenTree] = {}
        for p, drafter in enumerate(self.parts):
            mine = [i for i, s in enumerate(states) if s.part == p]
            if mine:
                trees = drafter.propose(
                    [states[i].own for i in mine],
                    [views[i] for i in mine],
                    [budgets[i] for i in mine],
                )
                found.update(zip(mine, trees, strict=True))
        return [
            found[i] if i in found else TokenTree.context(view.pending)
            for i, view in enumerate(views)
        ]

    def observe(self, states: Sequence[ChoiceState], feedback: Sequence[Feedback]) -> None:
        for p, drafter in enumerate(self.parts):
            told = [(s.own, f) for s, f in zip(states, feedback, strict=True) if s.part == p]
            if told:
                drafter.observe([own for own, _ in told], [f for _, f in told])

    def end(self, state: ChoiceState) -> None:
        if state.part != OFF:
            self.parts[state.part].end(state.own)
