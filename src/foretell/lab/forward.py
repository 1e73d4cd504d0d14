"""The time of one target forward by number of rows, beside the bytes it must read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foretell.core.errors import InputError
from foretell.core.protocols import TargetModel
from foretell.engine.curve import ForwardTimer, take_turns
from foretell.models.native.arch import Arch

SHAPE = ("hidden", "layers", "heads", "kv", "ffn", "vocab")


@dataclass(slots=True)
class ForwardReport:
    """Seconds of forwards (logits of all rows included) behind `context` committed rows."""

    context: int
    seconds: dict[int, list[float]]  # by number of rows
    bytes: int  # weights and cache rows that a forward reads
    bandwidth: float | None  # bytes a second that this machine streams, measured in between

    def median(self, rows: int) -> float:
        return statistics.median(self.seconds[rows])

    def share(self, rows: int) -> float | None:
        """What part of the measured bandwidth the forward reached."""
        if not self.bandwidth or not self.bytes:
            return None
        return self.bytes / self.median(rows) / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        base = self.median(min(self.seconds))
        rows = {
            str(n): {
                "median_ms": round(self.median(n) * 1e3, 4),
                "min_ms": round(min(s) * 1e3, 4),
                "p90_ms": round(sorted(s)[int(0.9 * (len(s) - 1))] * 1e3, 4),
                "ratio": round(self.median(n) / base, 4),
                "bandwidth_share": _round(self.share(n)),
            }
            for n, s in self.seconds.items()
        }
        speed = None if self.bandwidth is None else round(self.bandwidth / 1e9, 3)
        return {
            "rows": rows,
            "context": self.context,
            "bytes_read": self.bytes,
            "bandwidth_gb_s": speed,
        }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def parse_shape(text: str) -> Arch:
    """`hidden=1024,layers=24,heads=16,kv=4,ffn=2816,vocab=32000[,tied=1]` -> a plain Llama."""
    values: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in (*SHAPE, "tied") or not value.isdigit():
            raise InputError(
                f"--random-shape: '{item}' is not one of {', '.join(SHAPE)} with a whole number, "
                "such as hidden=1024."
            )
        values[key] = int(value)
    missing = [k for k in SHAPE if not values.get(k)]
    if missing:
        raise InputError(f"--random-shape lacks {', '.join(missing)}.")
    if values["hidden"] % values["heads"] or values["heads"] % values["kv"]:
        raise InputError("--random-shape: hidden is a multiple of heads, and heads of kv.")
    if values["hidden"] // values["heads"] % 2:
        raise InputError("--random-shape: hidden / heads is even.")
    return Arch.llama(
        values["vocab"],
        values["hidden"],
        values["layers"],
        values["heads"],
        values["kv"],
        values["ffn"],
        max_positions=8192,
        tied=bool(values.get("tied", 0)),
    )


def measure(
    model: TargetModel,
    rows: Sequence[int],
    context: int,
    repeats: int,
    progress: Callable[[int], None] = lambda n: None,
    bandwidth: Callable[[], float] | None = None,
) -> ForwardReport:
    """Row counts take turns, `repeats` times, so that a noisy moment hits them all alike.

    bandwidth: measures the machine's streaming speed in bytes a second; called a few times in
    between, its median is reported. progress(1) after every round.
    """
    if context + max(rows) > model.spec.max_positions:
        raise InputError(
            f"--context {context} and {max(rows)} rows do not fit into the "
            f"{model.spec.max_positions} positions of this model."
        )
    streams = []

    def again(rounds: int) -> bool:
        if rounds:
            if bandwidth is not None and (rounds - 1) % max(1, repeats // 5) == 0:
                streams.append(bandwidth())
            progress(1)
        return rounds < repeats

    seconds = take_turns(ForwardTimer(model, context), rows, again)
    read = 0
    if model.spec.weight_bytes:
        read = model.spec.weight_bytes + context * model.spec.row_bytes
    return ForwardReport(context, seconds, read, statistics.median(streams) if streams else None)


def forward_curve(
    model: TargetModel, rows: Sequence[int], context: int, repeats: int
) -> dict[str, Any]:
    """Median milliseconds of forwards by number of rows, and their ratio to the first. A model with
    a shorter context gets what it holds."""
    context = max(0, min(context, model.spec.max_positions - max(rows) - 1))
    report = measure(model, rows, context, repeats)
    medians = [report.median(n) * 1e3 for n in rows]
    return {
        "context": context,
        "rows": list(rows),
        "ms": [round(m, 4) for m in medians],
        "ratio": [round(m / medians[0], 4) for m in medians],
    }


def bandwidth(megabytes: int = 256) -> Callable[[], float]:
    """Streaming reads, bytes a second: by the compiled kernels, else a sum by torch's threads."""
    from foretell import kernels

    library = kernels.load()
    if library is not None:
        return lambda: library.stream_bandwidth(megabytes << 20, 3, torch.get_num_threads())
    block = torch.ones(megabytes << 18, dtype=torch.float32)

    def run() -> float:
        start = time.perf_counter()
        block.sum()
        return block.numel() * 4 / (time.perf_counter() - start)

    run()
    return run
