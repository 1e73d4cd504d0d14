"""Whether a widened model says what the original says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.lab.check.prompts import PROMPTS
from foretell.lab.export.parts import Parts
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import Checkpoint, Source
from foretell.models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Comparison:
    """The widened model against the original, both in float32, on the original's greedy texts."""

    prompts: int
    tokens: int  # greedy tokens compared
    different: int  # at which the widened model's first choice is another
    logit_difference: float  # the largest
    logit_range: float  # of the original's logits

    @property
    def passed(self) -> bool:
        return self.different == 0 and self.logit_difference <= 1e-3 * self.logit_range


class _Rounded:
    """A checkpoint whose matrices went through `dtype`, as widening stores them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        x = self.source.get(name, shape)
        return x.to(self.dtype) if x.dim() > 1 else x

    def quantised(self, name: str, shape: tuple[int, int]) -> None:
        """Floats only: the check is of those."""
        return None

    def release(self) -> None:
        self.source.release()


@torch.inference_mode()
def compare(
    folder: Path,
    wide: Path,
    dtype: torch.dtype,
    prompts: int,
    tokens: int,
    progress: Callable[[float, str], None],
) -> Comparison:
    """Greedy texts of the original (its matrices rounded to `dtype`), up to `tokens` behind each of
    `prompts` prompts, scored by both models."""
    parts = Parts(folder)
    source = _Rounded(Checkpoint(folder), dtype)
    small = NativeModel(parts.arch, parts.names, source, torch.float32)
    texts = []
    for i, prompt in enumerate(_prompts(folder, parts.arch.vocab, prompts)):
        room = parts.arch.max_positions - tokens
        prompt = prompt[: max(1, room)]
        most = min(tokens, parts.arch.max_positions - len(prompt))
        texts.append((prompt, greedy(small, prompt, most)))
        progress((i + 1) / prompts, "greedy text of the original")
    expected = [_score(small, p, o) for p, o in texts]
    del small, source
    big = NativeModel.load(wide, torch.float32)
    different, gap, span = 0, 0.0, 0.0
    for i, ((prompt, output), want) in enumerate(zip(texts, expected, strict=True)):
        got = _score(big, prompt, output)
        different += int((got.argmax(-1) != want.argmax(-1)).sum())
        gap = max(gap, float((got - want).abs().max()))
        span = max(span, float(want.max() - want.min()))
        progress((i + 1) / len(texts), "the same text by the widened model")
    return Comparison(len(texts), sum(len(o) for _, o in texts), different, gap, span)


def greedy(model: NativeModel, prompt: list[int], tokens: int) -> list[int]:
    cache, rows, output, at = model.new_cache(len(prompt) + tokens), prompt, [], 0
    for _ in range(tokens):
        with model.open([cache]) as txn:
            where = np.arange(at, at + len(rows))
            segment = Segment(np.asarray(rows, np.int64), where, logits=np.asarray([len(rows) - 1]))
            logits = model.forward(PackedBatch([segment]), txn).logits
            txn.commit([range(len(rows))])
        at, rows = at + len(rows), [int(logits[0].argmax())]
        output += rows
    return output


def _score(model: NativeModel, prompt: list[int], output: list[int]) -> Tensor:
    """[n, V] logits of the rows that choose each token of `output`."""
    ids = np.asarray([*prompt, *output[:-1]], np.int64)
    rows = np.arange(len(prompt) - 1, len(ids))
    cache = model.new_cache(len(ids))
    with model.open([cache]) as txn:
        segment = Segment(ids, np.arange(len(ids)), logits=rows)
        return model.forward(PackedBatch([segment]), txn).logits.float().clone()


def _prompts(folder: Path, vocab: int, count: int) -> list[list[int]]:
    """Ids of the built-in prompts, or random ones where there is no tokenizer."""
    try:
        tokenizer = Tokenizer.load(folder)
        found = [tokenizer.encode(text) for text in PROMPTS]
    except InputError:
        found = []
    found = [ids for ids in found if ids and max(ids) < vocab]
    random = np.random.default_rng(0)
    while len(found) < count:
        found.append(random.integers(0, vocab, 12).tolist())
    return found[:count]
