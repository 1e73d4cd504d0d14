"""Lookahead decoding: the pool, the window, and what of both goes into a tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretell import LLM, InputError, SamplingParams
from foretell.core.feedback import Feedback, Rows, Verdict
from foretell.core.protocols import Budget, SeqView
from foretell.core.rng import SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.lookahead import Lookahead, shifted
from foretell.drafters.tables.runs import Pool, prefix_tree
from helpers_grammar import ToyGrammar
from helpers_model import TableModel

FULL = Budget(1 << 30, 1 << 30)


def view_of(tokens: list[int]) -> SeqView:
    return SeqView(list(tokens), len(tokens), SamplingParams(), SeqRng(1), cached=len(tokens) - 1)


def test_the_pool_keeps_the_latest_runs_of_the_latest_ids() -> None:
    pool = Pool(length=2, guesses=2, keys=2)
    for run in ((1, 2), (3, 4), (1, 2), (5, 6)):
        pool.add(9, run)
    assert pool.newest(9) == [(5, 6), (1, 2)]
    pool.add(8, (0, 0))
    pool.add(7, (0, 1))
    assert pool.newest(9) == []
    assert list(pool.runs) == [8, 7]


def test_the_pool_reads_the_text_once_however_it_is_told() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3]
    once, often = Pool(2, 5, 99), Pool(2, 5, 99)
    once.extend(text)
    for n in range(1, len(text) + 1):
        often.extend(text[:n])
    assert once.runs == often.runs
    assert once.newest(1) == [(2, 3), (2, 4)]
    assert once.newest(4) == [(1, 2)]


def test_a_window_moves_along_its_columns() -> None:
    levels = [[10, 11, 12], [11, 12, 13]]  # each cell holds its position: nothing may disagree
    assert shifted(levels, 1, lambda t: t + 1) == [[11, 12, 13], [12, 13, 14]]
    assert shifted(levels, 3, lambda t: t + 1) == [[13, 14, 15], [14, 15, 16]]
    assert levels == [[10, 11, 12], [11, 12, 13]]


def test_runs_merge_by_prefix_within_the_budget() -> None:
    runs = [(1, 2, 3), (1, 2, 4), (5, 6, 7)]
    assert prefix_tree(runs, 99, 3, 99) == ([1, 2, 3, 4, 5, 6, 7], [-1, 0, 1, 1, -1, 4, 5])
    assert prefix_tree(runs, 99, 2, 99) == ([1, 2, 5, 6], [-1, 0, -1, 2])
    assert prefix_tree(runs, 5, 3, 99) == ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])
    assert prefix_tree(runs, 99, 3, 1) == ([1, 2, 3], [-1, 0, 1])


def step(drafter, state, view, say, budget=FULL, accept=0):
    """One step with a target that says `say(depth below the tip)` at every node."""
    (tree,) = drafter.propose([state], [view], [budget])
    tree.validate(1 << 20)
    n = len(tree)
    logits = torch.zeros(n, 4096)
    for node in range(n):
        logits[node, say(len(view.tokens) + tree.level(node))] = 1.0
    tokens = [say(len(view.tokens) + i) for i in range(accept + 1)]
    path = list(range(tree.n_context, tree.n_context + accept))
    verdict = Verdict(path, tokens)
    rows = Rows(logits, np.arange(n))
    drafter.observe(
        [state], [Feedback(tokens, [*range(tree.n_context), *path], tree, rows, verdict)]
    )
    view.tokens += tokens
    view.cached = len(view.tokens) - 1
    return tree


def rider_levels(tree: TokenTree) -> list[tuple[int, int, list[int]]]:
    """(level, token, tokens above it that are riders) of every rider."""
    found = []
    for node in range(len(tree)):
        if tree.kind[node] == Kind.RIDER:
            found.append((tree.level(node), int(tree.tokens[node]), tree.path_tokens(node)))
    return found


@pytest.mark.parametrize("accept", [0, 1])
def test_the_window_holds_what_the_target_says_of_each_position(accept: int) -> None:
    """The target says 1000 + position: after some steps every cell must hold exactly that, which a
    wrong shift, parent or row would break; and so must the pool."""
    drafter = Lookahead(window=3, ngram=4, guesses=3)
    view = view_of([5, 6, 7, 5, 6, 7, 5])
    state = drafter.begin(view)
    say = lambda position: 1000 + position  # noqa: E731
    sizes = []
    for _ in range(16):
        can = drafter.propose([state], [view], [FULL])[0].drafted
        base = len(view.tokens)
        tree = step(drafter, state, view, say, accept=min(accept, can))
        riders = rider_levels(tree)
        sizes.append(len(riders))
    assert sizes[:3] == [3, 6, 9]
    assert set(sizes[2:]) == {9}
    right = [p == [1000 + base + i for i in range(level)] for level, _, p in riders]
    assert sum(right) >= 9 - 3 * accept  # cells that have just come in may be guesses
    assert (1001 + base, 1002 + base, 1003 + base) in state.pool.newest(1000 + base)


def test_a_small_budget_cuts_the_window_and_a_chain_has_none() -> None:
    drafter = Lookahead(window=4, ngram=3)
    view = view_of([1, 2, 3, 1, 2, 3, 1])
    state = drafter.begin(view)
    for _ in range(4):
        step(drafter, state, view, lambda p: 1 + p % 3)
    for nodes, depth in ((9, 9), (5, 9), (99, 3), (99, 1)):
        (tree,) = drafter.propose([state], [view], [Budget(nodes, depth)])
        assert len(tree) - tree.n_context <= nodes
        assert max(tree.level(i) for i in range(len(tree))) <= depth
    (tree,) = drafter.propose([state], [view], [Budget(99, 9, branching=1)])
    assert tree.is_chain
    assert (tree.kind != Kind.RIDER).all()
    step(drafter, state, view, lambda p: 1 + p % 3, Budget(7, 4))
    (tree,) = drafter.propose([state], [view], [FULL])
    assert int((tree.kind == Kind.RIDER).sum()) == 8, "the window is whole again"


def test_the_window_finds_what_the_text_has_not_said() -> None:
    """A target that never repeats itself: only the window can fill the pool."""

    class Counting(TableModel):
        def logits(self, prefix):
            return torch.nn.functional.one_hot(torch.tensor(len(prefix) + 3), 97).float()

    params = SamplingParams(max_tokens=60)
    outputs = {}
    for draft in ("lookahead:window=0", "lookahead"):
        target = Counting(97)
        outputs[draft] = LLM(target, draft=draft).generate([[3]], params)[0]
        assert outputs[draft].token_ids == [4 + i for i in range(60)]
    assert outputs["lookahead:window=0"].stats.accepted == 0
    assert outputs["lookahead"].stats.steps < 35


def test_a_grammar_forbids_no_rider() -> None:
    tree = TokenTree.build([1], [2, 3, 4], [-1, -1, 1])
    tree.kind[2:] = Kind.RIDER
    tree.kill(np.array([False, True, True, True]))
    assert tree.kind.tolist() == [Kind.CONTEXT, Kind.DEAD, Kind.RIDER, Kind.RIDER]
    target = TableModel()
    params = SamplingParams(max_tokens=30)
    grammar = lambda: ToyGrammar(11, 3)  # noqa: E731
    want = LLM(target).generate([[1, 2]], params, constraint=grammar)[0].token_ids
    got = LLM(target, draft="lookahead").generate([[1, 2]], params, constraint=grammar)[0]
    assert got.token_ids == want
    assert got.stats.accepted > 0


@pytest.mark.parametrize("options", [{"ngram": 1}, {"window": -1}, {"guesses": 0}, {"pool": 0}])
def test_nonsense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="lookahead needs"):
        Lookahead(**options)
