"""How long forwards of a model take here: a timer, and the curve that a few measurements give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foretell.core.batch import PackedBatch, Segment
from foretell.core.protocols import TargetModel

ROWS = (*range(1, 11), 12, 16, 24, 32, 48, 64)
CONTEXT = 1024  # committed rows behind which the slopes are measured
SECONDS = 0.12  # spent on one point, at least
REPEATS = 5  # of one point, at least


class ForwardTimer:
    """Times forwards of `rows` rows behind `context` committed rows of each of `sequences`
    sequences, with logits for all rows; everything is rolled back."""

    def __init__(self, model: TargetModel, context: int = 0, sequences: int = 1) -> None:
        self.model, self.context = model, context
        self.caches = [model.new_cache(context + max(ROWS)) for _ in range(sequences)]
        vocab = model.spec.vocab
        for cache in self.caches if context else []:
            for at in range(0, context, 256):
                n = min(256, context - at)
                ids = np.arange(at, at + n, dtype=np.int64) * 7 % vocab
                segment = Segment(ids, np.arange(at, at + n), None, np.empty(0, np.int64))
                with model.open([cache]) as txn:
                    model.forward(PackedBatch([segment]), txn)
                    txn.commit([range(n)])

    @torch.inference_mode()
    def __call__(self, rows: int) -> float:
        """Seconds of one forward whose sequences bring `rows` rows each."""
        ids = np.arange(rows, dtype=np.int64) * 11 % self.model.spec.vocab
        where = self.context + np.arange(rows, dtype=np.int64)
        batch = PackedBatch([Segment(ids, where) for _ in self.caches])
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with self.model.open(self.caches) as txn:
            self.model.forward(batch, txn)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def take_turns(
    timer: Callable[[int], float], rows: Sequence[int], again: Callable[[int], bool]
) -> dict[int, list[float]]:
    """Seconds for every row count, as long as again(rounds so far). They take turns, so that a
    noisy moment hits all."""
    taken: dict[int, list[float]] = {n: [] for n in rows}
    for n in rows:
        timer(n)  # caches, buffers, page faults
        timer(n)
    rounds = 0
    while again(rounds):
        for n in rows:
            taken[n].append(timer(n))
        rounds += 1
    return taken


def medians(timer: Callable[[int], float], rows: Sequence[int], seconds: float) -> dict[int, float]:
    """Median seconds for every row count, after `seconds` for each of them."""
    end = 0.0

    def again(rounds: int) -> bool:
        nonlocal end
        end = end or time.perf_counter() + seconds * len(rows)
        return rounds < REPEATS or time.perf_counter() < end

    return {n: statistics.median(v) for n, v in take_turns(timer, rows, again).items()}


@dataclass(slots=True)
class Curve:
    """The measured numbers, in seconds."""

    rows: list[int]
    seconds: list[float]  # one sequence, no context
    per_context: float = 0.0  # for each committed row of each sequence
    per_pair: float = 0.0  # for each row and each committed row of its sequence
    per_sequence: float = 0.0  # for each sequence after the first

    def at(self, rows: int) -> float:
        """The curve, straight lines between its points; beyond them the last slope goes on."""
        if rows <= self.rows[-1]:
            return float(np.interp(rows, self.rows, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return self.seconds[-1] + max(slope, 0.0) * (rows - self.rows[-1])

    @classmethod
    def measure(cls, model: TargetModel) -> Curve:
        """Some seconds of forwards on an otherwise idle engine."""
        limit = model.spec.max_positions
        rows = [n for n in ROWS if n <= max(2, limit // 2)]
        base = medians(ForwardTimer(model), rows, SECONDS)
        curve = cls(rows, _rising([base[n] for n in rows]))
        context = min(CONTEXT, limit - 16)
        few = [1, min(8, rows[-1])]
        if context >= 64:
            long = medians(ForwardTimer(model, context), few, SECONDS)
            extra = [max(0.0, long[n] - curve.at(n)) / context for n in few]
            curve.per_pair = max(0.0, extra[1] - extra[0]) / max(1, few[1] - few[0])
            curve.per_context = max(0.0, extra[0] - curve.per_pair)
        many = medians(ForwardTimer(model, 0, 4), [1, 2], SECONDS)
        more = [many[n] - curve.at(4 * n) for n in (1, 2)]
        curve.per_sequence = max(0.0, statistics.mean(more)) / 3
        return curve


def _rising(values: list[float]) -> list[float]:
    """More rows never cost less: noise that says so is averaged away (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for v in values:
        blocks.append([v, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            a, b = blocks[-2], blocks.pop()
            blocks[-1] = [(a[0] * a[1] + b[0] * b[1]) / (a[1] + b[1]), a[1] + b[1]]
    return [mean for mean, weight in blocks for _ in range(int(weight))]
