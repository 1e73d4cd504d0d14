"""Aggressive decoding: the output copies the input until it says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.core.tree import TokenTree

Gram = tuple[int, ...]
FIRST = 4  # tokens of a draft from a place that nothing has confirmed yet; a run worth trusting


@dataclass(slots=True)
class Alignment:
    """Which place of the source the output has reached; a function of the text alone.

    at: index in the source of the token expected next, -1 = not aligned; run: tokens that were
    copied from there without a break; last: where the source was left when it diverged.
    """

    source: list[int]
    max_gram: int
    window: int
    start: int
    ends: list[dict[Gram, list[int]]] = field(default_factory=list)  # gram -> ends, by length
    known: int = 0  # tokens read
    at: int = -1
    run: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        for n in range(1, self.max_gram + 1):
            table: dict[Gram, list[int]] = {}
            for end in range(n, len(self.source) + 1):
                table.setdefault(tuple(self.source[end - n : end]), []).append(end)
            self.ends.append(table)
        self.known = len(self.source)

    def read(self, tokens: Sequence[int]) -> None:
        """Follow the output: every token either confirms the place, or is a divergence after which
        a new place is looked for."""
        for i in range(self.known, len(tokens)):
            token = tokens[i]
            if 0 <= self.at < len(self.source) and self.source[self.at] == token:
                self.at += 1
                self.run += 1
                self.last = self.at
            else:
                self.at = self.align(tokens[max(0, i + 1 - self.max_gram) : i + 1])
                if self.at < 0 and self.run >= FIRST:  # perhaps one token was replaced
                    self.at = self.last + 1
                self.run = 0
        self.known = len(tokens)

    def align(self, tail: Sequence[int]) -> int:
        """The place after the only occurrence of the output's last 1, 2, .. tokens; -1 when the
        last token does not occur, or they are ambiguous up to the longest gram.

        Ahead of where the source was left an occurrence needs to be the only one within the window;
        elsewhere, within the whole source, and `start` tokens long.
        """
        for n in range(1, min(self.max_gram, len(tail)) + 1):
            ends = self.ends[n - 1].get(tuple(tail[len(tail) - n :]))
            if ends is None:
                return -1
            near = [e for e in ends if self.last < e <= self.last + self.window]
            if len(near) == 1:
                return near[0]
            if len(ends) == 1 and n >= self.start:
                return ends[0]
        return -1


class Aggressive:
    """For outputs that mostly repeat their input (corrections, edits, rewriting, refactoring): the
    rest of the source, from where the output has got to, is the draft.

    The source is the prompt. A place is found by the unique-suffix rule: the last token if it
    occurs once in the source, else the last two, .. up to `max_gram`; no place, no draft. After a
    divergence the same rule finds the place where copying goes on, first within the `window` tokens
    ahead of where the source was left; anywhere else it takes `start` tokens, because a single one
    is often shared by chance (the paper's rule is start=1, window=0). Where that finds nothing
    after a longer copied run, one token of the source is taken to have been replaced. Drafts grow
    with the copied run, from 4 to `tokens` (the paper drafts the whole rest at once, for
    sentences). One-hot drafts: keeps the promise of the verifier.

    Paper: Ge, Xia, Sun, Chen, Wei, "Lossless Acceleration for Seq2seq Generation with Aggressive
    Decoding" (2022).
    """

    name = "aggressive"
    promise = Promise.EXACT
    reads_text = True
    paper = "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding"
    summary = "copy the input; after a divergence, go on where the output joins it again"
    needs = Needs()
    shapes = frozenset({"chain", "onehot"})

    def __init__(
        self, tokens: int = 24, max_gram: int = 3, window: int = 32, start: int = 2
    ) -> None:
        if tokens < 1 or window < 0 or not 1 <= start <= max_gram:
            raise InputError(
                "aggressive needs tokens >= 1, window >= 0 and 1 <= start <= max_gram."
            )
        self.tokens, self.max_gram, self.window, self.start = tokens, max_gram, window, start

    def begin(self, view: SeqView) -> Alignment:
        return Alignment(view.tokens[: view.prompt_len], self.max_gram, self.window, self.start)

    def propose(
        self, states: Sequence[Alignment], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        return [self._one(s, v, b) for s, v, b in zip(states, views, budgets, strict=True)]

    def _one(self, state: Alignment, view: SeqView, budget: Budget) -> TokenTree:
        if budget.none:
            return TokenTree.context(view.pending)
        state.read(view.tokens)
        if state.at < 0:
            return TokenTree.context(view.pending)
        count = min(max(FIRST, 2 * state.run), self.tokens, budget.depth, budget.nodes)
        return TokenTree.chain(view.pending, state.source[state.at : state.at + count])

    def observe(self, states: Sequence[Alignment], feedback: Sequence[Feedback]) -> None:
        """The alignment reads the committed tokens when it next proposes."""

    def end(self, state: Alignment) -> None:
        """Nothing to free."""
