"""The engine under a server, with the bundled pair: nothing changes what a request says, a shared
beginning is computed once, and clients that leave take nothing with them."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import foretell
from foretell import LLM, SamplingParams
from foretell.core.params import Speculation
from foretell.models.load import bundled_model
from foretell.serve.service import Service
from foretell.serve.terms import Limits

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (bundled_model() / "model.safetensors").exists(), reason="no bundled model here"
    ),
]
TEXTS = [
    "Once upon a time there was a lighthouse keeper",
    "Question: Tom has 12 apples and gives 3 to Anna. How many are left?\nAnswer:",
    "def fibonacci(n):\n    ",
    "The water cycle describes how water evaporates from the sea, rises,",
    "List three rules for clear writing:\n1.",
    "Q: What is the capital of France?\nA:",
    "Once upon a time there was a fisherman",
    "for i in range(10):\n    print(",
]


@pytest.fixture(scope="module")
def base() -> LLM:
    return foretell.load()


def serve(llm: LLM, test: Callable[[Service], Awaitable[Any]], **limits: Any) -> Any:
    async def body() -> Any:
        service = Service(llm, Limits(**limits))
        await service.start()
        try:
            return await asyncio.wait_for(test(service), 120)
        finally:
            await service.stop()

    return asyncio.run(body())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_alone_in_company_with_and_without_drafts_and_preempted(
    base: LLM, temperature: float
) -> None:
    tokens = 20
    params = [
        SamplingParams(max_tokens=tokens, temperature=temperature, seed=i, ignore_eos=True)
        for i in range(4)
    ]
    alone = LLM(base.model, base.tokenizer, context=base.context, draft="none", max_batch=1)
    want = [[o.token_ids for o in alone.generate(TEXTS, p)] for p in params]
    wishes = [
        Speculation(),
        Speculation(drafter="off"),
        Speculation(drafter="prompt-lookup"),
        Speculation(max_draft=2),
    ]

    async def company(service: Service) -> int:
        jobs = [
            (service.submit(text, p, wishes[(i + k) % len(wishes)]), want[k][i])
            for k, p in enumerate(params)
            for i, text in enumerate(TEXTS)
        ]
        for job, expected in jobs:
            assert (await job.output()).token_ids == expected
        return service.snapshot().preemptions_total

    choice = "choice:of=draft-model(tokens=4)+prompt-lookup(min_ngram=1)"
    for rows in (None, 220):  # 220 rows for 32 requests of about 35: many are preempted
        for policy in ("goodput", "fixed"):
            llm = base.with_methods(choice, policy=policy, max_batch=32, kv_rows=rows)
            preempted = serve(llm, company)
            assert (preempted > 0) == (rows is not None)


def test_the_second_request_with_a_long_beginning_answers_at_least_five_times_sooner(
    base: LLM,
) -> None:
    assert base.tokenizer is not None
    ids = base.tokenizer.encode(" ".join(f"Item {i}: {TEXTS[i % 8]}" for i in range(100)))[:1000]
    assert len(ids) == 1000
    llm = base.with_methods("draft-model", policy="goodput")
    params = SamplingParams(max_tokens=4)

    async def first_token(service: Service, prompt: list[int]) -> float:
        job = service.submit(prompt, params)
        async for _ in job:
            pass
        took = job.summary().first_token_s
        assert took is not None
        return took

    async def body(service: Service) -> float:
        await first_token(service, ids[:64])  # wakes threads and buffers
        cold, warm = [], []
        for k in range(3):
            prompt = [k + 50, *ids[1:]]
            cold.append(await first_token(service, [*prompt, 99, 98]))
            warm.append(await first_token(service, [*prompt, 97, 96, 95]))
        return statistics.median(cold) / statistics.median(warm)

    assert serve(llm, body) >= 5


def test_a_prompt_that_comes_in_pieces_gives_the_same_answer(base: LLM) -> None:
    llm = base.with_methods("draft-model", policy="goodput")
    params = SamplingParams(max_tokens=24)
    text = "".join(TEXTS)
    want = llm.generate([text], params)[0]
    llm.engine.scheduler.clear_kept()

    async def body(service: Service) -> None:
        stream = service.open(params)
        for at in range(0, len(text), 37):
            stream.append(text[at : at + 37])
            await asyncio.sleep(0.01)
        stream.update(text[:100] + "?" + text[100:])
        await asyncio.sleep(0.05)
        stream.update(text)
        job = stream.finish()
        out = await job.output()
        assert out.prompt_ids == want.prompt_ids
        assert out.token_ids == want.token_ids
        assert out.stats.reused > 20, "it was read as it came"

    serve(llm, body)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_two_hundred_clients_that_leave_take_nothing_with_them(base: LLM) -> None:
    llm = base.with_methods("draft-model", policy="goodput", max_batch=8, kv_rows=2000)

    async def client(service: Service, i: int) -> None:
        job = service.submit(f"{i}: {TEXTS[i % 8]}", SamplingParams(max_tokens=200))
        seen = 0
        async for events in job:
            seen += len(events)
            if seen > i % 9:
                return

    async def wave(service: Service, clients: int) -> None:
        await asyncio.gather(*(client(service, i) for i in range(clients)))
        while True:
            snap = service.snapshot()
            if not snap.running and not snap.waiting and not service.alive:
                assert snap.kv_used == 0
                assert snap.kv_kept <= 2000
                return
            await asyncio.sleep(0.01)

    async def body(service: Service) -> None:
        await wave(service, 100)
        before = resident()
        await wave(service, 200)
        assert resident() - before < 24 << 20
        assert len(asyncio.all_tasks()) == 1 + 1  # this one, and `wait_for`'s

    serve(llm, body, max_queue=250)
