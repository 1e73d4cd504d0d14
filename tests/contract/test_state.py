"""What methods keep between steps: caches, drafter state, and what the engine tells them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch

import methods
from foretell import LLM, SamplingParams
from foretell.core import registry
from foretell.core.batch import PackedBatch, Segment
from foretell.core.feedback import Verdict
from foretell.core.params import SamplingParams as Params
from foretell.core.protocols import Budget, BuildContext, Draw, Promise, SeqView
from foretell.core.rng import SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.compose import Composed
from foretell.models.toy import ToyModel
from helpers_grammar import ToyGrammar
from helpers_model import TableModel, pair

PROMPTS = [[1, 2, 3, 4, 5, 1, 2, 3], [7], [1, 2, 3, 4, 5, 1, 2, 3, 9, 9], [2, 1, 2, 1, 2]]


class Fickle:
    """Accepts a random path of the tree and adds a random token: any outcome may happen."""

    name = "fickle"
    promise = Promise.LOSSLESS
    paper = ""
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.SAMPLE

    def __init__(self, seed: int, vocab: int) -> None:
        self.random, self.vocab = random.Random(seed), vocab

    def __call__(self, tree: TokenTree, p: Any, rng: Any, position: int) -> Verdict:
        node, path = tree.tip, []
        while True:
            p.probs([node])  # the row must be there
            alive = [c for c in tree.children(node) if tree.kind[c] == Kind.CANDIDATE]
            if not alive or self.random.random() < 0.25:
                break
            node = self.random.choice(alive)
            path.append(node)
        bonus = self.random.randrange(self.vocab)
        return Verdict(path, [*tree.tokens[path].tolist(), bonus], len(path) + 1)


def last_logits(model: Any, cache: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after `tokens`, of which the cache holds the beginning; leaves the cache alone."""
    rest = tokens[cache.n :]
    n = len(rest)
    at = np.arange(cache.n, cache.n + n)
    segment = Segment(np.asarray(rest), at, None, np.array([n - 1]))
    with model.open([cache]) as txn:
        return model.forward(PackedBatch([segment]), txn).logits[0]


def single(drafter: Any, state: Any) -> list[tuple[Any, Any]]:
    """The drafters that a drafter is made of, down to those that are made of none, and their
    states."""
    if not isinstance(drafter, Composed):
        return [(drafter, state)]
    parts = zip(drafter.parts, drafter.own(state), strict=True)
    return [leaf for part, own in parts for leaf in single(part, own)]


def models(kind: str) -> tuple[Any, BuildContext]:
    if kind == "table":
        return pair()
    target, draft = ToyModel(11, seed=0), ToyModel(11, seed=1)
    return target, BuildContext(target, None, lambda path: draft, "toy")


@pytest.mark.parametrize("kind", ["table", "toy"])
@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_caches_survive_any_verdict(draft: str, kind: str) -> None:
    """After every step: cache.check(), the rows are those of the text, and the logits are those of
    a fresh prefill - for the target's cache and for the drafter's."""
    for seed in range(3 if kind == "table" else 2):
        target, context = models(kind)
        llm = LLM(
            target,
            draft=draft,
            verify=Fickle(seed, 11),
            context=context,
            kv_rows=90,
            step_rows=7,
            max_batch=3,
        )
        checked = Counter()

        def verify_all(_: Any, llm=llm, target=target, checked=checked) -> None:
            for seq in llm.engine.scheduler.running:
                seq.cache.check()
                assert seq.cache.n == seq.view.cached < len(seq.tokens)
                compare(target, seq.cache, seq.tokens)
                checked["target"] += 1
                for drafter, state in single(llm.drafter, seq.draft):
                    mine = getattr(state, "cache", None)
                    if mine is not None and mine.n:
                        mine.check()
                        assert len(state.fed) == mine.n
                        compare(drafter.model, mine, [*state.fed, 3])
                        checked["draft"] += 1

        def compare(model: Any, cache: Any, tokens: list[int]) -> None:
            want = last_logits(model, model.new_cache(), tokens)
            torch.testing.assert_close(last_logits(model, cache, tokens), want)

        step = llm.engine.step

        def checked_step(step=step, verify_all=verify_all):
            events = step()
            verify_all(None)
            return events

        llm.engine.step = checked_step
        params = SamplingParams(max_tokens=18, temperature=1.0, seed=seed)
        outputs = llm.generate(PROMPTS, params)
        assert [len(o.token_ids) for o in outputs] == [18] * len(PROMPTS)
        assert checked["target"] > 20
        # of a choice only the first part drafts for requests that do not choose
        drafting = draft.split("+")[0] if draft.startswith("choice") else draft
        assert checked["draft"] > 5 or "draft-model" not in drafting


@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_toy_model_greedy_and_replay_equal_plain_decoding(draft: str) -> None:
    """The real runner: attention by ancestors, ragged batches, chunks, preemption."""
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
        target, context = models("toy")
        want = [LLM(target, context=context).generate([p], params)[0].token_ids for p in PROMPTS]
        greedy: list[int] = []
        if not temperature:
            for _ in range(20):
                greedy.append(int(target.next_probs([*PROMPTS[0], *greedy]).argmax()))
            assert want[0] == greedy
        for options in ({}, {"step_rows": 3}, {"kv_rows": 50}, {"max_batch": 2}):
            target, context = models("toy")
            llm = LLM(target, draft=draft, context=context, **options)
            for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
                got = llm.generate([PROMPTS[i] for i in order], params)
                assert [o.token_ids for o in got] == [want[i] for i in order], options


class Watching:
    """Passes everything on to a drafter and writes down what it was told."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.told: dict[int, list[Any]] = {}
        self.begun: list[Any] = []
        self.ended = 0
        self.shown: list[Any] = []  # states that the last propose/observe named
        for name in ("name", "promise", "paper", "needs", "shapes"):
            setattr(self, name, getattr(inner, name))

    def begin(self, view: SeqView) -> Any:
        state = (self.inner.begin(view), view)
        self.begun.append(state)
        return state

    def propose(self, states: Any, views: Any, budgets: Any) -> list[TokenTree]:
        assert all(s[1] is v for s, v in zip(states, views, strict=True))
        trees = self.inner.propose([s[0] for s in states], views, budgets)
        for tree, view, budget in zip(trees, views, budgets, strict=True):
            tree.validate(1 << 30)
            assert tree.tokens[: tree.n_context].tolist() == view.pending
            assert tree.drafted <= max(0, budget.nodes)
            levels = [tree.level(i) for i in range(tree.n_context, len(tree))]
            assert max(levels, default=0) <= max(0, budget.depth)
            assert budget.branching > 1 or tree.is_chain
        return trees

    def observe(self, states: Any, feedback: Any) -> None:
        assert len({id(s) for s in states}) == len(states), "a sequence was told twice"
        assert len(states) == len(feedback)
        for state, f in zip(states, feedback, strict=True):
            view = state[1]
            assert view.tokens[len(view.tokens) - len(f.tokens) :] == f.tokens or not f.tokens
            assert f.path[: f.tree.n_context] == list(range(f.tree.n_context))
            accepted = f.tree.tokens[f.path[f.tree.n_context :]].tolist()
            assert accepted == f.tokens[: len(accepted)]
            self.told.setdefault(id(view), []).append(f)
        self.inner.observe([s[0] for s in states], feedback)

    def end(self, state: Any) -> None:
        self.ended += 1
        self.inner.end(state[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_drafters_are_told_everything_once(draft: str, temperature: float) -> None:
    """Feedback covers prompt and output without gap or repetition; budgets are kept; what begins
    also ends."""
    target, context = pair()
    watch = Watching(registry.create("drafter", draft, context))
    llm = LLM(target, draft=watch, context=context, step_rows=5, max_batch=3)
    steps = 0
    step = llm.engine.step

    def counted():
        nonlocal steps
        steps += 1
        before = {k: len(v) for k, v in watch.told.items()}
        events = step()
        assert all(len(v) - before.get(k, 0) <= 1 for k, v in watch.told.items())
        return events

    llm.engine.step = counted
    llm.engine.scheduler.reuse = False  # every row is computed, so every row is told
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=15, temperature=temperature, seed=1))
    assert watch.ended == len(watch.begun) == len(PROMPTS)
    for (_, view), out in zip(watch.begun, outputs, strict=True):
        told = watch.told[id(view)]
        assert len(told) <= steps
        rows = [t for f in told for t in f.tree.tokens[f.path].tolist()]
        text = [*out.prompt_ids, *out.token_ids]
        assert rows == text[: len(rows)]
        assert len(rows) >= len(text) - 1
        assert [t for f in told for t in f.tokens] == out.token_ids


@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_who_reads_the_text_alone_need_not_be_told(draft: str) -> None:
    _, context = models("toy")
    drafter = registry.create("drafter", draft, context)
    if getattr(drafter, "reads_text", False):
        nothing: Any = object()  # whatever is looked up in it raises
        drafter.observe([nothing], [nothing])


@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_preempted_states_are_ended_and_begun_again(draft: str) -> None:
    target, context = pair()
    watch = Watching(registry.create("drafter", draft, context))
    llm = LLM(target, draft=watch, context=context, kv_rows=45)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=15))
    preempted = sum(o.stats.preempted for o in outputs)
    assert preempted > 0
    assert watch.ended == len(watch.begun) == len(PROMPTS) + preempted


def view_of(text: list[int], draw: Draw) -> SeqView:
    temperature = 0.0 if draw is Draw.TOP else 1.0
    return SeqView(text, 6, Params(temperature=temperature), SeqRng(5), draw)


@pytest.mark.parametrize("draw", list(Draw))
@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_a_drafter_that_slept_drafts_the_same(draft: str, draw: Draw) -> None:
    """It may have been given no budget for any number of steps, or have just begun."""
    _, context = pair(draft_order=100)  # a stale row anywhere changes what it drafts
    drafter = registry.create("drafter", draft, context)
    r = random.Random(draft)
    whole = [1, 2, 3, 4, 1, 2]
    text = list(whole)
    awake, sleepy = view_of(text, draw), view_of(text, draw)
    awake.cache, sleepy.cache = (context.target.new_cache() for _ in range(2))
    states = [drafter.begin(awake), drafter.begin(sleepy)]
    full, none = Budget(8, 4), Budget(0, 0)
    compared = 0
    for step in range(40):
        rouse = step % 7 == 6
        first, second = drafter.propose(states, [awake, sleepy], [full, full if rouse else none])
        if rouse:
            fresh_view = view_of(list(text), draw)
            fresh_view.cached, fresh_view.cache = awake.cached, context.target.new_cache()
            fresh_view.cache.tokens[:] = text[: awake.cached]
            (third,) = drafter.propose([drafter.begin(fresh_view)], [fresh_view], [full])
            for other in (second, third):
                drafts = [t.tokens[t.n_context :].tolist() for t in (first, other)]
                assert drafts[0] == drafts[1]
                assert (first.parent == other.parent).all()
                assert (first.q is None) == (other.q is None)
                assert first.q is None or torch.equal(first.q, other.q)
                compared += len(drafts[0])
        else:
            assert second.drafted == 0
        accepted = first.tokens[first.n_context :].tolist()[: r.randint(0, 2)]
        text += [*accepted, r.choice([1, 2, 3, 4])]
        awake.cached = sleepy.cached = len(text) - 1
        awake.cache.tokens[:] = sleepy.cache.tokens[:] = text[:-1]
    assert compared > 3


def footprint(x: Any, seen: set[int]) -> int:
    """Numbers held by nested lists, dicts, dataclasses and caches."""
    if id(x) in seen or isinstance(x, TableModel):
        return 0
    seen.add(id(x))
    if isinstance(x, dict):
        return sum(footprint(v, seen) + 1 for v in x.values()) + len(x)
    if isinstance(x, list | tuple | set):
        return sum(footprint(v, seen) for v in x) + len(x)
    if isinstance(x, torch.Tensor | np.ndarray):
        return int(np.prod(x.shape))
    if is_dataclass(x):
        return sum(footprint(getattr(x, f.name), seen) for f in fields(x))
    return sum(footprint(v, seen) for v in getattr(x, "__dict__", {}).values()) + 1


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_state_grows_no_faster_than_the_text(draft: str) -> None:
    target, context = pair(max_positions=1000)
    llm = LLM(target, draft=draft, verify=Fickle(0, 11), context=context)
    sizes = {}
    for event in llm.stream([1, 2, 3], SamplingParams(max_tokens=400, temperature=1.0, seed=1)):
        for seq in llm.engine.scheduler.running:
            sizes[event.index] = footprint(seq.draft, set())
    assert sizes[390] <= 3 * sizes[190] + 200
    assert sizes[390] <= 40 * 400


@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_declared_needs_are_all_a_drafter_gets_and_asks(draft: str) -> None:
    """Only declared taps; logits only where the verifier or a declared need reads them."""
    target, context = pair()
    drafter = registry.create("drafter", draft, context)
    target.taps = list(drafter.needs.taps)
    asked = []

    def look(batch: PackedBatch, txn: Any) -> None:
        asked.append([None if s.logits is None else len(s.logits) for s in batch.segments])

    target.on_forward = look
    llm = LLM(target, draft=drafter, context=context, step_rows=6)
    riders, extend = 0, llm.engine._extend

    def count(turns: Any, trees: Any) -> Any:
        nonlocal riders
        riders += sum(int((tree.kind == Kind.RIDER).sum()) for tree in trees)
        return extend(turns, trees)

    llm.engine._extend = count
    out = llm.generate(PROMPTS, SamplingParams(max_tokens=12))
    if not drafter.needs.prompt_logits:
        assert all(n is not None for row in asked for n in row)
        total = sum(n for row in asked for n in row)
        if drafter.needs.logits:  # of its riders as well
            total -= riders
        assert total == sum(o.stats.steps + o.stats.drafted for o in out)


def test_dead_nodes_are_never_computed() -> None:
    target, context = pair()
    llm = LLM(target, draft="draft-model:tokens=4,branching=3", context=context)
    dead = live = 0
    step, constrain = llm.engine.step, llm.engine._constrain

    def counting(seq: Any, tree: TokenTree) -> Any:
        nonlocal dead, live
        masks = constrain(seq, tree)
        dead += int((tree.kind == Kind.DEAD).sum())
        live += len(tree.live)
        return masks

    llm.engine._constrain = counting
    target.rows_fed = 0
    llm.generate(PROMPTS, SamplingParams(max_tokens=30), constraint=lambda: ToyGrammar(11, 3))
    assert dead > 0
    assert target.rows_fed == live
    assert step
