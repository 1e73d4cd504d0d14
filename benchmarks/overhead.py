"""Microseconds of a step outside the target: drafting, verification, bookkeeping.

The target is a table that costs next to nothing, so whatever a step takes beyond it is the engine
and the drafter. A period in the text makes drafts right about as often as on repetitive prompts.

    python benchmarks/overhead.py --vocab 32000 --draft none --draft prompt-lookup:tokens=15
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from foretell import kernels
from foretell.core.batch import Output, PackedBatch
from foretell.core.protocols import ModelSpec
from foretell.engine.llm import LLM


class NoCache:
    def __init__(self) -> None:
        self.n = 0

    def reserve(self, rows: int) -> None: ...
    def check(self) -> None: ...

    def truncate(self, n: int) -> None:
        self.n = n

    def copy_prefix(self, other: NoCache, n: int) -> None:
        self.n = n


class NoTxn:
    def __init__(self, caches: Sequence[NoCache]) -> None:
        self.caches, self.scratch = caches, [0] * len(caches)

    def __enter__(self) -> NoTxn:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def advance(self, batch: PackedBatch) -> None: ...

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        for cache, path in zip(self.caches, paths, strict=True):
            cache.n += len(path)


class TableTarget:
    """The token after t is t + 1, within a period; one in `slip` steps goes elsewhere."""

    def __init__(self, vocab: int, period: int = 12, slip: int = 9) -> None:
        self.spec = ModelSpec(vocab, 4, 2, 1 << 20, name="table")
        self.device = torch.device("cpu")
        library = kernels.load()  # what models on the kernels have; they know the best tokens, too
        self.race, self.topk = (library.race, library.topk) if library else (None, None)
        self.rows = torch.randn(256, vocab)
        self.period, self.slip = period, slip
        self.seconds = 0.0
        self.calls = 0

    def new_cache(self, rows: int = 0) -> NoCache:
        return NoCache()

    def open(self, caches: Sequence[Any]) -> NoTxn:
        return NoTxn(caches)

    def forward(self, batch: PackedBatch, txn: NoTxn, taps: Sequence[Any] = ()) -> Output:
        start = time.perf_counter()
        ids = np.concatenate(
            [s.tokens if s.logits is None else s.tokens[s.logits] for s in batch.segments]
        )
        self.calls += 1
        logits = self.rows[torch.from_numpy(ids % 256)]
        jump = 5 if self.calls % self.slip == 0 else 1
        logits[torch.arange(len(ids)), torch.from_numpy((ids + jump) % self.period)] = 50.0
        best = None if self.race is None else logits.numpy().argmax(-1)
        self.seconds += time.perf_counter() - start
        return Output(logits, best=best)

    def embed(self, tokens: Any) -> Any: ...
    def unembed(self, hidden: Any) -> Any: ...


def measure(vocab: int, draft: str, policy: str, temperature: float, tokens: int) -> dict[str, Any]:
    target = TableTarget(vocab)
    llm = LLM(target, draft=draft, policy=policy, max_batch=1)  # type: ignore[arg-type]
    prompt = [i % 12 for i in range(200)]
    llm.generate([prompt], max_tokens=32, temperature=temperature, seed=0)
    rounds = []
    for _ in range(5):
        target.seconds, begin = 0.0, time.perf_counter()
        out = llm.generate([prompt], max_tokens=tokens, temperature=temperature, seed=0)[0]
        rounds.append((time.perf_counter() - begin - target.seconds) / out.stats.steps)
    return {
        "us": statistics.median(rounds) * 1e6,
        "drafted": out.stats.drafted / out.stats.steps,
        "length": out.stats.acceptance_length,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--draft", action="append", default=None)
    parser.add_argument("--policy", default="fixed")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for draft in args.draft or ["none", "prompt-lookup:tokens=8", "prompt-lookup:tokens=15"]:
        r = measure(args.vocab, draft, args.policy, args.temperature, args.tokens)
        print(
            f"{draft:40} {r['us']:8.1f} us/step, {r['drafted']:5.1f} drafted, "
            f"{r['length']:.2f} tokens/step",
            flush=True,
        )


if __name__ == "__main__":
    main()
