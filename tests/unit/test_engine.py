"""The engine from outside: interleaved requests, interruptions, statistics, lazy rows."""

from __future__ import annotations

import pytest

import helpers_reference as reference
from foretell import LLM, InputError, SamplingParams
from foretell.core.protocols import Caps, Needs, Promise
from foretell.core.tree import TokenTree
from foretell.drafters.none import NoDrafter
from foretell.engine.memory import default_rows
from foretell.engine.metrics import Stats
from helpers_model import Letters, TableModel, pair

PROMPT = [1, 2, 3, 1, 2, 3, 1]


def test_two_streams_may_be_read_in_turns() -> None:
    target, context = pair()
    llm = LLM(target, draft="draft-model:tokens=3", context=context)
    params = SamplingParams(max_tokens=15)
    streams = [llm.stream(p, params) for p in (PROMPT, [5, 6])]
    got: list[list[int]] = [[], []]
    for i in [0, 1, 1, 0, 0, 0, 1] * 10:
        event = next(streams[i], None)
        if event is not None:
            got[i].append(event.token)
    assert got == [reference.decode(target, p, params) for p in (PROMPT, [5, 6])]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupted_step_is_rolled_back(at: int) -> None:
    """Ctrl-C in the middle of a forward: the next request finds a clean engine."""
    target, context = pair()
    llm = LLM(target, draft="draft-model:tokens=3", context=context)
    calls = 0

    def interrupt(batch, txn) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    target.on_forward = interrupt
    params = SamplingParams(max_tokens=15)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, [5, 6]], params)
    assert llm.engine.scheduler.idle
    for kept in llm.engine.scheduler.kept:
        kept.cache.check()
        assert kept.cache.tokens == kept.tokens
    outputs = llm.generate([PROMPT, [5, 6]], params)
    want = [reference.decode(target, p, params) for p in (PROMPT, [5, 6])]
    assert [o.token_ids for o in outputs] == want


def test_plain_decoding_reads_one_token_a_step() -> None:
    target = TableModel()
    out = LLM(target).generate([PROMPT], max_tokens=9)[0]
    assert out.stats.steps == out.stats.emitted == 9
    assert out.stats.acceptance_length == 1.0
    assert out.stats.drafted == 0
    assert target.forwards == 9
    assert target.logit_rows == 9, "logits of prompt rows are not computed"


def test_a_perfect_drafter_emits_its_depth_plus_one() -> None:
    target, context = pair()
    context.load_model = lambda path: TableModel(like=target, agreement=1.0, seed=5)
    llm = LLM(target, draft="draft-model:tokens=4", context=context)
    out = llm.generate([PROMPT], max_tokens=50)[0]
    assert out.stats.steps == 10
    assert out.stats.acceptance_length == 5.0
    assert out.stats.per_position == [10] * 4
    assert out.stats.histogram == [0, 0, 0, 0, 10]
    assert out.to_json()["speculation"]["accepted_per_position"] == [10] * 4
    assert out.samples[0].drafted == ([True] * 4 + [False]) * 10


def test_the_last_draft_leaves_room_for_the_bonus_token() -> None:
    """Drafting beyond max_tokens would be wasted work."""
    target, context = pair()
    context.load_model = lambda path: TableModel(like=target, agreement=1.0, seed=5)
    llm = LLM(target, draft="draft-model:tokens=4", context=context)
    out = llm.generate([PROMPT], max_tokens=7)[0]
    assert (out.stats.steps, out.stats.drafted) == (2, 5)


def test_what_a_model_lacks_is_refused_at_the_start() -> None:
    class Layered(NoDrafter):
        name = "layered"
        promise = Promise.EXACT
        needs = Needs(layer_access=True)

    with pytest.raises(InputError, match="single layers"):
        LLM(TableModel(caps=Caps()), draft=Layered())
    assert LLM(TableModel(caps=Caps(layer_access=True)), draft=Layered())


def test_taps_reach_the_drafter_by_node() -> None:
    seen = []

    class Reader(NoDrafter):
        name = "reader"
        needs = Needs(taps=("last", 1), prompt_logits=True)

        def observe(self, states, feedback) -> None:
            for f in feedback:
                for tap in ("last", 1):
                    rows = f.hidden[tap][f.path]
                    assert len(rows) == len(f.path)
                    if tap == "last":
                        assert rows[:, 0].tolist() == f.tree.tokens[f.path].tolist()
                for node in f.path:
                    assert f.logits.has(node)
                seen.extend(f.path)

    target = TableModel(taps=("last", 1))
    llm = LLM(target, draft=Reader(), step_rows=3)
    llm.generate([PROMPT, [5]], max_tokens=4)
    assert len(seen) == len(PROMPT) + 1 + 2 * 3


def test_a_dead_tip_child_is_refused_without_a_row() -> None:
    tree = TokenTree.build([1], [2, 3], [-1, 0])
    import numpy as np

    tree.kill(np.array([False, True, False]))
    assert tree.live.tolist() == [0]
    assert tree.children(0) == [1]
    assert tree.decisions() == [0]


def test_statistics_add_up() -> None:
    s = Stats()
    for drafted, emitted in ((4, 3), (4, 1), (0, 1), (2, 2)):
        s.add(drafted, emitted)
    assert (s.steps, s.emitted, s.drafted, s.accepted) == (4, 7, 10, 3)
    assert s.acceptance_length == pytest.approx(1.75)
    assert s.per_position == [2, 1]
    assert s.histogram == [2, 1, 1]
    assert Stats().acceptance_length == 0.0
    assert Stats().tokens_per_s == 0.0


def test_times_are_sane() -> None:
    out = LLM(TableModel()).generate([PROMPT], max_tokens=5)[0]
    s = out.stats
    assert 0 < s.start <= s.first <= s.end
    assert s.tokens_per_s > 0
    assert out.to_json()["timing"]["decode_s"] >= 0


def test_rows_by_default_hold_every_full_context() -> None:
    assert default_rows(TableModel(max_positions=100), 3) == 300


def test_bad_words_are_avoided_along_the_path() -> None:
    letters = Letters([*"abcdefghij", "k"])
    target, context = pair()
    for draft in ("none", "draft-model:tokens=4,branching=2", "prompt-lookup:min_ngram=1"):
        llm = LLM(target, letters, draft=draft, context=context)
        free = llm.generate([PROMPT], max_tokens=20)[0]
        word = free.text[4:6]
        for temperature in (0.0, 1.0):
            params = SamplingParams(
                max_tokens=20, bad_words=(word, "a"), temperature=temperature, seed=1
            )
            out = llm.generate([PROMPT], params)[0]
            assert word not in out.text
            assert "a" not in out.text
            bad = [letters.encode(w) for w in params.bad_words]
            assert out.token_ids == reference.decode(target, PROMPT, params, bad_words=bad)


def test_the_seed_that_was_drawn_is_reported() -> None:
    target, context = pair()
    llm = LLM(target, draft="draft-model:tokens=3", context=context)
    first = llm.generate([PROMPT], temperature=1.0, max_tokens=20)[0]
    again = llm.generate([PROMPT], temperature=1.0, max_tokens=20, seed=first.samples[0].seed)[0]
    assert again.token_ids == first.token_ids
    other = llm.generate([PROMPT], temperature=1.0, max_tokens=20)[0]
    assert other.samples[0].seed != first.samples[0].seed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_drafter_sees_the_processors_along_its_own_path(temperature: float) -> None:
    """With the target's penalties applied to each path, a perfect drafter stays perfect."""
    target, context = pair()
    context.load_model = lambda path: TableModel(like=target, agreement=1.0, seed=5)
    llm = LLM(target, draft="draft-model:tokens=4", context=context)
    params = SamplingParams(
        max_tokens=50, frequency_penalty=1.5, temperature=temperature, top_k=7, seed=1
    )
    assert llm.generate([PROMPT], params)[0].stats.acceptance_length == 5.0


def test_a_step_that_reads_a_prompt_is_no_decoding_step() -> None:
    """Its rows are no drafts: what they take must not be taken for the price of a draft."""
    target, context = pair()
    llm = LLM(target, draft="draft-model:tokens=3", context=context)
    seen = []
    observe = llm.policy.observe
    llm.policy.observe = lambda trees, verdicts, t: (  # type: ignore[method-assign]
        seen.append((t.rows, t.decoding)), observe(trees, verdicts, t)
    )[1]  # fmt: skip
    llm.generate([PROMPT], max_tokens=12)
    assert seen[0][0] >= len(PROMPT)
    assert not seen[0][1]
    assert len(seen) > 2
    assert all(rows <= 4 and decoding for rows, decoding in seen[1:])
