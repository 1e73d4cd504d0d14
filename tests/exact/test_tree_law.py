"""Trees as they are really grown keep the target's law: every draw and every flip is enumerated.

The growers run unchanged; only the functions that draw (`trees.draw`) branch instead of drawing.
Stochastic beams decide by continuous times, so their discrete twin is enumerated here, and
tests/unit/test_trees.py shows that the grower draws the same trees as the twin.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foretell import LLM, InputError
from foretell.core import registry
from foretell.core.params import SamplingParams
from foretell.core.protocols import Budget, BuildContext, Draw, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.trees import draw
from foretell.drafters.trees.drive import grow_level_by_level
from foretell.drafters.trees.eagle2 import RerankGrower
from foretell.drafters.trees.growing import Growing
from foretell.drafters.trees.rsd_c import WidthsGrower
from foretell.verify.rejection import Rejection
from helpers_drafts import beams, table, without_replacement
from helpers_exact import Branch, Prefix, Table, deviation
from helpers_model import pair

EXACT = 1e-12
WIDE = Budget(99, 99)


@pytest.fixture(autouse=True)
def _draws_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranked(q, view, how, levels, orders, width):
        if how is Draw.TOP:
            top = q.topk(min(width, q.shape[-1]))
            return top.indices, top.values
        ids = []
        for row in q:
            drawn = without_replacement(view.rng.branch, row, width)
            ids.append([*drawn, *(t for t in range(len(row)) if t not in drawn)][:width])
        ids = torch.tensor(ids)
        return ids, q.gather(-1, ids)

    def independent(q, view, levels, orders, width):
        rows = [[view.rng.branch.choose(row.tolist()) for _ in range(width)] for row in q]
        return torch.tensor(rows)

    monkeypatch.setattr(draw, "ranked", ranked)
    monkeypatch.setattr(draw, "independent", independent)


def view_of(branch: Branch, text: Prefix, how: Draw) -> SeqView:
    rng: Any = SimpleNamespace(branch=branch)
    params = SamplingParams(temperature=1.0)
    return SeqView([0, *text], 1, params, rng, how, len(text), warp=lambda rows, paths: rows)


def grow(grower: Any, q: Table, text: Prefix) -> TokenTree:
    def forward(frontiers: list[list[int]]) -> torch.Tensor:
        paths = [grower.paths[n] if n >= 0 else [] for n in frontiers[0]]
        return torch.stack([q((*text, *(grower.tokens[a] for a in p))) for p in paths])

    grow_level_by_level([grower], forward)
    return grower.tree()


def drafting(spec: str, q: Table, how: Draw = Draw.SAMPLE) -> Callable[[Branch, Prefix], TokenTree]:
    shape = registry.create("tree", spec, BuildContext(None))  # type: ignore[arg-type]

    def draft(branch: Branch, text: Prefix) -> TokenTree:
        view = view_of(branch, text, how)
        return grow(shape.bind(view).grow(view, WIDE), q, text)

    return draft


SAMPLED = [
    "chain:depth=2",
    "k-ary:branching=2,depth=2",
    "static:paths=0/1/1.0",
    "sequoia:nodes=3,depth=2,acceptance=0.5/0.3",
    "optimal:nodes=3,depth=2,target=1/1/1",
    "dyspec:nodes=3,depth=2,ahead=1",
    "dyspec:nodes=3,depth=2,ahead=2,estimate=draft",
    "dyspec:nodes=4,depth=2,estimate=draft,form=threshold,threshold=0.3",
    "eagle2:nodes=4,width=2,depth=2",
    "rsd-c:widths=2/1",
    "specinfer:widths=1/2",
    "specinfer:widths=3",
]
TABLES = [("dense", "dense"), ("zeros", "dense"), ("dense", "zeros")]  # target, draft


@pytest.mark.parametrize("spec", SAMPLED)
def test_trees_keep_the_law_under_rejection(spec: str) -> None:
    for seed, (target, drafter) in enumerate(TABLES):
        p, q = table(("p", seed), 3, target), table(("q", seed), 3, drafter)
        assert deviation(Rejection(), drafting(spec, q), p, 3) < EXACT, (spec, target, drafter)


@pytest.mark.parametrize(
    ("verify", "how", "spec"),
    [
        ("specinfer", Draw.IID, "rsd-c:widths=2/1"),
        ("specinfer", Draw.IID, "dyspec:nodes=2,depth=2"),
        ("specinfer", Draw.IID, "specinfer:widths=3"),
        ("spectr", Draw.IID, "static:paths=0/1/1.0"),
        ("greedy-draft", Draw.TOP_ONE, "k-ary:branching=2,depth=2"),
        ("greedy-draft", Draw.TOP_ONE, "sequoia:nodes=3,depth=2,acceptance=0.5/0.3"),
        ("multipath", Draw.PATHS, "k-ary:branching=2,depth=2"),
        ("multipath", Draw.PATHS, "k-ary:branching=3,depth=1"),
        ("specinfer", Draw.SAMPLE, "rsd-c:widths=2/1"),
        ("greedy-draft", Draw.SAMPLE, "eagle2:nodes=3,width=2,depth=2"),
    ],
)
def test_other_ways_of_drawing_suit_their_rules(verify: str, how: Draw, spec: str) -> None:
    rule = registry.create("verifier", verify)
    p, q = table("p", 3), table("q", 3)
    assert deviation(rule, drafting(spec, q, how), p, 3) < EXACT


def test_what_a_round_learned_does_not_bias_the_next(monkeypatch) -> None:
    """Trees planned anew from the verdict of the round before, also when that changes them."""
    from foretell.drafters.trees.acceptance import Acceptance
    from foretell.drafters.trees.calibration import Calibration

    monkeypatch.setattr(Acceptance, "WEIGHT", 0.2)  # one verdict turns the plan over
    monkeypatch.setattr(Calibration, "WEIGHT", 0.2)
    for spec in ("sequoia:nodes=2,depth=2,every=1", "dyspec:nodes=2,depth=2"):
        p, q = table("p", 2), table("q", 2)
        forms: dict[Prefix, set[tuple[int, ...]]] = {}
        last: list[Any] = []

        def draft(branch: Branch, text: Prefix, spec=spec, q=q, last=last, forms=forms):
            view = view_of(branch, text, Draw.SAMPLE)
            if not text:
                shape = registry.create("tree", spec, BuildContext(None))  # type: ignore[arg-type]
                last[:] = [shape.bind(view)]
            tree = grow(last[0].grow(view, WIDE), q, text)
            forms.setdefault(text, set()).add(tuple(tree.parent.tolist()))
            return tree

        def verify(tree, rows, branch, position, last=last):
            verdict = Rejection()(tree, rows, branch, position)
            last[0].observe(tree, verdict)
            return verdict

        assert deviation(verify, draft, p, 4, rounds=2) < EXACT
        assert len(set().union(*forms.values())) > 1, "nothing was learned"


@pytest.mark.parametrize(("vocab", "width", "length"), [(3, 2, 1), (2, 2, 2), (2, 3, 2), (3, 2, 2)])
def test_stochastic_beams_keep_the_law(vocab: int, width: int, length: int) -> None:
    p, q = table("p", vocab), table("q", vocab)
    assert deviation(Rejection(), beams(q, vocab, width, length), p, length + 1) < EXACT


def worst(draft: Callable[[Table], Callable], vocab: int = 3, seeds: int = 2) -> float:
    off = 0.0
    for seed in range(seeds):
        p, q = table(("p", seed), vocab), table(("q", seed), vocab)
        off = max(off, deviation(Rejection(), draft(q), p, 3))
    return off


def test_admission_by_the_drawn_tokens_own_path_is_biased_and_refused() -> None:
    spec = "dyspec:nodes=2,depth=2,admit=path,estimate=draft"
    assert worst(lambda q: drafting(spec, q)) > 0.01
    target, context = pair()
    draft = "draft-model:tree=dyspec,nodes=2,admit=path"
    for verify in ("rejection", "specinfer"):
        with pytest.raises(InputError, match=r"biased.*own probability") as e:
            LLM(target, draft=draft, verify=verify, context=context)
        assert "\n" not in str(e.value)
    llm = LLM(target, draft=draft, verify="replay", context=context)
    assert llm.generate([[1, 2, 3]], max_tokens=3)[0].promise == "exact"


def by_hand(make: Callable[[SeqView], Growing]) -> Callable[[Table], Callable]:
    def procedure(q: Table) -> Callable[[Branch, Prefix], TokenTree]:
        return lambda branch, text: grow(make(view_of(branch, text, Draw.SAMPLE)), q, text)

    return procedure


def test_reranking_draws_by_their_own_q_is_biased() -> None:
    """Hence EAGLE-2 drafts the most probable tokens, without q rows, under rejection."""

    class Reranked(RerankGrower):
        def __init__(self, view: SeqView) -> None:
            super().__init__(view, Budget(2, 2), 2)
            self.how = Draw.SAMPLE

        def tree(self) -> TokenTree:
            kept = self.best()
            place = {n: i for i, n in enumerate(kept)} | {-1: -1}
            return TokenTree.build(
                self.view.pending,
                [self.tokens[n] for n in kept],
                [place[self.parents[n]] for n in kept],
                qrow=[self.qrow[n] for n in kept],
                q=torch.stack(self.q),
            )

    assert worst(by_hand(Reranked)) > 0.01


def test_siblings_cut_at_the_first_unlikely_one_are_biased() -> None:
    """The slot after a draw may depend on that draw; whether a draw is kept may not."""

    class ByMass(WidthsGrower):
        def __init__(self, view: SeqView) -> None:
            super().__init__(view, Budget(99, 1), [3])

        kept = 0

        def expand(self, logits: torch.Tensor) -> None:
            (below,) = self.drawn(logits, self.front, 3)
            unlikely = next((j for j, q in enumerate(below.q) if q < 1 / 3), 3)
            self.add(below, 0, unlikely + self.kept)
            self.front = []

    for kept in (0, 1):
        ByMass.kept = kept  # 1: the unlikely one stays, and nothing after it
        off = worst(by_hand(ByMass))
        assert off < EXACT if kept else off > 0.01


def test_independent_draws_that_share_a_row_are_biased() -> None:
    """Without replacement and with it are different laws: the rows say which."""

    class Shared(WidthsGrower):
        def __init__(self, view: SeqView) -> None:
            super().__init__(view, Budget(99, 1), [3])
            self.how = Draw.IID

        def drawn(self, logits, nodes, width):
            found = super().drawn(logits, nodes, width)
            for below in found:
                below.rows = [below.rows[0]] * len(below.rows)
            return found

    assert worst(by_hand(lambda view: WidthsGrower(view, Budget(99, 1), [3]))) < EXACT
    assert worst(by_hand(Shared)) > 1e-3
