"""What a weight format costs: the same held-out text scored in several dtypes, against float32.

Bits per byte are the cross-entropy of the text over its bytes. Agreement is how often a dtype's
most likely next token is float32's; KL is KL(float32 || dtype) in nats, the mean over tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.protocols import TargetModel
from foretell.lab.train.corpora import python_sources, read_corpus, split_corpus
from foretell.models.load import load_model
from foretell.models.text.tokenizer import Tokenizer

REFERENCE = "float32"
ROWS = 1024  # packed rows of one forward
Advance = Callable[[int], None]
Windows = list[list[int]]  # a window's ids: all but the first are predicted


@dataclass(frozen=True, slots=True)
class Quality:
    """One dtype on one text."""

    dtype: str
    runner: str  # which implementation ran it
    bits_per_byte: float
    agreement: float  # share of tokens whose most likely id is float32's
    kl: float  # nats a token
    weight_mb: float  # bytes of weights a forward reads, / 10^6
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Text:
    """Named documents to score."""

    name: str
    documents: Sequence[str]


def held_out(name: str, path: Path | None) -> Text:
    """The held-out segments of a corpus, split as `foretell train base` splits it; path None: the
    Python standard library's sources."""
    if path is None:
        corpus = split_corpus(name, python_sources(), is_code=True)
    else:
        corpus = split_corpus(name, read_corpus(path))
    return Text(name, corpus.held_out)


def whole(path: Path) -> Text:
    """A UTF-8 file as one document."""
    try:
        return Text(path.name, [path.read_text(encoding="utf-8")])
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--text {path} cannot be read as UTF-8 ({e}).") from None


def windows(text: Text, tokenizer: Tokenizer, tokens: int, width: int) -> Windows:
    """At most `tokens` predictions in windows of `width`, each document from its beginning; the
    last id of a window is the first of the next, so only a document's first id is not predicted."""
    found: Windows = []
    for document in text.documents:
        ids = tokenizer.encode(document)
        for at in range(0, len(ids) - 1, width):
            window = ids[at : at + min(width, tokens) + 1]
            found.append(window)
            tokens -= len(window) - 1
            if tokens <= 0:
                return found
    if not found:
        raise InputError(f"The text '{text.name}' is empty: give one of at least two tokens.")
    return found


def measure(
    model: str | Path,
    texts: Sequence[Text],
    dtypes: Sequence[str],
    *,
    tokens: int = 4096,
    width: int = 512,
    device: str = "auto",
    stage: Callable[[str, int], Advance] = lambda name, total: lambda n: None,
) -> dict[str, list[Quality]]:
    """Text name -> one Quality a dtype, in the order asked for. One model is held at a time;
    float32's distributions wait in a temporary file. stage(name, total) gives what is told of every
    scored token. Raises InputError."""
    tokenizer = Tokenizer.load(model)
    cut: list[Windows] = []
    reference = np.empty((0, 0), np.float32)
    results: dict[str, list[Quality]] = {t.name: [] for t in texts}
    with tempfile.TemporaryFile() as file:
        for dtype in [REFERENCE, *(d for d in dtypes if d != REFERENCE)]:
            begin = perf_counter()
            target = load_model(model, dtype=dtype, device=device)
            seconds = perf_counter() - begin
            if not cut:
                tokenizer.check_vocab(target.spec.vocab)
                width = min(width, target.spec.max_positions - 1)
                cut = [windows(t, tokenizer, tokens, width) for t in texts]
                rows = sum(len(w) - 1 for ws in cut for w in ws)
                shape = (rows, target.spec.vocab)
                file.truncate(max(1, 4 * rows * target.spec.vocab))
                reference = np.memmap(file, np.float32, "r+", shape=shape)
            advance, at = stage(dtype, len(reference)), 0
            for text, wins in zip(texts, cut, strict=True):
                figures = _score(target, wins, tokenizer, reference, at, dtype, advance)
                at += sum(len(w) - 1 for w in wins)
                megabytes = target.spec.weight_bytes / 1e6
                if dtype in dtypes:
                    results[text.name].append(
                        Quality(dtype, type(target).__name__, *figures, megabytes, seconds)
                    )
            del target
    order = {d: i for i, d in enumerate(dtypes)}
    return {name: sorted(q, key=lambda q: order[q.dtype]) for name, q in results.items()}


def _score(
    model: TargetModel,
    wins: Windows,
    tokenizer: Tokenizer,
    reference: np.ndarray,
    at: int,
    dtype: str,
    advance: Advance,
) -> tuple[float, float, float]:
    """(bits per byte, agreement, KL); in float32 the reference's rows from `at` on are written."""
    nats = agree = kl = 0.0
    size = rows = 0
    for group in _groups(wins):
        logp = _log_probs(model, group)
        ids = torch.tensor([i for w in group for i in w[1:]])
        span = slice(at + rows, at + rows + len(ids))
        if dtype == REFERENCE:
            reference[span] = logp.numpy()
        known = torch.from_numpy(np.asarray(reference[span]))
        nats -= float(logp.gather(1, ids[:, None]).double().sum())
        agree += float((logp.argmax(1) == known.argmax(1)).sum())
        kl += float((known.exp() * (known - logp)).nan_to_num(0.0).sum(dtype=torch.float64))
        size += sum(len(tokenizer.token_bytes(i)) for i in ids.tolist())
        rows += len(ids)
        advance(len(ids))
    return nats / math.log(2) / max(1, size), agree / rows, kl / rows


def _groups(wins: Windows) -> Iterator[Windows]:
    """Windows that share a forward."""
    group: Windows = []
    for window in wins:
        if group and sum(map(len, group)) + len(window) > ROWS:
            yield group
            group = []
        group.append(window)
    yield group


def _log_probs(model: TargetModel, group: Windows) -> Tensor:
    """[T, V] float32 on the host: log-probabilities of what follows every id but the last."""
    segments = [Segment(np.asarray(w[:-1], np.int64), np.arange(len(w) - 1)) for w in group]
    with model.open([model.new_cache() for _ in group]) as txn:
        logits = model.forward(PackedBatch(segments), txn).logits
    return logits.log_softmax(-1).cpu()
