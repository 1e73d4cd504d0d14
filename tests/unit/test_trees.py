"""Token trees: planning, growing, learning - against brute force."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from foretell import LLM, InputError, SamplingParams
from foretell.core import registry
from foretell.core.costs import GivenCosts
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, BuildContext, Caps, Draw, SeqView
from foretell.core.rng import SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.draft_model import DraftModel
from foretell.drafters.trees.acceptance import Acceptance, hazards
from foretell.drafters.trees.calibration import Calibration
from foretell.drafters.trees.draw import independent
from foretell.drafters.trees.drive import grow_level_by_level
from foretell.drafters.trees.optimal import Optimal
from foretell.drafters.trees.plan import Path, Plan
from foretell.drafters.trees.static import closed, fit, read_paths
from helpers_drafts import beams, table
from helpers_exact import outcomes
from helpers_model import TableModel, pair

WIDE = Budget(1000, 1000)
SHAPES = [
    "tree=chain,depth=2",
    "tree=k-ary,branching=2,tokens=2",
    "tree=static,paths=0/1/0.0/0.1/1.0/2/0.0.0",
    "tree=sequoia,nodes=6",
    "tree=optimal,nodes=6,target=10/10/10/12,draft=0.5",
    "tree=dyspec,nodes=6",
    "tree=dyspec,nodes=6,form=threshold,depth=3",
    "tree=eagle2,nodes=6,width=2,depth=3",
    "tree=rsd-c,widths=2/2/1",
    "tree=rsd-s,width=2,depth=3",
    "tree=specinfer,widths=1/3/1",
]
HOWS = [Draw.TOP, Draw.NOISE, Draw.SAMPLE, Draw.IID, Draw.TOP_ONE, Draw.PATHS]


def view_of(tokens: Sequence[int], draw: Draw = Draw.TOP, seed: int = 1) -> SeqView:
    params = SamplingParams(temperature=0.0 if draw is Draw.TOP else 1.0)
    return SeqView(list(tokens), 1, params, SeqRng(seed), draw, len(tokens) - 1)


def drafter(spec: str, model: TableModel | None = None, **options: Any) -> DraftModel:
    """`draft-model` with a tree; spec as in tests/contract/methods.py."""
    model = model or TableModel(seed=4)
    context = BuildContext(model, None, lambda path: model, "toy", **options)
    return registry.create("drafter", f"draft-model:{spec}", context)


def draft(spec: str, text: Sequence[int], how: Draw = Draw.TOP, budget=WIDE, seed=1) -> TokenTree:
    made = drafter(spec)
    view = view_of(text, how, seed)
    (tree,) = made.propose([made.begin(view)], [view], [budget])
    return tree


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.path_tokens(n)) for n in range(tree.n_context, len(tree))]


# ---- planning


def expected(rates: np.ndarray, tree: set[Path]) -> float:
    """Tokens that a tree of rank paths emits, the bonus included."""
    return 1 + sum(math.prod(rates[d, r] for d, r in enumerate(p)) for p in tree)


def all_trees(nodes: int, depth: int, ranks: int) -> set[frozenset[Path]]:
    """Every tree of so many nodes that leaves out no parent and no elder sibling."""
    found = {frozenset()}
    for _ in range(nodes):
        bigger = set()
        for tree in found:
            for above in [(), *tree]:
                r = sum(len(p) == len(above) + 1 and p[:-1] == above for p in tree)
                if len(above) < depth and r < ranks:
                    bigger.add(tree | {(*above, r)})
        found = bigger
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_dynamic_programme_finds_the_best_tree_of_every_size(seed: int) -> None:
    r = np.random.default_rng(seed)
    rates = r.dirichlet([2, 1, 1, 1], size=3)[:, :3]  # [D, R], not sorted: gaps must not pay
    plan = Plan(rates, 6)
    for nodes in range(1, 7):
        best = max(expected(rates, set(t)) for t in all_trees(nodes, 3, 3))
        mine = plan.tree(nodes)
        assert len(mine) <= nodes
        assert closed(mine) == mine
        assert expected(rates, set(mine)) == pytest.approx(best)
        assert plan.tokens[nodes] == pytest.approx(best)
    assert plan.tokens[0] == 1
    assert (np.diff(plan.tokens) >= 0).all()


def test_more_nodes_than_a_tree_can_hold_do_no_harm() -> None:
    plan = Plan(np.full((2, 2), 0.4), 20)
    assert len(plan.tree(20)) == 6
    assert plan.tokens[20] == pytest.approx(plan.tokens[6])


def verdict_of(tree: TokenTree, path: Sequence[int]) -> Verdict:
    last = path[-1] if path else tree.tip
    return Verdict(list(path), [0] * (len(path) + 1), len(path) + bool(tree.children(last)))


def test_acceptance_is_learned_from_verdicts() -> None:
    """A simulated target that accepts child r of level d with known probabilities."""
    rates = np.array([[0.5, 0.3, 0.1], [0.7, 0.1, 0.05]])
    tree = TokenTree.build([0], [1, 2, 3, 1, 2, 1, 2], [-1, -1, -1, 0, 0, 1, 1])
    learned = Acceptance(hazards([0.3, 0.3, 0.3]), 2)
    r = random.Random(0)
    for _ in range(1500):
        path: list[int] = []
        node = tree.tip
        for level in range(2):
            children, x = tree.children(node), r.random()
            for child, p in zip(children, rates[level], strict=False):
                x -= p
                if x < 0:
                    path.append(child)
                    node = child
                    break
            if len(path) <= level:
                break
        learned.observe(tree, verdict_of(tree, path))
    got = learned.rates()
    assert np.abs(got[0] - rates[0]).max() < 0.1
    assert np.abs(got[1, :2] - rates[1, :2]).max() < 0.1
    assert learned.tried[1, 2] == 0
    assert got[1, 2] > 0, "a rank that was never tried keeps a guess"
    assert got.sum(1).max() <= 1


def test_given_rates_come_back_as_they_were_given() -> None:
    given = [0.6, 0.2, 0.1]
    assert Acceptance(hazards(given), 2).rates()[1] == pytest.approx(given)
    assert hazards([1.0, 0.0]) == [1.0, 0.0]


def test_calibration_learns_what_q_does_not_say() -> None:
    tree = TokenTree.build([0], [1, 2], [-1, -1])
    for sampled in (False, True):
        c = Calibration(sampled)
        before = c.chance(0, 0.9)
        for i in range(300):  # confident, and wrong nine times of ten; the second is always right
            c.observe(tree, verdict_of(tree, [1] if i % 10 == 0 else [2]), [0.9, 0.5])
        assert c.chance(0, 0.9) < 0.25 < before
        assert c.chance(1, 0.5) > 0.9
        assert c.mean(1) > 0.9 > 0.3 > c.mean(0)


# ---- growing


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("spec", SHAPES)
def test_every_shape_keeps_to_its_budget(spec: str, how: Draw) -> None:
    made = drafter(spec)
    if how not in (Draw.TOP, Draw.NOISE, Draw.SAMPLE, *made.draws):
        pytest.skip("it does not draw that way")
    for nodes, depth, branching in itertools.product((0, 1, 3, 50), (0, 1, 2, 50), (1, 2, 50)):
        view = view_of([1, 2, 3], how)
        (tree,) = made.propose([made.begin(view)], [view], [Budget(nodes, depth, branching)])
        tree.validate(11)
        assert tree.drafted <= nodes
        assert max(tree.level(n) for n in range(len(tree))) <= min(depth, made.tokens)
        assert max(len(tree.children(n)) for n in range(len(tree))) <= branching
        assert tree.drafted > 0 or not nodes or not depth
        assert branching > 1 or tree.is_chain


@pytest.mark.parametrize("how", [Draw.TOP, Draw.NOISE, Draw.SAMPLE, Draw.IID])
@pytest.mark.parametrize("spec", SHAPES)
def test_rows_and_siblings_are_what_the_rule_expects(spec: str, how: Draw) -> None:
    made = drafter(spec)
    if how not in (Draw.TOP, Draw.NOISE, Draw.SAMPLE, *made.draws):
        pytest.skip("it does not draw that way")
    independent = how is Draw.IID or (how is Draw.SAMPLE and "specinfer" in spec)
    for seed in range(5):
        text = [seed, 1, 2]
        view = view_of(text, how, seed)
        (tree,) = made.propose([made.begin(view)], [view], [WIDE])
        if not how.from_q or "eagle2" in spec:
            assert tree.q is None
            assert len(set(paths_of(tree))) == tree.drafted
            continue
        for node in [tree.tip, *range(tree.n_context, len(tree))]:
            children = tree.children(node)
            tokens = tree.tokens[children].tolist()
            rows = [int(tree.qrow[c]) for c in children]
            assert len(set(rows)) == (len(rows) if independent else min(1, len(rows)))
            want = made.model.logits([*text, *tree.path_tokens(node)]).softmax(-1)
            for row in rows:
                torch.testing.assert_close(tree.q[row], want)
            repeats = [t in tokens[:i] for i, t in enumerate(tokens)]
            assert independent or not any(repeats)
            for child, repeat in zip(children, repeats, strict=True):
                assert (tree.kind[child] == Kind.DEAD) == repeat
                assert not repeat or not tree.children(child)


@pytest.mark.parametrize("spec", SHAPES)
def test_a_batch_drafts_what_each_would_alone(spec: str) -> None:
    for how in (Draw.TOP, Draw.NOISE, Draw.SAMPLE):
        texts = [[i, 1, 2] for i in range(4)]
        alone = [draft(spec, t, how) for t in texts]
        made, views = drafter(spec), [view_of(t, how) for t in texts]
        together = made.propose([made.begin(v) for v in views], views, [WIDE] * 4)
        for a, b in zip(alone, together, strict=True):
            assert paths_of(a) == paths_of(b)


@pytest.mark.parametrize("spec", SHAPES)
def test_nothing_is_drafted_below_a_stop(spec: str) -> None:
    """The scores of kept tokens are what a policy sees, and the token it doubts stays."""
    seen: list[tuple[float, ...]] = []

    def stop(scores: Sequence[float]) -> bool:
        seen.append(tuple(scores))
        return scores[-1] < 0.4

    doubted = 0
    for first in range(6):
        tree = draft(spec, [first, 1, 2], Draw.TOP, Budget(1000, 1000, stop=stop))
        for node in range(tree.n_context, len(tree)):
            if tree.score[node] < 0.4:
                doubted += 1
                assert not tree.children(node)
    assert seen
    assert doubted


def most_probable(model: TableModel, text: list[int], nodes: int, depth: int) -> list[tuple]:
    """Brute force: the best paths of all."""
    found = []
    for length in range(1, depth + 1):
        for path in itertools.product(range(model.spec.vocab), repeat=length):
            mass = 1.0
            for i, x in enumerate(path):
                mass *= float(model.logits([*text, *path[:i]]).softmax(-1)[x])
            found.append((mass, path))
    return sorted(p for _, p in sorted(found, reverse=True)[:nodes])


@pytest.mark.parametrize(
    "spec",
    [
        "tree=dyspec,nodes=9,depth=3,estimate=draft",
        "tree=dyspec,nodes=9,depth=3,estimate=draft,ahead=1",
        "tree=dyspec,nodes=9,depth=3,estimate=draft,ahead=9",
        "tree=eagle2,nodes=9,depth=3,width=9",
    ],
)
def test_the_best_paths_of_all_are_found(spec: str) -> None:
    model = TableModel(vocab=9, seed=4)
    made = drafter(spec, model)
    for seed in range(4):
        text = [seed, 1, 2]
        view = view_of(text)
        (tree,) = made.propose([made.begin(view)], [view], [WIDE])
        assert sorted(paths_of(tree)) == most_probable(model, text, 9, 3)


@pytest.mark.parametrize("how", [Draw.TOP, Draw.NOISE, Draw.SAMPLE])
def test_looking_ahead_changes_only_the_number_of_forwards(how: Draw) -> None:
    forwards = []
    trees = []
    for ahead in (1, 3, 8):
        made = drafter(f"tree=dyspec,nodes=12,ahead={ahead}")
        view = view_of([3, 1, 2], how)
        trees += made.propose([made.begin(view)], [view], [WIDE])
        forwards.append(made.model.forwards)
    assert paths_of(trees[0]) == paths_of(trees[1]) == paths_of(trees[2])
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[0] > forwards[2] or not how.from_q


def test_the_threshold_form_needs_a_forward_a_level() -> None:
    made = drafter("tree=dyspec,nodes=30,depth=3,form=threshold,threshold=0.02,estimate=draft")
    view = view_of([3, 1, 2])
    (tree,) = made.propose([made.begin(view)], [view], [WIDE])
    assert made.model.forwards <= 3
    want = most_probable(made.model, [3, 1, 2], 200, 3)
    masses = {
        p: math.prod(
            float(made.model.logits([3, 1, 2, *p[:i]]).softmax(-1)[x]) for i, x in enumerate(p)
        )
        for p in want
    }
    above = sorted(p for p, m in masses.items() if m > 0.02)
    assert len(above) < 30
    assert sorted(paths_of(tree)) == above


def test_the_threshold_moves_until_drafts_fill_up() -> None:
    made = drafter("tree=dyspec,nodes=12,form=threshold")
    view = view_of([3, 1, 2])
    state = made.begin(view)
    drafted = []
    for _ in range(60):
        (tree,) = made.propose([state], [view], [WIDE])
        state.shape.observe(tree, verdict_of(tree, []))
        drafted.append(tree.drafted)
    assert max(drafted) == 12
    assert np.mean(drafted[20:]) > 9


def test_reranking_survives_ties() -> None:
    """Probabilities that round to 1 give children the value of their parents."""

    class Certain(TableModel):
        def logits(self, prefix: Sequence[int]) -> torch.Tensor:
            rows = torch.full((self.spec.vocab,), -200.0)
            rows[5] = 0.0
            if len(prefix) == 3:
                rows[2] = 0.0
            return rows

    for nodes in range(1, 12):
        made = drafter(f"tree=eagle2,nodes={nodes},width=3,depth=4", Certain())
        view = view_of([1, 2])
        (tree,) = made.propose([made.begin(view)], [view], [WIDE])
        tree.validate(11)
        assert tree.drafted == min(nodes, 7)
        assert len(tree.children(tree.tip)) == 1


def test_stochastic_beams_draw_the_trees_of_their_discrete_twin() -> None:
    """The twin's law is proved in tests/exact/test_tree_law.py."""
    q = table("q", 3)
    law = outcomes(lambda b: tuple(paths_of(beams(q, 3, 2, 2)(b, ()))))
    shape = registry.create("tree", "rsd-s:width=2,depth=2")
    counts: Counter = Counter()
    for seed in range(3000):
        view = view_of([0], Draw.SAMPLE, seed)
        grower = shape.grow(view, WIDE)

        def forward(frontiers, grower=grower):
            return torch.stack([q(tuple(grower.ids(n))).float().log() for n in frontiers[0]])

        grow_level_by_level([grower], forward)
        counts[tuple(paths_of(grower.tree()))] += 1
    assert set(counts) <= set(law)
    keys = [k for k in law if law[k] * 3000 >= 5]
    seen, want = [counts[k] for k in keys], [law[k] * 3000 for k in keys]
    scale = sum(seen) / sum(want)
    assert len(keys) > 10
    assert stats.chisquare(seen, [w * scale for w in want]).pvalue > 1e-3


def test_chains_of_a_multi_path_rule_have_one_length() -> None:
    for seed in range(10):
        tree = draft("tree=k-ary,branching=3,depth=4", [seed, 1], Draw.PATHS, Budget(11, 9), seed)
        assert len(tree.children(tree.tip)) == 3
        leaves = [n for n in range(len(tree)) if not tree.children(n)]
        alive = [n for n in leaves if tree.kind[n] != Kind.DEAD]
        assert {tree.level(n) for n in alive} == {3}, "11 nodes make three chains of three"


def test_one_draw_beside_the_most_probable() -> None:
    for seed in range(11):
        tree = draft("tree=k-ary,branching=3,depth=2", [seed, 1], Draw.TOP_ONE, WIDE, seed)
        drawn, *best = tree.children(tree.tip)
        model = TableModel(seed=4)
        q = model.logits([seed, 1]).softmax(-1)
        top = q.topk(2).indices.tolist()
        assert tree.tokens[best].tolist() == top
        assert tree.qrow[best].tolist() == [-1, -1]
        rest = q.clone()
        rest[top] = 0
        torch.testing.assert_close(tree.q[int(tree.qrow[drawn])], rest / rest.sum())


# ---- static, sequoia, optimal


def test_static_trees_are_read_from_a_word_or_a_file(tmp_path) -> None:
    file = tmp_path / "tree.json"
    file.write_text("[[0], [1], [0, 0], [0, 1], [1, 0]]")
    for text in (str(file), "0/1/0.0/0.1/1.0"):
        tree = draft(f"tree=static,paths={text}", [3, 1, 2])
        assert tree.parent[1:].tolist() == [0, 0, 1, 1, 2]
        first = TableModel(seed=4).logits([3, 1, 2]).topk(2).indices.tolist()
        assert paths_of(tree)[:2] == [(t,) for t in first]


def test_a_smaller_budget_takes_the_first_nodes() -> None:
    paths = closed(read_paths("0/0.0/1/0.0.0/0.1/2"))
    assert fit(paths, Budget(2, 9)) == {(): 1, (0,): 1}
    assert fit(paths, Budget(4, 1)) == {(): 3}
    assert fit(paths, Budget(9, 9, 1)) == {(): 1, (0,): 1, (0, 0): 1}
    assert fit(closed([(1,), (1, 0), (0,)]), Budget(2, 9)) == {(): 2}, "elder siblings come first"


def test_sequoia_grows_the_planned_tree() -> None:
    tree = draft("tree=sequoia,nodes=5,acceptance=0.6/0.3,depth=3", [3, 1, 2])
    best = Plan(np.tile([0.6, 0.3], (3, 1)), 5).tree(5)
    assert tree.drafted == 5
    assert sorted(len(p) for p in best) == sorted(tree.level(n) for n in range(1, 6))


def test_sequoia_turns_to_what_is_accepted() -> None:
    """Where nothing but first children is ever right the tree becomes a chain, and a bush where
    one never knows which; greedy decoding and replay keep their own books."""
    made = drafter("tree=sequoia,nodes=4,every=8")
    for how, chain in ((Draw.TOP, True), (Draw.NOISE, False)):
        view = view_of([3, 1, 2], how)
        state = made.begin(view)
        for i in range(200):
            (tree,) = made.propose([state], [view], [WIDE])
            path: list[int] = []
            children = tree.children(tree.tip)
            if chain:
                while children:
                    path.append(children[0])
                    children = tree.children(path[-1])
            else:
                path = [children[i % len(children)]] if i % 3 else []
            state.shape.observe(tree, verdict_of(tree, path))
        assert tree.is_chain == chain
        assert chain or max(tree.level(n) for n in range(len(tree))) == 1


def sized(cost: Any, draft_seconds: float | None, **options: Any) -> tuple[int, int]:
    shape = Optimal(cost, draft=draft_seconds, **options)
    view = view_of([1, 2, 3])
    shape.plan([view])
    return shape.bind(view).choose(Budget(shape.nodes, shape.depth))


class Steep:
    """Every row costs as much as the first."""

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        return float(rows)

    def observe(self, rows: int, context: int, sequences: int, seconds: float) -> None: ...


def test_the_optimal_tree_follows_the_costs() -> None:
    flat = GivenCosts([1.0])
    rates = "0.6/0.2/0.1"
    assert sized(flat, 0.0, acceptance=rates)[0] == 32
    assert sized(flat, 0.0, acceptance=rates)[1] >= 6
    assert sized(flat, 0.5, acceptance=rates)[1] < 4, "expensive drafts are shallow"
    assert sized(Steep(), 0.0, acceptance=rates) == (0, 0), "rows that cost too much: no draft"
    nodes, depth = sized(GivenCosts([1, 1, 1, 1, 3]), 0.01, acceptance=rates)
    assert 4 <= nodes <= 9, "eight rows are free"
    assert 1 <= depth <= nodes


@pytest.mark.parametrize("draft_seconds", [0.0, 0.05, 0.3])
def test_the_optimal_tree_has_the_most_tokens_per_second(draft_seconds: float) -> None:
    cost = GivenCosts([1.0, 1.1, 1.3, 1.9, 3.5])
    rates = np.tile([0.5, 0.2, 0.1], (3, 1))
    shape = Optimal(cost, 12, 3, 3, "0.5/0.2/0.1", draft_seconds)
    nodes, depth = shape.bind(view_of([1])).choose(Budget(12, 3))
    value = {
        (n, d): Plan(rates[:d], 12).tokens[n] / (cost.seconds(1 + n) + d * draft_seconds)
        for n in range(1, 13)
        for d in range(1, 4)
    }
    assert value[nodes, depth] == pytest.approx(max(value.values()))


def test_company_makes_trees_smaller() -> None:
    cost = GivenCosts([1, 1, 1, 1, 2, 4, 8])
    shape = Optimal(cost, 16, 4, 3, "0.6/0.2", 0.0)
    learner = shape.bind(view_of([1]))
    assert learner.choose(Budget(16, 4), 8)[0] < learner.choose(Budget(16, 4), 1)[0]


def test_what_drafting_takes_is_measured() -> None:
    made = drafter("tree=optimal,nodes=4,target=1/1/1")
    view = view_of([1, 2, 3])
    made.propose([made.begin(view)], [view], [WIDE])
    assert 0 < made.shape.draft_seconds < 10
    given = drafter("tree=optimal,nodes=4,target=1/1/1,draft=0.25")
    given.propose([given.begin(view)], [view], [WIDE])
    assert given.shape.draft_seconds == 0.25


def test_where_drafting_does_not_pay_it_is_tried_again() -> None:
    made = drafter("tree=optimal,nodes=4,target=1/2/4/8,acceptance=0.1,draft=0")
    view = view_of([1, 2, 3])
    state = made.begin(view)
    drafted = [made.propose([state], [view], [WIDE])[0].drafted for _ in range(70)]
    assert drafted.count(0) == 68
    assert sum(d > 0 for d in drafted) == 2


def test_without_costs_it_says_so_and_drafts_a_fixed_size() -> None:
    with pytest.warns(UserWarning, match="knows no costs"):
        made = drafter("tree=optimal,nodes=30")
    view = view_of([1, 2, 3])
    (tree,) = made.propose([made.begin(view)], [view], [WIDE])
    assert tree.drafted == 8


def test_measured_costs_come_from_the_engine() -> None:
    made = drafter("tree=optimal,nodes=9", cost=Steep())
    view = view_of([1, 2, 3])
    (tree,) = made.propose([made.begin(view)], [view], [WIDE])
    assert tree.drafted == 0


# ---- options, models, the whole engine


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("tree=dyspek", "did you mean 'dyspec'"),
        ("tree=dyspec,node=3", "did you mean 'nodes'"),
        ("tree=dyspec,nodes=0", "nodes >= 1"),
        ("tree=dyspec,nodes=many", "not a valid int"),
        ("tree=dyspec,form=heaps", "heap, threshold"),
        ("tree=dyspec,threshold=0.1", "for form=threshold"),
        ("tree=dyspec,estimate=none", "learned, draft"),
        ("tree=rsd-c,widths=3/x", "whole numbers"),
        ("tree=rsd-c,widths=3/0", "whole numbers"),
        ("tree=rsd-s,width=0", "width >= 1"),
        ("tree=sequoia,acceptance=1.2", "at most 1"),
        ("tree=sequoia,acceptance=a/b", "not negative"),
        ("tree=optimal,target=0/1", "more than no time"),
        ("tree=static,paths=0/1.0", "[1] is missing"),
        ("tree=static,paths=1", "[0] is missing"),
        ("tree=static,paths=no-such-file.json", "cannot be read"),
        ("tree=static,paths=a.b", "ranks joined by dots"),
        ("tree=k-ary,branching=0", ">= 1"),
        ("tree=chain,depth=0", "depth >= 1"),
        ("nodes=3", "those of a tree follow tree=NAME"),
    ],
)
def test_mistakes_get_one_sentence(spec: str, match: str) -> None:
    with pytest.raises(InputError) as e:
        drafter(spec)
    assert match in str(e.value)
    assert "\n" not in str(e.value)


def test_tokens_limits_the_levels_of_any_tree() -> None:
    for spec in SHAPES:
        if "tokens" not in spec:
            tree = draft(f"{spec},tokens=1", [3, 1, 2])
            assert max(tree.level(n) for n in range(len(tree))) == 1


def test_a_draft_model_without_trees_only_drafts_chains() -> None:
    model = TableModel(caps=Caps(tree=False))
    assert drafter("tree=chain", model).shape.depth == 3
    with pytest.raises(InputError, match="cannot score trees"):
        drafter("tree=dyspec", model)


def test_targets_without_trees_get_chains_of_any_shape() -> None:
    for spec in SHAPES:
        target, context = pair(caps=Caps(tree=False))
        llm = LLM(target, draft=f"draft-model:{spec}", context=context)
        plain = LLM(pair(caps=Caps(tree=False))[0])
        for params in (
            SamplingParams(max_tokens=20),
            SamplingParams(max_tokens=20, temperature=1, seed=2),
        ):
            got = llm.generate([[1, 2, 3]], params)[0]
            assert got.token_ids == plain.generate([[1, 2, 3]], params)[0].token_ids
            assert got.stats.accepted > 0


def tokens_per_step(draft: str, temperature: float, verify: str = "auto") -> float:
    emitted = steps = 0
    for seed in range(6):
        target, context = pair(vocab=24, seed=seed, sharpness=1.6)
        llm = LLM(target, draft=draft, verify=verify, context=context)
        params = SamplingParams(max_tokens=60, temperature=temperature, seed=seed)
        for out in llm.generate([[1, 2, 3], [4, 5]], params):
            emitted += out.stats.emitted
            steps += out.stats.steps
    return emitted / steps


def test_the_greedy_tree_accepts_at_least_as_much_as_a_fixed_one() -> None:
    """At equal budgets, greedy decoding."""
    fixed = [
        tokens_per_step(f"draft-model:{spec}", 0.0)
        for spec in (
            "tree=static,paths=0/1/2/0.0/0.1/1.0/0.0.0/0.0.0.0",
            "tree=rsd-c,widths=2/1/1/1",
        )
    ]
    assert tokens_per_step("draft-model:tree=dyspec,nodes=8", 0.0) >= max(fixed)


def test_independent_draws_have_the_law_of_their_row() -> None:
    q = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0, 0.0]])
    counts: Counter = Counter()
    for seed in range(1500):
        ids = independent(q, view_of([0], Draw.IID, seed), [0, 0], [1, 2], 3)
        assert ids[1].tolist() == [2, 2, 2]
        counts[tuple(ids[0].tolist())] += 1
    law = {t: math.prod(float(q[0, x]) for x in t) for t in itertools.product((1, 3, 4), repeat=3)}
    assert set(counts) <= set(law)
    seen = [counts[t] for t in law]
    want = [1500 * w / sum(law.values()) for w in law.values()]
    assert stats.chisquare(seen, want).pvalue > 1e-3
