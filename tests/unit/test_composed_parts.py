"""What composed drafters pass on to their parts: whose state, which budget, which noise, and who
hears of what. The parts are stubs that write everything down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback, Rows, Verdict
from foretell.core.params import SamplingParams, Speculation
from foretell.core.protocols import Budget, Draw, Needs, Promise, SeqView
from foretell.core.rng import Purpose, SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.choice import Choice
from foretell.drafters.compose import Composed, fuse, has_rows, model_and_table, only, values
from foretell.drafters.fallback import Fallback
from foretell.drafters.merge import Merge, alone
from helpers_model import pair

CONTEXT = [7]


class Part:
    """Drafts what it is told to: `says` maps the first id of a text to tokens of a chain."""

    promise, paper = Promise.EXACT, ""

    def __init__(self, name: str, says: dict[int, list[int]] | None = None, **more: Any) -> None:
        self.name, self.says = name, says or {}
        self.needs, self.shapes = Needs(), frozenset({"chain", "onehot"})
        self.asked: list[tuple[Any, int, int]] = []  # state, nodes, first id
        self.heard: list[tuple[Any, list[int]]] = []  # state, tokens of the tree
        self.calls = 0
        self.ended: list[Any] = []
        self.noise: list[float] = []
        for key, value in more.items():
            setattr(self, key, value)

    def begin(self, view: SeqView) -> Any:
        return (self.name, view.tokens[0])

    def propose(
        self, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        assert len(states) == len(views) == len(budgets) > 0
        trees = []
        for state, view, budget in zip(states, views, budgets, strict=True):
            self.asked.append((state, budget.nodes, view.tokens[0]))
            self.noise.append(view.rng.uniform(5, Purpose.DRAFT))
            tokens = self.says.get(view.tokens[0], [])[: budget.nodes]
            q = torch.full((len(tokens), 10), 0.1) if "q" in self.shapes and tokens else None
            trees.append(TokenTree.chain(view.pending, tokens, q=q))
        return trees

    def observe(self, states: Sequence[Any], feedback: Sequence[Feedback]) -> None:
        self.calls += 1
        assert len(states) == len(feedback) > 0, "told of nothing"
        self.heard += [(s, f.tree.tokens.tolist()) for s, f in zip(states, feedback, strict=True)]

    def end(self, state: Any) -> None:
        self.ended.append(state)


def view_of(first: int, control: Speculation | None = None) -> SeqView:
    return SeqView([first, 0], 1, SamplingParams(), SeqRng(first), cached=1, control=control)


def step_of(tree: TokenTree, accepted: Sequence[int] = ()) -> Feedback:
    path = list(accepted)
    verdict = Verdict(path, [*tree.tokens[path].tolist(), 9], len(path) + bool(len(tree) > 1))
    rows = Rows(torch.zeros(1, 1), np.zeros(len(tree), np.int64))
    return Feedback(verdict.tokens, [*range(tree.n_context), *path], tree, rows, verdict)


def run(
    drafter: Any, firsts: Sequence[int], budgets: Sequence[int] = ()
) -> tuple[list[Any], list[TokenTree]]:
    views = [view_of(f) for f in firsts]
    states = [drafter.begin(v) for v in views]
    asked = [Budget(n, 9) for n in budgets or [9] * len(firsts)]
    return states, drafter.propose(states, views, asked)


class TestTogether:
    """What a whole is, given its parts."""

    def test_needs_are_those_of_all(self) -> None:
        one, two = Part("a", needs=Needs(taps=("last", 2))), Part("b", needs=Needs(taps=(2, 0)))
        assert Composed([one, two]).needs == Needs(taps=("last", 2, 0))
        for need in ("logits", "prompt_logits", "own_model", "layer_access"):
            for parts in ([Part("a", needs=Needs(**{need: True})), one], [one, two]):
                whole = Composed(parts).needs
                assert getattr(whole, need) == (parts[1] is one), need

    def test_the_promise_is_the_weakest(self) -> None:
        lossy, lossless = Part("a", promise=Promise.LOSSY), Part("b", promise=Promise.LOSSLESS)
        assert Composed([Part("x"), Part("y")]).promise is Promise.EXACT
        assert Composed([Part("x"), lossless]).promise is Promise.LOSSLESS
        assert Composed([lossless, lossy, Part("x")]).promise is Promise.LOSSY

    def test_what_one_of_them_would_bias_the_whole_does(self) -> None:
        odd = Part("a", unsound={Draw.IID: "why"}, clocked=True)
        for parts in ([odd, Part("b")], [Part("b"), odd]):
            assert Composed(parts).unsound == {Draw.IID: "why"}
            assert Composed(parts).clocked
        assert not Composed([Part("b"), Part("c")]).clocked

    def test_ways_of_drawing_are_those_that_all_who_draw_know(self) -> None:
        shapes = frozenset({"chain", "q"})
        some = Part("a", shapes=shapes, draws=frozenset({Draw.IID, Draw.PATHS}))
        few = Part("b", shapes=shapes, draws=frozenset({Draw.IID}))
        assert Composed([some, Part("table")]).draws == {Draw.IID, Draw.PATHS}
        assert Composed([some, few]).draws == {Draw.IID}
        assert Composed([few, Part("c", shapes=shapes)]).draws == frozenset()
        assert Composed([Part("x"), Part("y")]).draws == frozenset()
        assert Merge([some, Part("table")]).draws == {Draw.IID}
        assert Merge([some, Part("table")]).shapes == {"q", "onehot", "tree"}

    def test_shared_bytes_are_summed(self) -> None:
        sized = [Part("a", state_bytes=lambda: 5), Part("b"), Part("c", state_bytes=lambda: 7)]
        assert Composed(sized).state_bytes() == 12

    def test_every_part_that_draws_has_its_own_noise_and_the_first_the_usual_one(self) -> None:
        shapes = frozenset({"chain", "q"})
        drawing = [Part(name, {1: [3]}, shapes=shapes) for name in "abc"]
        table = Part("table", {1: [4]})
        run(Merge([*drawing, table]), [1])
        usual = view_of(1).rng.uniform(5, Purpose.DRAFT)
        noise = [p.noise[0] for p in drawing]
        assert noise[0] == usual, "alone or first in a company, it draws the same"
        assert len(set(noise)) == 3
        assert table.noise == [usual], "a table draws nothing"

    @pytest.mark.parametrize("make", [Composed, Fallback, Merge])
    def test_every_state_is_ended_by_its_own_part(self, make: Any) -> None:
        parts = [Part("a"), Part("b")]
        whole = make(parts)
        for first in (1, 2):
            whole.end(whole.begin(view_of(first)))
        assert [p.ended for p in parts] == [[(p.name, 1), (p.name, 2)] for p in parts]

    def test_a_part_may_be_spared_the_trees_of_others(self) -> None:
        class Sparing(Composed):
            def hears(self, state: Any, part: int) -> bool:
                return part == 0 or state[part][1] == 2

        a, b = Part("a"), Part("b")
        whole = Sparing([a, b])
        states = [whole.begin(view_of(first)) for first in (1, 2)]
        whole.observe(states, [step_of(TokenTree.context([0])) for _ in states])
        assert [s for s, _ in a.heard] == [("a", 1), ("a", 2)]
        assert [s for s, _ in b.heard] == [("b", 2)]


class TestFallback:
    def test_each_sequence_has_its_own_owner_budget_and_state(self) -> None:
        a = Part("a", {1: [1, 1], 2: [1]})
        b = Part("b", {1: [2, 2, 2], 2: [2, 2, 2], 3: [2]})
        c = Part("c", {3: [3]})
        states, trees = run(Fallback([a, b, c], least=2), [1, 2, 3, 4], [9, 8, 7, 6])
        drafted = [t.tokens[1:].tolist() for t in trees]
        assert drafted == [[1, 1], [2, 2, 2], [2], []]
        assert [s.owner for s in states] == [0, 1, 1, -1], "of equally long ones the earlier"
        assert a.asked == [(("a", i), 10 - i, i) for i in (1, 2, 3, 4)]
        assert b.asked == [(("b", i), 10 - i, i) for i in (2, 3, 4)]
        assert c.asked == [(("c", i), 10 - i, i) for i in (3, 4)]

    def test_nobody_is_asked_for_nothing(self) -> None:
        a, b = Part("a", {1: [1]}), Part("b", {1: [2]})
        run(Fallback([a, b], least=0), [1])
        assert b.asked == []
        run(Fallback([a, b], least=0), [2])
        assert len(b.asked) == 1, "least is at least 1"

    def test_a_draw_stands_however_short_and_whatever_was_found_before(self) -> None:
        drawing = Part("d", {1: [5]}, shapes=frozenset({"chain", "q"}))
        table, late = Part("a", {1: [1, 1]}), Part("c", {1: [3] * 6})
        states, trees = run(Fallback([table, drawing, late], least=4), [1])
        assert trees[0].tokens[1:].tolist() == [5]
        assert states[0].owner == 1
        assert late.asked == []

    def test_a_part_that_knows_its_own_trees_only_is_told_of_those(self) -> None:
        """The owner is that of this step, not of an earlier one."""
        a, b = Part("a", {1: [1]}, own_trees_only=True), Part("b", {1: [2], 2: [2]})
        whole = Fallback([a, b])
        states, trees = run(whole, [1, 2])
        whole.observe(states, [step_of(t) for t in trees])
        assert a.heard == [(("a", 1), [0, 1])]
        assert b.heard == [(("b", 1), [0, 1]), (("b", 2), [0, 2])], "others hear everything"
        a.says = {}
        trees = whole.propose(states, [view_of(1), view_of(2)], [Budget(9, 9)] * 2)
        whole.observe(states, [step_of(t) for t in trees])
        assert a.calls == 1
        a.says, b.says = {}, {}
        trees = whole.propose(states, [view_of(1), view_of(2)], [Budget(9, 9)] * 2)
        assert [s.owner for s in states] == [-1, -1]


class TestMerge:
    def test_parts_share_a_budget_and_nobody_is_asked_for_nothing(self) -> None:
        a, b, c = (Part(n, {1: [i, i], 2: [i] * 5}) for i, n in enumerate("abc", 1))
        _, trees = run(Merge([a, b, c], nodes=5), [1, 2], [9, 4])
        assert [t.drafted for t in trees] == [5, 4]
        assert a.asked == [(("a", 1), 5, 1), (("a", 2), 4, 2)]
        assert b.asked == [(("b", 1), 3, 1)]
        assert c.asked == [(("c", 1), 1, 1)]
        assert trees[0].tokens[1:].tolist() == [1, 1, 2, 2, 3], "earlier parts first"

    def test_one_branch_is_the_first_that_has_something_to_say(self) -> None:
        a, b = Part("a", {1: [1]}), Part("b", {1: [2], 2: [2, 2]})
        whole = Merge([a, b])
        views = [view_of(1), view_of(2)]
        states = [whole.begin(v) for v in views]
        trees = whole.propose(states, views, [Budget(9, 9, 1)] * 2)
        assert [t.tokens[1:].tolist() for t in trees] == [[1], [2, 2]]
        assert [first for *_, first in b.asked] == [2]

    def test_the_first_hears_of_its_own_tree_and_the_others_of_the_whole(self) -> None:
        a, b = Part("a", {1: [1, 2]}, own_trees_only=True), Part("b", {1: [1, 3, 4]})
        whole = Merge([a, b])
        states, trees = run(whole, [1])
        whole.observe(states, [step_of(trees[0], [1, 3])])
        assert a.heard == [(("a", 1), [0, 1, 2])]
        assert b.heard == [(("b", 1), [0, 1, 2, 3, 4])]
        assert states[0].first is None, "the next step may go by without a draft"
        prefill = TokenTree.context([1, 2, 3])
        whole.observe(states, [step_of(prefill)])
        assert a.heard[1:] == [(("a", 1), [1, 2, 3])]

    def test_a_first_part_that_understands_all_trees_is_told_once(self) -> None:
        a, b = Part("a", {1: [1]}), Part("b", {1: [2]})
        whole = Merge([a, b])
        states, trees = run(whole, [1])
        whole.observe(states, [step_of(trees[0])])
        assert a.heard == [(("a", 1), [0, 1, 2])]

    def test_what_a_verdict_says_of_the_first_tree(self) -> None:
        def first() -> TokenTree:
            return TokenTree.build([0], [1, 2], [-1, 0])

        whole = fuse(first(), TokenTree.build([0], [1, 2, 5, 4], [-1, 0, 1, -1]), 9)
        assert whole.tokens.tolist() == [0, 1, 2, 5, 4]
        for path, own, tokens, checked in (
            ([], [], [9], 1),
            ([1, 2], [1, 2], [1, 2, 9], 2),
            ([1, 2, 3], [1, 2], [1, 2, 5], 2),
            ([4], [], [4], 1),
        ):
            told = alone(step_of(whole, path), first())
            assert (told.verdict.path, told.verdict.tokens) == (own, tokens)
            assert told.verdict.checked == checked
            assert told.path == [0, *own]
        cut = step_of(whole, [1])
        cut.verdict.tokens, cut.verdict.checked = [1], 1  # a stop fell on the accepted token
        assert alone(cut, first()).verdict.checked == 1
        whole.kill(np.array([False, False, True, False, False]))
        tree = first()
        alone(step_of(whole, [1]), tree)
        assert tree.kind.tolist() == [Kind.CONTEXT, Kind.CANDIDATE, Kind.DEAD]


class TestChoice:
    def test_only_the_chosen_part_knows_of_a_sequence(self) -> None:
        a, b = Part("a", {1: [1], 2: [1]}), Part("b", {1: [2], 2: [2]})
        twin = Part("b", {3: [3]})
        whole = Choice([a, b, twin])
        assert whole.offers == ["a", "b", "b-2"]
        wishes = (None, Speculation(drafter="b"), Speculation(drafter="b-2"), Speculation("off"))
        views = [view_of(i, wish) for i, wish in enumerate(wishes, 1)]
        states = [whole.begin(v) for v in views]
        trees = whole.propose(states, views, [Budget(9 - i, 9) for i in range(4)])
        assert [t.tokens.tolist() for t in trees] == [[0, 1], [0, 2], [0, 3], [0]]
        assert a.asked == [(("a", 1), 9, 1)]
        assert b.asked == [(("b", 2), 8, 2)]
        assert twin.asked == [(("b", 3), 7, 3)]
        whole.observe(states, [step_of(t) for t in trees])
        assert [len(p.heard) for p in (a, b, twin)] == [1, 1, 1]
        assert b.heard == [(("b", 2), [0, 2])]
        for state in states:
            whole.end(state)
        assert [p.ended for p in (a, b, twin)] == [[("a", 1)], [("b", 2)], [("b", 3)]]

    def test_whom_nobody_chose_hears_nothing(self) -> None:
        a, b = Part("a", {1: [1]}), Part("b")
        whole = Choice([a, b])
        states, trees = run(whole, [1])
        whole.observe(states, [step_of(t) for t in trees])
        assert (a.calls, b.calls) == (1, 0)


class TestModelAndTable:
    def test_two_parts_a_model_and_a_table(self) -> None:
        for of in ("draft-model+suffix+suffix", "draft-model", "suffix+draft-model"):
            with pytest.raises(InputError, match="looks tokens up"):
                model_and_table(pair()[1], of, None, None)

    def test_the_named_checkpoint_and_datastore_are_used(self) -> None:
        _, context = pair()
        load, paths = context.load_model, []
        context.load_model = lambda path: (paths.append(path), load(path))[1]
        model, table = model_and_table(context, None, "some/checkpoint", None)
        assert (model.name, table.name) == ("draft-model", "suffix")
        assert [str(p) for p in paths] == ["some/checkpoint"]
        with pytest.raises(InputError, match="datastore no/where"):
            model_and_table(context, None, None, "no/where")


class TestTrees:
    def test_rows_are_what_was_drawn(self) -> None:
        chain = TokenTree.chain([0], [1, 2])
        assert not has_rows(chain)
        for qrow, want in (([0, -1], True), ([-1, 0], True), ([-1, -1], False)):
            tree = TokenTree.build([0], [1, 2], [-1, 0], qrow=qrow, q=torch.eye(3)[:1])
            assert has_rows(tree) == want

    def test_values_lie_between_nothing_and_their_parents(self) -> None:
        tree = TokenTree.build([0], [1, 2, 3], [-1, 0, 1], score=[0.5, 7.0, -2.0])
        assert values(tree) == [1.0, 0.5, 0.5, 0.0]
        assert values(TokenTree.chain([0], [1, 2])) == [1.0, 1.0, 1.0]

    def test_a_subset_keeps_levels_scores_and_kinds(self) -> None:
        tree = TokenTree.build([0], [1, 2, 3, 4], [-1, -1, 1, 2], score=[0.1, 0.2, 0.3, 0.4])
        tree.kill(np.array([False, False, False, False, True]))
        kept = only(tree, [True, False, True, True, True])
        assert kept.tokens.tolist() == [0, 2, 3, 4]
        assert kept.parent.tolist() == [-1, 0, 1, 2]
        assert kept.depth.tolist() == [0, 1, 2, 3]
        assert kept.score is not None
        assert kept.score.tolist() == [1.0, 0.2, 0.3, 0.4]
        assert kept.kind.tolist() == [0, 1, 1, 2]
        kept.validate(5)

    def test_one_hot_nodes_never_leave_their_budget(self) -> None:
        first = TokenTree.chain([5, 0], [1])
        second = TokenTree.chain([5, 0], [1, 2, 3])
        for nodes in (1, 2, 3, 9):
            assert fuse(first, second, nodes).drafted == min(nodes, 3)

    def test_a_dead_node_of_either_stays_dead(self) -> None:
        first, second = TokenTree.chain([0], [1, 2]), TokenTree.chain([0], [1, 3])
        first.kill(np.array([False, True, False]))
        both = fuse(first, second, 9)
        assert both.tokens.tolist() == [0, 1, 2, 1, 3]
        assert both.kind.tolist() == [0, 2, 2, 1, 1], "a dead node stands for nobody"
        assert both.depth.tolist() == [0, 1, 2, 1, 2]
        first, second = TokenTree.chain([0], [1]), TokenTree.chain([0], [3])
        second.kill(np.array([False, True]))
        assert fuse(first, second, 9).kind.tolist() == [0, 1, 2]

    def test_of_equal_siblings_the_first_stands(self) -> None:
        first = TokenTree.build([0], [1, 1], [-1, -1])
        both = fuse(first, TokenTree.chain([0], [1, 4]), 9)
        assert both.tokens.tolist() == [0, 1, 1, 4]
        assert both.parent.tolist() == [-1, 0, 0, 1]

    def test_what_the_second_repeats_itself_is_there_once(self) -> None:
        first, second = TokenTree.chain([0], [1]), TokenTree.build([0], [3, 3, 4], [-1, -1, 1])
        both = fuse(first, second, 9)
        assert both.tokens.tolist() == [0, 1, 3, 4]
        assert both.parent.tolist() == [-1, 0, 0, 2]
        drawn = TokenTree.build([0], [3, 3], [-1, -1], qrow=[0, 1], q=torch.eye(4)[[3, 3]])
        assert fuse(first, drawn, 9).kind.tolist() == [0, 1, 1, 2]

    def test_scores_rows_and_trained_prompts_come_along(self) -> None:
        first = TokenTree.build([0], [1], [-1], score=[0.5])
        first.embeds = {0: torch.ones(3)}
        second = TokenTree.build([0], [2], [-1], score=[0.25])
        both = fuse(first, second, 9)
        assert both.score is not None
        assert both.score.tolist() == [1.0, 0.5, 0.25]
        assert both.embeds is first.embeds
        assert both.qrow is None
        drawn = TokenTree.build([0], [1, 2], [-1, -1], qrow=[-1, 0], q=torch.eye(4)[2:3])
        both = fuse(drawn, TokenTree.chain([0], [3]), 9)
        assert both.qrow is not None
        assert both.qrow.tolist() == [-1, -1, 0, -1]
        assert both.q is drawn.q
        other = TokenTree.build([0], [3, 2], [-1, -1], qrow=[-1, 0], q=torch.eye(4)[3:4])
        both = fuse(drawn, other, 4)
        assert both.tokens.tolist() == [0, 1, 2, 3, 2]
        assert both.qrow is not None
        assert both.qrow.tolist() == [-1, -1, 0, -1, 1]
        assert both.kind.tolist() == [0, 1, 1, 1, 2]
        assert torch.equal(torch.as_tensor(both.q), torch.eye(4)[2:])
