"""Where a sequence ends: nothing after the end is emitted, counted, or kept in the cache."""

from __future__ import annotations

import pytest

import helpers_reference as reference
import methods
from foretell import LLM, SamplingParams
from foretell.core.protocols import BuildContext
from helpers_model import Letters, TableModel

PROMPT = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
PIECES = ["a", "b", "c", "d", "ab", "bc", "cd", " ", "é", "xyz", "."]


def agreeing(draft: str, **options) -> tuple[TableModel, LLM]:
    """Target and drafter are the same function: whole drafts are accepted."""
    target = TableModel()
    twin = TableModel(seed=9, like=target, agreement=1.0)
    eos = options.pop("eos", None)
    tokenizer = Letters(PIECES, eos) if options.pop("text", False) or eos is not None else None
    context = BuildContext(target, tokenizer, lambda path: twin, "twin")
    return target, LLM(target, tokenizer, draft=draft, context=context, **options)


def finished_rows(llm: LLM) -> int:
    return llm.engine.scheduler.kept[-1].cache.n


def check(llm: LLM, prompt: list[int], want: list[int], params: SamplingParams) -> None:
    events = []
    llm.engine.scheduler.clear_kept()  # of two runs that begin alike the longer one is kept
    out = llm.generate([prompt], params, on_event=events.append)[0]
    assert out.token_ids == want
    assert [e.token for e in events] == want
    assert [e.index for e in events] == list(range(len(want)))
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(want) - 1)
    assert events[-1].finish_reason == out.finish_reason
    assert "".join(e.text for e in events) == out.text
    s = out.stats
    assert s.emitted == len(want) == s.steps + s.accepted
    assert sum(s.per_position) == s.accepted <= s.drafted
    assert sum(s.histogram) == s.steps
    assert sum(out.samples[0].drafted) in (s.accepted, s.accepted + 1)  # a cut may end on a draft
    if len(prompt) + len(want) > llm.engine.scheduler.SHARE:
        kept = llm.engine.scheduler.kept[-1]
        assert kept.tokens == [*prompt, *want][: kept.cache.n]
        assert kept.cache.tokens == kept.tokens, "rows of tokens that were never emitted"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_max_tokens_inside_an_accepted_path(draft: str, temperature: float) -> None:
    target, llm = agreeing(draft)
    for limit in range(1, 14):
        params = SamplingParams(max_tokens=limit, temperature=temperature, seed=3)
        check(llm, PROMPT, reference.decode(target, PROMPT, params), params)
        assert llm.generate([PROMPT], params)[0].finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_stop_ids_inside_an_accepted_path(draft: str, temperature: float) -> None:
    target, llm = agreeing(draft)
    free = reference.decode(
        target, PROMPT, SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    )
    for stop in sorted(set(free)):
        params = SamplingParams(
            max_tokens=20, temperature=temperature, seed=3, stop_token_ids=(stop,)
        )
        want = reference.decode(target, PROMPT, params)
        assert want == free[: free.index(stop) + 1]
        check(llm, PROMPT, want, params)
        assert llm.generate([PROMPT], params)[0].finish_reason == "stop"


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_eos_ends_and_ignore_eos_does_not(draft: str) -> None:
    for eos in range(11):
        target, llm = agreeing(draft, eos=eos)
        for extra in ({}, {"ignore_eos": True}, {"min_tokens": 4}):
            params = SamplingParams(max_tokens=16, **extra)
            want = reference.decode(target, PROMPT, params, eos_ids=[eos])
            check(llm, PROMPT, want, params)
            text = llm.generate([PROMPT], params)[0].text
            ended = want[-1] == eos and not params.ignore_eos
            assert text == "".join(PIECES[t] for t in (want[:-1] if ended else want))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_stop_strings_inside_an_accepted_path(draft: str, include: bool) -> None:
    """Also those that span tokens, begin inside a token, or end inside one."""
    target, llm = agreeing(draft, text=True)
    free = reference.decode(target, PROMPT, SamplingParams(max_tokens=20))
    text = "".join(PIECES[t] for t in free)
    ends = [len("".join(PIECES[t] for t in free[: i + 1])) for i in range(len(free))]
    for begin in range(0, len(text) - 1):
        for size in (1, 2, 4):
            stop = text[begin : begin + size]
            at = text.index(stop) + len(stop)
            kept = next(i for i, e in enumerate(ends) if e >= at) + 1
            params = SamplingParams(max_tokens=20, stop=(stop, "never"), include_stop=include)
            check(llm, PROMPT, free[:kept], params)
            out = llm.generate([PROMPT], params)[0]
            assert out.finish_reason == "stop"
            assert out.text == text[: at if include else text.index(stop)]


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_drafts_are_accepted_in_these_tests(draft: str) -> None:
    _, llm = agreeing(draft)
    stats = llm.generate([PROMPT], SamplingParams(max_tokens=40))[0].stats
    always = "draft-model" in draft and not draft.startswith("bandit")  # which lets others try
    assert stats.acceptance_length > (1.5 if always else 1.0)


def test_streams_end_with_the_output() -> None:
    _, llm = agreeing("draft-model:tokens=4", text=True)
    events = list(llm.stream([1, 2, 3], SamplingParams(max_tokens=9, n=2, temperature=1.0, seed=1)))
    assert [e.output is not None for e in events] == [False] * 17 + [True]
    out = events[-1].output
    for sample in range(2):
        mine = [e for e in events if e.sample == sample]
        assert [e.token for e in mine] == out.samples[sample].token_ids
        assert [e.drafted for e in mine] == out.samples[sample].drafted


def test_an_abandoned_stream_leaves_nothing_behind() -> None:
    target, llm = agreeing("draft-model:tokens=4")
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=30))
    next(stream)
    stream.close()
    assert llm.engine.scheduler.idle
    params = SamplingParams(max_tokens=10)
    assert llm.generate([PROMPT], params)[0].token_ids == reference.decode(target, PROMPT, params)
