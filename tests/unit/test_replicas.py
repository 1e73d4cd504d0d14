"""Replicas: what decides where a request goes, an app called in process, merged metrics; and, where
Ray is installed, two replicas for real."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("fastapi")
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from foretell.core.errors import InputError
from foretell.serve import replicas
from foretell.serve.replicas import Call, answers, merge_metrics, merge_stats, prompt_text, share


def call(path: str = "/v1/completions", body: Any = None, method: str = "POST") -> Call:
    scope = {"method": method, "path": path, "query_string": b"", "headers": [(b"a", b"b")]}
    return Call.of(scope, b"" if body is None else json.dumps(body).encode())


# What decides


def test_the_prompt_decides() -> None:
    assert call(body={"prompt": "once upon"}).prompt == "once upon"
    assert call(body={"prompt": ["one", "two"]}).prompt == "one"
    chat = call(body={"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]})
    assert chat.prompt == "user\nx\n"
    assert call(body={"model": "m"}).prompt == ""
    assert call(method="GET").prompt == ""


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(0, 20))
def test_ids_that_begin_alike_make_texts_that_begin_alike(ids: list[int], cut: int) -> None:
    whole, part = (prompt_text(json.dumps({"prompt": i}).encode()) for i in (ids, ids[:cut]))
    assert len(whole) == len(ids)
    assert whole.startswith(part)
    whole.encode("utf-8")  # travels between processes: no surrogates


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda s: (
            st.lists(s, max_size=3)
            | st.dictionaries(st.sampled_from(["prompt", "messages", "content", "role", "text"]), s)
        ),
        max_leaves=12,
    )
)
def test_any_body_gives_some_text(value: Any) -> None:
    assert isinstance(prompt_text(json.dumps(value).encode()), str)


def test_a_broken_body_gives_none() -> None:
    for body in (b"", b"\xff", b"{", b"[" * 100_000):
        assert prompt_text(body) == ""


def test_a_streams_id_names_its_replica() -> None:
    assert call("/v1/streams/strm-abc12-00ff/append", {"text": "x"}).owner == "abc12"
    assert call("/v1/streams/strm-00ff", method="GET").owner == ""  # a server of one process
    assert call("/v1/completions", {"prompt": "strm-abc-1"}).owner == ""


@pytest.mark.parametrize(
    ("cores", "count", "threads", "cpus"),
    [(16, 2, 8, 8.0), (7, 2, 3, 3.0), (2, 2, 1, 1.0), (2, 3, 1, 0.66), (1, 200, 1, 0.01)],
)
def test_processors_are_shared_out(cores: int, count: int, threads: int, cpus: float) -> None:
    assert share(cores, count) == (threads, cpus)
    assert cpus * count <= max(cores, 0.01 * count)


# An app in process


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says back what it got; /slow sends one piece and then waits for the client to leave."""
    message = await receive()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x", b"y")]})
    if scope["path"] == "/slow":
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        scope["left"] = (await receive())["type"]
        raise OSError("gone")
    if scope["path"] == "/fails":
        raise ValueError("no")
    said = f"{scope['method']} {scope['foretell.replica']} {message['body'].decode()}"
    await send({"type": "http.response.body", "body": said.encode()})


def test_what_the_app_sends_comes_back() -> None:
    async def go() -> list[Any]:
        return [m async for m in answers(app, call("/x", {"a": 1}), "r1")]

    start, body = asyncio.run(go())
    assert (start["status"], start["headers"]) == (201, [(b"x", b"y")])
    assert body["body"] == b'POST r1 {"a": 1}'


def test_what_the_app_raises_is_raised() -> None:
    async def go() -> None:
        async for _ in answers(app, call("/fails"), "r1"):
            pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(go())


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_client_that_leaves_is_a_disconnect(stubborn: bool) -> None:
    seen: dict[str, Any] = {}

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        seen["scope"] = scope
        try:
            await app(scope, receive, send)
        finally:
            if stubborn and "left" not in seen:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    seen["cancelled"] = True
                    raise

    async def go() -> None:
        stream: AsyncIterator[Any] = answers(watched, call("/slow"), "r1")
        assert (await anext(stream))["status"] == 201
        assert (await anext(stream))["body"] == b"one"
        await stream.aclose()  # type: ignore[attr-defined]
        assert len(asyncio.all_tasks()) == 1, "a task was left behind"

    asyncio.run(go())
    assert seen["scope"]["left"] == "http.disconnect"
    assert seen.get("cancelled", False) is stubborn


# Numbers of several


PAGE = """# HELP foretell:steps_total Steps.
# TYPE foretell:steps_total counter
foretell:steps_total {}
# HELP foretell:tokens_total Tokens.
# TYPE foretell:tokens_total counter
foretell:tokens_total{{model_name="a b",position="0"}} {}
# HELP foretell:wait_seconds Waiting.
# TYPE foretell:wait_seconds histogram
foretell:wait_seconds_bucket{{le="0.1"}} {}
foretell:wait_seconds_bucket{{le="+Inf"}} 4.0
foretell:wait_seconds_count 4.0
foretell:wait_seconds_sum 1.5
"""


def test_metrics_keep_their_replica() -> None:
    merged = merge_metrics({"r1": PAGE.format(1, 2, 3), "r2": PAGE.format(5, 6, 4)})
    families = {f.name: f for f in text_string_to_metric_families(merged)}
    assert len(families) == 3
    tokens = families["foretell:tokens"].samples
    assert [(s.labels["replica"], s.labels["model_name"], s.value) for s in tokens] == [
        ("r1", "a b", 2.0),
        ("r2", "a b", 6.0),
    ]
    assert [s.value for s in families["foretell:steps"].samples] == [1.0, 5.0]
    assert families["foretell:wait_seconds"].type == "histogram"
    assert len(families["foretell:wait_seconds"].samples) == 8
    assert merged.count("# TYPE") == 3


def test_stats_are_summed_at_one_clock() -> None:
    one = {"time": 5.0, "running": 1, "kv_rows": 10, "draining": False}
    two = {"time": 900.0, "running": 2, "kv_rows": 10, "draining": True}
    merged = merge_stats([one, two], 77.0)
    assert merged == {"time": 77.0, "running": 3, "kv_rows": 20, "draining": False}


# Starting


def test_bad_starts_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least 1"):
        replicas.run(0, {})
    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"foretell\[scale\]"):
        replicas.run(2, {})


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (extra scale)")
def test_two_replicas() -> None:
    """Answers, affinity by prefix and by stream, merged numbers, and a drain that loses nothing."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = threading.Event()
    lines: list[str] = []
    options = {"port": port, "grace": 20.0, "policy": "fixed", "offer": ()}
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    thread = threading.Thread(
        target=replicas.run, args=(2, options), kwargs={"say": lines.append, "stop": stop}
    )
    thread.start()
    try:
        end = time.monotonic() + 120
        while not any("replicas of" in line for line in lines):
            assert thread.is_alive(), "it did not start"
            assert time.monotonic() < end, "it took too long to start"
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _two_replicas(client)
            body = {"prompt": "Once", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                events = answer.iter_lines()
                next(events)
                stop.set()
                last = [line for line in events if line][-1]
            assert last == "data: [DONE]", "a running request was cut off"
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def _two_replicas(client: Any) -> None:
    def finished() -> dict[str, float]:
        page = client.get("/metrics").text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for s in family.samples:
                if s.name == "foretell:e2e_request_latency_seconds_count":
                    found[s.labels["replica"]] = s.value
        return found

    def ask(prompt: str, n: int = 2) -> tuple[str, str]:
        """(text, replica)"""
        before = finished()
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        after = finished()
        (who,) = [r for r in after if after[r] != before[r]]
        return answer.json()["choices"][0]["text"], who

    texts = [f"Document {i}: " + f"The fox number {i} jumps over the dog. " * 8 for i in range(4)]
    homes = [ask(text)[1] for text in texts]
    assert len(set(homes)) == 2, "one replica got everything"
    assert [ask(text + "And?")[1] for text in texts] == homes

    whole, _ = ask("Once upon a time there was", 8)
    for _ in range(4):
        opened = client.post("/v1/streams", json={"max_tokens": 8, "temperature": 0}).json()
        assert opened["id"].split("-")[1] in homes
        for part in ("Once upon ", "a time ", "there was"):
            sent = client.post(f"/v1/streams/{opened['id']}/append", json={"text": part})
            assert sent.status_code == 200, sent.text
        answer = client.post(f"/v1/streams/{opened['id']}/finish", json={})
        assert answer.json()["choices"][0]["text"] == whole
    assert client.get("/v1/foretell/stats").json()["running"] == 0
    assert client.post("/v1/completions", json={"prompt": 5}).status_code == 400
