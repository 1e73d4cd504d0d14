"""Logits from plain forwards of a model, in several shapes: the yardstick of `check`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.protocols import TargetModel

CHUNK = 512  # prompt rows of one forward


@torch.inference_mode()
def last_logits(
    model: TargetModel, prompt: Sequence[int], output: Sequence[int], rows: int, copies: int = 1
) -> Tensor:
    """[V] logits after prompt + output: the prompt in chunks, then the output `rows` ids at a time
    (1 = as plain decoding does it), in a batch of `copies` equal sequences."""
    ids = [*prompt, *output]
    cuts = list(range(0, len(prompt), CHUNK)) + list(range(len(prompt), len(ids), rows))
    caches = [model.new_cache(len(ids)) for _ in range(copies)]
    logits = torch.empty(0)
    for start, stop in zip(cuts, [*cuts[1:], len(ids)], strict=True):
        tip = stop == len(ids)
        segments = [
            Segment(
                np.asarray(ids[start:stop], np.int64),
                np.arange(start, stop, dtype=np.int64),
                logits=np.asarray([stop - start - 1] if tip else [], np.int64),
            )
            for _ in caches
        ]
        with model.open(caches) as txn:
            out = model.forward(PackedBatch(segments), txn)
            txn.commit([range(stop - start)] * copies)
        if tip:
            logits = out.logits[0].float().clone()
    return logits


def logits_and_noise(
    model: TargetModel, prompt: Sequence[int], output: Sequence[int], copies: int = 1
) -> tuple[Tensor, float]:
    """Plain decoding's logits [V] after prompt + output, and the largest difference between them
    and those of forwards of other shapes over the same ids."""
    reference = last_logits(model, prompt, output, 1)
    shapes = [(w, 1) for w in (2, 5, 9, len(output)) if 1 < w <= len(output)]
    shapes += [(w, copies) for w in (1, 5)] if copies > 1 else []
    noise = 0.0
    for rows, many in sorted(set(shapes)):
        other = last_logits(model, prompt, output, rows, many)
        both = reference.isfinite() & other.isfinite()
        if both.any():
            noise = max(noise, float((reference - other)[both].abs().max()))
    # The prompt's own rows come from one chunk in every shape above; split them once as well.
    if len(prompt) > 1:
        other = last_logits(model, prompt[:-1], [prompt[-1], *output], 1)
        noise = max(noise, float((reference - other).nan_to_num(0, 0, 0).abs().max()))
    return reference, noise
