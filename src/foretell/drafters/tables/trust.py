"""How often drafted tokens come true, by who drafted them and how sure they said they were."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

EDGES = (0.2, 0.45, 0.6, 0.7, 0.78, 0.87, 0.95)  # between classes of what a drafter says of a token
RANKS = 4  # classes of drafters that say nothing: the token's place among its siblings
LEVELS = (1, 2, 3, 3, 4)  # levels below the tip that behave alike: 1, 2, 3 and 4, and beyond
MEMORY = 400.0  # tries of a mark; older ones fade
FIRST = (0.6, 0.25, 0.12, 0.08)  # guesses of a drafter that says nothing, by rank
GUESSES = (0.12, 0.3, 0.35, 0.5, 0.68, 0.79, 0.9, 0.97)  # of one that says something, by class:
# what became of suffix and prompt-lookup on Spec-Bench with the bundled model (30 prompts a family)
LONE, SHARED = 4.0, 12.0  # tries that the guess for a mark of one drafter, or of several, counts as
EVERY = 8  # judgements between two looks at the counts

Mark = tuple[int, ...]
"""For each drafter what it said of a token: 0 = it did not draft it, else a class from 1 on."""


def said(score: float | None, rank: int) -> int:
    """The class of a token with this score (given that its parent is right), or at this place
    among its siblings where there is no score."""
    if score is None:
        return 1 + min(rank, RANKS - 1)
    return RANKS + 1 + bisect_right(EDGES, score)


class Cell:
    """Tokens of one mark at levels that behave alike: how many were judged, how many came."""

    __slots__ = ("_known", "_when", "first", "hits", "lone", "tries")

    def __init__(self, first: float, lone: Sequence[Cell]) -> None:
        self.first, self.lone = first, lone  # a guess, or each of its drafters on its own
        self.hits = self.tries = self._known = 0.0
        self._when = -1

    def saw(self, hit: bool) -> None:
        if self.tries >= MEMORY:
            self.hits -= self.hits / MEMORY
            self.tries -= 1
        self.hits += hit
        self.tries += 1

    def chance(self, now: int) -> float:
        """As of the time `now`: looked up once in it."""
        if self._when != now:
            lone, weight = self.first, LONE
            if self.lone:
                lone, weight = max(c.chance(now) for c in self.lone), SHARED
            self._known = (self.hits + weight * lone) / (self.tries + weight)
            self._when = now
        return self._known


class Trust:
    """Chances that a token comes next, given that its parent came: counted by mark and level.

    A mark seen seldom leans on what is known of each drafter that took part in it, the most
    trusted of them; those lean on a guess. Old counts fade. A few hundred cells at most: of the
    (RANKS + 9) ** drafters marks few occur.
    """

    def __init__(self) -> None:
        self.cells: dict[tuple[int, Mark], Cell] = {}
        self.judged = 0

    def cell(self, level: int, mark: Mark) -> Cell:
        key = (LEVELS[min(level, len(LEVELS)) - 1], mark)
        found = self.cells.get(key)
        if found is None:
            parts = [i for i, m in enumerate(mark) if m]
            each = [tuple(m if j == i else 0 for j, m in enumerate(mark)) for i in parts]
            lone = [self.cell(level, m) for m in each] if len(parts) > 1 else []
            found = self.cells[key] = Cell(_first(max(mark)), lone)
        return found

    def saw(self, cell: Cell, hit: bool) -> None:
        """A token of this cell, whose parent came, came next or did not."""
        cell.saw(hit)
        for lone in cell.lone:
            lone.saw(hit)

    @property
    def now(self) -> int:
        """Time, in which chances stand still. Early on it runs with every judgement."""
        return self.judged if self.judged < 4 * EVERY else self.judged // EVERY * EVERY


def _first(said: int) -> float:
    """What to expect of a token of which nothing but this class is known."""
    return FIRST[said - 1] if said <= RANKS else GUESSES[said - RANKS - 1]
