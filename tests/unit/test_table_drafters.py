"""Drafters that read tables: recycling, aggressive decoding, tri-grams, stochastic n-grams."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foretell import LLM, InputError, SamplingParams
from foretell.core import registry
from foretell.core.protocols import Budget, BuildContext, Draw, SeqView
from foretell.core.rng import Purpose, SeqRng
from foretell.drafters.aded import Aded
from foretell.drafters.aggressive import Aggressive, Alignment
from foretell.drafters.recycling import TokenRecycling
from foretell.drafters.stand import Stand
from foretell.drafters.tables.adjacency import Adjacency
from foretell.drafters.tables.logit_ngrams import LogitNgrams
from foretell.drafters.tables.ranks import (
    PAPER,
    RankStats,
    RankTree,
    best_paths,
    best_size,
    paper_tree,
)
from foretell.drafters.tables.sketch import kept, sketched
from foretell.drafters.tables.trigrams import TriGrams, mixed, monte_carlo
from helpers_model import TableModel

FULL = Budget(1 << 30, 1 << 30)


def view_of(tokens, prompt_len=None, draw=Draw.TOP, seed=1, temperature=1.0) -> SeqView:
    params = SamplingParams(temperature=0.0 if draw is Draw.TOP else temperature)
    n = len(tokens) if prompt_len is None else prompt_len
    return SeqView(list(tokens), n, params, SeqRng(seed), draw, len(tokens) - 1)


def paths_of(tree) -> list[tuple[int, ...]]:
    return [tuple(tree.path_tokens(n)) for n in range(tree.n_context, len(tree))]


def drafted(tree) -> list[int]:
    return tree.tokens[tree.n_context :].tolist()


def keeps_to_budgets(drafter, state, view: SeqView, vocab: int) -> None:
    """It drafts something wherever it may, and never more than it may."""
    for nodes, depth, width in itertools.product((0, 1, 7, 99), (0, 1, 3), (1, 2, 9)):
        (tree,) = drafter.propose([state], [view], [Budget(nodes, depth, width)])
        tree.validate(vocab)
        assert tree.drafted <= nodes
        assert max(tree.level(n) for n in range(len(tree))) <= depth
        assert max(len(tree.children(n)) for n in range(len(tree))) <= width
        assert tree.drafted > 0 or not nodes or not depth
    stop = Budget(99, 5, 9, lambda scores: len(scores) >= 2)
    (tree,) = drafter.propose([state], [view], [stop])
    assert max(tree.level(n) for n in range(len(tree))) == 2


# --- shared pieces


def test_kept_leaves_out_what_lies_below() -> None:
    parents, scores = [-1, -1, 0, 1, 2], [0.9, 0.2, 0.1, 0.9, 0.9]
    keep = kept(lambda s: s[-1] < 0.5, parents, scores)
    assert keep.tolist() == [True, True, True, False, False]
    chain = kept(lambda s: s == [0.9, 0.2], [-1, 0, 1, 2], [0.9, 0.2, 0.1, 0.9])
    assert chain.tolist() == [True, True, False, False]
    assert kept(lambda s: False, [-1, 0], [0.9, 0.2]).tolist() == [True, True]
    levels = np.array([1, 1, 2, 2, 3])
    arrays = (np.arange(5), np.array(parents), levels, np.array(scores))
    tree = sketched(*arrays, keep=np.array([1, 0, 1, 0, 1], bool)).tree([8, 9])
    tree.validate(10)
    assert paths_of(tree) == [(0,), (0, 2), (0, 2, 4)]
    assert tree.score.tolist() == [1, 1, 0.9, 0.1, 0.9]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 0.6), min_size=1, max_size=4),
    st.integers(0, 12),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_best_paths_are_the_likeliest_nodes(p, nodes, depth, branching) -> None:
    p = sorted(p, reverse=True)
    got = best_paths(p, nodes, depth, branching)
    ranks = range(min(len(p), branching))
    every = [s for n in range(1, depth + 1) for s in itertools.product(ranks, repeat=n)]
    chances = sorted((float(np.prod([p[r] for r in s])) for s in every), reverse=True)
    assert [c for c, _ in got] == pytest.approx(chances[:nodes])
    for c, path in got:
        assert c == pytest.approx(float(np.prod([p[r] for r in path])))
    for n in range(len(got) + 1):
        part = {path for _, path in got[:n]}
        assert all(s[:-1] in part or len(s) == 1 for s in part)
        assert all(s[-1] == 0 or (*s[:-1], s[-1] - 1) in part for s in part)


def test_the_published_tree() -> None:
    assert len(PAPER) == len(set(PAPER)) == 80
    assert Counter(map(len, PAPER)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert sum(all(s[: len(p)] != p or s == p for s in PAPER) for p in PAPER) == 40, "leaves"
    shape = RankTree.of(PAPER)
    index = {path: i for i, path in enumerate(sorted(PAPER, key=lambda s: (len(s), s)))}
    for path, i in index.items():
        assert shape.rank[i] == path[-1]
        assert shape.level[i] == len(path)
        assert shape.parent[i] == index.get(path[:-1], -1)
    p = tuple(0.5**r for r in range(1, 9))
    assert len(paper_tree(p, 80, 9, 99)) == 80
    assert len(paper_tree(p, 80, 2, 3)) == 3 + sum(len(s) == 2 and max(s) < 3 for s in PAPER)
    assert paper_tree(p, 80, 9, 1).parent.tolist() == [-1, 0, 1, 2, 3, 4]
    assert len(paper_tree(p, 0, 9, 9)) == 0


def test_rank_stats_learn_and_stay_sorted() -> None:
    s = RankStats((0.4, 0.2, 0.1), weight=4, memory=1e9)
    assert s.chances().tolist() == pytest.approx([0.4, 0.2, 0.1])
    for _ in range(50):
        s.saw(0)
        s.saw(1)
        s.saw(9)
        s.saw(0, width=1)
    assert s.chances().tolist() == pytest.approx([101.6 / 204, 50.8 / 154, 0.4 / 154])
    for _ in range(500):
        s.saw(2)
    p = s.chances()
    assert (np.diff(p) <= 0).all()
    fading = RankStats((0.1,), weight=1, memory=10)
    for rank in [0] * 100 + [1] * 100:
        fading.saw(rank)
    assert fading.chances()[0] < 0.02


class Line:
    """A forward of r rows takes 1 + slope * r."""

    def __init__(self, slope: float) -> None:
        self.slope, self.asked = slope, []

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        self.asked.append((rows, context, sequences))
        return 1 + self.slope * rows

    def observe(self, *_: object) -> None: ...


def test_best_size_is_the_best_rate() -> None:
    chances = [0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01]
    sizes = []
    for slope in (0.0, 0.01, 0.05, 0.3, 1e6):
        gains = [1 + sum(chances[:n]) for n in range(8)]
        brute = max(range(8), key=lambda n: gains[n] / (1 + slope * (n + 1)))
        sizes.append(best_size(chances, Line(slope)))
        assert sizes[-1] == brute
    assert len(set(sizes)) >= 4
    assert (sizes[0], sizes[-1]) == (7, 0)
    cost = Line(0.1)
    best_size(chances, cost, 500, 4)
    assert {a[1:] for a in cost.asked} == {(500, 4)}
    assert {a[0] for a in cost.asked} == {4 * (n + 1) for n in range(8)}


# --- token recycling


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(1, 4), st.integers(0, 3))
def test_learning_a_text_puts_the_latest_followers_first(text, k, before) -> None:
    table = Adjacency(6, k)
    table.rows[:, :before] = np.arange(1, 7)[:, None] if before == 1 else 0
    old = table.rows.copy()
    table.learn(text)
    for token in range(6):
        want = [text[i + 1] for i in range(len(text) - 2, -1, -1) if text[i] == token]
        want = list(dict.fromkeys([*want, *(int(x) - 1 for x in old[token] if x)]))[:k]
        assert table.rows[token].tolist() == [x + 1 for x in want] + [0] * (k - len(want))
    again = table.rows.copy()
    table.learn(text)
    assert (table.rows == again).all()
    assert table.rank(text[-2], text[-1]) == 0
    assert Adjacency(6, k).rank(0, 1) == k


def recycler(rows: dict[int, list[int]], vocab: int = 30, **options) -> TokenRecycling:
    drafter = TokenRecycling(vocab, **options)
    for token, row in rows.items():
        drafter.table.put(np.array([token]), np.array([row]))
    return drafter


def test_the_tree_is_read_off_the_table() -> None:
    drafter = recycler({1: [2, 3, 4], 2: [5, 6], 3: [7], 5: [1], 6: [9]}, nodes=80)
    view = view_of([0, 1])
    view.prompt_len = 0
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    tree.validate(30)
    got = set(paths_of(tree))
    assert {(2,), (3,), (4,), (2, 5), (2, 6), (3, 7), (2, 5, 1), (2, 6, 9), (2, 5, 1, 2)} <= got
    assert (4, 0) not in got
    table = {1: [2, 3, 4], 2: [5, 6], 3: [7], 5: [1], 6: [9]}
    want = set()
    for ranks in PAPER:
        token, path = 1, []
        for r in ranks:
            row = table.get(token, [])
            if r >= len(row):
                break
            token = row[r]
            path.append(token)
        else:
            want.add(tuple(path))
    assert got == want
    for node in range(len(tree)):
        kids = [tree.tokens[c] for c in tree.children(node)]
        assert len(set(kids)) == len(kids)


def test_recycling_budgets() -> None:
    r = random.Random(0)
    drafter = recycler({t: r.sample(range(30), 8) for t in range(30)}, nodes=80)
    view = view_of([0, 1], 0)
    state = drafter.begin(view)
    for nodes, depth, width in itertools.product((0, 1, 5, 20, 999), (0, 1, 3, 99), (1, 2, 99)):
        (tree,) = drafter.propose([state], [view], [Budget(nodes, depth, width)])
        tree.validate(30)
        assert tree.drafted <= nodes
        assert max(tree.level(n) for n in range(len(tree))) <= depth
        assert max(len(tree.children(n)) for n in range(len(tree))) <= width
        assert tree.drafted > 0 or not nodes or not depth
        assert tree.is_chain or width > 1
    (tree,) = drafter.propose([state], [view], [FULL])
    assert tree.drafted == 80
    stop = Budget(99, 9, 9, lambda scores: len(scores) >= 2)
    (tree,) = drafter.propose([state], [view], [stop])
    assert max(tree.level(n) for n in range(len(tree))) == 2


def decode(draft, prompt, target=None, **params) -> tuple[LLM, list]:
    target = target or TableModel()
    llm = LLM(target, draft=draft, context=BuildContext(target))
    llm.context.cost = None
    outs = [llm.generate([prompt], SamplingParams(**params))[0] for _ in range(2)]
    return llm, outs


@pytest.mark.parametrize("update", ["all", "path"])
def test_rows_are_the_targets_own_candidates(update) -> None:
    """With a first-order target every row written is a top-k of a whole distribution."""
    target = TableModel(vocab=12, order=1)
    drafter = TokenRecycling(12, nodes=10, k=4, update=update)
    llm = LLM(target, draft=drafter)
    out = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=40))[0]
    for token in out.token_ids[:-1]:
        want = target.logits([token]).topk(4).indices + 1
        assert drafter.table.rows[token].tolist() == want.tolist()
    written = {t for t in range(12) if (drafter.table.rows[t, 1:] > 0).any()}
    visited = {3, *out.token_ids[:-1]}
    assert written == visited if update == "path" else written > visited


def test_of_two_nodes_with_one_token_the_accepted_one_is_remembered() -> None:
    """A second-order target: the row after a token depends on where it stands."""
    target = TableModel(vocab=6, order=3, seed=2)
    drafter = TokenRecycling(6, nodes=20, k=3)
    llm = LLM(target, draft=drafter)
    text = [1, 2, 3]
    for _ in range(30):
        out = llm.generate([text], SamplingParams(max_tokens=1))[0]
        want = target.logits(text).topk(3).indices + 1
        assert drafter.table.rows[text[-1]].tolist() == want.tolist()
        text += out.token_ids


def test_recycling_holds_one_row_of_ids_a_token() -> None:
    drafter = TokenRecycling(32_000)
    assert drafter.state_bytes() == 32_000 * 8 * 4 < 2e6


def test_a_tree_is_sized_by_what_rows_cost() -> None:
    r = random.Random(0)
    for slope, low, high in ((0.0, 80, 80), (0.02, 8, 60), (100.0, 0, 1)):
        drafter = TokenRecycling(30, cost=Line(slope))
        for t in range(30):
            drafter.table.put(np.array([t]), np.array([r.sample(range(30), 8)]))
        view = view_of([0, 1], 0)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
        assert low <= tree.drafted <= high
        (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(3, 9)])
        assert tree.drafted <= 3
    unknown = recycler({t: r.sample(range(30), 8) for t in range(30)})
    (tree,) = unknown.propose([unknown.begin(view)], [view], [FULL])
    assert tree.drafted == 80


def test_sizes_follow_what_has_come_true() -> None:
    drafter = TokenRecycling(30, cost=Line(0.02))
    view = view_of([0, 1], 0)
    sizes = []
    for rank in (0, 99):
        for _ in range(3000):
            drafter.table.stats.saw(rank)
        drafter.steps += 1000
        sizes.append(drafter._shape(drafter.table, view, FULL, 1))
    assert sizes[0].level.max() == 8 > sizes[1].level.max() if len(sizes[1]) else True
    assert len(sizes[1]) < len(sizes[0])


def test_rejection_keeps_its_size_whatever_others_do() -> None:
    drafter = TokenRecycling(30, cost=Line(0.02))
    view = view_of([0, 1, 2, 0, 1], draw=Draw.SAMPLE)

    def tree():
        return drafter.propose([drafter.begin(view)], [view], [FULL])[0]

    first = tree()
    for _ in range(3000):
        drafter.table.stats.saw(99)
    drafter.table.learn([1, 9, 1, 8, 1, 7])
    drafter.cost.slope = 5.0
    drafter.steps += 1000
    assert paths_of(tree()) == paths_of(first)
    assert first.drafted > 0


def test_recycling_beats_plain_steps_on_repetitive_prompts() -> None:
    target = TableModel(vocab=40, order=2, sharpness=3)
    text = LLM(target).generate([[1, 2]], SamplingParams(max_tokens=60, ignore_eos=True))[0]
    prompt = [1, 2, *text.token_ids]
    for spec in ("token-recycling:nodes=80", "token-recycling:nodes=16"):
        _, outs = decode(spec, prompt, target, max_tokens=50)
        assert outs[1].stats.acceptance_length > 1.5


# --- aggressive


class Script(TableModel):
    """A target whose text is fixed: after `prompt`, `answer`."""

    def __init__(self, prompt: list[int], answer: list[int], vocab: int) -> None:
        super().__init__(vocab, max_positions=4096)
        self.text = [*prompt, *answer]

    def logits(self, prefix) -> torch.Tensor:
        row = torch.zeros(self.spec.vocab)
        if len(prefix) < len(self.text) and list(prefix) == self.text[: len(prefix)]:
            row[self.text[len(prefix)]] = 20.0
        return row


def edited(source: list[int], r: random.Random, vocab: int, every: int) -> list[int]:
    """`source` with a substitution, insertion or deletion about every `every` tokens."""
    out = []
    for t in source:
        kind = r.random() * every
        if kind < 0.4:
            out.append(r.randrange(vocab))
        elif kind < 0.7:
            out += [r.randrange(vocab), t]
        elif kind < 1.0:
            continue
        else:
            out.append(t)
    return out


@pytest.mark.parametrize("every", [10, 20])
def test_edits_accept_three_tokens_a_call(every) -> None:
    """Text with a natural share of repeated tokens (Zipf), one edit in `every` tokens."""
    r = random.Random(every)
    weights = [1 / (i + 2) for i in range(300)]
    source = r.choices(range(300), weights, k=240)
    answer = edited(source, r, 300, every)
    prompt = [298, *source, 299]
    target = Script(prompt, answer, 300)
    outs = {}
    for spec in ("aggressive", "aggressive:start=1,window=0", "prompt-lookup"):
        llm = LLM(target, draft=spec, kv_rows=4096)
        out = llm.generate([prompt], SamplingParams(max_tokens=len(answer)))[0]
        assert out.token_ids == answer
        outs[spec] = out.stats
    mine = outs["aggressive"]
    assert mine.accepted / mine.steps >= 3
    assert mine.acceptance_length > outs["prompt-lookup"].acceptance_length


def test_alignment_needs_a_unique_suffix() -> None:
    #         0  1  2  3  4  5  6  7  8
    source = [5, 1, 2, 6, 1, 2, 7, 1, 3]
    paper = Alignment(source, 3, 0, 1)
    assert paper.align([6]) == 4, "one token that occurs once is enough"
    assert paper.align([1]) == -1
    assert paper.align([1, 2]) == -1
    assert paper.align([6, 1, 2]) == 6
    assert paper.align([1, 3]) == 9
    assert paper.align([0]) == -1
    assert paper.align([6, 0]) == -1
    careful = Alignment(source, 3, 4, 2)
    careful.last = 6  # the source was left before the 7
    assert careful.align([0, 1]) == 8, "the only 1 within the window ahead"
    assert careful.align([0, 6]) == -1, "behind: one token is too little"
    assert careful.align([2, 6]) == 4
    assert Alignment(source, 2, 0, 1).align([6, 1, 2]) == -1, "grams end at max_gram"


def test_copying_goes_on_where_the_output_joins_again() -> None:
    source = list(range(10, 40))
    drafter = Aggressive(tokens=8, window=8)
    view = view_of(source)
    state = drafter.begin(view)

    def draft() -> list[int]:
        view.cached = len(view.tokens) - 1
        return drafted(drafter.propose([state], [view], [FULL])[0])

    assert draft() == []
    view.tokens += [10]
    assert draft() == [11, 12, 13, 14]
    view.tokens += [11, 12, 13]
    assert draft() == [14, 15, 16, 17, 18, 19], "drafts grow with what was copied"
    view.tokens += [14, 99]
    assert draft() == [16, 17, 18, 19], "after a run: a token may have been replaced"
    view.tokens += [98]
    assert draft() == [], "no run, no guess"
    view.tokens += [16]
    assert draft() == [17, 18, 19, 20], "joined again"
    view.tokens += [17, 18, 20]
    assert draft() == [21, 22, 23, 24], "a deletion"
    view.tokens += [21, 35]
    assert draft() == [], "far ahead: one token is too little"
    view.tokens += [36]
    assert draft() == [37, 38, 39]
    view.tokens += [37, 38, 39]
    assert draft() == []
    for nodes, depth in ((2, 9), (9, 1), (0, 9)):
        view.tokens += [20, 21]
        view.cached = len(view.tokens) - 1
        (tree,) = drafter.propose([state], [view], [Budget(nodes, depth)])
        assert tree.drafted == min(nodes, depth)


# --- aded


def successors_of(rows: dict[tuple[int, int], dict[int, float]], width: int = 12):
    table = TriGrams()
    for (a, b), row in rows.items():
        for c, w in row.items():
            table.add([a, b, c], w)
    return mixed([table], width)


def test_trigrams_count() -> None:
    table = TriGrams()
    table.add([1, 2, 3, 1, 2, 3, 1, 2, 4])
    assert table.row(1, 2) == {3: 2.0, 4: 1.0}
    assert table.row(3, 1) == {2: 2.0}
    assert table.row(9, 9) == {}
    table.add([1, 2, 3], 0.5, cap=2.2)
    assert table.row(1, 2)[3] == 2.2
    both = mixed([table, table], 1)
    assert both(1, 2) == [(3, 1.0)]
    assert mixed([table], 5)(1, 2) == [(3, pytest.approx(2.2 / 3.2)), (4, pytest.approx(1 / 3.2))]
    assert mixed([table], 5)(8, 8) == []


def test_a_small_table_is_drafted_whole() -> None:
    successors = successors_of({(1, 2): {3: 2, 4: 1}, (2, 3): {5: 1}})
    draft = monte_carlo(successors, (1, 2), 4, 10, 1)
    assert draft == [
        (3, -1, 1, pytest.approx(2 / 3)),
        (4, -1, 1, pytest.approx(1 / 3)),
        (5, 0, 2, 1.0),
    ]


def test_the_search_finds_the_likely_nodes_of_a_large_table() -> None:
    """Every pair has eight successors with falling chances: the most visited nodes are close to
    the likeliest ones, and more iterations come closer."""
    r = random.Random(0)
    p = [0.5, 0.2, 0.1, 0.07, 0.05, 0.04, 0.02, 0.02]
    rows = {
        (a, b): dict(zip(r.sample(range(8), 8), p, strict=True)) for a in range(8) for b in range(8)
    }
    successors = successors_of(rows)

    def mass(draft) -> float:
        chances: list[float] = []
        for _, parent, _, c in draft:
            chances.append(c * (chances[parent] if parent >= 0 else 1))
        return sum(chances)

    best = sum(c for c, _ in best_paths(p, 12, 4))
    few, many = (
        np.mean([mass(monte_carlo(successors, (a, 3), 4, 12, n)) for a in range(8)])
        for n in (12, 400)
    )
    assert few < many
    assert many > 0.8 * best
    for n in (1, 12, 100):
        draft = monte_carlo(successors, (1, 1), 3, 12, n)
        assert len(draft) <= 12
        assert all(parent < i for i, (_, parent, _, _) in enumerate(draft))
        assert draft == monte_carlo(successors, (1, 1), 3, 12, n)
        assert max(level for _, _, level, _ in draft) <= 3
        kids = Counter((parent, token) for token, parent, _, _ in draft)
        assert max(kids.values()) == 1


def test_visits_follow_reward_not_only_chance() -> None:
    """Of two equally likely successors the one with known continuations gets the depth."""
    rows = {(0, 0): dict.fromkeys(range(1, 7), 1.0)}
    rows |= {(0, 3): {7: 1.0}, (3, 7): {8: 1.0}, (7, 8): {9: 1.0}}
    draft = monte_carlo(successors_of(rows), (0, 0), 4, 8, 300)
    tokens = [t for t, *_ in draft]
    assert {7, 8} <= set(tokens)


def test_aded_drafts_from_text_past_and_corpus(tmp_path) -> None:
    view = view_of([1, 2, 3, 1, 2])
    drafter = Aded(depth=2)
    state = drafter.begin(view)
    (tree,) = drafter.propose([state], [view], [FULL])
    assert paths_of(tree) == [(3,), (3, 1)]
    view.tokens += [9, 8, 7]
    drafter.end(state)
    view = view_of([5, 9, 8])
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert paths_of(tree) == [(7,)], "an output of the past"
    view = view_of([5, 9, 8], draw=Draw.SAMPLE)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert paths_of(tree) == [], "rejection keeps to itself"
    warm = Aded(corpus=[5, 6, 7, 8])
    view = view_of([5, 6], draw=Draw.SAMPLE)
    (tree,) = warm.propose([warm.begin(view)], [view], [FULL])
    assert paths_of(tree) == [(7,), (7, 8)], "a corpus never changes: all may read it"
    with pytest.raises(InputError, match="cannot be read"):
        registry.create(
            "drafter",
            f"aded:corpus={tmp_path}/none",
            BuildContext(TableModel(), object()),
        )
    with pytest.raises(InputError, match="tokenizer"):
        registry.create("drafter", "aded:corpus=x", BuildContext(TableModel()))


def test_aded_budgets() -> None:
    r = random.Random(1)
    view = view_of([r.randrange(3) for _ in range(300)])
    drafter = Aded(nodes=20, depth=5)
    state = drafter.begin(view)
    keeps_to_budgets(drafter, state, view, 3)


def test_aded_accepts_more_than_one_token_a_call_on_repetitive_text() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2, 7, 8] * 8
    target = Script(text[:20], text[20:], 12)
    out = LLM(target, draft="aded").generate([text[:20]], SamplingParams(max_tokens=60))[0]
    assert out.stats.accepted / out.stats.steps > 1
    assert out.token_ids == text[20:80]


# --- stand


def filled(vocab: int, rows: dict[tuple[int, ...], dict[int, float]], **options) -> Stand:
    drafter = Stand(vocab, **options)
    put_rows(drafter.tables.grams, rows)
    return drafter


def put_rows(grams: LogitNgrams, rows: dict[tuple[int, ...], dict[int, float]]) -> None:
    for gram, row in rows.items():
        low = grams.min_n
        grams.min_n = len(gram)  # only the n-gram itself
        best = sorted(row.items(), key=lambda tp: -tp[1])
        grams.put(gram, np.array([t for t, _ in best]), np.array([p for _, p in best]))
        grams.min_n = low


def test_the_longest_known_ngram_counts() -> None:
    grams = LogitNgrams(100, 4, 1, 3, 1 << 16)
    put_rows(grams, {(3,): {1: 1.0}, (2, 3): {2: 1.0}, (1, 2, 3): {3: 1.0}})
    for context, want in (([1, 2, 3], 3), ([9, 2, 3], 2), ([9, 9, 3], 1), ([3], 1)):
        assert grams.ids[grams.find(context), 0] == want
    assert grams.find([9]) == -1
    assert grams.find([]) == -1
    assert grams.key([0, 0]) != grams.key([0]), "zeros count"


def test_distributions_are_averaged_over_visits() -> None:
    grams = LogitNgrams(100, 3, 1, 1, 1 << 16)
    for probs in ({1: 0.6, 2: 0.3, 3: 0.1}, {2: 0.8, 4: 0.2}, {5: 0.9, 1: 0.1}):
        put_rows(grams, {(7,): probs})
    slot = grams.find([7])
    got = dict(zip(grams.ids[slot].tolist(), grams.probs[slot].tolist(), strict=True))
    want = {2: (0.3 + 0.8) / 3, 5: 0.3, 1: 0.7 / 3}
    assert got == pytest.approx(want, abs=1e-6)


def test_a_text_stands_in_until_the_target_was_there() -> None:
    grams = LogitNgrams(100, 3, 1, 2, 1 << 16)
    put_rows(grams, {(1,): {8: 1.0}})
    grams.learn([1, 2, 1, 2, 1, 3])
    assert grams.ids[grams.find([9, 1]), 0] == 8, "what the target said stays"
    slot = grams.find([2, 1])
    assert grams.ids[slot, :2].tolist() == [2, 3]
    assert grams.probs[slot].tolist() == pytest.approx([0.5, 0.5, 0])
    put_rows(grams, {(2, 1): {6: 1.0}})
    assert grams.probs[grams.find([2, 1])].tolist() == [1, 0, 0], "not averaged with the text"


def test_stand_drafts_the_likeliest_tokens_greedily() -> None:
    rows = {(1,): {2: 0.6, 3: 0.3}, (2,): {4: 0.9, 5: 0.1}, (3,): {6: 1.0}}
    drafter = filled(10, rows, nodes=6, depth=3)
    view = view_of([0, 1], 0)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    tree.validate(10)
    assert tree.q is None
    assert {(2,), (3,), (2, 4)} <= set(paths_of(tree))
    assert tree.children(tree.tip) == [1, 2]
    assert tree.tokens[1] == 2
    assert tree.score[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_replay_draws_race_with_the_targets_noise(temperature) -> None:
    rows = {(t,): {u: (u + 1) / 36 for u in range(8)} for t in range(8)}
    drafter = filled(8, rows, nodes=5, depth=5)
    for seed in range(20):
        view = view_of([0, 1], 0, Draw.NOISE, seed, temperature)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(5, 5, 1)])
        want = []
        for level in range(5):
            q = torch.arange(1, 9).float() ** (1 / temperature)
            noise = view.rng.race([2 + level], Purpose.TARGET, 8)[0]
            want.append(int((q / noise).argmax()))
        assert drafted(tree) == want


def test_samples_come_with_their_rows_without_replacement() -> None:
    r = random.Random(0)
    rows = {(t,): {u: r.random() for u in r.sample(range(9), 4)} for t in range(9)}
    for row in rows.values():
        total = sum(row.values()) * 1.25  # the table holds the top of a distribution
        for u in row:
            row[u] /= total
    drafter = filled(9, rows, nodes=12, depth=3, k=4)
    for seed in range(20):
        view = view_of([0, 1], 0, Draw.SAMPLE, seed, 0.7)
        state = drafter.begin(view)
        state.tables = drafter.tables
        (tree,) = drafter.propose([state], [view], [FULL])
        tree.validate(9)
        for node in [tree.tip, *range(tree.n_context, len(tree))]:
            kids = tree.children(node)
            if not kids:
                continue
            (row,) = {int(tree.qrow[c]) for c in kids}
            want = torch.zeros(9)
            for u, p in rows[(int(tree.tokens[node]),)].items():
                want[u] = p ** (1 / 0.7)
            torch.testing.assert_close(tree.q[row], want / want.sum())
            drawn = tree.tokens[kids].tolist()
            assert len(set(drawn)) == len(drawn)
            assert all(tree.q[row][t] > 0 for t in drawn)


def test_draws_have_the_law_of_q() -> None:
    """First and second of two draws without replacement, over many seeds."""
    p = {0: 0.5, 3: 0.3, 4: 0.2}
    drafter = filled(6, {(1,): p}, nodes=2, depth=1)
    counts: Counter = Counter()
    state = drafter.begin(view_of([0, 1], 0, Draw.SAMPLE))
    state.tables = drafter.tables
    for seed in range(4000):
        view = view_of([0, 1], 0, Draw.SAMPLE, seed)
        (tree,) = drafter.propose([state], [view], [FULL])
        counts[tuple(drafted(tree))] += 1
    law = {(a, b): p[a] * p[b] / (1 - p[a]) for a in p for b in p if a != b}
    assert set(counts) == set(law)
    observed = [counts[k] for k in law]
    assert stats.chisquare(observed, [4000 * w for w in law.values()]).pvalue > 1e-3


def test_stand_budgets_and_stops() -> None:
    rows = {(t,): {u: (u + 1) / 36 for u in range(8)} for t in range(8)}
    drafter = filled(8, rows, nodes=20)
    for draw in (Draw.TOP, Draw.NOISE, Draw.SAMPLE):
        view = view_of([0, 1], 0, draw)
        state = drafter.begin(view)
        state.tables = drafter.tables
        keeps_to_budgets(drafter, state, view, 8)


def test_the_tree_of_stand_follows_the_data() -> None:
    deep, wide = Stand(8, nodes=8), Stand(8, nodes=8)
    for _ in range(2000):
        deep.tables.stats.saw(0)
        wide.tables.stats.saw(random.Random(_).randrange(8))
    shapes = [d._shape(d.tables, FULL) for d in (deep, wide)]
    assert shapes[0].level.max() == 8
    assert shapes[1].level.max() <= 2


def test_stand_remembers_what_the_target_thought() -> None:
    target = TableModel(vocab=7, order=1)
    drafter = Stand(7, k=3, max_ngram=1)
    llm = LLM(target, draft=drafter)
    text = [1, 2]
    for _ in range(8):
        text += llm.generate([text], SamplingParams(max_tokens=1))[0].token_ids
    for token in text[1:-1]:
        slot = drafter.tables.grams.find([token])
        probs = target.logits([token]).softmax(-1).topk(3)
        assert drafter.tables.grams.ids[slot].tolist() == probs.indices.tolist()
        assert drafter.tables.grams.probs[slot].tolist() == pytest.approx(probs.values.tolist())


def long_trace(temperature: float) -> tuple[TableModel, dict[str, float]]:
    """A trace that revisits its contexts, sampled."""
    target = TableModel(vocab=24, order=2, sharpness=2.5, max_positions=2000)
    result = {}
    for spec in ("stand:nodes=8", "stand:nodes=8,onehot=true", "suffix", "prompt-lookup:tokens=8"):
        accepted = steps = 0
        for verify in ("auto", "rejection"):
            llm = LLM(target, draft=spec, verify=verify)
            params = SamplingParams(max_tokens=400, temperature=temperature, seed=3)
            s = llm.generate([[1, 2, 3]], params)[0].stats
            accepted, steps = accepted + s.accepted, steps + s.steps
        result[spec] = accepted / steps
    return target, result


def test_stochastic_ngrams_accept_more_than_deterministic_lookup() -> None:
    _, result = long_trace(0.9)
    assert result["stand:nodes=8"] > 1.2 * result["prompt-lookup:tokens=8"]
    assert result["stand:nodes=8"] > 1.2 * result["suffix"]


@pytest.mark.stat
def test_stand_has_the_targets_law_even_with_a_shared_table() -> None:
    """1500 requests that all learn from each other, under rejection: three tokens each."""
    target = TableModel(vocab=4, order=2, seed=1, sharpness=1.0)
    drafter = Stand(4, nodes=6, share="always")
    llm = LLM(target, draft=drafter, verify="rejection", max_batch=50)
    prompt, counts = [0, 1, 2, 3, 0, 1], Counter()
    for seed in range(3):
        params = SamplingParams(max_tokens=3, temperature=1.0, seed=seed, n=500)
        out = llm.generate([prompt], params)[0]
        counts.update(tuple(s.token_ids) for s in out.samples)
        assert out.stats.accepted > 0
    law = {}
    for text in itertools.product(range(4), repeat=3):
        law[text] = float(
            np.prod([target.next_probs([*prompt, *text[:i]])[text[i]] for i in range(3)])
        )
    observed, wanted = zip(*((counts[t], 1500 * w) for t, w in law.items()), strict=True)
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


# --- what all of them promise


def simulate(drafter, requests: int, vocab: int, limit: int) -> None:
    """Requests whose texts are all different, with the feedback of a real step now and then."""
    r = random.Random(0)
    target = TableModel(vocab=vocab, order=1)
    llm = LLM(target, draft=drafter)
    for i in range(requests):
        text = [r.randrange(vocab) for _ in range(r.randint(2, 8))]
        if i % 500 == 0:
            llm.generate([text], SamplingParams(max_tokens=6))
        else:
            view = view_of(text, len(text) // 2)
            state = drafter.begin(view)
            drafter.propose([state], [view], [Budget(4, 2)])
            drafter.end(state)
        assert drafter.state_bytes() <= limit, i


def test_shared_state_stays_within_its_bytes_over_10_000_requests() -> None:
    limit = 1 << 16
    recycling = TokenRecycling(40, nodes=4, k=4)
    simulate(recycling, 10_000, 40, 40 * 4 * 4)
    aded = Aded(bytes=limit, nodes=4, iterations=2, depth=2)
    simulate(aded, 10_000, 40, limit)
    assert aded.state_bytes() > limit / 2
    stand = Stand(40, nodes=4, depth=2, k=4, bytes=limit)
    simulate(stand, 10_000, 40, limit)
    assert stand.state_bytes() > limit / 2
    assert len(stand.tables.grams.places) == stand.tables.grams.slots


def test_an_evicted_ngram_leaves_nothing_behind() -> None:
    grams = LogitNgrams(1000, 2, 1, 1, 3 * (160 + 16))
    assert grams.slots == 3
    for t in range(5):
        put_rows(grams, {(t,): {t + 100: 1.0}})
        put_rows(grams, {(0,): {100: 1.0}})  # always fresh
    assert [t for t in range(5) if grams.find([t]) >= 0] == [0, 3, 4]
    for t in (0, 3, 4):
        slot = grams.find([t])
        assert grams.ids[slot, 0] == t + 100
        assert grams.probs[slot].tolist() == [1, 0]


@pytest.mark.parametrize(
    "spec", ["token-recycling:nodes=20", "aded", "stand", "suffix", "aggressive"]
)
def test_what_others_said_changes_no_output(spec) -> None:
    """Greedy, replayed, and a seed under rejection: the same in a fresh engine and in one that has
    served others."""
    target = TableModel(vocab=20, order=2)
    prompt = [3, 4, 5, 3, 4]
    for verify, temperature in (("auto", 0.0), ("auto", 0.8), ("rejection", 0.8)):
        params = SamplingParams(max_tokens=30, temperature=temperature, seed=5)
        served = LLM(target, draft=spec, verify=verify)
        served.context.cost = None
        for other in range(6):
            many = SamplingParams(max_tokens=20, temperature=1.0, seed=other)
            served.generate([[other, 4, 5], [3, 4, other]], many)
        fresh = LLM(target, draft=spec, verify=verify)
        a, b = (llm.generate([prompt], params)[0].token_ids for llm in (fresh, served))
        assert a == b


@pytest.mark.parametrize(
    "spec",
    [
        "token-recycling:k=0",
        "token-recycling:update=some",
        "token-recycling:share=maybe",
        "aggressive:tokens=0",
        "aggressive:start=4",
        "aded:depth=0",
        "aded:bytes=5",
        "stand:min_ngram=4",
        "stand:bytes=1",
        "stand:nodes=0",
        "stand:share=no",
    ],
)
def test_bad_options_are_refused(spec) -> None:
    with pytest.raises(InputError, match=spec.split(":")[0]):
        registry.create("drafter", spec, BuildContext(TableModel()))
