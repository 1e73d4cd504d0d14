"""What a server will need in memory, said before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from foretell.core.errors import InputError
from foretell.core.protocols import TargetModel
from foretell.engine.llm import LLM
from foretell.engine.memory import free_memory, mapped_memory

DRAFT_ROWS = 16  # rows a sequence's draft adds to a forward, as the workspace is reckoned
GROWTH = 1.5  # a cache on a device that reserves as it grows holds up to half more than its rows


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, but for the rows. Weights are there already; the rest is still to come, at most."""

    weights: int  # of the target; 0 = unknown
    drafter: int  # weights of its models, and the tables it shares between requests
    kv_rows: int  # rows of all sequences together, those kept for later prompts included
    row: int  # one row of the target's cache; 0 = unknown
    draft_row: int  # one row of the drafter's own caches
    workspace: int  # activations and logits of the largest step, about
    free: int  # what the device has left
    growth: float = 1.0

    @property
    def kv(self) -> int:
        return int(self.kv_rows * self.row * self.growth)

    @property
    def draft_kv(self) -> int:
        return int(self.kv_rows * self.draft_row * self.growth)

    @property
    def needed(self) -> int:
        """What will be taken beyond what is taken already."""
        return self.kv + self.draft_kv + self.workspace

    @property
    def most_rows(self) -> int:
        """Rows that would fit."""
        each = (self.row + self.draft_row) * self.growth
        return max(0, int((self.free - self.workspace) / each)) if each else self.kv_rows

    def lines(self) -> list[str]:
        """For people."""
        rows = f"{self.kv_rows:,} rows of {_size(self.row)}" if self.row else f"{self.kv_rows:,}"
        parts = [
            ("weights", _size(self.weights) if self.weights else "unknown", ""),
            ("drafter", _size(self.drafter), ""),
            ("KV cache", _size(self.kv) if self.row else "unknown", f"at most: {rows}"),
            ("drafter's KV", _size(self.draft_kv), "at most"),
            ("workspace", _size(self.workspace), "about"),
            ("free now", _size(self.free), f"{_size(self.needed)} of it may be taken"),
        ]
        return [f"{name:<13}{size:>9}  {note}".rstrip() for name, size, note in parts]

    def check(self) -> None:
        """InputError when it does not fit."""
        if self.needed > self.free:
            raise InputError(
                f"The cache of {self.kv_rows:,} rows and the workspace need {_size(self.needed)} "
                f"and {_size(self.free)} are free: lower --kv-rows to {self.most_rows} or less."
            )


def make_plan(llm: LLM) -> MemoryPlan:
    """The plan of a loaded engine."""
    spec, scheduler = llm.model.spec, llm.engine.scheduler
    logits = scheduler.max_batch * (1 + DRAFT_ROWS)
    rows = scheduler.step_rows + logits
    own = {id(m): m for m in _models(llm.drafter) if m is not llm.model}
    drafter: Any = llm.drafter
    tables = drafter.state_bytes() if hasattr(drafter, "state_bytes") else 0
    on_cpu = llm.model.device.type == "cpu"
    mapped = min(mapped_memory(), spec.weight_bytes) if on_cpu else 0
    return MemoryPlan(
        weights=spec.weight_bytes,
        drafter=sum(m.spec.weight_bytes for m in own.values()) + tables,
        kv_rows=scheduler.rows,
        row=spec.row_bytes,
        draft_row=sum(m.spec.row_bytes for m in own.values()),
        # residual, attention and MLP of every row in float32; logits, and what processing copies
        workspace=rows * spec.hidden * 64 + 3 * logits * spec.vocab * 4,
        free=free_memory(llm.model.device) - mapped,
        growth=1.0 if scheduler.ahead is None else GROWTH,
    )


def _models(drafter: Any) -> Iterator[TargetModel]:
    """The models that a drafter, or what it is made of, runs."""
    for part in getattr(drafter, "parts", ()):
        yield from _models(part)
    model = getattr(drafter, "model", None)
    while model is not None and not isinstance(model, TargetModel):
        model = getattr(model, "model", None)
    if model is not None:
        yield model


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit in ("B", "kB") or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
