"""Drafts from a suffix automaton, scored by frequency."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from foretell.drafters.tables.automaton import AnyAutomaton, SuffixAutomaton
from foretell.kernels.automaton import Place


@dataclass(slots=True)
class Limits:
    """What a draft may be. `factor`, `offset`: a match of m tokens drafts factor * m + offset."""

    nodes: int
    depth: int
    branching: int = 1
    factor: float = 4.0
    offset: float = 1.0
    min_prob: float = 0.1


@dataclass(slots=True)
class Found:
    """A draft: parents are indices of earlier nodes, -1 the tip; probs are those of whole paths,
    and their sum `score` is how many tokens one expects to stand."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    score: float = 0.0
    matched: int = 0  # tokens before the draft that the match is about


def best_draft(text: AnyAutomaton, place: Place, limits: Limits, floor: float = 0.0) -> Found:
    """The draft with the highest score among those below the matched suffix and its suffixes.

    Short matches draft little and cannot score more than that, so the search goes from the longest
    match down and ends where no shorter one can win. Drafts of a score <= floor are not sought.
    """
    if not isinstance(text, SuffixAutomaton):
        drafted = text.draft(
            *(place, limits.nodes, limits.depth, limits.branching),
            *(limits.factor, limits.offset, limits.min_prob, floor),
        )
        return Found() if drafted is None else Found(*drafted)
    state, matched = place
    best = Found(score=floor)
    while state > 0:
        most = min(limits.nodes, int(limits.factor * matched + limits.offset))
        if min(most, limits.depth if limits.branching == 1 else most) <= best.score:
            break
        if limits.branching == 1:
            found = _chain(text, state, most, limits, best.score)
        else:
            found = _tree(text, state, most, limits)
        if found.score > best.score:
            best, found.matched = found, matched
        state = text.link[state]
        matched = text.length[state]
    return best if best.tokens else Found()


def _onwards(text: SuffixAutomaton, state: int) -> int:
    """The longest suffix of `state` that anything followed: where the text ends it may repeat."""
    while state > 0 and text.first[state] < 0:
        state = text.link[state]
    return state


def _chain(text: SuffixAutomaton, state: int, most: int, limits: Limits, floor: float) -> Found:
    """The likeliest chain, given up as soon as it cannot score more than `floor`: where a text
    repeats itself many suffixes match, and all but the first lose."""
    prob, score, most = 1.0, 0.0, min(most, limits.depth)
    tokens: list[int] = []
    probs: list[float] = []
    first, to, link, count, others = text.first, text.to, text.link, text.count, text.more
    while len(tokens) < most:
        while state > 0 and first[state] < 0:  # `_onwards`
            state = link[state]
        if state <= 0:
            break
        more = others.get(state)
        token, after = first[state], to[state]
        if more is not None:
            heaviest = total = count[after]
            for t, s in more.items():
                c = count[s]
                total += c
                if c > heaviest:
                    heaviest, token, after = c, t, s
            prob *= heaviest / total
            if prob < limits.min_prob:
                break
            if score + prob * (most - len(tokens)) <= floor:
                return Found()
        tokens.append(token)
        probs.append(prob)
        score += prob
        state = after
    n = len(tokens)
    return Found(tokens, list(range(-1, n - 1)), list(range(1, n + 1)), probs, score)


def _tree(text: SuffixAutomaton, state: int, most: int, limits: Limits) -> Found:
    """Best first: the likeliest node whose parent is drafted comes next."""
    found = Found()
    heap: list[tuple[float, int, int, int, int, int]] = []
    pushed = 0

    def push(below: int, level: int, state: int, prob: float) -> None:
        nonlocal pushed
        state = _onwards(text, state)
        if state <= 0 or level > limits.depth:
            return
        more = text.more.get(state)
        nexts = [(text.count[text.to[state]], text.first[state], text.to[state])]
        if more is not None:
            nexts += [(text.count[s], t, s) for t, s in more.items()]
        total = sum(c for c, _, _ in nexts)
        if len(nexts) > 1:
            nexts = heapq.nlargest(limits.branching, nexts, key=lambda n: n[0])
        for c, token, after in nexts:
            p = prob * c / total
            if p < limits.min_prob:
                break
            pushed += 1
            heapq.heappush(heap, (-p, pushed, token, after, below, level))

    push(-1, 1, state, 1.0)
    while heap and len(found.tokens) < most:
        p, _, token, after, below, level = heapq.heappop(heap)
        found.tokens.append(token)
        found.parents.append(below)
        found.levels.append(level)
        found.probs.append(-p)
        found.score -= p  # one by one: the sums of newer Pythons are rounded otherwise
        push(len(found.tokens) - 1, level + 1, after, -p)
    return found
