"""What a second is worth, and what steps take."""

from __future__ import annotations

from dataclasses import dataclass

from foretell.core.protocols import CostModel

LOOK = 64  # times that what forwards cost is remembered for
KEEP = 1 - 1 / 256  # of the past, at every step


@dataclass(slots=True)
class Pace:
    """Tokens a step emits and seconds it takes, the old ones fading."""

    tokens: float = 0.0
    seconds: float = 0.0

    def took(self, tokens: int, seconds: float) -> None:
        self.tokens = KEEP * self.tokens + tokens
        self.seconds = KEEP * self.seconds + seconds

    @property
    def rate(self) -> float:
        """Tokens per second; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0


class StepCosts:
    """Seconds of a forward in which every sequence drafts 0, 1, .. up to `nodes` nodes. Without a
    cost model what they have to bring instead, `floor` tokens each (then a rate of 1 is meant)."""

    def __init__(self, cost: CostModel | None, nodes: int, floor: float) -> None:
        self.cost, self.nodes = cost, nodes
        self.asked = 0
        self.floors = [floor * n for n in range(nodes + 1)]
        self.known: dict[tuple[int, int], tuple[int, list[float]]] = {}

    def __call__(self, context: int, sequences: int) -> list[float]:
        """context: committed rows of a sequence."""
        if self.cost is None:
            return self.floors
        self.asked += 1
        key = (sequences, context // 256)
        when, costs = self.known.get(key, (-LOOK, []))
        if self.asked - when >= LOOK:
            if len(self.known) > 256:
                self.known.clear()
            rows = range(sequences, sequences * (self.nodes + 2), sequences)
            costs = [self.cost.seconds(r, context * sequences, sequences) for r in rows]
            self.known[key] = self.asked, costs
        return costs
