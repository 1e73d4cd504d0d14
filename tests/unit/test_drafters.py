"""Drafters against brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell import SamplingParams
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rng import Purpose, SeqRng
from foretell.drafters import own_model
from foretell.drafters.draft_model import DraftModel
from foretell.drafters.ngram import PromptLookup
from foretell.drafters.trees.draw import ranked
from helpers_model import TableModel

BUDGET = Budget(100, 100)


def view_of(
    tokens: Sequence[int], prompt_len: int, draw: Draw = Draw.TOP, seed: int = 1
) -> SeqView:
    params = SamplingParams(temperature=0.0 if draw is Draw.TOP else 1.0)
    return SeqView(list(tokens), prompt_len, params, SeqRng(seed), draw, len(tokens) - 1)


def drafted(tree) -> list[int]:
    return tree.tokens[tree.n_context :].tolist()


def lookup(tokens: list[int], stop: int, longest: int, shortest: int, count: int) -> list[int]:
    """Brute force: the longest suffix, then its most recent earlier place, then what follows."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(stop - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:] and end < len(tokens):
                text = list(tokens[:stop])
                for i in range(end, end + count):
                    if i >= len(text):
                        if stop < len(tokens):
                            break
                        text.append(text[i - (len(tokens) - end)])
                return text[end : end + count]
    return []


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 9),
    st.sampled_from(["all", "prompt"]),
)
def test_prompt_lookup_is_the_brute_force_search(
    tokens, prompt_len, shortest, more, count, span
) -> None:
    prompt_len = min(prompt_len, len(tokens))
    drafter = PromptLookup(count, shortest + more, shortest, span)
    view = view_of(tokens[:prompt_len], prompt_len)
    state = drafter.begin(view)
    for n in range(prompt_len, len(tokens) + 1):
        view.tokens[:] = tokens[:n]
        view.cached = n - 1
        (tree,) = drafter.propose([state], [view], [BUDGET])
        stop = prompt_len if span == "prompt" else n
        assert drafted(tree) == lookup(tokens[:n], stop, shortest + more, shortest, count)
        assert tree.is_chain


def test_prompt_lookup_prefers_the_longest_then_the_most_recent_match() -> None:
    text = [1, 2, 3, 7, 9, 2, 3, 8, 2, 3, 5, 1, 2, 3]
    drafter = PromptLookup(tokens=2, max_ngram=3, min_ngram=2)
    (tree,) = drafter.propose([drafter.begin(None)], [view_of(text, 14)], [BUDGET])
    assert drafted(tree) == [7, 9], "three ids match only at the beginning"
    drafter = PromptLookup(tokens=2, max_ngram=2, min_ngram=2)
    (tree,) = drafter.propose([drafter.begin(None)], [view_of(text, 14)], [BUDGET])
    assert drafted(tree) == [5, 1], "the most recent '2 3'"


def test_prompt_lookup_is_the_surer_the_longer_the_match() -> None:
    for text, matched in (
        ([1, 2, 9, 3, 1, 2], 2),
        ([1, 2, 3, 9, 4, 1, 2, 3], 3),
        ([5, 4, 3, 1, 2, 9, 6, 5, 4, 3, 1, 2], 5),  # beyond what is looked up
        ([7] * 6, 5),  # ends where the text begins
    ):
        view = view_of(text, len(text))
        drafter = PromptLookup(tokens=3, max_ngram=3, min_ngram=2)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [BUDGET])
        sure = [m / (m + 1) for m in range(matched, matched + 3)]
        assert tree.score[tree.n_context :].tolist() == pytest.approx(sure), text


def test_prompt_lookup_keeps_to_its_budget() -> None:
    text = [1, 2, 3, 4, 5, 1, 2]
    drafter = PromptLookup(tokens=5)
    for nodes, depth, want in ((9, 9, 5), (2, 9, 2), (9, 3, 3), (0, 9, 0), (9, 0, 0)):
        (tree,) = drafter.propose([drafter.begin(None)], [view_of(text, 7)], [Budget(nodes, depth)])
        assert len(drafted(tree)) == want
        assert tree.tokens[: tree.n_context].tolist() == [2]


def greedy_tree(model: TableModel, text: list[int], tokens: int, width: int) -> list[tuple]:
    """Paths of the k-ary tree: `width` children of each expanded node, best paths expanded."""
    frontier, paths = [((), 1.0)], []
    for level in range(tokens):
        fresh = []
        for path, score in frontier:
            probs = model.logits([*text, *path]).softmax(-1)
            for token in probs.topk(width).indices.tolist():
                fresh.append(((*path, token), score * float(probs[token])))
        paths += fresh
        keep = sorted(fresh, key=lambda f: -f[1])[:width]
        frontier = [f for f in fresh if f in keep]
        assert level < 9
    return [p for p, _ in paths]


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (4, 1), (1, 3), (3, 2), (4, 3)])
def test_draft_model_expands_the_most_probable_paths(tokens: int, width: int) -> None:
    model = TableModel(seed=4)
    drafter = DraftModel(model, 11, tokens, width)
    r = random.Random(0)
    for _ in range(20):
        text = [r.randrange(11) for _ in range(r.randint(1, 12))]
        view = view_of(text, len(text))
        (tree,) = drafter.propose([drafter.begin(view)], [view], [BUDGET])
        paths = [tuple(tree.path_tokens(n)) for n in range(tree.n_context, len(tree))]
        assert sorted(paths) == sorted(greedy_tree(model, text, tokens, width))
        assert tree.q is None
        if width > 1:
            for node in range(tree.n_context, len(tree)):
                *before, last = tree.path_tokens(node)
                want = model.logits([*text, *before]).softmax(-1)[last]
                assert tree.score[node] == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_sampled_drafts_come_with_the_rows_they_were_drawn_from(width: int) -> None:
    model = TableModel(seed=4)
    drafter = DraftModel(model, 11, 3, width)
    for seed in range(10):
        text = [seed, 1, 2]
        view = view_of(text, 3, Draw.SAMPLE, seed)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [BUDGET])
        tree.validate(11)
        seen = set()
        for node in range(tree.n_context, len(tree)):
            row = int(tree.qrow[node])
            before = tree.path_tokens(int(tree.parent[node]))
            want = model.logits([*text, *before]).softmax(-1)
            torch.testing.assert_close(tree.q[row], want)
            seen.add((int(tree.parent[node]), int(tree.tokens[node])))
        assert len(seen) == tree.drafted, "siblings are drawn without replacement"
        for node in [tree.tip, *range(tree.n_context, len(tree))]:
            rows = {int(tree.qrow[c]) for c in tree.children(node)}
            assert len(rows) <= 1


def test_replay_drafts_use_the_targets_own_noise() -> None:
    """A drafter that is the target itself is right at every position."""
    model = TableModel()
    for width in (1, 2):
        drafter = DraftModel(model, 11, 4, width)
        text = [1, 2, 3]
        view = view_of(text, 3, Draw.NOISE)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [BUDGET])
        best: list[int] = []
        for _ in range(4):
            noise = view.rng.race([3 + len(best)], Purpose.TARGET, 11)[0]
            best.append(int((model.logits([*text, *best]).softmax(-1) / noise).argmax()))
        paths = [tree.path_tokens(n) for n in range(len(tree))]
        assert best[:1] in paths
        assert best in paths or width > 1  # a tree expands the most probable paths


def test_draw_order_takes_what_q_allows() -> None:
    q = torch.tensor([0.0, 0.6, 0.0, 0.4])
    view = view_of([1], 1, Draw.SAMPLE)
    assert set(ranked(q[None], view, Draw.SAMPLE, [0], [0], 2)[0][0].tolist()) == {1, 3}
    drafter = DraftModel(TableModel(), 11, 1, 11)

    def warp(logits, paths):
        probs = torch.zeros_like(logits)
        probs[:, [2, 5]] = 0.5
        return probs

    view.warp = warp
    (tree,) = drafter.propose([drafter.begin(view)], [view], [BUDGET])
    assert sorted(drafted(tree)) == [2, 5]


def test_draft_model_keeps_to_its_budget() -> None:
    drafter = DraftModel(TableModel(), 11, 4, 3)
    for nodes in range(8):
        for depth in range(5):
            for branching in (1, 2, 9):
                view = view_of([1, 2], 2)
                budget = Budget(nodes, depth, branching)
                (tree,) = drafter.propose([drafter.begin(view)], [view], [budget])
                assert tree.drafted <= nodes
                assert max(tree.level(n) for n in range(len(tree))) <= depth
                widest = max(len(tree.children(n)) for n in range(len(tree)))
                assert widest <= min(branching, 3)
                assert tree.drafted > 0 or not nodes or not depth


def test_budgets_of_a_batch_are_kept_one_by_one() -> None:
    """A chain-only sequence beside one that may branch; one that sleeps; one without room."""
    drafter = DraftModel(TableModel(), 11, 3, 2)
    views = [view_of([i, 1, 2], 3) for i in range(4)]
    budgets = [Budget(9, 3, 1), Budget(9, 3), Budget(0, 0), Budget(9, 1)]
    alone = []
    for v, b in zip(views, budgets, strict=True):
        alone += drafter.propose([drafter.begin(v)], [v], [b])
    together = drafter.propose([drafter.begin(v) for v in views], views, budgets)
    for a, t in zip(alone, together, strict=True):
        assert drafted(a) == drafted(t)
        assert (a.parent == t.parent).all()
    assert together[0].is_chain
    assert together[2].drafted == 0


def test_a_vocabulary_of_another_padded_size() -> None:
    """Checkpoints of one family pad their vocabulary differently."""
    for theirs, ours in ((11, 16), (16, 11)):
        drafter = DraftModel(TableModel(theirs), ours, 3, 1)
        view = view_of([1, 2], 2, Draw.SAMPLE)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [BUDGET])
        assert tree.q.shape == (3, ours)
        assert max(drafted(tree)) < min(theirs, ours)


def test_long_texts_are_caught_up_in_chunks(monkeypatch) -> None:
    model = TableModel()
    view = view_of([i % 11 for i in range(23)], 23)
    trees = []
    for chunk in (100, 4):
        monkeypatch.setattr(own_model, "CHUNK", chunk)
        drafter = DraftModel(model, 11, 2, 1)
        state = drafter.begin(view)
        model.widest = 0
        trees += drafter.propose([state], [view], [BUDGET])
        assert state.fed[:23] == view.tokens
    assert model.widest <= 4
    assert drafted(trees[0]) == drafted(trees[1])


def three(q: torch.Tensor, view: SeqView, level: int, order: int) -> list[int]:
    return ranked(q[None], view, Draw.SAMPLE, [level], [order], 3)[0][0].tolist()


def test_noise_of_one_position_differs_from_round_to_round() -> None:
    """Whatever node of whatever draft stands for it: an earlier round may have looked at it."""
    q = torch.full((1000,), 1e-3)
    text = list(range(10))
    draws = [
        tuple(three(q, view_of(text[:base], 3, Draw.SAMPLE), 9 - base, order))
        for base in (5, 6, 7)
        for order in (0, 1, 2)
    ]
    assert len(set(draws)) == 9
