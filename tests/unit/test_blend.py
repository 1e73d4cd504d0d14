"""The blend: prefixes shared, chances learnt from all that was proposed, as many nodes as pay."""

from __future__ import annotations

import random

import numpy as np
import pytest

from foretell import LLM, SamplingParams
from foretell.core import registry
from foretell.core.costs import paying
from foretell.core.errors import InputError
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.core.rng import SeqRng
from foretell.core.tree import TokenTree
from foretell.drafters.blend import Blend
from foretell.drafters.tables.pace import LOOK, Pace, StepCosts
from foretell.drafters.tables.sketch import Sketch
from foretell.drafters.tables.trust import MEMORY, SHARED, Trust, said
from foretell.drafters.tables.union import Union, judge, likeliest
from helpers_model import Cost, pair


def union(*trees: TokenTree) -> Union:
    whole = Union()
    for part, tree in enumerate(trees):
        whole.add(Sketch.of(tree), part, len(trees))
    return whole


def test_a_union_shares_prefixes_and_remembers_who_said_what() -> None:
    first = TokenTree.chain([9], [1, 2, 3])
    second = TokenTree.build([9], [1, 5, 4, 2], [-1, -1, 0, 0], score=[0.95, 0.2, 0.7, 0.1])
    whole = union(first, second)
    assert whole.tokens == [1, 2, 3, 5, 4]
    assert whole.parents == [-1, 0, 1, -1, 0]
    assert whole.levels == [1, 2, 3, 1, 2]
    assert whole.marks == [
        [said(None, 0), said(0.95, 0)],
        [said(None, 0), said(0.1, 1)],
        [said(None, 0), 0],
        [0, said(0.2, 1)],
        [0, said(0.7, 0)],
    ]


@pytest.mark.parametrize("seed", range(30))
def test_a_union_is_that_of_the_paths(seed: int) -> None:
    """Against a table of paths, for one to three drafters, with and without scores, siblings of
    the same token included; what is handed in stays as it was."""
    r = random.Random(seed)
    parts = r.randint(1, 3)
    whole, said_of, handed = Union(), {}, []
    for part in range(parts):
        n, scored = r.randint(0, 7), r.random() < 0.5
        parents = [r.randint(-1, i - 1) for i in range(n)]
        levels = [0] * n + [0]
        for i, above in enumerate(parents):
            levels[i] = levels[above] + 1
        tokens = [r.randrange(3) for _ in parents]
        scores = [r.random() for _ in parents] if scored else None
        lists = tokens, [*parents], levels[:n], scores and [*scores]
        sketch = Sketch(*lists) if seed % 2 else Sketch(np.array(tokens, np.int64), *lists[1:])
        whole.add(sketch, part, parts)
        handed.append((sketch, (tokens, parents, levels[:n], scores)))
        paths, ranks = {-1: ()}, dict[int, int]()
        for i, above in enumerate(parents):
            paths[i] = (*paths[above], tokens[i])
            rank = ranks[above] = ranks.get(above, -1) + 1
            mark = said(scores[i], 0) if scores else said(None, rank)
            said_of.setdefault(paths[i], [0] * parts)[part] = mark
    for sketch, before in handed:
        assert tuple(x if x is None else list(x) for x in sketch) == before
    found = {-1: ()}
    for i, (token, above) in enumerate(zip(whole.tokens, whole.parents, strict=True)):
        assert above < i
        found[i] = (*found[above], token)
        assert whole.levels[i] == len(found[i])
    del found[-1]
    assert len(set(found.values())) == len(found)
    assert {path: whole.marks[i] for i, path in found.items()} == said_of


class Given:
    """Drafts one tree."""

    name, shapes, needs = "given", frozenset({"tree", "onehot"}), Needs()
    promise = Promise.EXACT

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree

    def begin(self, view: SeqView) -> None: ...

    def propose(self, states: list, views: list, budgets: list) -> list[TokenTree]:
        return [self.tree] * len(views)


def test_what_pays_is_kept_wherever_it_stands_in_the_tree() -> None:
    """The second child is the likelier one; its seconds are counted."""
    scores = [0.1, 0.99, 0.1, 0.99]
    tree = TokenTree.build([8, 9], [1, 2, 3, 4], [-1, -1, 0, 1], score=scores)
    blend = Blend([Given(tree)], cost=Cost(0.2))  # type: ignore[list-item]
    view = SeqView([8, 9], 1, SamplingParams(), SeqRng(0))
    state = blend.begin(view)
    (found,) = blend.propose([state], [view], [Budget(9, 9)])
    assert found.tokens.tolist()[-2:] == [2, 4]
    assert found.parent.tolist()[-2:] == [found.tip, found.tip + 1]
    assert state.seconds >= Cost(0.2).seconds(3)
    assert state.union is not None
    assert state.union.levels == [1, 1, 2, 2]


def test_nodes_that_are_no_candidates_stay_out() -> None:
    tree = TokenTree.build([9], [1, 2, 3], [-1, 0, -1])
    tree.kill(TokenTree.build([9], [1, 2, 3], [-1, 0, -1]).tokens == 1)
    assert union(tree).tokens == [3]


def test_what_came_true_is_learnt_of_nodes_that_were_not_drafted_too() -> None:
    trust = Trust()
    whole = union(TokenTree.build([9], [1, 2, 3, 4], [-1, -1, 0, 2]))
    whole.chances(trust)
    judge(whole, [1, 3, 7], trust)
    judged = {key: (c.hits, c.tries) for key, c in trust.cells.items()}
    assert judged == {
        (1, (said(None, 0),)): (1, 1),  # 1 came
        (1, (said(None, 1),)): (0, 1),  # its sibling 2 did not
        (2, (said(None, 0),)): (1, 1),  # 3 came behind 1
        (3, (said(None, 0),)): (0, 1),  # 4 did not behind 3
    }
    judge(whole, [8], trust)  # nothing is known of what stands below a refused token
    assert trust.cells[(2, (said(None, 0),))].tries == 1


def test_chances_are_learnt_and_agreement_is_a_case_of_its_own() -> None:
    dice, trust = random.Random(0), Trust()
    alone, both = (said(None, 0), 0), (said(None, 0), said(0.5, 0))
    for _ in range(600):
        trust.judged += 1
        trust.saw(trust.cell(1, both), dice.random() < 0.9)
        trust.saw(trust.cell(1, (0, said(0.5, 0))), dice.random() < 0.1)
        trust.saw(trust.cell(1, alone), dice.random() < 0.3)
    assert abs(trust.cell(1, both).chance(trust.now) - 0.9) < 0.05
    assert 0.3 < trust.cell(1, alone).chance(trust.now) < 0.65, "what agreed counts for each alone"
    new = trust.cell(1, (said(None, 0), said(0.95, 0))).chance(trust.now)
    assert new >= trust.cell(1, alone).chance(trust.now), "an unseen mark leans on its best part"
    assert trust.cell(1, both).tries <= MEMORY + 1 > SHARED


def test_likeliest_keeps_parents_first_and_branching() -> None:
    parents, values = [-1, -1, 0, 0, 2], [0.5, 0.4, 0.5, 0.1, 0.3]
    assert likeliest(values, parents, 9) == [0, 2, 1, 4, 3]
    assert likeliest(values, parents, 1) == [0, 2, 4]
    assert likeliest(values, parents, 2) == [0, 2, 1, 4, 3]


def test_a_node_is_drafted_if_it_brings_what_its_seconds_bring_elsewhere() -> None:
    costs = [1.0, 1.1, 1.2, 1.3]
    assert paying([0.9, 0.5, 0.15], costs, rate=2.0) == 2
    assert paying([0.9, 0.5, 0.15], costs, rate=1.0) == 3
    assert paying([0.15, 0.1], costs, rate=2.0) == 0, "alone it would pay: 1.15 / 1.1 > 1"
    assert paying([0.15, 0.05], costs, rate=0.0) == 1, "at first against plain decoding"
    assert paying([], costs, rate=2.0) == 0
    assert paying([0.15], [2.0, 2.2], rate=0.0) == 1, "plain steps of two seconds"


def test_a_step_that_costs_more_rows_is_looked_beyond() -> None:
    """A kernel takes rows by fours: the second to fourth cost nothing more."""
    assert paying([0.3, 0.3, 0.3, 0.3], [1.0, 1.5, 1.5, 1.5, 1.5], rate=2.0) == 4


def test_pace_follows_what_steps_bring() -> None:
    pace = Pace()
    assert pace.rate == 0
    for _ in range(1000):
        pace.took(3, 2.0)
    assert pace.rate == pytest.approx(1.5)
    for _ in range(1000):
        pace.took(1, 2.0)
    assert pace.rate == pytest.approx(0.5, rel=0.05)


def test_costs_are_remembered_for_a_while_and_by_company() -> None:
    cost = Cost(0.1)
    costs = StepCosts(cost, nodes=2, floor=0.0)
    first, crowd = costs(100, 1), costs(100, 3)
    assert first == [cost.seconds(n, 100, 1) for n in (1, 2, 3)]
    assert crowd == [cost.seconds(n, 300, 3) for n in (3, 6, 9)]
    costs.cost = Cost(0.7)
    assert costs(100, 1) == first
    for _ in range(LOOK):
        later = costs(100, 1)
    assert later == [costs.cost.seconds(n, 100, 1) for n in (1, 2, 3)]


def test_the_pace_is_that_of_what_was_emitted() -> None:
    _, blend = drafted(0.1)
    tokens, seconds = blend.pace.tokens, blend.pace.seconds
    assert tokens / seconds > 1 / Cost(0.1).seconds(1, 0, 1), "quicker than a token a plain step"


BOTH = ("suffix", "token-recycling:nodes=9")


def drafted(each: float, tokens: int = 200, of: tuple[str, ...] = BOTH) -> tuple[float, Blend]:
    """Nodes a step where a row more costs so much."""
    target, context = pair()
    parts = [registry.create("drafter", d, context) for d in of]
    blend = Blend(parts, cost=Cost(each))
    llm = LLM(target, draft=blend, context=context)
    stats = llm.generate([[1, 2, 3, 1, 2]], SamplingParams(max_tokens=tokens))[0].stats
    return stats.drafted / stats.steps, blend


def test_the_dearer_a_row_the_smaller_the_tree() -> None:
    sizes = [drafted(each)[0] for each in (0.0, 0.1, 0.4)]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert drafted(3.0)[0] < 0.2, "where a row costs three steps none pays"


def test_a_part_alone_is_cut_too() -> None:
    sizes = [drafted(each, of=("suffix",))[0] for each in (0.0, 0.3, 3.0)]
    assert sizes[0] > sizes[1] > 0
    assert sizes[2] < 0.2


def test_what_is_not_drafted_goes_on_being_judged() -> None:
    _, blend = drafted(3.0)
    assert sum(c.tries for c in blend.trust.cells.values()) > 50


def test_a_part_that_draws_is_refused() -> None:
    with pytest.raises(InputError, match="merge:of="):
        registry.create("drafter", "blend:of=suffix+draft-model", pair()[1])


def test_bad_options_are_refused() -> None:
    for spec in ("blend:nodes=0", "blend:floor=1", "blend:floor=-0.1"):
        with pytest.raises(InputError):
            registry.create("drafter", spec, pair()[1])
