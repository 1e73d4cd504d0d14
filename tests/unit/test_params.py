"""Sampling parameters that make no sense are refused with a sentence that names them."""

from __future__ import annotations

import math

import pytest

from foretell import LLM, SamplingParams
from foretell.core.errors import InputError
from helpers_model import TableModel

NAN, INF = math.nan, math.inf
WRONG = {
    "max_tokens": [0, -1, 1.5, NAN, None, True],
    "min_tokens": [-1, 0.5, 1000],
    "temperature": [-0.1, NAN, INF, "hot", None],
    "top_k": [-1, 2.5],
    "top_p": [0, -0.1, 1.1, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "typical_p": [0, 1.5, NAN],
    "repetition_penalty": [0, -1, NAN, INF],
    "presence_penalty": [NAN, INF],
    "frequency_penalty": [NAN, -INF],
    "n": [0, -2, 1.5],
    "seed": [-1, 1.5, "7"],
    "logprobs": [-1, 101, True],
    "prompt_logprobs": [-1, 1.5],
    "stop": [("",), (3,)],
    "bad_words": [("",)],
    "logit_bias": [{1: NAN}, {1: INF}],
    "allowed_token_ids": [[]],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_nonsense_is_refused(name: str, value) -> None:
    with pytest.raises(InputError, match=name) as e:
        SamplingParams(**{name: value})
    assert "\n" not in str(e.value)


def test_the_defaults_are_greedy_and_sane() -> None:
    params = SamplingParams()
    assert params.greedy
    assert not SamplingParams(temperature=0.1).greedy
    assert SamplingParams(logit_bias={3: -INF}).logit_bias == {3: -INF}


def test_a_single_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(bad_words="no").bad_words == ("no",)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"logit_bias": {99: 1.0}}, "logit_bias: token id 99"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids: token id -1"),
        ({"stop_token_ids": [11]}, "stop_token_ids: token id 11"),
        ({"stop": "x"}, "without a tokenizer"),
        ({"bad_words": ["x"]}, "without a tokenizer"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ],
)
def test_requests_are_checked_against_the_model(params: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        LLM(TableModel()).generate([[1, 2]], **params)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([[]], "empty"),
        ([""], "empty"),
        ("hello", "without a tokenizer"),
        ([[1, 11]], "outside 0..10"),
        ([[-1]], "outside 0..10"),
        ([[1] * 128], "context is 128"),
    ],
)
def test_prompts_are_checked(prompt, match: str) -> None:
    with pytest.raises(InputError, match=match):
        LLM(TableModel()).generate(prompt)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"step_rows": 0}, "step_rows=0"),
        ({"kv_rows": 0}, "kv_rows=0"),
        ({"draft": "non"}, "did you mean"),
    ],
)
def test_engine_options_are_checked(options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        LLM(TableModel(), **options)


def test_greedy_verification_cannot_sample() -> None:
    llm = LLM(TableModel(), verify="greedy")
    assert llm.generate([[1]], max_tokens=2)[0].verifier == "greedy"
    with pytest.raises(InputError, match="temperature 0"):
        llm.generate([[1]], temperature=1.0)


def test_lossy_methods_need_permission_and_say_so() -> None:
    from foretell.core.protocols import Promise
    from foretell.verify.replay import Replay

    class Sloppy(Replay):
        name = "sloppy"
        promise = Promise.LOSSY

    with pytest.raises(InputError, match="allow_lossy"):
        LLM(TableModel(), verify=Sloppy())
    llm = LLM(TableModel(), verify=Sloppy(), allow_lossy=True)
    assert llm.generate([[1]], temperature=1.0, max_tokens=2)[0].promise == "lossy"


@pytest.mark.parametrize(
    ("verify", "temperature", "promise"),
    [
        ("auto", 0, "exact"),
        ("auto", 1, "exact"),
        ("rejection", 1, "lossless"),
        ("rejection", 0, "exact"),
    ],
)
def test_outputs_say_what_was_promised(verify: str, temperature: float, promise: str) -> None:
    out = LLM(TableModel(), verify=verify).generate([[1]], temperature=temperature, max_tokens=2)
    assert out[0].promise == promise


def test_a_verifier_that_cannot_read_the_drafts_is_refused() -> None:
    from foretell.verify.replay import Replay

    class ChainsOfQ(Replay):
        accepts = frozenset({"chain", "q"})

    with pytest.raises(InputError, match="cannot verify"):
        LLM(TableModel(), draft="prompt-lookup", verify=ChainsOfQ())
