"""The walk that rules with one answer per node share."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.core.feedback import Verdict
from foretell.core.tree import Kind, TokenTree


def follow(tree: TokenTree, nodes: Sequence[int], answers: Sequence[int]) -> Verdict:
    """Walk from the tip along children whose token is the answer at their parent.

    nodes: the decision nodes; answers: the token the target says after each of them.
    The answer at the node where the walk ends is the bonus token.
    """
    answer = dict(zip(nodes, answers, strict=True))
    current, path, tokens = tree.tip, [], []
    drafted, alive = tree.tokens.tolist(), int(Kind.CANDIDATE)
    while True:
        want = answer[current]
        tokens.append(want)
        children = tree.children(current)
        for child in children:
            if drafted[child] == want and tree.kind[child] == alive:
                path.append(child)
                current = child
                break
        else:
            return Verdict(path, tokens, len(path) + bool(children))
