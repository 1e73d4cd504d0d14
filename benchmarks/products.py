"""Milliseconds of the matrix products of one forward, against the memory bandwidth of the moment.

All matrices of a model behind one another in one call, every layer in memory of its own, nothing
else in between. Row counts and a plain read of memory alternate, so that a noisy machine is noisy
for all of them; compare only inside one run.

    python benchmarks/products.py --formats int8,int4,bfloat16 --rows 1,2,4,8,16 --json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from dataclasses import dataclass

import torch

from foretell import kernels
from foretell.kernels.library import FORMATS, Library, allocate


@dataclass(frozen=True)
class Shape:
    """What decides which products a forward has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of one layer."""
        h, q = self.hidden, self.heads * self.head_dim
        return [
            (q + 2 * self.kv_heads * self.head_dim, h),
            (h, q),
            (2 * self.ffn, h),
            (h, self.ffn),
        ]


SHAPES = {
    "small": Shape(256, 10, 8, 4, 32, 640, 4096),
    "336m": Shape(1024, 24, 16, 4, 64, 2816, 32000),
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
}


class Link(ctypes.Structure):
    """One product of ft_run_products."""

    _fields_ = [
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    ]


class Products:
    """Random weights of a shape in one format; `run(rows)` is one forward's products."""

    def __init__(
        self, lib: Library, shape: Shape, name: str, group: int, head: str, threads: int, most: int
    ) -> None:
        self.lib, self.threads, self.grain = lib, threads, 1
        layer = [(name, n, k) for n, k in shape.matrices()]
        wanted = layer * shape.layers + [(head, shape.vocab, shape.hidden)]
        packed = {}
        for format, n, k in set(wanted):
            packed[format, n, k] = lib.pack(format, torch.randn(n, k), group=group)
        sizes = [lib.packed_bytes(format, n, k, group) for format, n, k in wanted]
        self.bytes = sum(sizes)
        self.memory = allocate(self.bytes)
        links, at = [], 0
        for (format, n, k), size in zip(wanted, sizes, strict=True):
            place = self.memory[at : at + size]
            place.copy_(packed[format, n, k].data)
            links.append(Link(FORMATS[format], group, n, k, place.data_ptr()))
            at += size
        self.links = (Link * len(links))(*links)
        widest = max(k for _, _, k in wanted)
        self.x = torch.randn(most, widest)
        self.q = lib.quantise_rows(self.x)
        self.out = torch.empty(most, max(-(-n // 32) * 32 for _, n, _ in wanted))

    def run(self, rows: int) -> float:
        """Seconds."""
        q = self.q
        start = time.perf_counter()
        self.lib.cdll.ft_run_products(
            *(self.links, len(self.links), rows, self.x.data_ptr(), self.x.stride(0)),
            *(q.q.data_ptr(), q.q.stride(0), q.scale.data_ptr(), q.sums.data_ptr()),
            *(self.out.data_ptr(), self.grain, self.threads),
        )
        return time.perf_counter() - start


def measure(case: Products, rows: list[int], rounds: int) -> dict:
    """Medians over alternating rounds."""
    size = min(case.bytes, 1 << 28)
    times: dict[int, list[float]] = {r: [] for r in rows}
    reads = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        case.lib.cdll.ft_stream(case.memory.data_ptr(), size, case.threads)
        read = size / (time.perf_counter() - start)
        taken = {r: case.run(r) for r in rows}
        if turn:  # the first round warms up
            reads.append(read)
            for r in rows:
                times[r].append(taken[r])
    bandwidth = statistics.median(reads)
    one = statistics.median(times[rows[0]])
    table = []
    for r in rows:
        seconds = statistics.median(times[r])
        table.append(
            {
                "rows": r,
                "ms": round(seconds * 1e3, 3),
                "best_ms": round(min(times[r]) * 1e3, 3),
                "GB/s": round(case.bytes / seconds / 1e9, 1),
                "share": round(case.bytes / seconds / bandwidth, 3),
                "ratio": round(seconds / one, 3),
            }
        )
    return {"bytes": case.bytes, "bandwidth": round(bandwidth / 1e9, 1), "rows": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="336m", choices=SHAPES)
    parser.add_argument("--formats", default="int8,int4,bfloat16")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--grain", default="1", help="panels handed out at once; 0: equal shares")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lib = kernels.load()
    if lib is None:
        raise SystemExit(kernels.why_not())
    rows = [int(r) for r in options.rows.split(",")]
    report: dict = {"isa": lib.isa, "threads": options.threads or lib.threads, "formats": {}}
    for name in options.formats.split(","):
        # An int4 model keeps its head in int8.
        head = "int8" if name == "int4" else name
        shape = SHAPES[options.shape]
        case = Products(lib, shape, name, options.group, head, options.threads, max(rows))
        for grain in options.grain.split(","):
            case.grain = int(grain)
            found = measure(case, rows, options.rounds)
            report["formats"][name + (f" grain {grain}" if "," in options.grain else "")] = found
            if options.json:
                continue
            size, speed = found["bytes"] / 1e6, found["bandwidth"]
            print(f"{name}: {size:.0f} MB a forward, memory reads {speed} GB/s, grain {grain}")
            for line in found["rows"]:
                print("  " + "  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        del case
    if options.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
