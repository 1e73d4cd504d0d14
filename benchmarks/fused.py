"""Milliseconds of one fused forward over T rows behind a context, by dtype; ratios to one row.

Dtypes and row counts take turns within one run, so that a noisy machine is noisy for all of them;
compare only inside one run. `native` and `native-bfloat16` are the stock torch runner. The last
column of the first row is the speed at which the packed weights were read.

    python benchmarks/fused.py --shape 336m --dtypes int8,int4 --rows 1,2,4,8,16
    python benchmarks/fused.py --shape 336m --dtypes int8 --stages       # where the time goes
    python benchmarks/fused.py --shape 336m --dtypes float32,native --prefill 512
    python benchmarks/fused.py --shape bundled --dtypes float32,native --rows 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.tree import TokenTree
from foretell.models.native.arch import Arch
from foretell.models.native.families import describe
from foretell.models.native.fused import STAGES, FusedModel
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import read_config
from foretell.models.quant.formats import FORMATS

ASSETS = Path(__file__).parents[1] / "src" / "foretell" / "assets" / "base"
SHAPES = {
    "tiny": Arch.llama(256, 32, 2, 4, 2, 64),
    "336m": Arch.llama(32000, 1024, 24, 16, 4, 2816, tied=False),
    "1b": Arch.llama(128256, 2048, 16, 32, 8, 8192),
}


def shape(name: str) -> Arch:
    if name in SHAPES:
        return SHAPES[name]
    return describe(read_config(ASSETS if name == "bundled" else ASSETS / "draft"))[0]


def make(arch: Arch, dtype: str) -> Any:
    if dtype == "native":
        return NativeModel.random(arch)
    if dtype.startswith("native-"):
        return NativeModel.random(arch, getattr(torch, dtype.removeprefix("native-")))
    return FusedModel.random(arch, FORMATS.get(dtype) or getattr(torch, dtype))


class Bench:
    """One model with a committed context."""

    def __init__(self, arch: Arch, dtype: str, context: int) -> None:
        self.model, self.context, self.vocab = make(arch, dtype), context, arch.vocab
        self.cache = self.model.new_cache(context + 64)
        if context:
            with self.model.open([self.cache]) as txn:
                self.model.forward(PackedBatch([self.prompt(context)]), txn)
                txn.commit([range(context)])

    def prompt(self, n: int) -> Segment:
        return Segment(np.arange(n) % self.vocab, np.arange(n), None, np.array([n - 1]))

    def step(self, rows: int, tree: bool) -> float:
        parents = [(i - 1) // 2 if tree else i - 1 for i in range(rows - 1)]
        if tree and rows > 1:
            parents = [-1 if i < 2 else (i - 2) // 2 for i in range(rows - 1)]
        segment = segment_of(TokenTree.build([5], [7] * (rows - 1), parents), self.context, None)
        batch = PackedBatch([segment])
        start = time.perf_counter()
        with self.model.open([self.cache]) as txn:
            self.model.forward(batch, txn)
        return (time.perf_counter() - start) * 1e3

    def prefill(self, rows: int) -> float:
        cache = self.model.new_cache(rows)
        batch = PackedBatch([self.prompt(rows)])
        start = time.perf_counter()
        with self.model.open([cache]) as txn:
            self.model.forward(batch, txn)
        return (time.perf_counter() - start) * 1e3


def table(benches: dict[str, Bench], o: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [int(r) for r in o.rows.split(",")]
    times: dict[tuple[str, int], list[float]] = {(d, r): [] for d in benches for r in rows}
    for i in range(o.repeat + 2):
        for key, found in times.items():
            took = benches[key[0]].step(key[1], o.tree)
            if i >= 2:
                found.append(took)
    out = []
    for dtype, bench in benches.items():
        first = statistics.median(times[dtype, rows[0]])
        for r in rows:
            t = times[dtype, r]
            row = {"dtype": dtype, "rows": r, "ms": statistics.median(t), "least": min(t)}
            row["ratio"] = row["ms"] / first
            row["gbps"] = bench.model.spec.weight_bytes / row["ms"] / 1e6
            out.append(row)
    return out


def stages(bench: Bench, rows: int, repeat: int, tree: bool) -> dict[str, float]:
    """Milliseconds of each stage as the first thread sees them, medians over `repeat` forwards."""
    found = []
    for _ in range(repeat):
        seconds = np.zeros(len(STAGES))
        bench.model.seconds = seconds
        total = bench.step(rows, tree)
        parts = (seconds * 1e3).tolist()
        found.append([*parts, total - sum(parts), total])
    bench.model.seconds = None
    middle = [statistics.median(column) for column in zip(*found, strict=True)]
    return dict(zip((*STAGES, "outside", "all"), middle, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--shape", choices=(*SHAPES, "bundled", "draft"), default="336m")
    p.add_argument("--dtypes", default="float32,bfloat16,int8,int4")
    p.add_argument("--rows", default="1,2,4,8,16")
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--repeat", type=int, default=15)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tree", action="store_true", help="binary trees instead of chains")
    p.add_argument("--stages", action="store_true")
    p.add_argument(
        "--prefill", type=int, default=0, help="time one forward of so many rows instead"
    )
    p.add_argument("--json", action="store_true")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    arch = shape(o.shape)
    with torch.inference_mode():
        benches = {d: Bench(arch, d, o.context) for d in o.dtypes.split(",")}
    if o.prefill:
        found: dict[str, list[float]] = {d: [] for d in benches}
        for i in range(4):
            for d, bench in benches.items():
                took = bench.prefill(o.prefill)
                if i:
                    found[d].append(took)
        result: Any = [
            {"dtype": d, "rows": o.prefill, "ms": statistics.median(t)} for d, t in found.items()
        ]
    elif o.stages:
        result = [
            {"dtype": d, "rows": int(r)} | stages(b, int(r), o.repeat, o.tree)
            for d, b in benches.items()
            for r in o.rows.split(",")
        ]
    else:
        result = table(benches, o)
    if o.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{o.shape}, context {o.context}, {o.threads} threads")
    for row in result:
        print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{v!s:>8}" for k, v in row.items()))


if __name__ == "__main__":
    main()
