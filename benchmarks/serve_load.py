"""What a server delivers under load: tokens per second and latency by number of clients.

Every setting is a server of its own, with N clients who send a prompt, read the answer, and send
the next; every answer has --tokens tokens (unless --eos), so that all have the same work. Settings
take turns in short slices, so that a noisy moment hits all alike: between its slices a setting
stands still, requests and all, and its clock with it. Drafting off, some fixed lengths and goodput
control are compared by the last four columns: throughput against the better of off and the best
fixed length, and its standard error, from leaving out one turn after the other (a tenth after ten
seconds a setting is nothing unusual: give it time); the same over the requests that all of them
have answered (all are sent the same ones in the same order, and answers differ more than settings
do); and latency against the best fixed length's. Reading prompts is work that no setting changes
but that falls to one setting's slices or another's: with --longest 600 and 128 tokens an answer it
is a tenth of the time and not half of it.

    python benchmarks/serve_load.py --levels 1,4,16 --seconds 60
    python benchmarks/serve_load.py --http --levels 1,2,4,8,16,32 --seconds 300 --json load.json

Without --http the engine runs in this process behind `serve.Service`; with it, every setting is
`foretell serve` on a port of its own, stopped (SIGSTOP) while others are measured, and its clients
speak HTTP with server-sent events. Prompts: spec_bench of FORETELL_DATA, else some built-in ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

BUILT_IN = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Tom has 12 apples. He gives 3 to Anna and buys 8 more. How many apples does he have now?",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Summarize the following text: The water cycle describes how water evaporates from the surface "
    "of the earth, rises into the atmosphere, cools and condenses into clouds, and falls again.",
    "Translate to German: The weather is nice today and we are going to the park.",
    "Question: What is the capital of France, and what is it known for?\nAnswer:",
    "List five rules for writing clear documentation.",
    "Explain to a child why the sky is blue.",
)
FIXED = "1,2,3,5,8"


def prompts(longest: int) -> list[str]:
    file = Path(os.environ.get("FORETELL_DATA", "")) / "spec_bench" / "question.jsonl"
    if not os.environ.get("FORETELL_DATA") or not file.is_file():
        return list(BUILT_IN)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [r["turns"][0] for r in rows if len(r["turns"][0]) <= longest]


@dataclass
class Tally:
    """What one setting did at one level; seconds are its own clock's."""

    slices: list[tuple[int, float]] = field(default_factory=list)  # tokens, seconds
    took: dict[tuple[int, int], float] = field(default_factory=dict)  # (client, n-th request)

    @property
    def rate(self) -> float:
        return self.without(None)

    def without(self, turn: int | None) -> float:
        """Tokens per second of all slices, or of all but one."""
        kept = [s for i, s in enumerate(self.slices) if i != turn]
        return sum(n for n, _ in kept) / sum(s for _, s in kept) if kept else 0.0

    @property
    def latency(self) -> float:
        return self.pace(set(self.took))

    def pace(self, requests: set[tuple[int, int]]) -> float:
        """Seconds that these requests took on average."""
        return statistics.mean(self.took[r] for r in requests) if requests else float("nan")


class Setting:
    """A server and its clients. The clock runs only during its slices."""

    def __init__(self, name: str, texts: list[str], args: argparse.Namespace) -> None:
        self.name, self.texts, self.tokens, self.seed = name, texts, args.tokens, args.seed
        self.temperature, self.eos = args.temperature, args.eos
        self.went_by = 0.0
        self.since: float | None = None
        self.tally = Tally()
        self.tasks: list[asyncio.Task] = []
        self.counted = 0  # tokens of all slices

    def now(self) -> float:
        return self.went_by + (time.perf_counter() - self.since if self.since else 0.0)

    async def slice(self, seconds: float) -> None:
        before = self.counted
        self.since = start = time.perf_counter()
        self.resume()
        await asyncio.sleep(seconds)
        await self.pause()
        took = time.perf_counter() - start
        self.went_by, self.since = self.went_by + took, None
        self.tally.slices.append((self.counted - before, took))

    def hire(self, clients: int) -> None:
        self.tasks = [asyncio.create_task(self.client(i)) for i in range(clients)]

    async def dismiss(self) -> None:
        self.resume()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.settle()
        await self.pause()
        self.tally = Tally()

    async def client(self, i: int) -> None:
        r = random.Random(self.seed * 1000 + i)  # the same prompts in the same order everywhere
        for n in count():
            text = r.choice(self.texts)
            start = self.now()
            await self.ask(text, r.randrange(1 << 30))
            self.tally.took[i, n] = self.now() - start

    async def ask(self, text: str, seed: int) -> None:
        raise NotImplementedError

    def resume(self) -> None: ...
    async def pause(self) -> None: ...
    async def settle(self) -> None: ...
    async def stop(self) -> None: ...


class InProcess(Setting):
    """`serve.Service` in this process; its engine waits at a gate between slices. A slice ends with
    the step that is under way, so that it never runs into the next one's."""

    service: Any
    gate: threading.Event
    stepping: threading.Lock

    async def start(self, llm: Any) -> None:
        from foretell.serve.service import Service

        self.gate, self.stepping = threading.Event(), threading.Lock()
        step = llm.engine.step

        def gated() -> Any:
            while True:
                self.gate.wait()
                with self.stepping:
                    if self.gate.is_set():
                        events = step()
                        self.counted += len(events)
                        return events

        llm.engine.step = gated
        self.service = Service(llm)
        self.resume()
        await self.service.start()
        await self.pause()

    def resume(self) -> None:
        self.gate.set()

    async def pause(self) -> None:
        self.gate.clear()
        while self.stepping.locked():
            await asyncio.sleep(0.0005)

    async def ask(self, text: str, seed: int) -> None:
        from foretell import SamplingParams

        params = SamplingParams(
            max_tokens=self.tokens, temperature=self.temperature, seed=seed, ignore_eos=not self.eos
        )
        async for _ in self.service.submit(text, params):
            pass

    def split(self) -> str:
        """Where the time of a step went since this was last asked; the decisions."""
        new, old = self.service.snapshot(), getattr(self, "last", None)
        self.last = new

        def since(field: str) -> float:
            return getattr(new, field) - (getattr(old, field) if old else 0)

        steps = max(1.0, since("steps_total"))
        parts = [
            f"{part} {1e3 * since(part + '_seconds_total') / steps:.2f}"
            for part in ("draft", "target", "verify")
        ]
        lengths = {
            k: n - (old.draft_lengths.get(k, 0) if old else 0) for k, n in new.draft_lengths.items()
        }
        return (
            f"{steps:.0f} steps of {since('generated_tokens_total') / steps:.2f} tokens, "
            f"ms: {', '.join(parts)}; lengths { ({k: n for k, n in lengths.items() if n}) }"
        )

    async def settle(self) -> None:
        while self.service.snapshot().running or self.service.snapshot().waiting:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.resume()
        await self.service.stop()


class OverHttp(Setting):
    """`foretell serve`, stopped between slices."""

    async def start(self, options: list[str]) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "foretell", "serve", "--port", str(self.port), *options,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(600):
            try:
                await asyncio.open_connection("127.0.0.1", self.port)
                break
            except OSError:
                if self.process.returncode is not None:
                    raise SystemExit(f"foretell serve {' '.join(options)} ended.") from None
                await asyncio.sleep(0.1)
        await self.pause()

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.005)  # what it has said by then is read

    async def ask(self, text: str, seed: int) -> None:
        body = json.dumps(
            {
                "prompt": text, "max_tokens": self.tokens, "temperature": self.temperature,
                "seed": seed, "stream": True, "ignore_eos": not self.eos,
            }
        ).encode()  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            while chunk := await reader.read(1 << 16):
                self.counted += chunk.count(b'data: {"')
        finally:
            writer.close()

    async def settle(self) -> None:
        await asyncio.sleep(0.3)

    async def stop(self) -> None:
        self.resume()
        self.process.terminate()
        await self.process.wait()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    texts = prompts(args.longest)
    lengths = [int(n) for n in args.fixed.split(",")]
    policies = {"off": "fixed"} | {f"fixed {n}": f"fixed:tokens={n}" for n in lengths}
    policies["goodput"] = args.goodput
    settings: dict[str, Setting] = {}
    if not args.http:
        import torch

        import foretell
        from foretell.core.places import cache_folder
        from foretell.core.protocols import BuildContext
        from foretell.engine.cost import MeasuredCost

        if args.threads:
            torch.set_num_threads(args.threads)
        base = foretell.load(
            args.model, draft=args.draft, max_batch=args.max_batch, dtype=args.dtype
        )
        draft = args.draft
        if draft == "auto":
            draft = base.drafter.name
    for name, policy in policies.items():
        if args.http:
            setting: Setting = OverHttp(name, texts, args)
            options = ["--draft", "none" if name == "off" else args.draft, "--policy", policy]
            options += ["--max-num-seqs", str(args.max_batch), "--dtype", args.dtype]
            options += ["--model", args.model] if args.model else []
            await setting.start(options)  # type: ignore[attr-defined]
        else:
            setting = InProcess(name, texts, args)
            old = base.context
            context = BuildContext(
                old.target, old.tokenizer, old.load_model, old.default_draft,
                MeasuredCost(base.model, cache_folder("cost")),
            )  # fmt: skip
            llm = foretell.LLM(
                base.model, base.tokenizer, context=context, max_batch=args.max_batch,
                draft="none" if name == "off" else draft, policy=policy,
            )  # fmt: skip
            await setting.start(llm)  # type: ignore[attr-defined]
        settings[name] = setting
    levels = [int(n) for n in args.levels.split(",")]
    each = args.seconds / len(levels) / len(settings)
    rounds = max(1, round(each / args.slice))
    table: dict[int, dict[str, Tally]] = {}
    order = list(settings.values())
    for level in levels:
        for setting in order:
            setting.hire(level)
            await setting.slice(args.warm)  # the first prompts, the first guesses of a policy
            setting.tally = Tally()
        for turn in range(rounds):
            shift = turn % len(order)
            for setting in order[shift:] + order[:shift]:
                await setting.slice(each / rounds)
        table[level] = {name: s.tally for name, s in settings.items()}
        show(level, table[level], header=level == levels[0])
        if args.split and not args.http:
            for name, setting in settings.items():
                print(f"{name:>12}: {setting.split()}")  # type: ignore[attr-defined]
        for setting in order:
            await setting.dismiss()
    for setting in order:
        await setting.stop()
    return {
        str(level): {
            name: {"tokens_per_s": t.rate, "latency_s": t.latency, "requests": len(t.took)}
            for name, t in row.items()
        }
        for level, row in table.items()
    }


def show(level: int, row: dict[str, Tally], header: bool) -> None:
    if header:
        names = "".join(f"{n:>10}" for n in row)
        print(f"{'clients':>7}{names}{'/ best':>9}{'+-':>7}{'same':>9}{'latency':>9}   tokens/s")
    fixed = {n: t for n, t in row.items() if n.startswith("fixed")}
    good = row["goodput"]
    others = [t for n, t in row.items() if n != "goodput"]

    def ratio(turn: int | None) -> float:
        return good.without(turn) / max(t.without(turn) for t in others)

    turns = range(min(len(t.slices) for t in row.values()))
    left_out = [ratio(i) for i in turns] if len(turns) > 1 else [float("nan")] * 2
    error = (statistics.pvariance(left_out) * (len(left_out) - 1)) ** 0.5  # jackknife
    quickest = min(t.latency for t in fixed.values())
    both = set[tuple[int, int]].intersection(*(set(t.took) for t in row.values()))
    same = min(t.pace(both) for t in others) / good.pace(both)
    rates = "".join(f"{t.rate:>10.0f}" for t in row.values())
    print(
        f"{level:>7}{rates}{ratio(None):>9.3f}{error:>7.3f}{same:>9.3f}"
        f"{good.latency / quickest:>9.3f}",
        flush=True,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("--model", default=None, help="checkpoint (default: the bundled model)")
    p.add_argument("--draft", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--goodput", default="goodput", help="the policy under test")
    p.add_argument("--fixed", default=FIXED, help="fixed draft lengths it is compared with")
    p.add_argument("--levels", default="1,2,4,8,16,32", help="numbers of clients")
    p.add_argument("--seconds", type=float, default=300, help="in all, without warming up")
    p.add_argument("--slice", type=float, default=1.0, help="seconds of one turn")
    p.add_argument("--warm", type=float, default=1.5, help="seconds before a level counts")
    p.add_argument("--tokens", type=int, default=128, help="max_tokens of a request")
    p.add_argument("--longest", type=int, default=2000, help="characters of a prompt, at most")
    p.add_argument("--eos", action="store_true", help="answers may end before --tokens")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--max-batch", type=int, default=32)
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--http", action="store_true", help="real servers and HTTP clients")
    p.add_argument("--split", action="store_true", help="print where the time of steps went")
    p.add_argument("--json", default=None, help="write the numbers to this file")
    args = p.parse_args()
    result = asyncio.run(measure(args))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), "utf-8")


if __name__ == "__main__":
    main()
