"""What a forward of a model costs on this machine: measured once, kept on disk, corrected by use.

T(rows, context, sequences) is a sum: a curve over the packed rows (measured, interpolated), plus
what reading the context costs per committed row and per pair of row and committed row, plus what
every further sequence costs. Four short measurements give the curve and the three slopes; every
real forward then corrects the prediction for its number of rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from foretell.core import machine
from foretell.core.costs import row_range
from foretell.core.protocols import TargetModel
from foretell.engine.curve import Curve

VERSION = 2


class MeasuredCost:
    """A `CostModel` of one model on this machine.

    The curve is measured when it is first asked for, or read from `folder`, where it is kept by
    model shape, dtype, threads and processor. Afterwards `observe` moves the prediction: a factor
    for all forwards (the machine is busier or quieter than it was) and one for each range of rows.
    """

    PACE = 0.1  # weight of a new observation in the running averages of log(actual / predicted)

    def __init__(self, model: TargetModel, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder
        self._curve: Curve | None = None
        self._table: list[float] = []  # curve.at(n) for small n
        self._all = 0.0
        self._range: dict[int, float] = {}  # by `row_range`
        self.errors: list[float] = []  # |predicted / actual - 1| of the last forwards

    @cached_property
    def path(self) -> Path | None:
        """The file of the curve; nothing is worked out before somebody needs the curve."""
        return self.folder / f"{identity(self.model)}.json" if self.folder else None

    @property
    def curve(self) -> Curve:
        if self._curve is None:
            self._curve = self._read() or self._measure()
            self._table = [self._curve.at(max(1, n)) for n in range(257)]
        return self._curve

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        return self.plain(rows, context, sequences) * math.exp(
            self._all + self._range.get(row_range(rows, 2), 0.0)
        )

    def observe(self, rows: int, context: int, sequences: int, seconds: float) -> None:
        if self._curve is None or rows < 1 or seconds <= 0:
            return
        place = row_range(rows, 2)
        guess = self.seconds(rows, context, sequences)
        if len(self.errors) >= 1000:
            del self.errors[:500]
        self.errors.append(abs(guess / seconds - 1))
        # a forward that was interrupted for long says nothing about the next one
        miss = max(-0.7, min(0.7, math.log(seconds / guess)))
        self._all += self.PACE * miss / 2
        self._range[place] = self._range.get(place, 0.0) + self.PACE * miss / 2

    @property
    def error(self) -> float | None:
        """Median of |predicted / actual - 1| over the last forwards."""
        return statistics.median(self.errors) if self.errors else None

    def plain(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        """What was measured, without the corrections."""
        curve = self.curve
        base = self._table[rows] if rows < len(self._table) else curve.at(rows)
        pairs = rows * context / max(1, sequences)
        return (
            base
            + curve.per_context * context
            + curve.per_pair * pairs
            + curve.per_sequence * (sequences - 1)
        )

    def _measure(self) -> Curve:
        curve = Curve.measure(self.model)
        if self.path is not None:
            with suppress(OSError):  # a full or read-only disk costs a measurement next time
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(
                    "w", dir=self.path.parent, suffix=".tmp", delete=False
                ) as f:
                    json.dump({"version": VERSION, **asdict(curve)}, f)
                Path(f.name).replace(self.path)
        return curve

    def _read(self) -> Curve | None:
        if self.path is None:
            return None
        try:
            value: dict[str, Any] = json.loads(self.path.read_bytes())
            if value.pop("version") != VERSION:
                return None
            curve = Curve(**value)
            whole = len(curve.rows) == len(curve.seconds) > 1
            return curve if whole and min(curve.seconds) > 0 else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def identity(model: TargetModel) -> str:
    """A name for this model's shape and arithmetic, and what does it, on this machine."""
    spec = model.spec
    kind = getattr(model, "format", None) or getattr(model, "dtype", "")
    parts = [
        type(model).__name__, str(kind), spec.vocab, spec.hidden, spec.layers, spec.row_bytes,
        spec.weight_bytes, str(model.device), torch.get_num_threads(), torch.__version__,
        platform.machine(), processor(model.device), os.environ.get("FORETELL_KERNELS", ""),
        getattr(model, "build", ""),
    ]  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def processor(device: torch.device) -> str:
    """The name of the processor that runs a model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()
