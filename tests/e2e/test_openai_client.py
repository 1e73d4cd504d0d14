"""The official client against the real program: every endpoint and option, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from foretell.engine.llm import LLM

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytestmark = pytest.mark.e2e

PROMPT = "def fibonacci(n):\n"
MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many has he?"},
]
KEY = "sk-test-key"


class Program:
    """`foretell serve` in a process of its own. By default with the bundled model, which brings its
    drafter and a chat template."""

    def __init__(self, *words: str, port: int = 0, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foretell", "serve", "--port", str(port), *words],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(120), f"it did not start: {self.log}"
        found = re.search(r"(http://\S+)/v1", "".join(self.log))
        assert found, self.log
        self.url = found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("Serving at"):
                self._ready.set()
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def metric(self, name: str) -> float:
        """The sum over the labels of one metric."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [ln for ln in page.splitlines() if re.match(rf"{re.escape(name)}[{{ ]", ln)]
        assert lines, f"no metric {name}"
        return sum(float(ln.rsplit(" ", 1)[1]) for ln in lines)

    def cancelled(self) -> float:
        """Requests that were dropped since the start."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.search(r'request_success_total{.*finished_reason="cancelled".*} (\S+)', page)
        return float(found[1]) if found else 0.0

    def idle(self, seconds: float = 30.0) -> None:
        """Wait until nothing runs and nothing waits."""
        end = time.monotonic() + seconds
        while any(
            self.metric(f"foretell:{n}")
            for n in ("num_requests_running", "num_requests_waiting", "kv_cache_used_rows")
        ):
            assert time.monotonic() < end, "something still runs"
            time.sleep(0.05)

    def end(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def program(*words: str, **more: Any) -> Iterator[Program]:
    made = Program(*words, **more)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.end()


@pytest.fixture(scope="module")
def served() -> Iterator[Program]:
    words = ("--served-model-name", "base", "--served-model-name", "gpt-4o-mini")
    with program(*words, "--api-key", "another", env={"FORETELL_API_KEY": KEY}) as made:
        yield made
        assert made.end(signal.SIGTERM) == 0
        assert not any("Traceback" in line for line in made.log), made.log


@pytest.fixture(scope="module")
def client(served: Program) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> LLM:
    """The same model without server and drafter."""
    return LLM.load(draft="none", threads=1)


# The tour


def test_the_banner_tells_what_is_served(served: Program) -> None:
    text = "".join(served.log)
    for word in ("draft-model", "suffix", "goodput", "exact", "KV cache", "limits", served.url):
        assert word in text
    assert KEY not in text


def test_models(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["base", "gpt-4o-mini"]
    assert client.models.retrieve("gpt-4o-mini").owned_by == "foretell"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nothing")
    assert error.value.code == "model_not_found"


def test_completions(client: Any, plain: LLM) -> None:
    for temperature in (0.0, 0.8):
        got = client.completions.create(
            model="base", prompt=PROMPT, max_tokens=40, temperature=temperature, seed=11
        )
        want = plain.generate(PROMPT, max_tokens=40, temperature=temperature, seed=11)[0]
        assert got.object == "text_completion"
        assert got.choices[0].text == want.text
        assert got.choices[0].finish_reason == want.finish_reason
        assert got.usage.completion_tokens == len(want.token_ids)


def test_completions_of_every_kind_of_prompt(client: Any, plain: LLM) -> None:
    ids = plain.encode(PROMPT)
    for prompt, count in ((PROMPT, 1), ([PROMPT, "Once"], 2), (ids, 1), ([ids, ids[:3]], 2)):
        got = client.completions.create(model="base", prompt=prompt, max_tokens=4, n=2, seed=1)
        assert [c.index for c in got.choices] == list(range(2 * count))
    echoed = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=4, echo=True, logprobs=2, seed=1
    )
    choice = echoed.choices[0]
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(ids) + 4
    assert choice.logprobs.text_offset[len(ids)] == len(PROMPT)


def test_streamed_completions(client: Any) -> None:
    same = {"model": "base", "prompt": PROMPT, "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.completions.create(**same, logprobs=1)
    stream = client.completions.create(
        **same, logprobs=1, stream=True, stream_options={"include_usage": True}
    )
    texts, usage, tokens = ["", ""], None, 0
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens += len(choice.logprobs.tokens)
    assert texts == [c.text for c in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == tokens


def test_sampling_options(client: Any, plain: LLM) -> None:
    options: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({"stop": ["return", "\n\n"]}, {}, {"stop": ("return", "\n\n")}),
        ({"presence_penalty": 1.0, "frequency_penalty": 0.5}, {}, {}),
        ({"logit_bias": {"300": -100, "301": 20}}, {}, {"logit_bias": {300: -100.0, 301: 20.0}}),
        ({"top_p": 0.7}, {"top_k": 20, "min_p": 0.02}, {"top_k": 20, "min_p": 0.02}),
        ({}, {"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({}, {"min_tokens": 20, "ignore_eos": True}, {"min_tokens": 20, "ignore_eos": True}),
        ({}, {"stop_token_ids": [13, 300]}, {"stop_token_ids": (13, 300)}),
        ({}, {"bad_words": ["return"]}, {"bad_words": ("return",)}),
        ({}, {"allowed_token_ids": [300, 301, 302]}, {"allowed_token_ids": [300, 301, 302]}),
        ({}, {"typical_p": 0.5}, {"typical_p": 0.5}),
    ]
    base = {"max_tokens": 24, "seed": 5, "temperature": 1.0}
    for named, extra, engine in options:
        got = client.completions.create(
            model="base", prompt=PROMPT, **base, **named, extra_body=extra
        )
        want = plain.generate(PROMPT, **{**base, **named, **extra, **engine})[0]
        assert got.choices[0].text == want.text, (named, extra)
        assert got.choices[0].finish_reason == want.finish_reason, (named, extra)


def test_chat(client: Any, plain: LLM) -> None:
    want = plain.generate([plain.chat_ids(MESSAGES)], max_tokens=32, temperature=0.0)[0]
    got = client.chat.completions.create(
        model="base", messages=MESSAGES, max_completion_tokens=32, temperature=0
    )
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == want.text
    assert got.choices[0].message.tool_calls is None
    assert got.usage.prompt_tokens == len(want.prompt_ids)


def test_streamed_chat_with_logprobs(client: Any) -> None:
    same = {"model": "base", "messages": MESSAGES, "max_tokens": 24, "seed": 9, "logprobs": True}
    whole = client.chat.completions.create(**same, top_logprobs=3)
    stream = client.chat.completions.create(**same, top_logprobs=3, stream=True)
    text, said, roles, reason = "", [], [], None
    for chunk in stream:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        roles += [choice.delta.role] if choice.delta.role else []
        said += choice.logprobs.content if choice.logprobs else []
        reason = choice.finish_reason or reason
    assert text == whole.choices[0].message.content
    assert roles == ["assistant"]
    assert reason == whole.choices[0].finish_reason
    assert said == whole.choices[0].logprobs.content
    assert all(len(e.top_logprobs) == 3 for e in said)


def test_the_streaming_helper_and_parts_of_content(client: Any) -> None:
    parts = [{"type": "text", "text": "How many is 3 + 4?"}]
    with client.chat.completions.stream(
        model="base", messages=[{"role": "user", "content": parts}], stop=[" ", "\n"], seed=1
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content


def test_tools_and_their_answers_pass_through(client: Any) -> None:
    """The bundled model's template knows no tool format: answers stay text."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    got = client.chat.completions.create(
        model="base", messages=messages, tools=[tool], tool_choice="auto", max_tokens=5
    )
    assert isinstance(got.choices[0].message.content, str)
    for more in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError, match="grammar"):
            client.chat.completions.create(
                model="base", messages=MESSAGES, tools=[tool], max_tokens=5, **more
            )


def test_speculation_per_request(client: Any) -> None:
    same = {"model": "base", "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    default = client.completions.create(**same)
    block = default.model_extra["speculation"]
    assert block["drafter"] == "draft-model"
    assert block["promise"] == "exact"
    assert 1.0 <= block["acceptance_length"] <= 16
    off = client.completions.create(**same, extra_body={"speculation": {"off": True}})
    assert off.choices[0].text == default.choices[0].text
    assert off.model_extra["speculation"]["drafted"] == 0
    assert off.model_extra["speculation"]["why_off"]
    for name in ("prompt-lookup", "suffix", "draft-model"):
        got = client.completions.create(**same, extra_headers={"X-Foretell-Draft": name})
        assert got.choices[0].text == default.choices[0].text
        assert got.model_extra["speculation"]["drafter"] == name
    short = client.completions.create(**same, extra_headers={"X-Foretell-Max-Draft": "1"})
    assert len(short.model_extra["speculation"]["accepted_per_position"]) <= 1
    last = list(client.completions.create(**same, stream=True))[-1]
    assert last.model_extra["speculation"]["promise"] == "exact"


def test_errors_are_the_clients_own_classes(client: Any, served: Program) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="base", prompt=PROMPT, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="base", prompt="word " * 5000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="a")
    wrong = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.completions.create(model="base", prompt="a")
    second = openai.OpenAI(base_url=f"{served.url}/v1", api_key="another", max_retries=0)
    with second:
        assert second.models.list().data
    with pytest.raises(openai.APIStatusError) as late:
        client.completions.create(
            model="base", prompt="a", max_tokens=1500, n=32, extra_body={"timeout": 0.05}
        )
    assert late.value.status_code == 504
    stream = client.completions.create(
        model="base",
        prompt="a",
        max_tokens=1900,
        stream=True,
        extra_body={"timeout": 0.5, "ignore_eos": True},
    )
    with pytest.raises(openai.APIError, match="not done"):
        list(stream)


def test_the_rest(served: Program) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=key) as http:
        assert http.get("/health").status_code == 200
        assert set(http.get("/version").json()) == {"version"}
        tokens = http.post("/tokenize", json={"prompt": PROMPT}).json()
        assert tokens["count"] == len(tokens["tokens"])
        back = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
        assert back["prompt"].endswith(PROMPT)
        asked = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert asked["count"] > 10
        assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]
        assert "foretell" in http.get("/").text


def test_the_metrics_count_drafts(served: Program, client: Any) -> None:
    """Whether a step drafts is the policy's choice; within these requests it must choose to."""
    names = ("spec_decode_num_drafts_total", "spec_decode_num_accepted_tokens_per_pos_total")
    for _ in range(20):
        client.completions.create(model="base", prompt=PROMPT, max_tokens=48, temperature=0)
        counts = [served.metric(f"foretell:{name}") for name in names]
        if min(counts) > 0:
            break
    assert min(counts) > 0, counts


def test_thirty_two_clients_get_what_one_gets(served: Program, plain: LLM) -> None:
    asks = [(f"{PROMPT}# {i}\n", 0.0 if i % 2 else 1.0) for i in range(32)]
    want = [
        plain.generate(p, max_tokens=16, temperature=t, seed=i)[0].text
        for i, (p, t) in enumerate(asks)
    ]

    def ask(i: int) -> str:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as own:
            prompt, temperature = asks[i]
            stream = own.completions.create(
                model="base",
                prompt=prompt,
                max_tokens=16,
                temperature=temperature,
                seed=i,
                stream=True,
            )
            return "".join(c.choices[0].text for c in stream)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == want


# Clients that leave, servers that end


def hang_up(port: int, stream: bool) -> None:
    """Send a long request and drop the connection: after the first tokens, or before any."""
    body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        wire.sendall(head.encode() + data)
        if stream:
            wire.recv(4096)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def test_two_hundred_killed_clients_leave_nothing(served: Program) -> None:
    def kill(count: int, stream: bool) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: hang_up(served.port, stream), range(count)))

    kill(40, True)  # caches and pools reach their size
    served.idle()
    before = served.metric("process_resident_memory_bytes")
    files = served.metric("process_open_fds")
    gone = served.cancelled()
    kill(150, True)
    kill(50, False)
    served.idle()
    assert served.cancelled() - gone >= 190, "the others were done before they were hung up"
    assert served.metric("process_resident_memory_bytes") < before + (32 << 20)
    assert served.metric("process_open_fds") <= files + 8


def test_sigterm_finishes_what_runs_and_refuses_the_rest() -> None:
    with program("--grace", "60") as made:
        own = openai.OpenAI(base_url=f"{made.url}/v1", api_key="any", max_retries=0)
        body = {"model": "foretell-base", "prompt": "a", "extra_body": {"ignore_eos": True}}
        stream = own.completions.create(**body, max_tokens=600, stream=True)
        chunks = [next(stream)]
        made.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{made.url}/health").status_code != 503:
            assert time.monotonic() < deadline
        with pytest.raises(openai.InternalServerError) as error:
            own.completions.create(**body, max_tokens=1)
        assert error.value.status_code == 503
        assert error.value.response.headers["retry-after"]
        chunks += stream
        assert len(chunks) == 600
        assert made.process.wait(30) == 0
        assert any("Draining" in line for line in made.log)


@pytest.mark.slow
def test_a_second_signal_ends_at_once() -> None:
    with program("--grace", "60") as made:
        body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 16}
        with httpx.stream("POST", f"{made.url}/v1/completions", json=body, timeout=30) as answer:
            said = answer.iter_bytes()  # kept: closing it would hang up
            next(said)
            made.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert made.process.poll() is None, "the first one only drains"
            begin = time.monotonic()
            assert made.end(signal.SIGINT) == 130
            assert time.monotonic() - begin < 2


@pytest.mark.slow
def test_kill_and_restart_serves_again_at_once() -> None:
    with program() as first:
        port = first.port
        with httpx.stream(
            "POST",
            f"{first.url}/v1/completions",
            json={"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True},
            timeout=30,
        ) as answer:
            said = answer.iter_bytes()
            next(said)
            first.end(signal.SIGKILL)
        with program(port=port) as second:
            assert second.port == port
            body = {"prompt": "a", "max_tokens": 2}
            assert httpx.post(f"{second.url}/v1/completions", json=body).status_code == 200


@pytest.mark.slow
def test_drained_requests_that_take_too_long_are_told() -> None:
    with program("--grace", "0.3") as made:
        body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 16}
        with httpx.stream("POST", f"{made.url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            made.process.send_signal(signal.SIGTERM)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert "error" in json.loads(said[-2].removeprefix("data: "))
        assert made.process.wait(30) == 0
