"""Drafters made of drafters: what composition, merging and selection have in common.

`of` names the parts: ``of=suffix+draft-model(tokens=4,tree=dyspec)+none``; options stand in
parentheses, and parts may be composed themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, Drafter, Draw, Needs, Promise, SeqView
from foretell.core.registry import Spec, split
from foretell.core.rng import DrafterRng
from foretell.core.tree import Kind, TokenTree


def parse_parts(text: str) -> list[Spec]:
    """`a+b(key=value,key=value)` -> specs. InputError when it cannot be read."""
    specs = []
    for piece in (p.strip() for p in split(text, "+")):
        name, bracket, rest = piece.partition("(")
        if not name or (bracket and not rest.endswith(")")) or (not bracket and ")" in piece):
            raise InputError(
                f"'{text}' is not a list of drafters: write it like suffix+draft-model(tokens=4)."
            )
        specs.append(Spec.parse(f"{name}:{rest[:-1]}" if bracket else name))
    return specs


class Composed:
    """Forwards everything to its parts. A part's state belongs to the part; what a whole needs,
    holds and promises is what its parts do together."""

    name = ""
    promise = Promise.EXACT
    needs = Needs()
    least = 2  # parts
    clocked = False  # whether what it drafts depends on the time things take

    def __init__(self, parts: Sequence[Drafter]) -> None:
        if len(parts) < self.least:
            raise InputError(f"'{self.name}' needs at least {self.least} drafters in of=A+B.")
        self.parts = list(parts)
        self.listeners = [i for i, p in enumerate(parts) if not getattr(p, "reads_text", False)]
        needs = [p.needs for p in parts]
        self.needs = Needs(
            taps=tuple(dict.fromkeys(t for n in needs for t in n.taps)),
            logits=any(n.logits for n in needs),
            prompt_logits=any(n.prompt_logits for n in needs),
            own_model=any(n.own_model for n in needs),
            layer_access=any(n.layer_access for n in needs),
        )
        self.shapes: frozenset[str] = frozenset().union(*(p.shapes for p in parts))
        order = list(Promise)
        self.promise = max((p.promise for p in parts), key=order.index)
        self.unsound: Mapping[Draw, str] = {
            draw: why for p in parts for draw, why in getattr(p, "unsound", {}).items()
        }
        self.clocked = self.clocked or any(getattr(p, "clocked", False) for p in parts)
        drawing = [p for p in parts if "q" in p.shapes]
        self.draws: frozenset[Draw] = frozenset(
            d for d in Draw if drawing and all(d in getattr(p, "draws", ()) for p in drawing)
        )

    @classmethod
    def make_parts(cls, context: BuildContext, of: str) -> list[Drafter]:
        return [registry.create("drafter", spec, context) for spec in parse_parts(of)]

    def state_bytes(self) -> int:
        """Of what all requests share."""
        return sum(p.state_bytes() for p in self.parts if hasattr(p, "state_bytes"))  # type: ignore[attr-defined]

    def begin(self, view: SeqView) -> Any:
        return [p.begin(view) for p in self.parts]

    def ask(
        self, part: int, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """Let a part propose; every part that draws has noise of its own."""
        drafter = self.parts[part]
        if part and "q" in drafter.shapes:
            views = [replace(v, rng=DrafterRng(v.rng, part)) for v in views]
        return drafter.propose(states, views, budgets)

    def own(self, state: Any) -> list[Any]:
        """The parts' states."""
        return state

    def end(self, state: Any) -> None:
        for part, own in zip(self.parts, self.own(state), strict=True):
            part.end(own)

    def observe(self, states: Sequence[Any], feedback: Sequence[Feedback]) -> None:
        """Everybody learns from every step, but for parts that only understand their own trees:
        those are told of the steps they drafted alone. (Parts that learn from the committed text
        read it when they next propose.)"""
        for i in self.listeners:
            told = [
                (self.own(s)[i], f)
                for s, f in zip(states, feedback, strict=True)
                if self.hears(s, i)
            ]
            if told:
                self.parts[i].observe([s for s, _ in told], [f for _, f in told])

    def hears(self, state: Any, part: int) -> bool:
        """Whether a part is told of a sequence's step."""
        selfish = getattr(self.parts[part], "own_trees_only", False)
        return not selfish or self.drafted_by(state, part)

    def drafted_by(self, state: Any, part: int) -> bool:
        """Whether the last tree of this sequence was that of one part, unchanged."""
        return False


def drafts(tree: TokenTree) -> int:
    """Nodes behind the context."""
    return len(tree) - tree.n_context


def has_rows(tree: TokenTree) -> bool:
    """Whether a token of it was drawn from a q: such a tree is never dropped, cut or re-sorted."""
    return tree.qrow is not None and bool((tree.qrow >= 0).any())


def values(tree: TokenTree) -> list[float]:
    """[N] what the drafter thinks of each node: the product of the scores on its path. Never more
    than the parent's; 1 for the context and where there are no scores."""
    own = [1.0] * len(tree) if tree.score is None else tree.score.tolist()
    value = [1.0] * len(tree)
    parents = tree.parent.tolist()
    for i in range(tree.n_context, len(tree)):
        value[i] = value[parents[i]] * min(max(own[i], 0.0), 1.0)
    return value


def only(tree: TokenTree, keep: Sequence[bool]) -> TokenTree:
    """The nodes [N] to keep of a tree without q rows; the context stays, and what hung below a
    node that goes, goes with it."""
    c, parents = tree.n_context, tree.parent.tolist()
    place = {i: i for i in range(c)}
    for i in range(c, len(tree)):
        if keep[i] and parents[i] in place:
            place[i] = len(place)
    if len(place) == len(tree):
        return tree
    kept = list(place)
    parent = np.array([place.get(parents[i], -1) for i in kept], np.int64)
    rows = None if tree.qrow is None else tree.qrow[kept]
    scores = None if tree.score is None else tree.score[kept]
    return TokenTree(
        tree.tokens[kept], parent, tree.kind[kept], tree.depth[kept], rows, tree.q, scores
    )


def model_and_table(
    context: BuildContext, of: str | None, model: str | None, store: str | None
) -> list[Drafter]:
    """The two parts of methods that add retrieved tokens to a model's tree: those of `of`, or an
    EAGLE-2 tree of the draft model (`model`: a checkpoint; by default the drafter beside the
    target) and a datastore (`store`: a file; without one the text itself and past outputs)."""
    if of is not None:
        if model is not None or store is not None:
            raise InputError("Give either of=MODEL+TABLE or model= and store=, not both.")
        specs = parse_parts(of)
    else:
        path = {} if model is None else {"path": model}
        table = Spec("suffix", {"branching": 3})
        if store is not None:
            table = Spec("retrieval", {"path": store})
        specs = [Spec("draft-model", {**path, "tree": "eagle2"}), table]
    parts = [registry.create("drafter", spec, context) for spec in specs]
    if len(parts) != 2 or "q" in parts[1].shapes or not parts[1].shapes:
        raise InputError(
            f"'{of}' is not a drafter with a model and one that looks tokens up: "
            "write it like draft-model(tree=eagle2)+suffix."
        )
    return parts


def fuse(first: TokenTree, second: TokenTree, nodes: int) -> TokenTree:
    """`first` with the paths of `second` hung in by longest common prefix; both have the same
    context. At most `nodes` drafted nodes, those of `first` all kept; of a `second` without q rows
    the nodes with the most probable paths (`values`) are taken.

    A one-hot node of `second` that is there already is left out; a new one comes behind its
    siblings. A node with a q row is never left out: where its token is there already it becomes a
    repeated draw (DEAD: no row of its own, still refused with its q), and what hangs below it hangs
    below the sibling that stands for it. So a walk refuses the siblings of `first` first, then
    those of `second` on what is left, which is lossless for rows and one-hot nodes alike.

    A `second` with q rows must have been drafted within `nodes` minus the drafts of `first`;
    ValueError otherwise.
    """
    c, n = first.n_context, len(first)
    extra = len(second) - second.n_context
    if not extra:
        return first
    drawn = has_rows(second)
    if drawn and n - c + extra > nodes:
        raise ValueError("a tree with q rows is never cut: draft it within what the first left")
    tokens, parent = first.tokens.tolist(), first.parent.tolist()
    kind, depth = first.kind.tolist(), first.depth.tolist()
    score = first.score.tolist() if first.score is not None else [1.0] * n
    shift = 0 if first.q is None else len(first.q)
    qrow = first.qrow.tolist() if first.qrow is not None else [-1] * n
    known = {(parent[i], tokens[i]): i for i in range(n - 1, c - 1, -1) if kind[i] == 1}
    place = {i: i for i in range(c)}  # node of `second` -> node here
    rows = second.qrow.tolist() if second.qrow is not None else [-1] * len(second)
    order = list(range(c, len(second)))
    if not drawn:
        value = values(second)
        order.sort(key=lambda i: (-value[i], i))  # parents stay before their children
    for i in order:
        above = place.get(int(second.parent[i]))
        if above is None or second.kind[i] == Kind.RIDER:
            continue  # its parent found no room; what is not a draft has no place here
        token, row = int(second.tokens[i]), rows[i]
        there = known.get((above, token))
        if row < 0:
            if there is not None:
                place[i] = there
                continue
            if len(tokens) - c >= nodes:
                continue
        fresh = len(tokens)
        alive = there is None and second.kind[i] != Kind.DEAD
        place[i] = fresh if there is None else there
        if alive:
            known[(above, token)] = fresh
        tokens.append(token)
        parent.append(above)
        kind.append(int(Kind.CANDIDATE if alive else Kind.DEAD))
        depth.append(depth[above] + 1)
        score.append(float(second.score[i]) if second.score is not None else 1.0)
        qrow.append(row + shift if row >= 0 else -1)
    q = first.q
    if second.q is not None:
        q = second.q if q is None else torch.cat([q, second.q.to(q)])
    return TokenTree(
        np.array(tokens, np.int64),
        np.array(parent, np.int64),
        np.array(kind, np.int8),
        np.array(depth, np.int64),
        np.array(qrow, np.int64) if has_rows(first) or drawn else None,
        q,
        np.array(score),
        embeds=first.embeds,
    )


def rest(budget: Budget, tree: TokenTree) -> Budget:
    """What `tree` leaves of a budget."""
    return budget.clamp(
        nodes=budget.nodes - drafts(tree), depth=budget.depth, branching=budget.branching
    )
