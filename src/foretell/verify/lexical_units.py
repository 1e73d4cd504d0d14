"""Lexical units: runs of tokens that the model is sure of are emitted at once. Lossy."""

from __future__ import annotations

from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import Kind, TokenTree
from foretell.verify.replay import replayed
from foretell.verify.walk import answers


class LexicalUnits:
    """Takes a drafted token that plain decoding would say or, failing that, the most probable
    drafted one whose probability under the target is at least `threshold`; behind the last one it
    emits the token that plain decoding says there. So a unit, a run of tokens that the model is
    sure of, comes out in one step even where sampling would have left it.

    The paper trains the model to fill masks behind its last token with such runs and never looks
    back; here any drafter proposes them and the model's own probabilities, which that forward
    computes anyway, decide. With a threshold above 1 nothing passes that plain decoding does not
    say: the output is then that of `replay` (`greedy` at temperature 0), token for token. At
    temperature 0 a threshold above 0.5 never lets anything but the argmax pass.

    Paper: Sun et al., "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical
    Units for LLMs" (2024). Promise: lossy (sampled text becomes more probable text).
    """

    name = "lexical-units"
    promise = Promise.LOSSY
    paper = (
        "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs"
    )
    summary = "accept runs of tokens that the target is sure of (lossy)"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.TOP

    def __init__(self, threshold: float = 0.5) -> None:
        if not threshold > 0:
            raise InputError(f"lexical-units:threshold={threshold} is not above 0.")
        self.threshold = threshold

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        say = answers(tree, p, p.greedy if p.deterministic else replayed(tree, p, rng, position))
        path: list[int] = []
        current = tree.tip
        while True:
            answer, children = say(current), tree.children(current)
            alive = [c for c in children if tree.kind[c] == Kind.CANDIDATE]
            tokens = tree.tokens[alive].tolist()
            if answer in tokens:
                current = alive[tokens.index(answer)]
            else:
                likely = p.probs([current])[0, tokens].tolist() if tokens else []
                if not likely or max(likely) < self.threshold:
                    said = [*tree.tokens[path].tolist(), answer]
                    return Verdict(path, said, len(path) + bool(children))
                current = alive[likely.index(max(likely))]
            path.append(current)
