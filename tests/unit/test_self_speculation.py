"""Drafts from some of the target's own layers: early exit, skipped layers, DEL."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from foretell import LLM, InputError, SamplingParams
from foretell.core.batch import PackedBatch, Segment
from foretell.core.protocols import Budget, BuildContext, Caps, Draw, SeqView
from foretell.core.rng import SeqRng
from foretell.drafters.del_exit import DynamicExit, Shadow, best_exit, tokens_per_layer
from foretell.drafters.early_exit import EarlyExit
from foretell.drafters.layer_search import Search, gaussian_process
from foretell.drafters.self_draft import FEW, run_some, stop_below
from foretell.drafters.self_skip import SelfSkip, agreement
from foretell.drafters.trees.drive import chain_segment
from foretell.models.native.arch import Arch
from foretell.models.native.runner import NativeModel
from helpers_model import TableModel

TEXT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model() -> NativeModel:
    """Four layers whose logits are far from flat."""
    return NativeModel.random(Arch.llama(13, 16, 4, 4, 2, 24, tied=False), torch.float64, gain=3.0)


def filled(model, text: list[int], draw: Draw = Draw.TOP, pending: int = 1) -> SeqView:
    """A sequence whose cache holds all of `text` but the last `pending` ids."""
    params = SamplingParams(temperature=0.0 if draw is Draw.TOP else 1.0)
    view = SeqView(list(text), len(text), params, SeqRng(7), draw, len(text) - pending)
    view.cache = model.new_cache(64)
    with model.open([view.cache]) as txn:
        model.forward(PackedBatch([chain_segment(text[:-pending], 0)]), txn)
        txn.commit([range(len(text) - pending)])
    return view


def by_hand(model, text: list[int], layers: tuple[int, ...], n: int) -> list[int]:
    """n greedy tokens after `text`: the committed ids through all layers, drafts through some."""
    out: list[int] = []
    for _ in range(n):
        view = filled(model, text)
        segment = chain_segment([text[-1], *out], len(text) - 1)
        with model.open([view.cache]) as txn:
            out.append(int(run_some(model, [segment], txn, layers)[0].argmax()))
    return out


@pytest.mark.parametrize(("layer", "pending"), [(1, 1), (2, 1), (3, 3)])
def test_a_draft_is_what_the_first_layers_say(model, layer: int, pending: int) -> None:
    drafter = EarlyExit(model, layer)
    view = filled(model, TEXT, pending=pending)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 4)])
    assert tree.tokens[: tree.n_context].tolist() == view.pending
    if pending == 1:
        want = by_hand(model, TEXT, tuple(range(layer)), 4)
    else:  # rows of pending ids exist in the first layers only: those are all that is read
        copy = filled(model, TEXT[: -pending + 1])
        want = []
        for _ in range(4):
            feed = [*TEXT[-pending:], *want]
            with model.open([copy.cache]) as txn:
                segment = chain_segment(feed, copy.cache.n)
                want.append(int(run_some(model, [segment], txn, range(layer))[0].argmax()))
    assert tree.tokens[tree.n_context :].tolist() == want


def test_all_layers_are_the_model_and_leave_no_trace(model) -> None:
    view = filled(model, TEXT)
    before = view.cache.kv[:, : view.cache.n].clone()
    drafter = EarlyExit(model, 2)
    drafter.layers = tuple(range(4))
    (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 4)])
    text = list(TEXT)
    for token in tree.tokens[tree.n_context :].tolist():
        rows = Segment(np.asarray(text), np.arange(len(text)), None, np.array([len(text) - 1]))
        with model.open([model.new_cache()]) as txn:
            assert int(model.forward(PackedBatch([rows]), txn).logits[0].argmax()) == token
        text.append(token)
    view.cache.check()
    assert view.cache.n == len(TEXT) - 1
    assert torch.equal(view.cache.kv[:, : view.cache.n], before)


def test_q_is_what_the_draft_was_drawn_from(model) -> None:
    view = filled(model, TEXT, Draw.SAMPLE)
    drafter = EarlyExit(model, 2)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 3)])
    assert tree.q is not None
    feed = [TEXT[-1]]
    for i, token in enumerate(tree.tokens[tree.n_context :].tolist()):
        copy = filled(model, TEXT)
        with model.open([copy.cache]) as txn:
            logits = run_some(model, [chain_segment(feed, len(TEXT) - 1)], txn, (0, 1))
        torch.testing.assert_close(tree.q[i].double(), logits[0].softmax(-1).double())
        feed.append(token)


def test_each_sequence_drafts_by_its_own_layers(model) -> None:
    texts = [TEXT, TEXT[:5], TEXT[::-1]]
    views = [filled(model, t) for t in texts]
    drafter = EarlyExit(model, 2)
    states = [drafter.begin(v) for v in views]
    runs = [(0, 1), (0,), (0, 1)]
    trees = drafter.draft(states, views, [Budget(9, 3)] * 3, runs)
    for tree, text, run in zip(trees, texts, runs, strict=True):
        assert tree.tokens[tree.n_context :].tolist() == by_hand(model, text, run, 3)
    trees = drafter.draft(states, views, [Budget(9, 3)] * 3, [(), (0,), ()])
    assert [t.drafted for t in trees] == [0, 3, 0]


def test_prompts_and_sequences_without_a_cache_get_no_draft(model) -> None:
    drafter = EarlyExit(model, 1)
    long = filled(model, TEXT * 4, pending=FEW + 1)
    bare = SeqView(TEXT, len(TEXT), SamplingParams(), SeqRng(1))
    for view in (long, bare):
        (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 3)])
        assert tree.drafted == 0
        assert tree.n_context == len(view.pending)


def test_the_threshold_keeps_the_token_and_stops_below_it() -> None:
    budget = stop_below(Budget(9, 9), 0.5)
    assert budget.stop is not None
    assert budget.stop([0.9, 0.4])
    assert not budget.stop([0.4, 0.5])
    both = stop_below(Budget(9, 9, stop=lambda s: len(s) > 1), 0.5)
    assert both.stop is not None
    assert both.stop([0.9, 0.9])
    model = TableModel(sharpness=0.5)
    drafted = {}
    for threshold in (0.0, 1.0):
        llm = LLM(model, draft=f"early-exit:threshold={threshold},tokens=4")
        out = llm.generate([TEXT], SamplingParams(max_tokens=12))[0]
        drafted[threshold] = out.stats.drafted / out.stats.steps
    assert drafted[1.0] <= 1 < 2 < drafted[0.0]


# --- self-skip


def test_the_search_finds_the_layers_that_do_not_matter() -> None:
    useless, choices = {2, 5, 7}, tuple(range(1, 11))
    found = []
    for seed in range(3):
        search = Search(choices, 3, random.Random(seed))
        assert search.best == (1, 3, 5)
        while not search.done(0.95):
            layers = search.candidate()
            assert len(set(layers)) == 3
            assert set(layers) <= set(choices)
            search.tell(layers, len(useless & set(layers)) / 3)
        found.append(search.score)
        assert len(search.tried) <= 64
    assert np.mean(found) > 0.8


def test_the_first_try_is_the_set_in_use_and_worse_ones_do_not_replace_it() -> None:
    search = Search((1, 2, 3, 4), 2, random.Random(0))
    first = search.candidate()
    assert first == search.best == (1, 3)
    search.tell(first, 0.5)
    search.tell((2, 4), 0.5)
    assert search.best == (1, 3)
    search.tell((1, 4), 0.6)
    assert (search.best, search.score) == ((1, 4), 0.6)


def test_the_gaussian_process_goes_through_its_points_and_doubts_what_is_far() -> None:
    known = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], float)
    values = np.array([0.1, 0.9, 0.4])
    asked = np.vstack([known, [[1, 1, 1, 0], [0, 0, 1, 1]]])
    mean, spread = gaussian_process(known, values, asked, noise=1e-9)
    assert mean[:3] == pytest.approx(values, abs=1e-4)
    assert spread[:3] == pytest.approx(0, abs=1e-3)
    assert mean[3] > 0.4
    assert spread[4] > spread[3] > 0.01
    # against the textbook formula with explicit inverses
    kernel = np.exp(-((asked[:, None] - known[None]) ** 2).sum(-1) / 2)
    inverse = np.linalg.inv(kernel[:3] + 1e-9 * np.eye(3))
    scaled = (values - values.mean()) / values.std()
    assert mean == pytest.approx(values.mean() + values.std() * kernel @ inverse @ scaled)


def test_agreement_counts_rows_that_say_the_text() -> None:
    logits = torch.eye(4)[[1, 2, 3, 0]]
    assert agreement(logits, [1, 2, 0, 0]) == 0.75


def test_a_set_is_scored_on_the_tail_of_the_text(model) -> None:
    text = TEXT[:3]
    for _ in range(12):  # what the model itself says: all layers agree with it everywhere
        text.append(by_hand(model, text, (0, 1, 2, 3), 1)[0])
    drafter = SelfSkip(model, span=8)
    view = filled(model, text)
    assert drafter._score(view, ()) == 1.0
    tail = range(len(text) - 9, len(text) - 1)
    for skipped in ((1,), (2,), (1, 2)):
        kept = drafter.kept(skipped)
        cache = model.new_cache()
        cache.copy_prefix(view.cache, tail[0])
        with model.open([cache]) as txn:
            logits = run_some(model, [chain_segment(text[tail[0] : -1], tail[0])], txn, kept)
        assert len(logits) == 1
        hits = [by_hand_from(model, view, text, i, tail[0], kept) == text[i + 1] for i in tail]
        assert drafter._score(view, skipped) == pytest.approx(np.mean(hits))


def by_hand_from(model, view: SeqView, text: list[int], i: int, start: int, kept) -> int:
    """What the kept layers say after text[: i + 1], rows from `start` on being theirs."""
    cache = model.new_cache()
    cache.copy_prefix(view.cache, start)
    with model.open([cache]) as txn:
        return int(run_some(model, [chain_segment(text[start : i + 1], start)], txn, kept).argmax())


def test_searching_changes_the_layers_and_not_the_output() -> None:
    model = NativeModel.random(Arch.llama(13, 16, 6, 4, 2, 24), torch.float64, gain=2.0)
    params = SamplingParams(max_tokens=60, seed=3)  # the search is keyed by it
    want = LLM(model).generate([TEXT], params)[0].token_ids
    llm = LLM(model, draft="self-skip:every=1,span=8,threshold=0,tokens=3")
    seen = set()
    for event in llm.stream([*TEXT], params):
        seen |= {s.draft.search.best for s in llm.engine.scheduler.running if s.draft}
        last = event
    assert last.output.token_ids == want
    assert len(seen) > 1
    assert all(0 not in s and 5 not in s for s in seen), "the first and the last layer always run"


# --- DEL


def test_tokens_per_layer_is_the_expectation_over_the_cost() -> None:
    a, layer, d, layers, head = 0.7, 3, 4, 12, 0.5
    expected = sum(a**i for i in range(d + 1))
    assert tokens_per_layer(a, layer, d, layers, head) == pytest.approx(
        expected / (d * (layer + head) + layers + head)
    )
    assert tokens_per_layer(1.0, 1, 4, 12, 0.0) == pytest.approx(5 / 16)


def test_the_best_exit_is_at_least_as_good_as_any_fixed_one() -> None:
    r = random.Random(0)
    for _ in range(50):
        rates = {layer: r.random() for layer in (2, 4, 6, 8)}
        layer, d = best_exit(rates, 6, 10, 0.3)
        best = max(tokens_per_layer(rates[k], k, n, 10, 0.3) for k in rates for n in range(7))
        assert tokens_per_layer(rates[layer], layer, d, 10, 0.3) == pytest.approx(best)
    assert best_exit(dict.fromkeys((2, 4), 0.0), 6, 10, 0.3)[1] == 0, "useless exits: no draft"
    assert best_exit({2: 0.99, 4: 0.99}, 6, 10, 0.0) == (2, 6)


def test_a_shadow_fades_and_finds_the_middle_of_the_confidences() -> None:
    shadow = Shadow(hits=0, tries=0)
    shadow.tell([True, True, False, False], [0.9, 0.7, 0.3, 0.1], 0.5)
    assert shadow.rate == 0.5
    assert shadow.threshold == pytest.approx((0.8 + 0.2) / 2)
    shadow.tell([False, False], [0.2, 0.2], 0.5)
    assert shadow.rate == pytest.approx(1 / 4)
    assert shadow.threshold == pytest.approx((0.8 + 0.2) / 2)
    assert Shadow().threshold == 0.0


def test_shadows_count_what_each_layer_would_have_said(model) -> None:
    """Against by-hand forwards of the first layers over the whole text."""
    drafter = DynamicExit(model, exits=3, every=1, fade=1.0)
    assert drafter.exits == [1, 2, 3]
    assert drafter.needs.taps == (1, 2, 3)
    llm = LLM(model, draft=drafter)
    states = []
    for event in llm.stream(TEXT, SamplingParams(max_tokens=10)):
        states += [s.draft for s in llm.engine.scheduler.running if s.draft]
        last = event
    text = [*TEXT, *last.output.token_ids]
    for layer, shadow in states[0].shadows.items():
        with model.open([model.new_cache()]) as txn:
            segment = chain_segment(text[:-1], 0)
            segment.logits = None
            said = run_some(model, [segment], txn, range(layer)).argmax(-1).tolist()
        output = text[len(TEXT) :]
        hits = sum(a == b for a, b in zip(said[len(TEXT) - 1 :], output, strict=True))
        assert (shadow.hits - 1, shadow.tries - 2) == (hits, len(output))


def test_del_stops_drafting_where_it_does_not_pay() -> None:
    class Hopeless(TableModel):
        def _after_layers(self, layers, prefix):
            rows = super()._after_layers(layers, prefix)
            return rows if len(layers) == self.spec.layers else -rows

    params = SamplingParams(max_tokens=40)
    good = LLM(TableModel(), draft="del:every=1").generate([TEXT], params)[0]
    bad = LLM(Hopeless(), draft="del:every=1").generate([TEXT], params)[0]
    fixed = LLM(Hopeless(), draft="early-exit:layer=1").generate([TEXT], params)[0]
    assert good.token_ids == bad.token_ids == fixed.token_ids
    assert bad.stats.drafted < 10 < fixed.stats.drafted
    assert good.stats.accepted > 5


# --- refusals


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("early-exit:layer=9", "not one of 1..2"),
        ("early-exit:threshold=2", "probability"),
        ("early-exit:tokens=0", "at least 1"),
        ("early-exit:nodes=3", "no option 'nodes'"),
        ("self-skip:skip=1", "0 < skip < 1"),
        ("self-skip:span=1", "span >= 2"),
        ("del:exits=0", "exits >= 1"),
        ("del:fade=2", "fade <= 1"),
    ],
)
def test_nonsense_is_refused(draft: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LLM(TableModel(), draft=draft)


@pytest.mark.parametrize("draft", ["early-exit", "self-skip", "del"])
def test_models_without_layer_access_are_refused(draft: str) -> None:
    target = TableModel(caps=Caps())
    with pytest.raises(InputError, match="single layers"):
        LLM(target, draft=draft, context=BuildContext(target))
