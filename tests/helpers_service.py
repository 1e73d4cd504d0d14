"""A started service around an engine, for tests of what its clients see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from foretell import LLM
from foretell.serve.service import Service
from foretell.serve.terms import Limits

PROMPT = [1, 2, 3, 4, 1, 2]
LONG = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 3, 5, 7, 9, 2]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


@asynccontextmanager
async def serving(llm: LLM, limits: Limits | None = None, **options: Any) -> AsyncIterator[Service]:
    service = Service(llm, limits, **options)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()
