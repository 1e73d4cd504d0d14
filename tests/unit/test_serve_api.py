"""The HTTP API over a tiny model: answers, streams, limits and errors, through real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from foretell.core.params import SamplingParams, Speculation
from foretell.engine.llm import LLM
from foretell.engine.metrics import Stats
from foretell.engine.outputs import RequestOutput, SampleOutput
from foretell.engine.sequence import TokenEvent
from foretell.serve import respond
from foretell.serve.service import Service
from foretell.serve.terms import Limits
from helpers_serve import CONTEXT, events, make, running, tiny_llm, until

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(llm: LLM) -> LLM:
    """The same model without a server: what the answers must be."""
    return llm.with_methods(draft="none")


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[tuple[httpx.Client, Service]]:
    service, app = make(llm)
    with running(service, app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, service


@pytest.fixture
def http(served: tuple[httpx.Client, Service]) -> httpx.Client:
    return served[0]


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": "the cat", "seed": 7, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The status and OpenAI's shape, with a sentence that names what is wrong."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error["message"]
    assert error["message"].endswith((".", "?")), error["message"]
    return error


# Answers


def test_a_completion_is_what_generate_says(http: httpx.Client, reference: LLM) -> None:
    for temperature in (0.0, 1.0):
        got = complete(http, max_tokens=20, temperature=temperature, foretell=True)
        want = reference.generate("the cat", max_tokens=20, temperature=temperature, seed=7)[0]
        choice = got["choices"][0]
        assert choice["text"] == want.text
        assert choice["foretell"]["tokens"] == want.token_ids
        assert len(choice["foretell"]["drafted"]) == len(want.token_ids)
        assert choice["finish_reason"] == want.finish_reason
        usage = got["usage"]
        assert usage["prompt_tokens"] == len(want.prompt_ids)
        assert usage["completion_tokens"] == len(want.token_ids)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_default_temperature_is_openais(http: httpx.Client, reference: LLM) -> None:
    want = reference.generate("the cat", max_tokens=16, temperature=1.0, seed=7)[0]
    assert complete(http)["choices"][0]["text"] == want.text


def test_samples_and_prompts_are_choices_in_order(http: httpx.Client, reference: LLM) -> None:
    prompts = ["the cat", "a dog"]
    got = complete(http, prompt=prompts, n=3, max_tokens=12)["choices"]
    want = reference.generate(prompts, max_tokens=12, temperature=1.0, seed=7, n=3)
    assert [c["index"] for c in got] == list(range(6))
    assert [c["text"] for c in got] == [s.text for o in want for s in o.samples]


def test_token_ids_are_prompts_too(http: httpx.Client, llm: LLM) -> None:
    ids = llm.encode("the cat")
    text = complete(http, max_tokens=9)["choices"][0]["text"]
    assert complete(http, prompt=ids, max_tokens=9)["choices"][0]["text"] == text
    several = complete(http, prompt=[ids, ids], max_tokens=9)["choices"]
    assert [c["text"] for c in several] == [text, text]


def test_null_is_as_if_left_out(http: httpx.Client) -> None:
    from foretell.serve.schema import CompletionRequest

    nulls = dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt", "seed", "max_tokens"})
    plain, same = complete(http, max_tokens=8), complete(http, max_tokens=8, **nulls)
    assert plain["choices"] == same["choices"]


def test_unknown_fields_are_ignored(http: httpx.Client) -> None:
    plain = complete(http, max_tokens=8)
    assert complete(http, max_tokens=8, nobody_knows_this=3)["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"top_k": 3}, {"top_k": 3}),
        ({"top_k": -1}, {}),
        ({"top_p": 0.5, "min_p": 0.01}, {"top_p": 0.5, "min_p": 0.01}),
        ({"typical_p": 0.6}, {"typical_p": 0.6}),
        ({"logit_bias": {"65": 100, "66": 99.5}}, {"logit_bias": {65: 100.0, 66: 99.5}}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": -1, "repetition_penalty": 1.3},
            {"presence_penalty": 1.5, "frequency_penalty": -1, "repetition_penalty": 1.3},
        ),
        ({"stop_token_ids": [1, 2, 3]}, {"stop_token_ids": [1, 2, 3]}),
        ({"allowed_token_ids": [70, 71]}, {"allowed_token_ids": [70, 71]}),
        ({"bad_words": ["a"]}, {"bad_words": ["a"]}),
        ({"min_tokens": 4, "ignore_eos": True}, {"min_tokens": 4, "ignore_eos": True}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
    ],
)
def test_sampling_fields_mean_what_they_mean(
    http: httpx.Client, reference: LLM, fields: dict[str, Any], params: dict[str, Any]
) -> None:
    got = complete(http, max_tokens=16, return_token_ids=True, **fields)["choices"][0]
    given = {"max_tokens": 16, "temperature": 1.0, "seed": 7, **params}
    assert got["token_ids"] == reference.generate("the cat", **given)[0].token_ids


def test_max_tokens_is_cut_to_the_context(http: httpx.Client) -> None:
    got = complete(http, max_tokens=10**9, ignore_eos=True, temperature=0)
    assert got["usage"]["total_tokens"] == CONTEXT
    assert got["choices"][0]["finish_reason"] == "length"


def test_echo_and_scoring_of_a_prompt(http: httpx.Client, reference: LLM) -> None:
    got = complete(http, echo=True, max_tokens=3, logprobs=2)["choices"][0]
    assert got["text"].startswith("the cat")
    table = got["logprobs"]
    ids = reference.encode("the cat")
    assert len(table["tokens"]) == len(ids) + 3
    assert table["token_logprobs"][0] is None
    assert table["top_logprobs"][0] is None
    assert table["tokens"][: len(ids)] == ["the", " ", "c", "a", "t"]
    assert table["text_offset"][: len(ids) + 1] == [0, 3, 4, 5, 6, 7]
    want = reference.generate("the cat", max_tokens=1, prompt_logprobs=2)[0].prompt_logprobs
    assert want is not None
    for mine, theirs in zip(table["token_logprobs"][1 : len(ids)], want[1:], strict=True):
        assert theirs is not None
        assert mine == pytest.approx(theirs[0], abs=1e-5)
    scored = complete(http, echo=True, max_tokens=0, logprobs=1)
    assert scored["choices"][0]["text"] == "the cat"
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert scored["usage"]["completion_tokens"] == 0
    refused(http.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}), 400, "max_tokens")


def test_logprobs_are_those_of_the_engine(http: httpx.Client, reference: LLM) -> None:
    got = complete(http, max_tokens=6, logprobs=3, return_tokens_as_token_ids=True)["choices"][0]
    want = reference.generate("the cat", max_tokens=6, temperature=1.0, seed=7, logprobs=3)[0]
    entries = want.samples[0].logprobs
    assert entries is not None
    table = got["logprobs"]
    assert table["tokens"] == [f"token_id:{t}" for t in want.token_ids]
    for value, top, (own, best), token in zip(
        table["token_logprobs"], table["top_logprobs"], entries, want.token_ids, strict=True
    ):
        assert value == pytest.approx(own, abs=1e-5)
        expected = {f"token_id:{t}": v for t, v in [*best, (token, own)]}
        assert top == pytest.approx(expected, abs=1e-5)


# Streams

SHAPES: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"n": 3},
    {"prompt": ["the cat", "a dog", "x"], "n": 2},
    {"stop": ["a", "the"]},
    {"stop": "e", "include_stop_str_in_output": True},
    {"logprobs": 2},
    {"logprobs": 1, "echo": True},
    {"echo": True, "n": 2},
    {"foretell": True, "return_token_ids": True},
    {"echo": True, "max_tokens": 0, "logprobs": 0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stream_says_what_the_whole_answer_says(
    http: httpx.Client, shape: dict[str, Any]
) -> None:
    body = {"max_tokens": 40, "stream_options": {"include_usage": True}, **shape}
    chunks = events(
        http.post("/v1/completions", json={"prompt": "the cat", "seed": 7, "stream": True, **body})
    )
    body.pop("stream_options")
    whole = complete(http, **body)
    last = chunks.pop()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["speculation"]["drafter"] == "prompt-lookup"
    assert all(c["usage"] is None for c in chunks)
    assert len({(c["id"], c["object"], c["created"], c["model"]) for c in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if shape.get("foretell"):
            assert [c["foretell"]["token"] for c in mine] == choice["foretell"]["tokens"]
            assert [c["foretell"]["drafted"] for c in mine] == choice["foretell"]["drafted"]
            assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
        if "logprobs" in shape:
            for key, values in choice["logprobs"].items():
                assert [v for c in mine for v in c["logprobs"][key]] == values, key


def test_one_token_is_one_chunk_and_characters_stay_whole(
    http: httpx.Client, reference: LLM
) -> None:
    """The tiny model says random bytes: every kind of broken UTF-8 comes up."""
    for seed in range(12):
        body = {"prompt": "é", "seed": seed, "max_tokens": 60, "stream": True, "ignore_eos": True}
        chunks = events(http.post("/v1/completions", json=body))
        given = {"max_tokens": 60, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        want = reference.generate("é", **given)[0]
        assert len(chunks) == len(want.token_ids) == 60
        assert "".join(c["choices"][0]["text"] for c in chunks) == want.text


def test_a_drafted_step_streams_token_by_token(http: httpx.Client) -> None:
    """A prompt that repeats itself drafts several tokens a step; each is a chunk of its own."""
    body = {"prompt": "abcabcabcabc", "temperature": 0, "max_tokens": 64, "ignore_eos": True}
    body |= {"stream": True, "foretell": True}
    chunks = events(http.post("/v1/completions", json=body))
    assert len(chunks) == 64
    block = chunks[-1]["speculation"]
    assert block["accepted"] > 0, "nothing was drafted, so this test shows nothing"
    drafted = [c["choices"][0]["foretell"]["drafted"] for c in chunks]
    assert sum(drafted) == block["accepted"]
    assert block["steps"] + block["accepted"] == 64
    assert block["acceptance_length"] == pytest.approx(64 / block["steps"], abs=1e-4)
    assert sum(block["accepted_per_position"]) == block["accepted"]


def test_usage_so_far(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "the cat", "max_tokens": 5, "stream": True, "stream_options": options}
    body["ignore_eos"] = True
    chunks = events(http.post("/v1/completions", json=body))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 5, 5]


def test_chat_streams_and_answers(http: httpx.Client, llm: LLM, reference: LLM) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    body = {"messages": messages, "seed": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = http.post("/v1/chat/completions", json=body).json()
    want = reference.generate([llm.chat_ids(messages)], max_tokens=12, temperature=1.0, seed=3)[0]
    message = whole["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", want.text)
    chunks = events(http.post("/v1/chat/completions", json={**body, "stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)
    deltas = [c["choices"][0]["delta"]["content"] for c in chunks]
    assert "".join(deltas) == want.text
    said = [e for c in chunks[1:] for e in c["choices"][0]["logprobs"]["content"]]
    assert said == whole["choices"][0]["logprobs"]["content"]
    assert all(len(e["top_logprobs"]) == 2 for e in said)
    assert len(said) == len(want.token_ids)
    joined = b"".join(bytes(e["bytes"]) for e in said if e["token"] != "<|end|>")
    assert joined.decode("utf-8", "replace") == want.text


def test_chat_parts_tools_and_template_variables(http: httpx.Client) -> None:
    def ids(**body: Any) -> str:
        answer = http.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["tokens"]
        return http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    text = ids(messages=messages, tools=[tool], chat_template_kwargs={"mood": "!"})
    assert text == (
        '[tools [{"type": "function", "function": {"name": "f", '
        '"parameters": {"type": "object"}}}]]'
        '<user>one\ntwo<assistant><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
        "<tool>42<assistant>!"
    )
    assert ids(messages=[{"role": "user", "content": "a"}], add_generation_prompt=False) == (
        "<user>a"
    )


def test_the_longer_name_of_max_tokens_wins(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    for fields, want in (
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({}, CONTEXT),
    ):
        usage = http.post("/v1/chat/completions", json={**body, **fields}).json()["usage"]
        assert usage["total_tokens" if want == CONTEXT else "completion_tokens"] == want


# Wishes about speculation


def test_speculation_can_be_turned_off_and_limited(http: httpx.Client) -> None:
    body = {"prompt": "abcabcabcabc", "temperature": 0, "max_tokens": 48, "ignore_eos": True}
    on = complete(http, **body)
    assert on["speculation"]["drafted"] > 0
    ways: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"speculation": {"off": True}}, {}),
        ({"speculation": {"drafter": "off"}}, {}),
        ({"speculation": {"max_draft": 0}}, {}),
        ({}, {"X-Foretell-Draft": "off"}),
        ({}, {"X-Foretell-Max-Draft": "0"}),
    ]
    for fields, headers in ways:
        off = http.post("/v1/completions", json={**body, **fields}, headers=headers).json()
        assert off["choices"][0]["text"] == on["choices"][0]["text"]
        block = off["speculation"]
        assert block["drafted"] == 0, (fields, headers)
        assert block["acceptance_length"] == 1.0
        assert block["why_off"], "it says why"
    few = complete(http, **body, speculation={"max_draft": 2})["speculation"]
    assert 0 < len(few["accepted_per_position"]) <= 2
    headers = {"X-Foretell-Draft": "off"}  # the body wins
    body = {**body, "speculation": {"drafter": "prompt-lookup"}}
    both = http.post("/v1/completions", json=body, headers=headers).json()
    assert both["speculation"]["drafted"] > 0


def test_the_promise_is_kept_or_refused(http: httpx.Client) -> None:
    for promise in ("exact", "lossless"):
        block = complete(http, speculation={"promise": promise})["speculation"]
        assert block["promise"] == "exact"  # the stronger one is what this server does
    wish = {"prompt": "a", "speculation": {"promise": "lossy"}}
    refused(http.post("/v1/completions", json=wish), 400, "lossy")
    answer = http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Foretell-Promise": "x"})
    refused(answer, 400, "promise")
    unknown = {"prompt": "a", "speculation": {"drafter": "eagle9"}}
    refused(http.post("/v1/completions", json=unknown), 400, "eagle9")
    typo = {"prompt": "a", "speculation": {"max_drafts": 3}}
    refused(http.post("/v1/completions", json=typo), 400, "max_drafts")
    answer = http.post(
        "/v1/completions", json={"prompt": "a"}, headers={"X-Foretell-Max-Draft": "-1"}
    )
    refused(answer, 400, "Max-Draft")


# The other endpoints


def test_models_version_health(http: httpx.Client) -> None:
    cards = http.get("/v1/models").json()
    assert [c["id"] for c in cards["data"]] == ["tiny", "alias"]
    assert cards["data"][0]["max_model_len"] == CONTEXT
    assert http.get("/v1/models/alias").json()["id"] == "alias"
    refused(http.get("/v1/models/gpt-4"), 404, "gpt-4")
    assert complete(http, model="alias", max_tokens=1)["model"] == "alias"
    assert http.get("/health").json() == {"status": "ok"}
    from foretell import __version__

    assert http.get("/version").json() == {"version": __version__}


def test_tokenize_and_back(http: httpx.Client, llm: LLM) -> None:
    body = {"prompt": "the é cat", "return_token_strs": True}
    got = http.post("/tokenize", json=body).json()
    assert got["tokens"] == llm.encode("the é cat")
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert got["max_model_len"] == CONTEXT
    back = http.post("/detokenize", json={"tokens": got["tokens"]}).json()
    assert back == {"prompt": "the é cat"}
    refused(http.post("/detokenize", json={"tokens": [260]}), 400, "260")
    refused(http.post("/tokenize", json={}), 400, "prompt")


def test_metrics(served: tuple[httpx.Client, Service]) -> None:
    http, service = served

    def read() -> dict[str, float]:
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [ln for ln in answer.text.splitlines() if ln and not ln.startswith("#")]
        return {ln.rsplit(" ", 1)[0]: float(ln.rsplit(" ", 1)[1]) for ln in lines}

    label = 'model_name="tiny"'
    before = read()
    got = complete(http, prompt="abcabcabcabc", temperature=0, max_tokens=40, ignore_eos=True)
    until(lambda: service.snapshot().running == 0)
    after = read()

    def grown(name: str, labels: str = label) -> float:
        key = f"foretell:{name}{{{labels}}}"
        return after[key] - before.get(key, 0.0)

    block = got["speculation"]
    assert grown("spec_decode_num_drafts_total") == block["drafts"]
    assert grown("spec_decode_num_draft_tokens_total") == block["drafted"]
    assert grown("spec_decode_num_accepted_tokens_total") == block["accepted"]
    per_position = [
        grown("spec_decode_num_accepted_tokens_per_pos_total", f'{label},position="{i}"')
        for i in range(len(block["accepted_per_position"]))
    ]
    assert per_position == block["accepted_per_position"]
    assert grown("generation_tokens_total") == 40
    assert grown("prompt_tokens_total") == got["usage"]["prompt_tokens"]
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("time_per_output_token_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_count") == 1
    assert grown("request_queue_time_seconds_count") == 1
    assert grown("request_success_total", f'finished_reason="length",{label}') == 1 or (
        grown("request_success_total", f'{label},finished_reason="length"') == 1
    )
    assert after[f"foretell:num_requests_running{{{label}}}"] == 0
    assert after[f"foretell:num_requests_waiting{{{label}}}"] == 0
    assert after[f"foretell:kv_cache_usage_perc{{{label}}}"] == 0
    for name in ("goodput_tokens_per_second", "num_preemptions_total", "prefix_cache_hits_total"):
        assert f"foretell:{name}{{{label}}}" in after
    assert any(k.startswith("foretell:policy_decisions_total{") for k in after)
    assert after["process_resident_memory_bytes"] > 0


def test_the_openapi_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    paths = document["paths"]
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rsplit("/", 1)[1]
        assert name in document["components"]["schemas"]
    assert "422" not in json.dumps(list(paths.values()))
    for path in ("/docs", "/redoc"):
        assert http.get(path).status_code == 404


# Errors

BAD: list[tuple[str, Any, tuple[str, ...]]] = [
    ("no prompt", {}, ("prompt", "missing")),
    ("empty prompt", {"prompt": ""}, ("prompt",)),
    ("no prompts", {"prompt": []}, ("prompt",)),
    ("empty ids", {"prompt": [[]]}, ("prompt",)),
    ("mixed", {"prompt": [1, "a"]}, ("prompt",)),
    ("booleans", {"prompt": [True]}, ("prompt",)),
    ("id too large", {"prompt": [260]}, ("260",)),
    ("id negative", {"prompt": [-1]}, ("prompt",)),
    ("huge id", {"prompt": [10**30]}, ("prompt",)),
    ("prompt too long", {"prompt": [1] * CONTEXT}, ("context",)),
    ("text too long", {"prompt": "é" * 5000}, ("context",)),
    ("temperature text", {"prompt": "a", "temperature": "1"}, ("temperature",)),
    ("temperature negative", {"prompt": "a", "temperature": -1}, ("temperature",)),
    ("top_p", {"prompt": "a", "top_p": 2}, ("top_p",)),
    ("n", {"prompt": "a", "n": 0}, ("'n'",)),
    ("many n", {"prompt": "a", "n": 10**6}, ("'n'",)),
    ("max_tokens", {"prompt": "a", "max_tokens": -1}, ("max_tokens",)),
    ("max_tokens float", {"prompt": "a", "max_tokens": 1.5}, ("max_tokens",)),
    ("min over max", {"prompt": "a", "min_tokens": 9, "max_tokens": 2}, ("min_tokens",)),
    ("stop empty", {"prompt": "a", "stop": ""}, ("stop",)),
    ("stop number", {"prompt": "a", "stop": 3}, ("stop",)),
    ("seed", {"prompt": "a", "seed": 2**70}, ("seed",)),
    ("bias key", {"prompt": "a", "logit_bias": {"x": 1}}, ("logit_bias",)),
    ("bias id", {"prompt": "a", "logit_bias": {"260": 1}}, ("logit_bias",)),
    ("bias value", {"prompt": "a", "logit_bias": {"1": 1e9}}, ("logit_bias",)),
    ("stop id", {"prompt": "a", "stop_token_ids": [999]}, ("stop_token_ids",)),
    ("allowed none", {"prompt": "a", "allowed_token_ids": []}, ("allowed_token_ids",)),
    ("logprobs", {"prompt": "a", "logprobs": 21}, ("logprobs",)),
    ("suffix", {"prompt": "a", "suffix": "b"}, ("suffix",)),
    ("best_of", {"prompt": "a", "best_of": 3}, ("best_of",)),
    ("beams", {"prompt": "a", "use_beam_search": True}, ("beam",)),
    ("grammar", {"prompt": "a", "guided_json": {}}, ("grammar",)),
    (
        "json",
        {"prompt": "a", "response_format": {"type": "json_object"}},
        ("response_format", "grammar"),
    ),
    ("options", {"prompt": "a", "stream_options": {}}, ("stream_options",)),
    ("no object", [1], ("object",)),
    ("null", None, ("object",)),
]


@pytest.mark.parametrize(("name", "body", "words"), BAD, ids=[b[0] for b in BAD])
def test_bad_bodies_are_one_sentence(
    http: httpx.Client, name: str, body: Any, words: tuple[str, ...]
) -> None:
    refused(http.post("/v1/completions", content=json.dumps(body), headers=JSON), 400, *words)


RAW: list[bytes] = [
    b"",
    b"{",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b"\x00",
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/streams"])
@pytest.mark.parametrize("raw", RAW, ids=[str(i) for i in range(len(RAW))])
def test_broken_json_is_a_400(http: httpx.Client, path: str, raw: bytes) -> None:
    refused(http.post(path, content=raw, headers=JSON), 400)


CHAT: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("messages",)),
    ({"messages": []}, ("messages",)),
    ({"messages": [{}]}, ("role",)),
    ({"messages": ["hi"]}, ("messages",)),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ("content",)),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, ("logprobs",)),
    ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, ("grammar",)),
    (
        {
            "messages": [{"role": "user", "content": "a"}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        ("grammar",),
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 1}},
        ("chat_template_kwargs",),
    ),
    ({"messages": [{"role": "user", "content": "a"}], "functions": [{}]}, ("tools",)),
    ({"messages": [{"role": "user", "content": "a" * 3000}]}, ("context",)),
]


@pytest.mark.parametrize(("body", "words"), CHAT, ids=[str(i) for i in range(len(CHAT))])
def test_bad_conversations(
    http: httpx.Client, body: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(http.post("/v1/chat/completions", json=body), 400, *words)


def test_a_model_without_a_template_says_so(tmp_path: Any) -> None:
    from helpers_serve import tiny_model

    service, app = make(LLM.load(tiny_model(tmp_path / "m", chat=False), draft="none"))
    with running(service, app) as url:
        body = {"messages": [{"role": "user", "content": "a"}]}
        refused(httpx.post(f"{url}/v1/chat/completions", json=body), 400, "no chat template")
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_paths_methods_and_content_types(http: httpx.Client) -> None:
    refused(http.get("/nowhere"), 404, "path")
    refused(http.post("/v1/completions/", json={"prompt": "a"}), 404)
    answer = http.put("/v1/completions", json={})
    refused(answer, 405, "method")
    assert "POST" in answer.headers["allow"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = http.post(
            "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind}
        )
        refused(answer, 415, "Content-Type")
    refused(http.post("/v1/completions", json={"prompt": "a", "model": "gpt-4"}), 404, "gpt-4")


def test_nothing_is_said_to_other_sites_unless_asked(http: httpx.Client, reference: LLM) -> None:
    origin = {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=origin).headers
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    assert http.options("/v1/completions", headers=asked).status_code == 405
    service, app = make(reference, cors_origins=["https://good.example"], api_keys=["k"])
    with running(service, app) as url:
        good = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        answer = httpx.options(f"{url}/v1/completions", headers=good)
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        answer = httpx.options(f"{url}/v1/completions", headers=asked)
        assert "access-control-allow-origin" not in answer.headers


def test_api_keys(reference: LLM) -> None:
    service, app = make(reference, api_keys=["first", "sécond"])
    with running(service, app) as url, httpx.Client(base_url=url) as http:
        body = {"prompt": "a", "max_tokens": 1}
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first"},
            {"Authorization": "Basic first"},
            {"X-Api-Key": "first"},
        ):
            answer = http.post("/v1/completions", json=body, headers=headers)
            error = refused(answer, 401, "API key")
            assert error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in (b"first", "sécond".encode()):
            headers = [(b"Authorization", b"Bearer " + key)]
            assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
        for path in ("/v1/models", "/tokenize", "/openapi.json", "/version", "/v1/foretell/stats"):
            refused(http.get(path), 401)
        for path in ("/health", "/metrics", "/"):
            assert http.get(path).status_code == 200


def test_bodies_that_are_too_large(reference: LLM) -> None:
    service, app = make(reference, max_body=2000)
    with running(service, app) as url, httpx.Client(base_url=url) as http:
        body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 1900}).encode()
        assert http.post("/v1/completions", content=body, headers=JSON).status_code == 200
        body = json.dumps({"prompt": "a", "user": "x" * 2000}).encode()
        refused(http.post("/v1/completions", content=body, headers=JSON), 413, "2000")

        def pieces() -> Iterator[bytes]:  # no Content-Length
            for _ in range(8):
                yield b"x" * 1000

        refused(http.post("/v1/completions", content=pieces(), headers=JSON), 413, "2000")


def test_a_full_queue_is_429_with_retry_after(tmp_path: Any) -> None:
    llm = tiny_llm(tmp_path / "m", max_batch=1)
    service, app = make(llm, Limits(max_queue=1))
    with running(service, app) as url, httpx.Client(base_url=url, timeout=30) as http:
        long = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=long) as one:
            assert one.status_code == 200
            answers = []
            with httpx.Client(base_url=url, timeout=30) as other:
                body = {"prompt": ["a", "b", "c", "d"], "max_tokens": 200, "ignore_eos": True}
                answers.append(other.post("/v1/completions", json=body))
            error = refused(answers[0], 429)
            assert error["code"] == "queue_full"
            assert int(answers[0].headers["retry-after"]) >= 1
        until(lambda: service.snapshot().running == service.snapshot().waiting == 0)


def test_a_timeout_is_504_or_an_event(llm: LLM, served: tuple[httpx.Client, Service]) -> None:
    http, service = served
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "n": 64, "timeout": 0.05}
    error = refused(http.post("/v1/completions", json=body), 504)
    assert error["code"] == "timeout"
    body = {"prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 8}
    answer = http.post("/v1/completions", json={**body, "timeout": 0.15})
    if answer.status_code == 200:  # it timed out behind its first token
        assert events(answer)[-1]["error"]["code"] == "timeout"
    else:
        refused(answer, 504)
    until(lambda: service.snapshot().running == service.snapshot().waiting == 0)


def test_what_fails_while_decoding_is_the_requests_error(http: httpx.Client) -> None:
    body = {"prompt": "a", "allowed_token_ids": [65], "bad_words": ["A"], "max_tokens": 3}
    bias = {"prompt": "a", "allowed_token_ids": [65], "stop_token_ids": [65], "min_tokens": 2}
    for bad in (bias,):
        for stream in (False, True):
            refused(http.post("/v1/completions", json={**bad, "stream": stream}), 400, "Nothing")
    assert http.post("/v1/completions", json=body).status_code in (200, 400)
    assert complete(http, max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_levels_of_what_is_told(reference: LLM, llm: LLM) -> None:
    from foretell.serve.blocks import Level

    body = {"prompt": "abcabcabc", "temperature": 0, "max_tokens": 32, "ignore_eos": True}
    for flag, told in ((None, True), ("none", False), ("summary", True), ("detailed", True)):
        fresh = llm.with_methods(draft="prompt-lookup:min_ngram=1")
        service, app = make(fresh, level=Level.of(flag))
        with running(service, app) as url:
            got = httpx.post(f"{url}/v1/completions", json=body).json()
        assert ("speculation" in got) == told
        assert ("metrics" in got) == (flag in ("summary", "detailed"))
        assert ("speculation" in got["choices"][0]) == (flag == "detailed")
        if flag == "detailed":
            own = got["choices"][0]["speculation"]
            assert sum(own["acceptance_histogram"]) == own["steps"]
            theirs = got["metrics"]["speculative_decoding"]
            assert theirs["num_spec_steps"] == own["drafts"] > 0
            assert theirs["num_draft_tokens"] == own["drafted"]
            assert theirs["num_accepted_draft_tokens"] == own["accepted"]
            assert sum(theirs["acceptance_histogram"]) == own["drafts"]


def test_params_have_the_servers_defaults() -> None:
    """SamplingParams is greedy by default and the API is not: nobody mixes them up."""
    assert SamplingParams().temperature == 0.0


def test_contexts_smaller_than_the_models(reference: LLM) -> None:
    """The cache or the operator may hold less than the model could: answers end there."""
    for options, engine, most in (
        ({}, {"kv_rows": 100}, 100),
        ({"max_model_len": 50}, {"kv_rows": 100}, 50),
    ):
        service, app = make(reference.with_methods(draft="none", **engine), **options)
        with running(service, app) as url:
            body = {"prompt": "the cat", "max_tokens": 5000, "ignore_eos": True}
            got = httpx.post(f"{url}/v1/completions", json=body).json()
            assert got["usage"]["total_tokens"] == most
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == most
            body = {"prompt": [1] * most}
            refused(httpx.post(f"{url}/v1/completions", json=body), 400, f"{most} tokens")


def test_several_prompts_are_taken_or_refused_together(reference: LLM) -> None:
    from foretell.serve.prepare import Ask
    from foretell.serve.respond import submit
    from foretell.serve.terms import QueueFull

    class Job:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    made: list[Job] = []

    class Full:
        def submit(self, *args: Any, **more: Any) -> Job:
            if len(made) == 2:
                raise QueueFull("Full.", 3.0)
            made.append(Job())
            return made[-1]

    ask = Ask([[1], [2], [3]], [None] * 3, SamplingParams(), Speculation())
    with pytest.raises(QueueFull):
        submit(Full(), ask)  # type: ignore[arg-type]
    assert [job.cancelled for job in made] == [True, True]


def test_promises_of_a_lossless_and_of_a_lossy_server(llm: LLM, reference: LLM) -> None:
    want = reference.generate("the cat", max_tokens=24, temperature=1.0, seed=7)[0].text
    for verify, promise, lossy in (("rejection", "lossless", False), ("typical", "lossy", True)):
        other = llm.with_methods(
            draft="prompt-lookup:min_ngram=1", verify=verify, allow_lossy=lossy
        )
        service, app = make(other, allow_lossy=lossy)
        with running(service, app) as url:
            body = {"prompt": "the cat", "max_tokens": 24, "seed": 7}

            def ask(least: str | None, body: Any = body, url: str = url) -> dict[str, Any]:
                wish = {"speculation": {"promise": least}} if least else {}
                answer = httpx.post(f"{url}/v1/completions", json={**body, **wish})
                assert answer.status_code == 200, answer.text
                return answer.json()

            assert ask(None)["speculation"]["promise"] == promise
            exact = ask("exact")
            assert exact["speculation"]["promise"] == "exact"
            assert exact["choices"][0]["text"] == want
            if lossy:
                assert ask("lossy")["speculation"]["promise"] == "lossy"


def test_a_client_that_hangs_up_is_not_worked_for(served: tuple[httpx.Client, Service]) -> None:
    http, service = served
    before = service.snapshot().requests_total["cancelled"]
    body = {"prompt": "a", "max_tokens": 240, "ignore_eos": True, "n": 128}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=0.2)
    until(lambda: service.snapshot().running == service.snapshot().waiting == 0, 2)
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    until(lambda: service.snapshot().running == service.snapshot().waiting == 0, 2)
    until(lambda: service.snapshot().requests_total["cancelled"] == before + 2, 2)
    assert service.snapshot().kv_used == 0


class FakeJob:
    """A job that says a text, a character a token."""

    def __init__(self, text: str) -> None:
        self.id, self.created, self.prompt_ids, self.text = "x", 0.0, [1, 2], text
        self.counters, self.cancelled = Stats(), False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        yield self.told()

    def stats(self, sample: int) -> Stats:
        return self.counters

    def speculation(self, sample: int) -> dict[str, Any]:
        return {**Stats().speculation("none", "greedy"), "drafts": 0, "promise": "exact"} | {
            "why_off": None
        }

    def told(self) -> list[TokenEvent]:
        said = [TokenEvent(0, 0, i, ord(c), c, False) for i, c in enumerate(self.text)]
        said[-1].finish_reason = "stop"
        return said

    def output(self) -> RequestOutput:
        ids = [ord(c) for c in self.text]
        sample = SampleOutput(self.text, ids, "stop", 0, [False] * len(ids), Stats(), None)
        return RequestOutput(self.prompt_ids, [sample], None, "exact", "none", "greedy")


def test_a_client_that_stops_reading_is_given_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from foretell.serve.answers.completion import Completion
    from foretell.serve.prepare import Ask
    from foretell.serve.schema import CompletionRequest

    monkeypatch.setattr(respond, "STUCK", 0.1)
    assert llm.tokenizer is not None
    job = FakeJob("hello")
    body = CompletionRequest.model_validate({"prompt": "a", "stream": True})
    ask = Ask([[1, 2]], [None], SamplingParams(), Speculation())
    answer = Completion(body, ask, [job], llm.tokenizer, "tiny")  # type: ignore[list-item]
    sent: list[str] = []

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)  # the socket's buffer is full

    async def main() -> None:
        await asyncio.wait_for(respond.EventStream(answer)({}, receive, send), 5)

    asyncio.run(main())
    assert sent == ["http.response.start", "http.response.body"]
    assert job.cancelled


CALLED = 'Let me see.\n<tool_call>{"name": "f", "arguments": {"x": [1, "é"]}}</tool_call>'


@pytest.mark.parametrize(("text", "calls"), [(CALLED, 1), (CALLED * 2, 2), ("no <tool_call>", 0)])
def test_calls_in_chat_answers(llm: LLM, text: str, calls: int) -> None:
    from foretell.serve.answers.chat import Chat
    from foretell.serve.prepare import Ask
    from foretell.serve.schema import ChatRequest

    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]})
    ask = Ask([[1, 2]], [None], SamplingParams(), Speculation(), tools=True)
    assert llm.tokenizer is not None

    def answer() -> Chat:
        return Chat(body, ask, [FakeJob(text)], llm.tokenizer, "tiny")  # type: ignore[list-item]

    whole = answer().whole([FakeJob(text).output()])["choices"][0]
    streamed = answer()
    chunks = [*streamed.first(0), *streamed.chunks(0, FakeJob(text).told())]
    said = [json.loads(c.removeprefix("data: "))["choices"][0] for c in chunks]
    assert len(said) == len(text) + 1, "one token is one chunk"
    assert "".join(c["delta"]["content"] for c in said) == (whole["message"]["content"] or "")
    found = [c for s in said for c in s["delta"].get("tool_calls", [])]
    assert [c["index"] for c in found] == list(range(calls))
    own = whole["message"].get("tool_calls", [])
    assert [c["function"] for c in own] == [c["function"] for c in found]
    assert all(c["function"] == {"name": "f", "arguments": '{"x": [1, "é"]}'} for c in own)
    assert (
        whole["finish_reason"] == said[-1]["finish_reason"] == ("tool_calls" if calls else "stop")
    )
    if not calls:
        assert whole["message"]["content"] == text


def test_calls_are_read_where_the_template_teaches_them(llm: LLM, tmp_path: Any) -> None:
    from foretell.serve.prepare import Prepare
    from helpers_serve import tiny_model

    assert Prepare(llm, ["tiny"], CONTEXT).calls
    other = tiny_model(tmp_path / "m")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    assert not Prepare(LLM.load(other, draft="none"), ["tiny"], CONTEXT).calls
