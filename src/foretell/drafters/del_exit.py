"""DEL: which layer to exit at, and how far to draft, chosen anew in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, Needs, SeqView, TargetModel
from foretell.core.rows import largest
from foretell.core.tree import TokenTree
from foretell.drafters.self_draft import SelfDraft, shape_of, stop_below
from foretell.drafters.trees.chain import Chain
from foretell.drafters.trees.shape import TreeShape

TAIL = 16  # most positions looked at in one round


def tokens_per_layer(alpha: float, layer: int, tokens: int, layers: int, head: float) -> float:
    """Expected tokens of a round for each layer it reads: (1 - a^(d+1)) / (1 - a) tokens from d
    drafts of acceptance a, which cost d (layer + head) and a verification layers + head."""
    expected = tokens + 1.0 if alpha >= 1 else (1 - alpha ** (tokens + 1)) / (1 - alpha)
    return expected / (tokens * (layer + head) + layers + head)


def best_exit(rates: dict[int, float], most: int, layers: int, head: float) -> tuple[int, int]:
    """The (layer, tokens) with most tokens per layer; tokens = 0 is plain decoding."""
    plans = [(layer, d) for layer in rates for d in range(1, most + 1)]
    plans.insert(0, (min(rates), 0))
    return max(plans, key=lambda p: tokens_per_layer(rates[p[0]], *p, layers, head))


@dataclass(slots=True)
class Shadow:
    """What drafts from one layer would have been worth: sums that fade from round to round."""

    hits: float = 1.0
    tries: float = 2.0
    sure: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of misses, of hits
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def rate(self) -> float:
        return self.hits / self.tries

    @property
    def threshold(self) -> float:
        """Midway between the mean confidence of misses and that of hits; 0 where either is new."""
        if min(self.seen) < 1:
            return 0.0
        means = [s / n for s, n in zip(self.sure, self.seen, strict=True)]
        return max(0.0, sum(means) / 2)

    def tell(self, hits: Sequence[bool], sure: Sequence[float], fade: float) -> None:
        self.hits = self.hits * fade + sum(hits)
        self.tries = self.tries * fade + len(hits)
        for kind in (0, 1):
            mine = [c for c, h in zip(sure, hits, strict=True) if h == bool(kind)]
            self.sure[kind] = self.sure[kind] * fade + sum(mine)
            self.seen[kind] = self.seen[kind] * fade + len(mine)


@dataclass(slots=True)
class DelState:
    shape: TreeShape
    shadows: dict[int, Shadow]
    rounds: int = 0


class DynamicExit(SelfDraft):
    """`early-exit` whose layer and length are chosen in every round, for every sequence.

    Every `every` rounds the target's hidden states behind each of `exits` candidate layers, on the
    path that was committed, go through its head: the share of them whose argmax is the token that
    followed is the acceptance a draft from that layer would have had (counted with a factor
    `fade` for every earlier round). The (layer, length) with
    most expected tokens per layer read drafts, which may be none at all: then only these rows cost
    something. Within a round drafting stops below a token whose probability is under the middle
    of the mean confidences of that layer's hits and misses. Lengths go up to `tokens`.

    `head`: what the head costs, in layers (default: by its number of weights).
    Paper: Zarch et al., "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative
    Decoding" (2025). Draws follow the verifier: keeps its promise.
    """

    name = "del"
    paper = "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding"
    summary = "early exit whose layer and length follow the text"

    def __init__(
        self,
        model: TargetModel,
        tokens: int = 8,
        exits: int = 4,
        every: int = 4,
        fade: float = 0.95,
        head: float | None = None,
        shape: TreeShape | None = None,
    ) -> None:
        super().__init__(model, shape or Chain(tokens))
        if tokens < 1 or exits < 1 or every < 1 or not 0 < fade <= 1 or (head or 0.0) < 0:
            raise InputError(
                "del needs tokens >= 1, exits >= 1, every >= 1, 0 < fade <= 1 and head >= 0."
            )
        spec = model.spec
        self.tokens, self.every, self.fade = tokens, every, fade
        # a layer has about 12 H^2 weights, the head V H
        self.head = spec.vocab / (12 * spec.hidden) if head is None else head
        few = min(exits, spec.layers - 1)
        self.exits = sorted({max(1, round((i + 1) * spec.layers / (few + 1))) for i in range(few)})
        self.needs = Needs(layer_access=True, taps=tuple(self.exits))

    @classmethod
    def build(
        cls,
        context: BuildContext,
        tokens: int = 8,
        exits: int = 4,
        every: int = 4,
        fade: float = 0.95,
        head: float | None = None,
        tree: str | None = None,
        **options: Any,
    ) -> DynamicExit:
        own = ("tokens", "exits", "every", "fade", "head", "tree")
        shape = shape_of(cls.name, context, tokens, tree, options, own)
        return cls(context.target, tokens, exits, every, fade, head, shape)

    def begin(self, view: SeqView) -> DelState:
        return DelState(self.shape.bind(view), {layer: Shadow() for layer in self.exits})

    def choose(self, state: DelState) -> tuple[int, int]:
        """(layer, tokens) of the next round."""
        rates = {layer: s.rate for layer, s in state.shadows.items()}
        return best_exit(rates, self.tokens, self.model.spec.layers, self.head)

    def propose(
        self, states: Sequence[DelState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        runs, limited = [], []
        for state, budget in zip(states, budgets, strict=True):
            layer, tokens = self.choose(state)
            runs.append(tuple(range(layer)) if tokens else ())
            budget = replace(budget, depth=min(budget.depth, tokens))
            limited.append(stop_below(budget, state.shadows[layer].threshold))
        return self.draft(states, views, limited, runs)

    def observe(self, states: Sequence[DelState], feedback: Sequence[Feedback]) -> None:
        super().observe(states, feedback)
        for state, f in zip(states, feedback, strict=True):
            if not f.tokens:
                continue  # a part of a prompt
            if state.rounds % self.every == 0:
                self._look(state, f)
            state.rounds += 1

    def _look(self, state: DelState, f: Feedback) -> None:
        """Score every candidate layer on the path that was committed."""
        # The tip and what was accepted, each followed by a token that was emitted. More of the
        # context would be there where a prompt was read in one piece, and then what is drafted
        # would depend on the company a request is in.
        following = f.tokens[-TAIL:]
        nodes = [f.tree.tip, *f.verdict.path][: len(f.tokens)][-TAIL:]
        hidden = torch.cat([f.hidden[layer][nodes] for layer in self.exits])
        sure, said = largest(self.model.unembed(hidden).softmax(-1), 1)
        both = torch.stack([sure.double(), said.double()]).view(2, len(self.exits), -1).tolist()
        for i, layer in enumerate(self.exits):
            hits = [int(a) == b for a, b in zip(both[1][i], following, strict=True)]
            state.shadows[layer].tell(hits, both[0][i], self.fade)
