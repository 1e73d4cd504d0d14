"""Suffix decoding: what followed the longest match, in this text and in past outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.tables.automaton import AnyAutomaton, automata
from foretell.drafters.tables.matches import scores
from foretell.drafters.tables.sharing import check_share, shares
from foretell.drafters.tables.sketch import NOTHING, Sketch, Sketches, sketched
from foretell.drafters.tables.speculate import Found, Limits, best_draft
from foretell.kernels.automaton import Place

SEGMENTS = 4
CHUNK = 16  # tokens between two looks at the bytes


class PastOutputs:
    """Automata over finished outputs, never more than `limit` bytes: the oldest goes when the
    newest has its share. An output that fits nowhere goes on, without its beginning, in the next.
    """

    def __init__(self, limit: int, depth: int) -> None:
        self.limit, self.new = limit, automata(depth)
        self.segments: dict[int, AnyAutomaton] = {}  # serial number -> segment, oldest first
        self.made = 0

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.segments.values())

    def add(self, tokens: Sequence[int]) -> None:
        for at in range(0, len(tokens), CHUNK):
            newest = self.segments.get(self.made)
            if newest is None or newest.nbytes > self.limit // SEGMENTS:
                self.made += 1
                newest = self.segments[self.made] = self.new()
            elif at == 0:
                newest.begin()
            newest.extend(tokens[at : at + CHUNK])
            while self.nbytes > self.limit and len(self.segments) > 1:
                del self.segments[next(iter(self.segments))]


@dataclass(slots=True)
class SuffixState:
    """One sequence: its own automaton over tokens[:known], and its places in the shared ones."""

    view: SeqView
    shared: bool
    own: AnyAutomaton
    known: int = 0
    places: dict[int, tuple[Place, int]] = field(default_factory=dict)  # place, tokens read


class Suffix(Sketches):
    """Drafts what most often followed the longest suffix that occurred before, in the text of the
    request or in the outputs of past requests.

    A draft's score is the expected number of tokens that stand: the sum over its nodes of how often
    their path followed the match. Of all matched suffixes, in the request and in every segment of
    past outputs, the draft with the best score wins. Lengths adapt: a match of m tokens drafts up
    to factor * m + offset tokens, at most `tokens`, none whose path is rarer than `min_prob`.
    branching=1 drafts a chain, more a tree. Past outputs stay within `bytes` (0: none are kept);
    the oldest quarter goes first. share: see `tables.sharing`. To read a token takes about 0.2
    microseconds and 50 bytes, once; without a compiler 3 to 6 and 100 to 180. Deterministic one-hot
    drafts: keeps the promise of the verifier.

    Paper: Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI
    Applications" (2024); the automaton: Hu et al., "SAM Decoding: Speculative Decoding via Suffix
    Automaton" (2024).
    """

    name = "suffix"
    promise = Promise.EXACT
    reads_text = True
    paper = "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications"
    summary = "what most often followed the longest match, here and in past outputs"
    needs = Needs()

    def __init__(
        self,
        tokens: int = 16,
        branching: int = 1,
        factor: float = 4.0,
        offset: float = 1.0,
        min_prob: float = 0.1,
        bytes: int = 64 << 20,
        depth: int = 32,
        share: str = "exact",
    ) -> None:
        if tokens < 1 or branching < 1 or depth < 2:
            raise InputError("suffix needs tokens >= 1, branching >= 1 and depth >= 2.")
        finite = math.isfinite(factor) and math.isfinite(offset)
        if not finite or factor < 0 or factor + offset < 1 or not 0 <= min_prob <= 1:
            raise InputError(
                "suffix needs factor >= 0, factor + offset >= 1 and min_prob within 0..1."
            )
        if bytes and bytes < 1 << 16:
            raise InputError("suffix:bytes is 0 (keep no past outputs) or at least 65536.")
        self.limits = Limits(tokens, tokens, branching, factor, offset, min_prob)
        self.depth, self.share = depth, check_share(self.name, share)
        self.new = automata(depth)
        self.past = PastOutputs(bytes, depth) if bytes else None
        self.shapes = frozenset({"chain" if branching == 1 else "tree", "onehot"})

    def state_bytes(self) -> int:
        """Of what all requests share."""
        return self.past.nbytes if self.past else 0

    def begin(self, view: SeqView) -> SuffixState:
        shared = self.past is not None and shares(view, self.share)
        return SuffixState(view, shared, self.new())

    def end(self, state: SuffixState) -> None:
        """The output becomes part of the past."""
        if state.shared and self.past:
            self.past.add(state.view.tokens[state.view.prompt_len :])

    def observe(self, states: Sequence[SuffixState], feedback: Sequence[Feedback]) -> None:
        """The automaton reads the committed tokens when it next proposes."""

    def sketch(
        self, states: Sequence[SuffixState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        return [self._one(s, v, b) for s, v, b in zip(states, views, budgets, strict=True)]

    def after(
        self, state: SuffixState, view: SeqView, path: Sequence[int], budget: Budget
    ) -> TokenTree:
        """What followed the text and `path`, which is not part of it (yet), in the text itself:
        a tree whose context ends with `path`."""
        context = [*view.pending, *path]
        if budget.none:
            return TokenTree.context(context)
        self._read(state, view.tokens)
        place = state.own.follow(state.own.repeated(), path)
        found = best_draft(state.own, place, self._limits(budget))
        return self._scored(found, budget).tree(context)

    def _read(self, state: SuffixState, tokens: list[int]) -> None:
        state.own.extend(tokens[state.known :])
        state.known = len(tokens)

    def _limits(self, budget: Budget) -> Limits:
        own = self.limits
        return Limits(
            min(own.nodes, budget.nodes),
            min(own.depth, budget.depth),
            min(own.branching, budget.branching),
            own.factor,
            own.offset,
            own.min_prob,
        )

    def _one(self, state: SuffixState, view: SeqView, budget: Budget) -> Sketch:
        if budget.none:
            return NOTHING
        limits, tokens = self._limits(budget), view.tokens
        self._read(state, tokens)
        found = best_draft(state.own, state.own.repeated(), limits)
        if state.shared and self.past:
            found = self._look_back(state, tokens, limits, found)
        return self._scored(found, budget)

    def _scored(self, found: Found, budget: Budget) -> Sketch:
        parents, levels = found.parents, found.levels
        sure = scores(found.matched, found.probs, parents, levels)
        return sketched(found.tokens, parents, levels, sure, stop=budget.stop)

    def _look_back(
        self, state: SuffixState, tokens: list[int], limits: Limits, found: Found
    ) -> Found:
        """The best draft of the past outputs if its score is higher than what was found here."""
        assert self.past is not None
        n = len(tokens)
        for serial, segment in self.past.segments.items():
            place, read = state.places.get(serial, ((0, 0), 0))
            if n - read > 2 * self.depth:  # farther back nothing is exact anyway
                place, read = (0, 0), n - 2 * self.depth
            place = segment.follow(place, tokens[read:])
            state.places[serial] = place, n
            other = best_draft(segment, place, limits, found.score)
            if other.tokens:
                found = other
        if len(state.places) > 4 * SEGMENTS:
            state.places = {k: v for k, v in state.places.items() if k in self.past.segments}
        return found
