"""What rules accept, against the optimal-transport bound; lossy rules; which pairs are refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.cli.main import main
from foretell.core.errors import InputError
from foretell.core.protocols import Draw, SeqView
from foretell.core.rng import SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.lab.verifiers import bound, chain, level, problems
from foretell.verify.greedy_draft import GreedyDraft
from foretell.verify.judge import Judge, load_head
from foretell.verify.multipath import MultiPath
from foretell.verify.reflective import Reflective
from foretell.verify.rejection import Rejection
from foretell.verify.specinfer import SpecInfer
from foretell.verify.spectr import SpecTr, k_seq
from foretell.verify.typical import Typical, typical_threshold
from helpers_drafts import Grow, iid, lazily, paths, sampled, table, top_one
from helpers_exact import Child, Prefix, Table, TableRows, outcomes
from helpers_model import Letters, pair

DRAWN = {  # rule -> (itself, how its k children are drawn)
    "rejection": (Rejection(), lambda q, k: sampled(q, [k])),
    "specinfer": (SpecInfer(), lambda q, k: iid(q, [k])),
    "spectr": (SpecTr(), lambda q, k: paths(q, k, 1)),
    "multipath": (MultiPath(), lambda q, k: paths(q, k, 1)),
    "greedy-draft": (GreedyDraft(), lambda q, k: top_one(q, [k])),
    "one-hot": (Rejection(), lambda q, k: most_probable(q, k)),
}
KINDS = [("dense", "dense"), ("zeros", "dense"), ("dense", "zeros"), ("even", "odd")]


def most_probable(q: Table, k: int) -> Grow:
    """The k most probable tokens, ties and zeros by id."""

    def grow(branch, prefix: Prefix, level: int) -> list[Child]:
        best = (-q(prefix)).argsort(stable=True)[:k].tolist()
        return [] if level else [(x, None, Kind.CANDIDATE) for x in best]

    return grow


def accepted(rule, grow, p: Table) -> float:
    """The probability that one child stands, all random outcomes enumerated."""

    def run(branch) -> bool:
        tree = lazily(grow)(branch, ())
        return rule(tree, TableRows(p, tree), branch, 0).accepted > 0

    return outcomes(run).get(True, 0.0)


def rows(seed: int, vocab: int, kinds=("dense", "dense")) -> tuple[Table, Table]:
    return table(("p", seed), vocab, kinds[0]), table(("q", seed), vocab, kinds[1])


class TestOneLevel:
    @pytest.mark.parametrize("name", DRAWN)
    def test_the_formula_is_what_the_rule_does(self, name: str) -> None:
        rule, draw = DRAWN[name]
        formula, _ = level.RULES[name]
        for (seed, kinds), k in itertools.product(enumerate(KINDS), (1, 2, 3)):
            p, q = rows(seed, 4, kinds)
            want = accepted(rule, draw(q, k), p)
            assert formula(p(()).numpy(), q(()).numpy(), k) == pytest.approx(want, abs=1e-9)

    @pytest.mark.parametrize("name", DRAWN)
    def test_no_rule_exceeds_the_bound(self, name: str) -> None:
        formula, drawn = level.RULES[name]
        most = level.BOUNDS[drawn]
        random = np.random.default_rng(3)
        gaps = []
        for temperature, k in itertools.product((0.4, 1.0, 2.0), (1, 2, 3, 5)):
            settings = problems.Settings(vocab=12, agreement=0.5)
            p, q = problems.random_pair(settings, random, temperature)
            got, best = formula(p, q, k), most(p, q, k)
            assert got <= best + 1e-9
            gaps.append(best - got)
            if k == 1 and name != "one-hot":
                assert got == pytest.approx(1 - np.abs(p - q).sum() / 2)
                assert best == pytest.approx(got, abs=1e-12)
        if name in ("specinfer", "spectr", "rejection"):
            assert max(gaps) > 0.01

    def test_sampling_refused_siblings_agrees_with_following_all(self, monkeypatch) -> None:
        p, q = problems.random_pair(problems.Settings(vocab=20), np.random.default_rng(0), 1.0)
        exact = level.without_replacement(p, q, 4)
        monkeypatch.setattr(level, "EXACT", 10)
        assert level.without_replacement(p, q, 4) == pytest.approx(exact, abs=0.01)

    def test_the_order_that_the_papers_report(self) -> None:
        found = {(r.k, r.rule): r for r in problems.levels(problems.Settings(temperatures=(1.0,)))}
        for k in (2, 4):
            of = {rule: found[k, rule].accepted for rule in level.RULES}
            assert of["rejection"] > of["spectr"] > of["specinfer"]
            assert of["greedy-draft"] > of["rejection"]
            assert found[k, "greedy-draft"].share == pytest.approx(1)
            assert found[k, "spectr"].share > 1 - 1 / np.e


class TestBound:
    """The formulas against the transport problem itself, by linear programming."""

    @pytest.mark.parametrize("kinds", KINDS)
    def test_formulas_solve_the_transport_problem(self, kinds) -> None:
        for seed, k in itertools.product(range(3), (1, 2, 3)):
            p, q = (t(()).numpy() for t in rows(seed, 4, kinds))
            target = {(x,): w for x, w in enumerate(p)}
            for again, formula in (
                (True, bound.best_independent),
                (False, bound.best_without_replacement),
            ):
                drafts = draft_law(q, k, again)
                assert sum(drafts.values()) == pytest.approx(1)
                best = bound.transport(drafts, target, lambda d, t: float(t[0] in d))
                assert formula(p, q, k) == pytest.approx(best, abs=1e-8)

    def test_a_prefix_of_q_over_p_is_the_best_subset(self) -> None:
        p, q = (t(()).numpy() for t in rows(5, 5))
        subsets = itertools.chain.from_iterable(
            itertools.combinations(range(5), n) for n in range(6)
        )
        least = min(p[list(h)].sum() - q[list(h)].sum() ** 2 for h in subsets)
        assert bound.best_independent(p, q, 2) == pytest.approx(1 + least)

    def test_quadrature_is_exact_for_thousands_of_tokens(self) -> None:
        """k = 2 has a closed form: the sum over the first draw."""
        _, q = problems.random_pair(problems.Settings(vocab=3000), np.random.default_rng(1), 0.7)
        head, other = np.cumsum(q), q / (1 - q)
        closed = head * np.cumsum(other) - np.cumsum(other * q)
        assert np.abs(bound.all_inside(q, 2) - closed).max() < 1e-9

    def test_top_one_is_the_optimum_of_its_drafts(self) -> None:
        for seed, k in itertools.product(range(3), (2, 3)):
            p, q = (t(()).numpy() for t in rows(seed, 4))
            top, rest = bound.top_and_rest(q, k)
            drafts = {(*top.tolist(), x): w for x, w in enumerate(rest) if w > 0}
            target = {(x,): w for x, w in enumerate(p)}
            best = bound.transport(drafts, target, lambda d, t: float(t[0] in d))
            assert bound.best_top_one(p, q, k) == pytest.approx(best, abs=1e-8)


def draft_law(q: np.ndarray, k: int, replace: bool) -> dict[tuple, float]:
    law = {}
    for drawn in itertools.product(range(len(q)), repeat=min(k, int((q > 0).sum()))):
        left, chance = q.copy(), 1.0
        for x in drawn:
            chance *= left[x] / left.sum()
            if not replace:
                left[x] = 0
            if chance == 0:
                break
        if chance > 0:
            law[drawn] = chance
    if replace and k > int((q > 0).sum()):
        return {d: w for d, w in _powers(q, k).items() if w > 0}
    return law


def _powers(q: np.ndarray, k: int) -> dict[tuple, float]:
    return {d: float(np.prod(q[list(d)])) for d in itertools.product(range(len(q)), repeat=k)}


class TestChains:
    def test_no_rule_exceeds_the_bound_over_two_levels(self) -> None:
        for seed in range(4):
            p, q = rows(seed, 3)
            found = chain.expected(p, q, 3, 2, (2, 3))
            assert found["rejection"] <= found["block"] + 1e-12
            assert found["block"] <= found["bound 1"] + 1e-8
            for k in (2, 3):
                assert found[f"multipath {k}"] <= found[f"bound {k}"] + 1e-8
            assert found["bound 1"] < found["bound 2"] < found["bound 3"]

    def test_formulas_are_what_the_rules_do(self) -> None:
        from foretell.verify.block import Block

        p, q = rows(1, 3)

        def mean(rule, grow) -> float:
            def run(branch) -> int:
                tree = lazily(grow)(branch, ())
                return rule(tree, TableRows(p, tree), branch, 0).accepted

            return sum(n * w for n, w in outcomes(run).items())

        two = sampled(q, [1, 1])
        assert chain.token_level(p, q, 3, 2) == pytest.approx(mean(Rejection(), two))
        assert chain.block(p, q, 3, 2) == pytest.approx(mean(Block(), two))
        assert chain.block(p, q, 3, 2, 2) == pytest.approx(mean(MultiPath(), paths(q, 2, 2)))

    def test_one_certain_drafter_attains_everything(self) -> None:
        p, _ = rows(0, 3)
        found = chain.expected(p, p, 3, 2, (2,))
        assert found["rejection"] == pytest.approx(2)
        assert found["bound 1"] == pytest.approx(2)


def test_k_seq_scale_is_the_smallest_allowed() -> None:
    for seed, k in itertools.product(range(5), (2, 3, 6)):
        p, q = (t(()) for t in rows(seed, 6))
        rho, rest = k_seq(p, q, k)
        beta = float(torch.minimum(q, p / rho).sum())
        assert 1 <= rho <= k
        assert 1 - (1 - beta) ** k <= rho * beta + 1e-9
        assert rest.min() >= 0
        if rho > 1 + 1e-5:
            less = rho * (1 - 1e-5)
            beta = float(torch.minimum(q, p / less).sum())
            assert 1 - (1 - beta) ** k > less * beta


# lossy rules


class Fixed:
    """Rows given by hand, one for every node, and hidden states."""

    host = True

    def __init__(self, table: list[list[float]], hidden=None, deterministic: bool = False) -> None:
        self.table, self.deterministic = torch.tensor(table), deterministic
        self.states = hidden

    def probs(self, nodes, read=None) -> torch.Tensor:
        return self.table[list(nodes if read is None else read)]

    def greedy(self, nodes) -> list[int]:
        return self.table[list(nodes)].argmax(-1).tolist()

    def hidden(self, tap, nodes) -> torch.Tensor:
        assert tap == "last"
        return torch.tensor(self.states)[list(nodes)]


SURE, UNSURE = [0.94, 0.05, 0.01], [0.4, 0.35, 0.25]


class TestTypical:
    def test_threshold(self) -> None:
        p = torch.tensor([SURE, UNSURE])
        entropy = -(p * p.log()).sum(-1)
        want = [min(0.09, 0.3 * float(torch.exp(-h))) for h in entropy]
        assert typical_threshold(p, 0.09, 0.3).tolist() == pytest.approx(want)
        wide = torch.full((1, 64), 1 / 64)  # exp(-H) = 1 / 64: here entropy decides
        assert typical_threshold(wide, 0.09, 0.3).tolist() == pytest.approx([0.3 / 64])
        assert Typical(epsilon=0.25).delta == 0.5
        assert Typical(epsilon=0.25, delta=0.0).delta == 0.0

    def test_unlikely_tokens_pass_where_the_target_is_unsure_only(self) -> None:
        tree = TokenTree.build([0], [1, 2], [-1, 0])
        sure = Typical()(tree, Fixed([SURE] * 3), SeqRng(0), 1)
        assert (sure.path, sure.checked) == ([], 1)
        unsure = Typical()(tree, Fixed([UNSURE] * 3), SeqRng(0), 1)
        assert (unsure.path, unsure.tokens[:2], unsure.checked) == ([1, 2], [1, 2], 2)

    def test_the_longest_path_stands_then_the_most_probable(self) -> None:
        #  tip -> a(1) -> c(1);  tip -> b(0) -> d(0), e(1)
        tree = TokenTree.build([0], [1, 0, 1, 0, 1], [-1, -1, 0, 1, 1])
        verdict = Typical()(tree, Fixed([UNSURE] * 6), SeqRng(0), 1)
        assert verdict.tokens[:2] == [0, 0]
        shallow = TokenTree.build([0], [0, 1, 1], [-1, -1, 1])
        assert Typical()(shallow, Fixed([UNSURE] * 4), SeqRng(0), 1).tokens[:2] == [1, 1]

    def test_dead_nodes_never_stand(self) -> None:
        tree = TokenTree.chain([0], [1, 1])
        tree.kind[1:] = Kind.DEAD
        assert Typical()(tree, Fixed([UNSURE]), SeqRng(0), 1).path == []

    def test_nucleus(self) -> None:
        tree = TokenTree.build([0], [2], [-1])  # 0.75 lies above it
        assert Typical(nucleus=0.8)(tree, Fixed([UNSURE] * 2), SeqRng(0), 1).path == [1]
        assert Typical(nucleus=0.7)(tree, Fixed([UNSURE] * 2), SeqRng(0), 1).path == []
        assert Typical(nucleus=0.8)(tree, Fixed([SURE] * 2), SeqRng(0), 1).path == []

    def test_nothing_stands_below_what_does_not_pass(self) -> None:
        """And the bonus token is drawn with the noise of its own position."""
        likely = [0.0, 0.05, 0.95]
        tree = TokenTree.chain([0], [2, 2, 1, 2])
        noise = []

        class Note(Never):
            def pick(self, p: torch.Tensor, position: int) -> int:
                noise.append(position)
                return super().pick(p, position)

        rows = [likely, likely, [0.9, 0.05, 0.05], likely, likely]
        verdict = Typical()(tree, Fixed(rows), Note(), 7)
        assert (verdict.path, verdict.tokens, verdict.checked) == ([1, 2], [2, 2, 0], 3)
        assert noise == [9]

    def test_a_whole_nucleus_does_not_hold_what_cannot_be(self) -> None:
        """The rest may fall short of 1 by rounding."""
        short = [0.5, 0.49999, 0.0]
        tree = TokenTree.build([0], [2], [-1])
        assert Typical(nucleus=1.0)(tree, Fixed([short] * 2), SeqRng(0), 1).path == []

    def test_of_equally_long_paths_the_whole_counts_not_the_last_token(self) -> None:
        tree = TokenTree.build([0], [0, 1, 0, 0], [-1, -1, 0, 1])
        rows = [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4], UNSURE, UNSURE]
        assert Typical()(tree, Fixed(rows), SeqRng(0), 1).path == [1, 3]

    def test_temperature_zero_takes_the_argmax(self) -> None:
        tree = TokenTree.build([0], [1, 0], [-1, -1])
        verdict = Typical()(tree, Fixed([UNSURE] * 3, deterministic=True), SeqRng(0), 1)
        assert verdict.tokens == [0, 0]

    @pytest.mark.parametrize("bad", [{"epsilon": 2.0}, {"delta": -1.0}, {"nucleus": 0.0}])
    def test_bad_options(self, bad: dict[str, float]) -> None:
        with pytest.raises(InputError):
            Typical(**bad)


class Never:
    """Refuses whatever can be refused."""

    def flip(self, p: float, w: float, position: int, index: int) -> bool:
        return False

    def pick(self, p: torch.Tensor, position: int) -> int:
        return int(p.argmax())


class TestJudge:
    tree = TokenTree.chain([0], [1, 2])
    hidden = ((0.0, 0.0), (4.0, 0.0), (-4.0, 0.0))  # of the tip and the two drafts

    def judge(self, **options: Any) -> Judge:
        return Judge(torch.tensor([1.0, 0.0]), **options)

    def run(self, rule: Judge, **more: Any):
        return rule(self.tree, Fixed([UNSURE] * 3, self.hidden, **more), Never(), 1)

    def test_the_head_pardons_what_the_rule_refuses(self) -> None:
        verdict = self.run(self.judge())
        assert verdict.path == [1]  # sigmoid(4) passes, sigmoid(-4) does not
        assert self.run(self.judge(bias=9.0)).path == [1, 2]
        assert self.run(self.judge(threshold=0.99)).path == []

    def test_threshold_one_pardons_nothing(self) -> None:
        assert self.run(self.judge(threshold=1.0, bias=1e9)).path == []

    def test_ends_and_improbable_tokens_are_not_pardoned(self) -> None:
        assert self.run(self.judge(strict=frozenset({1}))).path == []
        assert self.run(self.judge(floor=0.36)).path == []
        banned = [[0.6, 0.0, 0.4]] * 3
        verdict = self.judge(bias=9.0)(self.tree, Fixed(banned, self.hidden), Never(), 1)
        assert verdict.path == []

    def test_a_token_counts_by_what_its_parent_says(self) -> None:
        rows = [[0.5, 0.3, 0.2], [0.9, 0.0, 0.1], UNSURE]
        judge = self.judge(bias=9.0, floor=0.15)
        assert judge(self.tree, Fixed(rows, self.hidden), Never(), 1).path == [1]

    def test_ends_are_those_of_the_tokenizer(self, tmp_path) -> None:
        from safetensors.torch import save_file

        save_file({"weight": torch.ones(4)}, tmp_path / "head.safetensors")
        context = pair()[1]
        for tokenizer, strict in ((None, set()), (Letters("abcdefghijk", eos=3), {3})):
            context.tokenizer = tokenizer
            rule = Judge.build(context, str(tmp_path / "head.safetensors"))
            assert rule.strict == strict

    def test_what_is_dead_is_not_read_and_not_pardoned(self) -> None:
        tree = TokenTree.chain([0], [1, 2])
        tree.kill(np.array([False, True, False]))
        rows = Fixed([UNSURE], ((0.0, 0.0),))  # nothing was computed for it
        assert self.judge(bias=9.0)(tree, rows, Never(), 1).path == []

    def test_siblings_are_refused_with_flips_of_their_own(self) -> None:
        seen = []

        class Note(Never):
            def flip(self, p: float, w: float, position: int, index: int) -> bool:
                seen.append((position, index))
                return False

        tree = TokenTree.build([0], [1, 2], [-1, -1])
        self.judge(threshold=1.0)(tree, Fixed([UNSURE] * 3, self.hidden), Note(), 4)
        assert seen == [(4, 0), (4, 1)]

    def test_temperature_zero_asks_the_head_where_the_argmax_differs(self) -> None:
        verdict = self.run(self.judge(), deterministic=True)
        assert verdict.tokens == [1, 0]

    def test_head_files(self, tmp_path) -> None:
        from safetensors.torch import save_file

        path = tmp_path / "head.safetensors"
        for shape in ((4,), (1, 4)):
            save_file({"weight": torch.ones(shape), "bias": torch.tensor([0.5])}, path)
            weight, bias = load_head(path, 4)
            assert (weight.tolist(), bias) == ([1.0] * 4, 0.5)
        save_file({"weight": torch.ones(4)}, path)
        assert load_head(path, 4)[1] == 0
        for bad in ({"weight": torch.ones(3)}, {"w": torch.ones(4)}, {"weight": torch.ones(4, 1)}):
            save_file(bad, path)
            with pytest.raises(InputError, match="hidden size"):
                load_head(path, 4)
        save_file({"weight": torch.full((4,), float("nan"))}, path)
        with pytest.raises(InputError, match="finite"):
            load_head(path, 4)
        for bias in (torch.tensor([float("inf")]), torch.zeros(2)):
            save_file({"weight": torch.ones(4), "bias": bias}, path)
            with pytest.raises(InputError, match="one finite 'bias'"):
                load_head(path, 4)
        path.write_text("nonsense")
        with pytest.raises(InputError, match="not a safetensors file"):
            load_head(path, 4)
        with pytest.raises(InputError, match="no file"):
            load_head(tmp_path / "absent", 4)


class TestReflective:
    view = SeqView([0], 1, SamplingParams(), SeqRng(0))

    def test_the_probe_is_a_second_reading_behind_the_draft(self) -> None:
        rule = Reflective([7, 8], weight=0.5)
        tree = rule.extend(TokenTree.chain([5, 0], [1, 2, 3]), self.view, 9)
        assert tree.tokens.tolist() == [5, 0, 1, 2, 3, 7, 8, 1, 2]
        assert tree.parent.tolist() == list(range(-1, 8))
        assert tree.depth.tolist() == list(range(9))
        assert (tree.kind[5:] == Kind.RIDER).all()
        assert tree.asked == {2: 6, 3: 7, 4: 8}  # type: ignore[attr-defined]
        tree.validate(9)

    def test_no_room_no_probe(self) -> None:
        tree = TokenTree.chain([0], [1, 2, 3])
        assert Reflective([7, 8]).extend(tree, self.view, 3) is tree
        assert Reflective([7, 8], weight=0).extend(tree, self.view, 99) is tree
        bare = TokenTree.context([0])
        assert Reflective([7, 8]).extend(bare, self.view, 99) is bare

    def test_dead_drafts_are_not_read_again(self) -> None:
        tree = TokenTree.chain([0], [1, 2, 3], q=torch.full((3, 4), 0.25))
        tree.kill(np.array([False, False, False, True]))
        longer = Reflective([7]).extend(tree, self.view, 99)
        assert longer.tokens[4:].tolist() == [7, 1]
        assert longer.parent[4] == 2
        assert longer.qrow is not None
        assert longer.qrow.tolist() == [-1, 0, 1, 2, -1, -1]
        assert Reflective([7], trees=False).extend(tree, self.view, 99) is tree

    def test_both_readings_are_fused(self) -> None:
        tree = Reflective([0], weight=0.5).extend(TokenTree.chain([0], [1]), self.view, 9)
        asked: list[tuple[float, float]] = []

        class Note(Never):
            def flip(self, p, w, position, index):
                asked.append((p, w))
                return True

        p = Fixed([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
        Reflective([0], weight=0.5)(tree, p, Note(), 1)
        assert asked == [(pytest.approx(0.45), 1.0)]

    def test_temperature_zero_takes_the_argmax_of_the_fusion(self) -> None:
        p = Fixed([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], deterministic=True)
        for weight, path in ((0.2, []), (0.8, [1])):
            rule = Reflective([0], weight=weight)
            tree = rule.extend(TokenTree.chain([0], [1]), self.view, 9)
            verdict = rule(tree, p, SeqRng(0), 1)
            assert verdict.path == path
            assert verdict.tokens[-1] == 0  # what follows comes from the usual rows

    @pytest.mark.parametrize("bad", [{"weight": 1.5}, {"weight": 0.5, "prompt": []}])
    def test_bad_options(self, bad: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            Reflective(**{"prompt": [1], **bad})


# through the engine

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, seed=3)
GREEDY = SamplingParams(max_tokens=40)
CHAIN, TREE = "draft-model:tokens=3", "draft-model:tokens=3,branching=2"


def engine(draft: str, verify: Any, **options: Any) -> LLM:
    target, context = pair()
    return LLM(target, draft=draft, verify=verify, context=context, allow_lossy=True, **options)


def text(draft: str, verify: Any, params: SamplingParams = SAMPLED, **options: Any) -> list[int]:
    return engine(draft, verify, **options).generate([PROMPT], params)[0].token_ids


LOSSLESS = ["specinfer", "spectr", "greedy-draft", "multipath", "block"]


@pytest.mark.parametrize("verify", LOSSLESS)
def test_lossless_rules_run_from_the_engine(verify: str) -> None:
    for draft in (CHAIN, TREE, "prompt-lookup:min_ngram=1", "none"):
        if draft == TREE and verify == "block":
            continue
        llm = engine(draft, verify)
        assert str(llm.rules.promise(SAMPLED)) == "lossless"
        out = llm.generate([PROMPT], SAMPLED)[0]
        assert len(out.token_ids) == 40
        if draft in (CHAIN, TREE):
            assert out.stats.accepted > 0
        assert text(draft, verify) == out.token_ids  # the seed fixes it
        assert text(draft, verify, GREEDY) == text("none", "auto", GREEDY)


@pytest.mark.parametrize("verify", ["typical", "reflective:weight=0", Judge(torch.zeros(4))])
def test_lossy_rules_are_refused_without_consent(verify) -> None:
    target, context = pair()
    with pytest.raises(InputError, match="allow-lossy"):
        LLM(target, draft=CHAIN, verify=verify, context=context)
    assert str(engine(CHAIN, verify).rules.promise(SAMPLED)) == "lossy"


def test_judge_with_threshold_one_is_rejection() -> None:
    for draft, seed in itertools.product((CHAIN, TREE), range(5)):
        params = SamplingParams(max_tokens=30, temperature=1.0, seed=seed)
        judge = Judge(torch.ones(4), bias=50.0, threshold=1.0)
        assert text(draft, judge, params) == text(draft, "rejection", params)
    assert text(CHAIN, Judge(torch.ones(4), threshold=1.0), GREEDY) == text("none", "auto", GREEDY)


def test_a_judge_that_pardons_everything_emits_the_drafts() -> None:
    llm = engine(CHAIN, Judge(torch.zeros(4), bias=50.0))
    stats = llm.generate([PROMPT], SAMPLED)[0].stats
    assert stats.accepted >= 0.99 * stats.drafted - 3
    strict = text(CHAIN, Judge(torch.zeros(4), bias=50.0, strict=frozenset(range(11))))
    assert strict == text(CHAIN, "rejection")


def test_only_the_judge_taps_hidden_states() -> None:
    target, context = pair(taps=["last"])
    LLM(
        target, draft=CHAIN, verify=Judge(torch.ones(4)), context=context, allow_lossy=True
    ).generate([PROMPT], SAMPLED)
    target, context = pair(taps=[])
    LLM(target, draft=CHAIN, verify="rejection", context=context).generate([PROMPT], SAMPLED)


def test_reflective_with_weight_zero_is_rejection() -> None:
    for seed in range(5):
        params = SamplingParams(max_tokens=30, temperature=1.0, seed=seed)
        assert text(CHAIN, "reflective:weight=0", params) == text(CHAIN, "rejection", params)


def test_the_probe_runs_in_the_same_forward() -> None:
    plain, probing = engine(CHAIN, "rejection"), engine(CHAIN, Reflective([1, 2], weight=0.4))
    outs = [llm.generate([PROMPT], SAMPLED)[0] for llm in (plain, probing)]
    targets: list[Any] = [plain.model, probing.model]
    for out, target in zip(outs, targets, strict=True):
        assert target.forwards == out.stats.steps
    assert targets[1].rows_fed > targets[0].rows_fed
    assert len(outs[1].token_ids) == 40


def test_probes_leave_no_trace_in_the_cache() -> None:
    """At temperature 0 a reading that always agrees with the first changes nothing."""
    rule = Reflective([1, 2, 3], weight=1e-9)
    for rows in (None, 60):
        assert text(CHAIN, rule, GREEDY, kv_rows=rows) == text("none", "auto", GREEDY)


def test_a_tokenizer_is_needed_to_reflect() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        engine(CHAIN, "reflective")


def test_pairs_that_would_be_biased_are_refused() -> None:
    for draft, verify, why in (
        (TREE, "block", "cannot verify"),
        ("draft-model:tree=rsd-s", "multipath", "independently drawn chains"),
        ("draft-model:tree=rsd-s", "greedy-draft", "the most probable siblings"),
        ("draft-model:tree=specinfer,widths=2/2", "multipath", "independently drawn chains"),
    ):
        with pytest.raises(InputError, match=why):
            engine(draft, verify)


def test_chains_are_drawn_in_the_usual_way_for_every_rule() -> None:
    """A chain drafter that knows of no other way of drawing is asked for the usual one."""
    for verify in ("block", "multipath", "spectr", "greedy-draft", "specinfer"):
        llm = engine(CHAIN, verify)
        llm.drafter.draws = frozenset()  # type: ignore[attr-defined]
        inner, asked = llm.drafter.propose, set()

        def note(states, views, budgets, inner=inner, asked=asked):
            trees = inner(states, views, budgets)
            asked.update(v.draw for v in views)
            asked.update(t.q is not None for t in trees)
            return trees

        llm.drafter.propose = note  # type: ignore[method-assign]
        llm.generate([PROMPT], replace(SAMPLED, max_tokens=6))
        assert asked >= {Draw.SAMPLE, True}
        assert asked <= {Draw.SAMPLE, True, False}


# the command


def report(capsys, *words: str) -> dict[str, Any]:
    assert main(["lab", "verifiers", "--json", "-q", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_reports_every_rule(capsys) -> None:
    found = report(capsys, "--vocab", "8", "--k", "1,2", "--temperature", "1", "--pairs", "2")
    assert {r["rule"] for r in found["levels"]} == set(level.RULES)
    assert all(0 < r["share"] <= 1 + 1e-9 for r in found["levels"])
    assert found["chains"][0]["block"] >= found["chains"][0]["rejection"]
    assert (
        main(["lab", "verifiers", "--vocab", "8", "--k", "2", "--pairs", "1", "--depth", "1"]) == 0
    )
    assert "greedy-draft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--k", "9", "--vocab", "8"], "k lies in"),
        (["--k", "x"], "not a list of numbers"),
        (["--temperature", "0"], "positive"),
        (["--pairs", "0"], "pair"),
        (["--agreement", "2"], "agreement"),
        (["--depth", "0"], "at least 1"),
        (["--model", "somewhere"], "need --prompts"),
        (["--prompts", "/nowhere"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words: list[str], why: str) -> None:
    assert main(["lab", "verifiers", *words]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1


def test_measuring_on_models() -> None:
    from foretell.lab.verifiers.measure import line_up, measure

    llm = engine(CHAIN, "auto")
    params = SamplingParams(max_tokens=20, temperature=1.0)
    runs = [
        measure(llm, [PROMPT, PROMPT[2:]], params, *run[1:], keep=4)
        for run in line_up("draft-model", 4)
    ]
    for (label, *_, most), run in zip(line_up("draft-model", 4), runs, strict=True):
        assert run.tokens == 40, label
        assert 1 < run.per_step <= 1 + most
        assert 0 < run.first <= 1
    equal = runs[0].on_equal_drafts
    assert equal["drafts"] > 3
    assert equal["block"] != equal["rejection"]
