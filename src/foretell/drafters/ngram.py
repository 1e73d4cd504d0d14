"""Prompt lookup: copy what followed the last occurrence of the current suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.drafters.tables.matches import chain_scores, match_length
from foretell.drafters.tables.sketch import NOTHING, Sketch, Sketches, sketched


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram last ended: O(1) to extend by a token and to look up a suffix."""

    min_ngram: int
    max_ngram: int
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> index after it
    known: int = 0  # n-grams ending at indices < known are in the table

    def extend(self, tokens: Sequence[int], upto: int) -> None:
        """Enter the n-grams that end at indices up to and including `upto` (exclusive ends)."""
        for end in range(max(self.known, 1), upto + 1):
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                self.ends[tuple(tokens[end - n : end])] = end
        self.known = max(self.known, upto + 1)

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Index after the most recent earlier occurrence of the longest known suffix, and how long
        that is; (0, 0) = there is none."""
        for n in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            end = self.ends.get(tuple(tokens[len(tokens) - n :]))
            if end is not None:
                return end, n
        return 0, 0


def copy_from(tokens: Sequence[int], start: int, stop: int, count: int) -> list[int]:
    """`count` tokens beginning at `start`. When the copy reaches the end of `tokens` it goes on
    with what it has copied (the text is periodic); before another `stop` it just ends."""
    draft: list[int] = []
    for i in range(start, start + count):
        if i < stop:
            draft.append(tokens[i])
        elif stop == len(tokens):
            draft.append(draft[i - stop])
        else:
            break
    return draft


class PromptLookup(Sketches):
    """Finds the most recent earlier occurrence of the longest suffix (`max_ngram` down to
    `min_ngram` tokens) and drafts the `tokens` that followed it, as a chain.

    ``span=all`` looks in prompt and output, ``span=prompt`` in the prompt only. O(max_ngram) per
    token. Paper: Saxena, "Prompt Lookup Decoding" (2023); also LLMA, Yang et al., "Inference with
    Reference" (2023). One-hot drafts: keeps the promise of the verifier.
    """

    name = "prompt-lookup"
    promise = Promise.EXACT
    reads_text = True
    paper = "Prompt Lookup Decoding"
    summary = "copy what followed the last occurrence of the current suffix"
    needs = Needs()
    shapes = frozenset({"chain", "onehot"})

    def __init__(
        self, tokens: int = 8, max_ngram: int = 4, min_ngram: int = 2, span: str = "all"
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InputError("prompt-lookup needs 1 <= min_ngram <= max_ngram.")
        if tokens < 1:
            raise InputError("prompt-lookup:tokens is at least 1.")
        if span not in ("all", "prompt"):
            raise InputError(f"prompt-lookup:span={span} is neither 'all' nor 'prompt'.")
        self.tokens, self.min_ngram, self.max_ngram = tokens, min_ngram, max_ngram
        self.prompt_only = span == "prompt"

    def begin(self, view: SeqView) -> NgramIndex:
        return NgramIndex(self.min_ngram, self.max_ngram)

    def sketch(
        self, states: Sequence[NgramIndex], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        return [self._one(s, v, b) for s, v, b in zip(states, views, budgets, strict=True)]

    def _one(self, index: NgramIndex, view: SeqView, budget: Budget) -> Sketch:
        if budget.none:
            return NOTHING
        tokens = view.tokens
        stop = view.prompt_len if self.prompt_only else len(tokens)
        # An n-gram needs a continuation, so the suffix itself is never found.
        index.extend(tokens, stop - 1)
        start, n = index.find(tokens)
        if not n:
            return NOTHING
        count = min(self.tokens, budget.depth, budget.nodes)
        draft = copy_from(tokens, start, stop, count)
        m = len(draft)
        sure = chain_scores(match_length(tokens, start, n), m)
        return sketched(draft, range(-1, m - 1), range(1, m + 1), sure, stop=budget.stop)

    def observe(self, states: Sequence[NgramIndex], feedback: Sequence[Feedback]) -> None:
        """The index reads the committed tokens when it next proposes."""

    def end(self, state: NgramIndex) -> None:
        """Nothing to free."""
