"""`/v1/streams`: whatever the pieces, the answer is that of the whole prompt sent at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell.serve.terms import Limits
from helpers_serve import CONTEXT, events, make, running, tiny_llm, until

PATH = "/v1/streams"
FORM = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
TEXT = "the cat sat on a mat and the dog sat on the cat"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_llm(tmp_path_factory.mktemp("tiny"), policy="fixed")


@pytest.fixture(scope="module")
def client(llm: Any) -> Iterator[httpx.Client]:
    service, app = make(llm, Limits(max_queue=6, stream_idle=30.0))
    with running(service, app) as url, httpx.Client(base_url=url, timeout=30) as made:
        yield made


@contextmanager
def another(
    llm: Any, limits: Limits | None = None, rows: int | None = None, **options: Any
) -> Iterator[httpx.Client]:
    """A server of its own: an engine belongs to one service."""
    engine = llm.with_methods("prompt-lookup", policy="fixed", max_batch=4, kv_rows=rows)
    service, app = make(engine, limits, **options)
    with running(service, app) as url, httpx.Client(base_url=url, timeout=30) as made:
        yield made


def opened(client: httpx.Client, **body: Any) -> str:
    answer = client.post(PATH, json={**FORM, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def append(client: httpx.Client, name: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"{PATH}/{name}/append", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def finish(client: httpx.Client, name: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"{PATH}/{name}/finish", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def at_once(client: httpx.Client, **body: Any) -> dict[str, Any]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = client.post(path, json={**FORM, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: dict[str, Any]) -> list[Any]:
    """What the model said, and what it was counted as."""
    usage = answer["usage"]
    found: list[Any] = [usage["prompt_tokens"], usage["completion_tokens"]]
    for choice in answer["choices"]:
        found += [choice.get("text", choice.get("message")), choice["finish_reason"]]
        found += [choice["logprobs"]]
    return found


def refused(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    for word in words:
        assert word in error["message"]
    return error


# Equal to the whole


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.1, "seed": 3, "n": 3},
        {"logprobs": 2},
        {"speculation": {"off": True}},
    ],
    ids=["greedy", "sampled", "three", "logprobs", "off"],
)
def test_pieces_answer_like_the_whole(client: httpx.Client, form: dict[str, Any]) -> None:
    name = opened(client, **form)
    for i in range(0, len(TEXT), 7):
        append(client, name, text=TEXT[i : i + 7])
    assert said(finish(client, name)) == said(at_once(client, prompt=TEXT, **form))


def test_a_correction_answers_like_the_corrected(client: httpx.Client) -> None:
    name = opened(client, prompt="the cat sat in the house")
    answer = client.put(f"{PATH}/{name}", json={"prompt": "the cat sat in the garden"})
    assert answer.status_code == 200
    append(client, name, text=" and sang")
    whole = at_once(client, prompt="the cat sat in the garden and sang")
    assert said(finish(client, name)) == said(whole)


def test_ids(client: httpx.Client) -> None:
    name = opened(client, prompt=[5, 6, 7])
    append(client, name, token_ids=[8, 9])
    assert said(finish(client, name)) == said(at_once(client, prompt=[5, 6, 7, 8, 9]))


def test_chat_grows_by_text_and_by_messages(client: httpx.Client) -> None:
    first = {"role": "user", "content": "a"}
    name = opened(client, messages=[first])
    append(client, name, text=" word")
    append(client, name, messages=[{"role": "assistant", "content": "b"}, first])
    append(client, name, text=" more")
    talk = [
        {"role": "user", "content": "a word"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "a more"},
    ]
    whole = at_once(client, messages=talk)
    answer = finish(client, name)
    assert said(answer) == said(whole)
    assert answer["object"] == "chat.completion"

    name = opened(client, messages=[first])
    assert client.put(f"{PATH}/{name}", json={"messages": talk}).status_code == 200
    assert said(finish(client, name)) == said(whole)


def test_without_max_tokens_the_room_that_is_left_counts(llm: Any) -> None:
    form = {"temperature": 0, "ignore_eos": True}
    talk = [{"role": "user", "content": TEXT}]
    with another(llm, rows=90) as client:
        name = client.post(PATH, json={**form, "messages": talk}).json()["id"]
        whole = client.post("/v1/chat/completions", json={**form, "messages": talk}).json()
        assert said(finish(client, name)) == said(whole)
        assert whole["usage"]["total_tokens"] == 90


def test_an_answer_can_be_streamed(client: httpx.Client) -> None:
    name = opened(client, prompt=TEXT)
    form = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.post(f"{PATH}/{name}/finish", json=form)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer)
    text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
    whole = at_once(client, prompt=TEXT)
    assert text == whole["choices"][0]["text"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.text("the cab", max_size=9)),
        st.tuples(st.just("cut"), st.integers(0, 30)),
        st.tuples(st.just("update"), st.text("the cab", max_size=25)),
        st.tuples(st.just("wait"), st.none()),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES, seed=st.integers(0, 3))
def test_any_changes_answer_like_the_last_prompt(
    client: httpx.Client, changes: list[tuple[str, Any]], seed: int
) -> None:
    """Append and update in any order; tokens that merge across pieces ("t", "h") included."""
    form = {"temperature": 0.8, "seed": seed}
    name, prompt = opened(client, **form), ""
    for kind, what in changes:
        if kind == "wait":  # until all is read, so that later corrections find rows to drop
            until(lambda: _read(state(client, name)))
            continue
        if kind == "append":
            prompt += what
            append(client, name, text=what)
            continue
        prompt = prompt[:what] if kind == "cut" else what
        answer = client.put(f"{PATH}/{name}", json={"prompt": prompt})
        assert answer.status_code == 200, answer.text
    if not prompt:
        refused(client.post(f"{PATH}/{name}/finish"), 400, "empty")
        assert client.delete(f"{PATH}/{name}").status_code == 200
        return
    assert said(finish(client, name)) == said(at_once(client, prompt=prompt, **form))


def _read(now: dict[str, Any]) -> bool:
    return now["rows_ready"] == max(0, now["prompt_tokens"] - 1)


def test_appends_at_the_same_time_all_count(client: httpx.Client) -> None:
    name = opened(client, prompt="x")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda c: append(client, name, text=c), "abcdefgh"))
    assert finish(client, name)["usage"]["prompt_tokens"] == 9


# What is read, and what is read again


def state(client: httpx.Client, name: str) -> dict[str, Any]:
    answer = client.get(f"{PATH}/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_prompt_is_read_while_it_grows(client: httpx.Client, llm: Any) -> None:
    text = "zyxw vuts " * 4
    name = opened(client)
    assert state(client, name)["prompt_tokens"] == 0
    append(client, name, text=text)
    count = len(llm.encode(text))
    until(lambda: state(client, name)["rows_ready"] == count - 1)
    now = state(client, name)
    assert now["prompt_tokens"] == count
    assert now["recomputed"] == 0
    assert 0 < now["expires_in"] <= 30
    client.delete(f"{PATH}/{name}")


def test_a_correction_costs_only_what_changed(client: httpx.Client, llm: Any) -> None:
    before, after = "qrst " * 6 + "old end", "qrst " * 6 + "new"
    name = opened(client, prompt=before)
    count = len(llm.encode(before))
    until(lambda: state(client, name)["rows_ready"] == count - 1)
    assert client.put(f"{PATH}/{name}", json={"prompt": after}).status_code == 200
    ids, new = llm.encode(before), llm.encode(after)
    common = next(i for i, (a, b) in enumerate(zip(ids, new, strict=False)) if a != b)
    until(lambda: state(client, name)["rows_ready"] == len(new) - 1)
    assert state(client, name)["recomputed"] == count - 1 - common
    finish(client, name)


# Ends


def test_what_is_over_says_so(client: httpx.Client) -> None:
    name = opened(client, prompt="x")
    finish(client, name)
    error = refused(client.get(f"{PATH}/{name}"), 404, "finished")
    assert error["code"] == "stream_finished"
    refused(client.post(f"{PATH}/{name}/append", json={"text": "y"}), 404, "finished")

    name = opened(client, prompt="x")
    answer = client.delete(f"{PATH}/{name}")
    assert answer.json() == {"id": name, "object": "stream", "deleted": True}
    refused(client.post(f"{PATH}/{name}/finish"), 404, "cancelled")
    assert refused(client.get(f"{PATH}/strm-0"), 404)["code"] == "stream_not_found"


def test_a_stream_nobody_feeds_expires(llm: Any) -> None:
    with another(llm, Limits(stream_idle=0.4)) as client:
        name = opened(client, prompt="x" * 20)
        until(lambda: client.get(f"{PATH}/{name}").status_code == 404)
        error = refused(client.get(f"{PATH}/{name}"), 404, "expired")
        assert error["code"] == "stream_expired"
        until(lambda: client.get("/v1/foretell/stats").json()["kv_used"] == 0)


def test_open_streams_are_limited(llm: Any) -> None:
    with another(llm, Limits(max_queue=3)) as client:
        names = [opened(client, prompt="x") for _ in range(3 + 4)]  # four could run
        answer = client.post(PATH, json=FORM)
        refused(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        assert client.delete(f"{PATH}/{names[0]}").status_code == 200
        opened(client, prompt="x")


def test_streams_that_are_dropped_leave_nothing(llm: Any) -> None:
    with another(llm) as client:

        def used() -> tuple[int, ...]:
            now = client.get("/v1/foretell/stats").json()
            return now["running"], now["waiting"], now["streams"], now["kv_used"]

        for i in range(20):
            name = opened(client, prompt=TEXT)
            append(client, name, text=TEXT)
            if i % 2:
                until(lambda name=name: state(client, name)["rows_ready"] > 0)
            assert client.delete(f"{PATH}/{name}").status_code == 200
        until(lambda: used() == (0, 0, 0, 0))


def test_ids_are_long_and_never_the_same(client: httpx.Client) -> None:
    names = {opened(client) for _ in range(2)}
    assert len(names) == 2
    assert all(len(n) == len("strm-") + 40 for n in names)
    for name in names:
        client.delete(f"{PATH}/{name}")


def test_a_key_is_asked_for(llm: Any) -> None:
    with another(llm, api_keys=["secret"]) as client:
        assert client.post(PATH, json=FORM).status_code == 401
        assert client.get(f"{PATH}/strm-0").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        opened(client, prompt="x")


# Refusals


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [300]}, "300"),
        ({"prompt": "x" * 3 * CONTEXT}, "context"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"speculation": {"drafter": "nobody"}}, "nobody"),
    ],
)
def test_bad_openings(client: httpx.Client, body: dict[str, Any], words: str) -> None:
    before = client.get("/v1/foretell/stats").json()["waiting"]
    refused(client.post(PATH, json={**FORM, **body}), 400, words)
    assert client.get("/v1/foretell/stats").json()["waiting"] == before


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "token_ids": [1]},
        {"token_ids": [1]},
        {"token_ids": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"text": 5},
        {"text": "x" * 3 * CONTEXT},
    ],
)
def test_a_refused_change_changes_nothing(client: httpx.Client, body: dict[str, Any]) -> None:
    name = opened(client, prompt="the cat")
    refused(client.post(f"{PATH}/{name}/append", json=body), 400)
    if "token_ids" not in body:
        told = {"prompt": body["text"]} if set(body) == {"text"} else body
        refused(client.put(f"{PATH}/{name}", json=told), 400)
    assert said(finish(client, name)) == said(at_once(client, prompt="the cat"))


def test_bodies_that_are_none(client: httpx.Client) -> None:
    kind = {"content-type": "application/json"}
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 10_000, b'{"messages": '):
        assert client.post(PATH, content=body, headers=kind).status_code == 400
    assert client.post(PATH, content=b"{}", headers={"content-type": "text/plain"}).status_code in (
        400,
        415,
    )
    name = opened(client)
    for verb, path in (("POST", "/append"), ("PUT", ""), ("POST", "/finish")):
        answer = client.request(verb, f"{PATH}/{name}{path}", content=b"{", headers=kind)
        assert answer.status_code == 400
    options = {"stream_options": {"include_usage": True}}
    refused(client.post(f"{PATH}/{name}/finish", json=options), 400, "stream")
    refused(client.post(f"{PATH}/{name}/finish", json={}), 400, "empty")
    client.delete(f"{PATH}/{name}")


def test_the_document_knows_the_streams(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    paths = document["paths"]
    assert {"post"} <= paths[PATH].keys()
    assert {"get", "put", "delete"} <= paths[f"{PATH}/{{name}}"].keys()
    text = str(document)
    for name in document["components"]["schemas"]:
        assert name
    import re

    used = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert used <= document["components"]["schemas"].keys()
