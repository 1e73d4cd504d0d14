"""Drafters made of drafters: specs, fused trees, who is asked, who is told."""

from __future__ import annotations

import pytest
import torch

from foretell import LLM, InputError
from foretell.core import registry
from foretell.core.feedback import Feedback, Rows, Verdict
from foretell.core.params import SamplingParams
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rng import DrafterRng, Purpose, SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.compose import fuse, has_rows, only, parse_parts, rest, values
from foretell.drafters.graft import pruned, slots
from foretell.drafters.merge import alone
from foretell.drafters.rasd import relevant
from helpers_model import pair

CONTEXT = [7, 8]


def tree(tokens: list[int], parents: list[int], **options) -> TokenTree:
    return TokenTree.build(CONTEXT, tokens, parents, **options)


def paths(t: TokenTree) -> list[tuple[int, ...]]:
    alive = [i for i in range(t.n_context, len(t)) if t.kind[i] == Kind.CANDIDATE]
    return [tuple(t.path_tokens(i)) for i in alive]


class TestSpecs:
    def test_parts_and_their_options(self) -> None:
        parts = parse_parts(
            "suffix + draft-model(tokens=4,tree=dyspec)+fallback(of=a+b(x=1),least=2)"
        )
        assert [p.name for p in parts] == ["suffix", "draft-model", "fallback"]
        assert parts[1].options == {"tokens": "4", "tree": "dyspec"}
        assert parts[2].options == {"of": "a+b(x=1)", "least": "2"}

    @pytest.mark.parametrize("text", ["", "a+", "+a", "a(x=1", "a)b", "(x=1)", "a(x=1)b", "a++b"])
    def test_what_cannot_be_read_is_refused_in_one_sentence(self, text: str) -> None:
        with pytest.raises(InputError, match="not a list of drafters") as e:
            parse_parts(text)
        assert "\n" not in str(e.value)

    @pytest.mark.parametrize(
        ("spec", "why"),
        [
            ("merge:of=suffix", "at least 2"),
            ("merge", "needs of="),
            ("fallback:of=suffix+sufix", "did you mean 'suffix'"),
            ("merge:of=suffix+none,nodes=0", "nodes is at least 1"),
            ("bandit:rule=best", "none of watch, ucb, exp3"),
            ("rasd:of=suffix+draft-model", "looks tokens up"),
            ("rasd:of=draft-model+none", "looks tokens up"),
            ("rasd:of=draft-model+suffix,store=x", "not both"),
            ("rasd:keep=-1", "keep is at least 0"),
            ("graft:of=draft-model+prompt-lookup", "use suffix or retrieval"),
            ("graft:prune=2", "prune within 0..1"),
        ],
    )
    def test_wrong_options(self, spec: str, why: str) -> None:
        with pytest.raises(InputError, match=why):
            registry.create("drafter", spec, pair()[1])

    def test_the_whole_needs_and_holds_what_its_parts_do(self) -> None:
        context = pair()[1]
        whole = registry.create("drafter", "fallback:of=token-recycling+draft-model+none", context)
        assert whole.needs.logits
        assert whole.needs.own_model
        assert whole.shapes == {"tree", "chain", "onehot", "q"}
        merged = registry.create("drafter", "merge:of=suffix+draft-model", context)
        assert merged.shapes == {"tree", "onehot", "q"}
        nested = registry.create("drafter", "fallback:of=bandit(of=suffix+none)+none", context)
        assert nested.clocked

    def test_rules_for_siblings_of_one_origin_refuse_merges(self) -> None:
        target, context = pair()
        draft = "merge:of=draft-model(branching=2)+draft-model(tokens=1)"
        for verify in ("block", "multipath", "greedy-draft", "spectr"):
            with pytest.raises(InputError):
                LLM(target, draft=draft, verify=verify, context=context)
        LLM(target, draft=draft, verify="rejection", context=context)


class TestFuse:
    def test_union_of_paths_without_duplicates(self) -> None:
        first = tree([1, 2, 3], [-1, 0, -1])
        second = tree([1, 4, 3, 5, 6], [-1, 0, -1, 2, -1])
        both = fuse(first, second, 99)
        both.validate(9)
        assert sorted(paths(both)) == sorted(set(paths(first)) | set(paths(second)))
        assert both.tokens[: len(first)].tolist() == first.tokens.tolist()
        assert both.tokens[:2].tolist() == CONTEXT

    def test_the_likeliest_paths_of_the_second_get_the_room(self) -> None:
        first = tree([1], [-1])
        second = tree([2, 3, 4, 5], [-1, 0, -1, 2], score=[0.5, 0.9, 0.9, 0.4])
        assert paths(fuse(first, second, 3)) == [(1,), (4,), (2,)]
        assert paths(fuse(first, second, 4)) == [(1,), (4,), (2,), (2, 3)]
        assert paths(fuse(first, second, 1)) == [(1,)]
        assert fuse(first, TokenTree.context(CONTEXT), 0) is first

    def test_rows_move_and_repeated_draws_stay_dead(self) -> None:
        q = torch.eye(9)
        first = tree([1, 2], [-1, -1], qrow=[0, 0], q=q[:1])
        second = tree([3, 1, 5], [-1, -1, 1], qrow=[0, 0, 1], q=q[1:3], score=[0.1, 0.2, 0.3])
        both = fuse(first, second, 99)
        assert both.tokens[2:].tolist() == [1, 2, 3, 1, 5]
        assert both.kind[2:].tolist() == [1, 1, 1, 2, 1]
        assert both.parent[2:].tolist() == [1, 1, 1, 1, 2]  # 5 hangs below the 1 that lives
        assert both.qrow is not None
        assert both.qrow[2:].tolist() == [0, 0, 1, 1, 2]
        assert torch.equal(both.q, q[:3])
        assert both.children(1) == [2, 3, 4, 5]
        with pytest.raises(ValueError, match="never cut"):
            fuse(first, second, 4)

    def test_one_hot_nodes_beside_drawn_ones(self) -> None:
        first = tree([1], [-1])
        second = tree([1, 2], [-1, 0], qrow=[0, 1], q=torch.eye(9)[:2])
        both = fuse(first, second, 9)
        assert both.qrow is not None
        assert both.qrow.tolist() == [-1, -1, -1, 0, 1]
        assert both.kind.tolist() == [0, 0, 1, 2, 1]
        assert has_rows(both)
        assert not has_rows(first)

    def test_values_and_subsets(self) -> None:
        t = tree([1, 2, 3], [-1, 0, 0], score=[0.5, 0.5, 3.0])
        assert values(t) == [1, 1, 0.5, 0.25, 0.5]
        kept = only(t, [True, True, True, False, True])
        assert paths(kept) == [(1,), (1, 3)]
        assert paths(only(t, [True, True, False, True, True])) == []
        assert only(t, [True] * 5) is t
        assert rest(Budget(5, 4, 1), t) == Budget(2, 4, 1)


def view_of(text: list[int], draw: Draw = Draw.TOP) -> SeqView:
    temperature = 0.0 if draw is Draw.TOP else 1.0
    return SeqView(text, 4, SamplingParams(temperature=temperature), SeqRng(5), draw, len(text) - 1)


class TestParts:
    def test_fall_through_asks_in_order(self) -> None:
        spec = "fallback:of=prompt-lookup(tokens=2,min_ngram=2)+draft-model(tokens=3)"
        drafter = registry.create("drafter", spec, pair()[1])
        for text, owner, size in (([1, 2, 3, 4, 1, 2], 0, 2), ([1, 2, 3, 4, 5, 6], 1, 3)):
            view = view_of(text)
            state = drafter.begin(view)
            (t,) = drafter.propose([state], [view], [Budget(9, 9)])
            assert (t.drafted, state.owner) == (size, owner)
            model = state.parts[1]
            assert bool(model.cache.n) == (owner == 1), "who is not asked sleeps"

    def test_parts_have_noise_of_their_own_at_every_depth(self) -> None:
        root = SeqRng(3)
        rngs = [root, *(DrafterRng(root, i) for i in range(3))]
        rngs += [DrafterRng(r, i) for r in rngs[1:] for i in range(3)]
        rows = {r.uniform(5, Purpose.DRAFT, salt=7) for r in rngs}
        assert len(rows) == len(rngs)
        assert len({r.uniform(5, Purpose.TARGET) for r in rngs}) == 1  # replay: the target's own

    def test_two_draws_of_one_model_differ(self) -> None:
        drafter = registry.create(
            "drafter", "merge:of=draft-model(tokens=1)+draft-model(tokens=1)", pair()[1]
        )
        seen = set()
        for n in range(12):
            view = view_of([1, 2, 3, n % 5, n % 3], Draw.SAMPLE)
            (t,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 9)])
            assert t.drafted == 2
            seen.add(int(t.tokens[-1]) == int(t.tokens[-2]))
        assert seen == {True, False}

    def test_the_first_part_hears_of_its_own_tree(self) -> None:
        first = tree([1, 2], [-1, 0])
        whole = fuse(first, tree([1, 3, 4], [-1, 0, 1]), 9)
        verdict = Verdict([2, 4, 5], [1, 3, 4, 6], 3)
        rows = Rows(torch.zeros(1, 1), torch.zeros(len(whole), dtype=torch.int64).numpy())
        own = alone(Feedback(verdict.tokens, [0, 1, 2, 4, 5], whole, rows, verdict), first)
        assert own.tree is first
        assert (own.verdict.path, own.verdict.tokens, own.verdict.checked) == ([2], [1, 3], 2)
        assert own.path == [0, 1, 2]


class TestRasd:
    def test_roots_the_model_does_not_believe_in_go(self) -> None:
        table = tree([1, 2, 3, 4], [-1, 0, -1, 2])
        q = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.0, 0.7])
        assert paths(relevant(table, [q], 2, set())) == [(3,), (3, 4)]
        assert paths(relevant(table, [q], 0, {1})) == [(1,), (1, 2)]
        assert relevant(table, [], 0, set()) is table

    def test_a_chain_only_target_gets_chains(self) -> None:
        for spec in ("rasd:of=draft-model+suffix", "graft:of=draft-model+suffix,prune=0"):
            drafter = registry.create("drafter", spec, pair()[1])
            view = view_of([1, 2, 3, 4, 1, 2, 3, 4, 1, 2])
            (t,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 9, 1)])
            assert t.is_chain
            assert t.drafted >= 3


class TestGraft:
    def test_pruning_and_the_order_of_places(self) -> None:
        t = tree([1, 2, 3, 4], [-1, 0, -1, 0], score=[0.9, 0.05, 0.3, 0.8])
        cut, where = pruned(t, 0.1)
        assert paths(cut) == [(1,), (3,), (1, 4)]
        assert where == {2}
        # leaves by value: (1, 4) 0.72, (3) 0.3; then (1), which lost a child; then the tip
        assert slots(cut, where) == [4, 3, 2, 1]
        drawn = tree([1], [-1], qrow=[0], q=torch.eye(9)[:1], score=[0.01])
        assert pruned(drawn, 0.5) == (drawn, set())

    def test_freed_places_are_filled_from_behind_the_path(self) -> None:
        """The model's chain leads into text that was there before; its continuation is found."""
        context = pair()[1]
        text = [1, 2, 3, 4, 5, 6]
        twin = registry.create("drafter", "draft-model:tokens=2", context)
        plain = view_of(list(text))
        (chain,) = twin.propose([twin.begin(plain)], [plain], [Budget(9, 9)])
        a, b = chain.tokens[1:].tolist()
        text = [a, b, 9, 0, 9, *text]
        spec = "graft:of=draft-model(tokens=2)+suffix,nodes=5,prune=0"
        drafter = registry.create("drafter", spec, context)
        view = view_of(text)
        (t,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 9)])
        assert (a, b, 9, 0) in paths(t)
        assert t.drafted <= 5

    def test_suffix_and_retrieval_look_behind_a_path_without_learning_it(self) -> None:
        drafter = registry.create("drafter", "suffix", pair()[1])
        view = view_of([1, 2, 3, 4, 5, 1, 2])
        state = drafter.begin(view)
        before = drafter.propose([state], [view], [Budget(3, 3)])[0]
        after = drafter.after(state, view, [3], Budget(2, 2))
        assert after.tokens[after.n_context - 1 :].tolist() == [3, 4, 5]
        again = drafter.propose([state], [view], [Budget(3, 3)])[0]
        assert again.tokens.tolist() == before.tokens.tolist() == [2, 3, 4, 5]


class TestRiders:
    """Nodes that ride along with a tree are no drafts of it."""

    def test_a_window_is_nothing_to_say(self) -> None:
        target, context = pair()
        draft = "fallback:of=lookahead(window=4,ngram=3)+draft-model(tokens=3)"
        llm = LLM(target, draft=draft, context=context)
        lone = LLM(target, draft="lookahead:window=4,ngram=3", context=context)
        params = SamplingParams(max_tokens=60)
        both, one = (m.generate([[1, 2, 3, 4]], params)[0] for m in (llm, lone))
        assert both.token_ids == one.token_ids
        assert both.stats.steps < one.stats.steps, "the model drafts where the pool is empty"

    def test_a_fused_tree_takes_no_riders_in(self) -> None:
        first = TokenTree.chain([9], [1, 2])
        second = TokenTree.build([9], [1, 3, 4, 5], [-1, 0, -1, 2])
        second.kind[3:] = Kind.RIDER
        whole = fuse(first, second, 9)
        assert whole.tokens.tolist() == [9, 1, 2, 3]
        assert (whole.kind[1:] == Kind.CANDIDATE).all()
