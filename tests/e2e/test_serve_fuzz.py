"""Fuzzing the server: no 5xx, no hang, always OpenAI's shape, whatever is sent.

The budget of the default run is small; `pytest -m slow` sends 2,000 requests made from the OpenAPI
document. FORETELL_FUZZ sets the number of bodies of the byte fuzzer.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from foretell.serve.service import Service
from foretell.serve.terms import Limits
from helpers_serve import make, running, tiny_llm, until

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

pytestmark = pytest.mark.e2e
EXAMPLES = int(os.environ.get("FORETELL_FUZZ", "60"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/streams")
HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    llm = tiny_llm(tmp_path_factory.mktemp("model"))
    service, app = make(llm, Limits(timeout=5.0, stream_idle=2.0))
    with running(service, app) as url:
        yield url, service
        until(lambda: service.snapshot().running == service.snapshot().waiting == 0, 20)


@pytest.fixture(scope="module")
def http(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=20) as client:
        yield client


def check(answer: httpx.Response) -> None:
    """Never the server's fault, and an error is always in the one shape."""
    said = answer.text[:500]
    # 504 is what a request that generates for longer than the server allows deserves
    assert answer.status_code < 500 or answer.status_code == 504, said
    assert answer.status_code != 422, said
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, said
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n"), said
        for block in answer.text.split("\n\n")[:-2]:
            chunk = json.loads(block.removeprefix("data: "))
            assert chunk.get("error", {}).get("type") != "server_error", said


# From the OpenAPI document


def from_document(url: str, total: int) -> Counter[tuple[str, int]]:
    """Send about `total` requests, divided among the operations; (operation, status) -> times."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [o.ok() for o in schema.get_all_operations()]
    sent: Counter[tuple[str, int]] = Counter()
    posts = [o for o in operations if o.method.upper() == "POST"]
    share = {o.label: (9 if o in posts[:4] else 2) for o in operations}
    whole = sum(share.values())
    with httpx.Client(timeout=20) as client:
        for operation in operations:
            modes = schemathesis.GenerationMode
            strategies = [operation.as_strategy(generation_mode=m) for m in modes]
            budget = max(1, -(-total * share[operation.label] // (whole * len(strategies))))

            for strategy in strategies:

                @given(case=strategy)
                @settings(
                    max_examples=budget,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                def send(case: Any) -> None:
                    answer = _send(client, url, case)
                    sent[case.operation.label, answer.status_code] += 1
                    check(answer)

                with suppress(Unsatisfiable):  # nothing about this operation can be wrong
                    send()
    return sent


def _send(client: httpx.Client, url: str, case: Any) -> httpx.Response:
    made = case.as_transport_kwargs(base_url=url)
    body: dict[str, Any] = {}
    if "json" in made:
        text = json.dumps(made["json"], allow_nan=True)
        body["content"] = text.encode("utf-8", "surrogatepass")
        body["headers"] = {"Content-Type": "application/json"}
    elif made.get("data") is not None:
        raw = made["data"]
        body["content"] = raw if isinstance(raw, bytes) else str(raw).encode("utf-8", "replace")
    headers = {
        k.encode("latin-1", "replace"): str(v).encode("utf-8", "replace")
        for k, v in {**(made.get("headers") or {}), **body.pop("headers", {})}.items()
    }
    try:
        return client.request(
            made["method"], made["url"], params=made.get("params"), headers=headers, **body
        )
    except (httpx.InvalidURL, httpx.LocalProtocolError):  # the client itself refuses to send it
        return httpx.Response(200, request=httpx.Request("GET", url))


def test_requests_made_from_the_document(server: tuple[str, Service]) -> None:
    assert from_document(server[0], 80).total() >= 60


@pytest.mark.slow
def test_two_thousand_requests_made_from_the_document(server: tuple[str, Service]) -> None:
    sent = from_document(server[0], 2800)
    print(sent)
    assert sent.total() >= 2000
    for path in POSTS[:4]:  # good and bad ones got where they were meant to
        assert sent[f"POST {path}", 200] >= 20, path
        assert sent[f"POST {path}", 400] >= 20, path


# Bodies that no document describes

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**40, 0, -1]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["", "\x00", "<|end|>", "\U0001f600", "\ud800", "the", "a" * 3000]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = (
    "prompt",
    "messages",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "n",
    "stop",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "ignore_eos",
    "echo",
    "stream",
    "stream_options",
    "response_format",
    "speculation",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "timeout",
    "foretell",
    "return_token_ids",
    "tokens",
)
good = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["a", "the cat", [1, 2], ["a", "b"], [[5], [6, 7]], "\x00é"]),
        "messages": st.just([{"role": "user", "content": "hi"}]),
        "tokens": st.lists(st.integers(0, 300), max_size=5),
        "max_tokens": st.integers(0, 12),
        "n": st.integers(1, 3),
        "logprobs": st.one_of(st.integers(0, 5), st.booleans()),
        "temperature": st.sampled_from([0, 0.5, 1, 1e-300, 1e300, 5e-324]),
        "top_p": st.sampled_from([1, 0.5, 1e-300]),
        "top_k": st.sampled_from([-1, 0, 1, 5, 10**6]),
        "min_p": st.sampled_from([0, 1, 1e-300]),
        "typical_p": st.sampled_from([1, 1e-300, 0.3]),
        "repetition_penalty": st.sampled_from([0.01, 100, 1.2]),
        "presence_penalty": st.sampled_from([-2, 2, 0]),
        "frequency_penalty": st.sampled_from([-2, 2]),
        "logit_bias": st.sampled_from(
            [{"1": -100}, {"259": 100}, {str(i): -100 for i in range(260)}]
        ),
        "stop": st.sampled_from(["a", ["e", "th"], []]),
        "bad_words": st.sampled_from([["a"], ["the"]]),
        "allowed_token_ids": st.sampled_from([[1], [259], list(range(260))]),
        "stop_token_ids": st.sampled_from([[1], [259, 259], []]),
        "min_tokens": st.integers(0, 20),
        "ignore_eos": st.booleans(),
        "echo": st.booleans(),
        "stream": st.booleans(),
        "seed": st.sampled_from([0, -1, 2**63, 2**64 - 1]),
        "foretell": st.booleans(),
        "return_token_ids": st.booleans(),
        "timeout": st.sampled_from([1e-9, 0.001, 1]),
        "speculation": st.sampled_from(
            [{"off": True}, {"max_draft": 1}, {"drafter": "nope"}, {"promise": "exact"}]
        ),
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]),
    },
)


@given(
    path=st.sampled_from(POSTS),
    body=good,
    bad=st.dictionaries(st.sampled_from(FIELDS), values, max_size=2),
)
@SETTINGS
def test_fields_with_other_values(
    http: httpx.Client, path: str, body: dict[str, Any], bad: dict[str, Any]
) -> None:
    content = json.dumps({**body, **bad}).encode()
    check(http.post(path, content=content, headers=HEADERS))


@given(path=st.sampled_from(POSTS), body=good)
@SETTINGS
def test_any_mix_of_good_values(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    body.setdefault("prompt", "a")
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    body.setdefault("max_tokens", 4)
    if path != "/v1/completions":
        body["logprobs"] = bool(body.get("logprobs"))
    check(http.post(path, content=json.dumps(body).encode(), headers=HEADERS))


TEMPLATE = b'{"prompt": "the cat", "max_tokens": 3, "messages": [{"role": "u", "content": "a"}]}'


@given(
    path=st.sampled_from(POSTS),
    edits=st.lists(
        st.tuples(st.integers(0, len(TEMPLATE)), st.integers(0, 6), st.binary(max_size=6)),
        max_size=4,
    ),
    kind=st.sampled_from([b"application/json"] * 4 + [b"text/plain", b"", b"\xff/\xfe"]),
)
@SETTINGS
def test_bytes(
    http: httpx.Client, path: str, edits: list[tuple[int, int, bytes]], kind: bytes
) -> None:
    body = TEMPLATE
    for at, cut, put in edits:
        body = body[:at] + put + body[at + cut :]
    check(http.post(path, content=body, headers=[(b"Content-Type", kind)]))


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), max_size=30),
)
@SETTINGS
def test_paths(http: httpx.Client, method: str, path: str) -> None:
    try:
        request = http.build_request(method, "/" + path)
    except (httpx.InvalidURL, ValueError):
        return
    if request.url.host == httpx.URL(http.base_url).host:
        check(http.send(request))


def test_the_file_system_is_out_of_reach(http: httpx.Client) -> None:
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/..%2f..%2fetc"):
        request = httpx.Request("GET", f"{str(http.base_url).rstrip('/')}{path}")
        assert http.send(request).status_code == 404
    for model in ("/etc/passwd", "../../etc/passwd"):
        body = {"model": model, "prompt": "a"}
        assert http.post("/v1/completions", json=body).status_code == 404
    body = {"prompt": "a", "speculation": {"drafter": "draft-model:path=/etc"}}
    assert http.post("/v1/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    ],
    ids=["noise", "version", "negative", "huge", "chunks", "long path", "many headers"],
)
def test_broken_http(server: tuple[str, Service], http: httpx.Client, raw: bytes) -> None:
    host, port = httpx.URL(server[0]).host, httpx.URL(server[0]).port
    with socket.create_connection((host, port), timeout=5) as wire:
        wire.sendall(raw)
        wire.shutdown(socket.SHUT_WR)
        said = b""
        while piece := wire.recv(65536):
            said += piece
    assert not said.startswith(b"HTTP/1.1 5"), said[:200]
    assert http.get("/health").status_code == 200
