"""What HTTP costs: tokens per second of streams through the server, against the service alone.

    python benchmarks/serve_http.py [--streams 1,8,32] [--tokens 128] [--repeat 3] [-- serve flags]

Both ways run the same prompts with the same engine, in turn. "service": tasks in the engine's own
process read the events. "http": `foretell serve` in a process of its own, streaming clients (raw
sockets, so that they cost little) in this one. The table's last column is their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

PROMPT = "def fibonacci(n):\n    # {}\n"
Round = Callable[[int, int], Awaitable[float]]


def alone(words: list[str]) -> subprocess.Popen[str]:
    """A process that runs rounds in the service and prints seconds: it reads 'streams tokens'."""
    code = "import serve_http; serve_http.worker()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=__file__.rsplit("/", 1)[0],
    )


def worker() -> None:
    """The service without HTTP, driven through stdin."""
    import typer

    from foretell.cli.serve import app  # the same flags as the server's
    from foretell.core.params import SamplingParams
    from foretell.serve.build import ServeConfig, build

    command = typer.main.get_command(app)
    with command.make_context("serve", sys.argv[1:]) as context:
        given = {k: v for k, v in context.params.items() if v is not None}
    from foretell.cli.common import threads_for

    config = ServeConfig.of({"threads": threads_for(given.get("model")), **given})
    service, _ = build(config)

    async def main() -> None:
        await service.start()

        async def one(i: int, tokens: int) -> None:
            ids = service.llm.encode(PROMPT.format(i))
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
            async for _ in service.submit(ids, params):
                pass

        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            streams, tokens = map(int, line.split())
            begin = time.perf_counter()
            await asyncio.gather(*(one(i, tokens) for i in range(streams)))
            print(time.perf_counter() - begin, flush=True)
        await service.stop()

    asyncio.run(main())


async def http_round(port: int, streams: int, tokens: int) -> float:
    async def one(i: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(
            {
                "prompt": PROMPT.format(i),
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
            }
        )
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body.encode())
        )
        said = await reader.read(-1)
        writer.close()
        return said.count(b"data: {")

    begin = time.perf_counter()
    counts = await asyncio.gather(*(one(i) for i in range(streams)))
    assert all(c == tokens for c in counts), counts
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    options, words = parser.parse_known_args()
    words = [w for w in words if w != "--"]
    server = subprocess.Popen(
        [sys.executable, "-m", "foretell", "serve", "--port", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
    )
    service = alone(words)
    try:
        assert server.stderr is not None
        assert service.stdin is not None
        assert service.stdout is not None
        found = None
        for line in server.stderr:
            if found := re.search(r":(\d+)/v1", line):
                break
        assert found is not None, "the server did not start"
        port = int(found[1])

        def ask(streams: int) -> float:
            print(streams, options.tokens, file=service.stdin, flush=True)
            return float(service.stdout.readline())

        print(f"{'streams':>8} {'service tok/s':>14} {'http tok/s':>11} {'ratio':>6}")
        for streams in map(int, options.streams.split(",")):
            ask(streams)  # warm: caches, what the policy learns
            asyncio.run(http_round(port, streams, options.tokens))
            times = [
                (ask(streams), asyncio.run(http_round(port, streams, options.tokens)))
                for _ in range(options.repeat)
            ]
            total = streams * options.tokens
            inside, outside = (total / statistics.median(t) for t in zip(*times, strict=True))
            print(f"{streams:>8} {inside:>14.0f} {outside:>11.0f} {outside / inside:>6.2f}")
    finally:
        service.kill()
        server.kill()


if __name__ == "__main__":
    main()
