"""What a transformers model can do, measured on a few random tokens instead of believed.

Every claim is a comparison with the model's own plain forward (no cache, a straight line of
tokens). A claim also needs a control: the wrong answer must lie clearly outside the tolerance,
otherwise the comparison could not have failed and nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.protocols import Caps

if TYPE_CHECKING:
    from foretell.models.hf import HFModel

# Largest difference, relative to the largest logit, that rounding explains.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "ln_out", "out_norm")
_UNBOUNDED = 1 << 20
_CONTROL = 4  # a wrong answer must be this many tolerances away


class Mismatch(Exception):
    """A step did not reproduce the plain forward."""


def probe_ids(vocab: int) -> list[int]:
    """24 ids spread over the vocabulary, the same at every call."""
    return np.random.default_rng(7).integers(0, vocab, 24).tolist()


def plain(model: HFModel, ids: Sequence[int]) -> Tensor:
    """[n, V] float32: the reference."""
    with torch.inference_mode():
        line = torch.tensor([list(ids)], device=model.device)
        return model.module(input_ids=line, use_cache=False, return_dict=True).logits[0].float()


def _tolerance(model: HFModel, reference: Tensor) -> float:
    return _ROUNDING.get(model.dtype, 5e-2) * float(reference.abs().max().clamp_min(1e-6))


def _same(model: HFModel, got: Tensor, reference: Tensor) -> None:
    worst = float((got - reference).abs().max()) if got.numel() else 0.0
    if got.shape != reference.shape or not worst <= _tolerance(model, reference):
        raise Mismatch(f"logits differ by {worst:.2g}")


def _run(model: HFModel, txn: Any, segment: Segment) -> Tensor:
    return model.forward(PackedBatch([segment]), txn).logits


def _chain(ids: Sequence[int], start: int, logits: Sequence[int] | None = None) -> Segment:
    wanted = None if logits is None else np.asarray(logits, np.int64)
    return Segment(np.asarray(ids, np.int64), np.arange(start, start + len(ids)), None, wanted)


def _louder(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    return out * 1000


def find_norm(model: HFModel) -> nn.Module | None:
    """The final norm, if the logits are nothing but head(norm(state)); else None."""
    ids = probe_ids(model.spec.vocab)[:6]
    found = {n: m for n, m in model.module.named_modules() if n.rsplit(".", 1)[-1] in _NORMS}
    taken: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                taken[name] = args[0]

        return hook

    # Caps on the logits (tanh) are nearly straight where logits are small: look far out, too.
    loud = model._head.register_forward_hook(_louder)
    try:
        outside = plain(model, ids) / 1000
    finally:
        loud.remove()
    hooks = [m.register_forward_hook(watch(n)) for n, m in found.items()]
    try:
        reference = plain(model, ids)
    finally:
        for h in hooks:
            h.remove()
    with torch.inference_mode():
        for name, state in reversed(taken.items()):
            try:
                logits = model._head(found[name](state)).float().reshape(reference.shape)
                _same(model, logits, reference)
                _same(model, logits, outside)
            except (Mismatch, RuntimeError):
                continue
            return found[name]
    return None


def check_chain(model: HFModel) -> None:
    """Prefill, several rows behind it, single rows. Raises Mismatch."""
    ids = probe_ids(model.spec.vocab)[:10]
    reference = plain(model, ids)
    cache = model.new_cache()
    with model.open([cache]) as txn:
        _same(model, _run(model, txn, _chain(ids[:5], 0)), reference[:5])
        _same(model, _run(model, txn, _chain(ids[5:8], 5)), reference[5:8])
        txn.commit([range(8)])
    with model.open([cache]) as txn:
        _same(model, _run(model, txn, _chain(ids[8:], 8)), reference[8:])
        txn.commit([range(2)])
    cache.check()


def check_rollback(model: HFModel) -> None:
    """Rows that were undone leave no trace. Raises Mismatch."""
    ids = probe_ids(model.spec.vocab)
    cache = model.new_cache()
    with model.open([cache]) as txn:
        _run(model, txn, _chain(ids[:5], 0))
        txn.commit([range(5)])
    with model.open([cache]) as txn:
        _run(model, txn, _chain(ids[10:14], 5))
    with model.open([cache]) as txn:
        _run(model, txn, _chain([*ids[5:8], *ids[14:16]], 5))
        txn.commit([range(3)])
    cache.check()
    with model.open([cache]) as txn:
        _same(model, _run(model, txn, _chain(ids[8:10], 8)), plain(model, ids[:10])[8:])


def picks_logits(model: HFModel) -> bool:
    """Whether `logits_to_keep` takes a list of rows."""
    if "logits_to_keep" not in model._accepts:
        return False
    ids = probe_ids(model.spec.vocab)[:5]
    model._picks_logits = True
    try:
        with model.open([model.new_cache()]) as txn:
            got = _run(model, txn, _chain(ids, 0, [1, 3]))
        _same(model, got, plain(model, ids)[[1, 3]])
        return True
    except Exception:  # whatever the model's code throws at an argument it does not expect
        return False
    finally:
        model._picks_logits = False


def looks_near_only(config: Any) -> bool:
    """Whether some layers attend by distance (windows, chunks): the mask of a tree would have to
    know it, and a short probe would not see it."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(k != "full_attention" for k in kinds)
    if getattr(config, "use_sliding_window", None) is False:
        return False
    words = ("window", "chunk", "local")
    named = (v for k, v in config.to_dict().items() if any(w in k for w in words))
    return any(v and not isinstance(v, bool) for v in named)


def check_tree(model: HFModel) -> None:
    """Nodes of a small tree, a second forward below it, and the commit of a path through it, all
    against the lines that lead there. Raises Mismatch. `model.spec.caps.tree` must be set."""
    ids = probe_ids(model.spec.vocab)
    head, nodes = ids[:5], ids[5:11]
    parent = [-1, 0, 0, 0, 3, 1]  # the tip, three children, two grandchildren
    seen = np.eye(6, dtype=bool)
    depth = np.zeros(6, np.int64)
    lines: list[list[int]] = []
    for i, p in enumerate(parent):
        if p >= 0:
            seen[i] |= seen[p]
            depth[i] = depth[p] + 1
        lines.append([*head, *(nodes[j] for j in np.flatnonzero(seen[i]))])
    wrong = plain(model, [*head, *nodes])[5:]
    cache = model.new_cache()
    with model.open([cache]) as txn:
        _run(model, txn, _chain(head, 0))
        txn.commit([range(5)])
    with model.open([cache]) as txn:
        got = _run(model, txn, Segment(np.asarray(nodes), 5 + depth, seen))
        for i, line in enumerate(lines):
            reference = plain(model, line)[-1]
            _same(model, got[i], reference)
            clear = float((wrong[i] - reference).abs().max()) > _CONTROL * _tolerance(
                model, reference
            )
            if i > 1 and not clear:
                raise Mismatch("the control is too close to tell")
        below = np.append(seen[4], True)[None]  # a row below the grandchild, in a second forward
        got = _run(model, txn, Segment(np.asarray(ids[11:12]), np.asarray([8]), below))
        line = [*lines[4], ids[11]]
        _same(model, got[0], plain(model, line)[-1])
        txn.commit([[0, 3, 4, 6]])
    cache.check()
    with model.open([cache]) as txn:
        got = _run(model, txn, _chain(ids[12:14], 9))
        _same(model, got, plain(model, [*line, *ids[12:14]])[-2:])


def max_positions(config: Any) -> int:
    """The longest context that the configuration names."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return _UNBOUNDED


def measure(model: HFModel) -> None:
    """Find out and set what `model` can do. Raises InputError when it cannot be decoded step by
    step. Errors of the model's own code (any kind) count as "cannot"."""
    model.spec = replace(model.spec, vocab=plain(model, [0, 1]).shape[-1])
    model._norm = find_norm(model)
    if not model._stateful:
        try:
            check_chain(model)
            check_rollback(model)
        except Exception:  # a cache of its own kind: run it the way `generate` does
            model._stateful = True
    if model._stateful:
        caps = Caps(tree=False, rollback=False, recurrent=True)
        model.spec = replace(model.spec, caps=caps)
        try:
            check_chain(model)
        except Exception as e:
            raise InputError(
                f"{model.spec.name} does not give the same logits step by step as at once "
                f"({e}); it cannot be decoded faithfully."
            ) from e
        return
    model._picks_logits = picks_logits(model)
    config = model.module.config.get_text_config()
    maybe = (
        "position_ids" in model._accepts
        and getattr(config, "_attn_implementation", "") in ("sdpa", "eager")
        and not looks_near_only(config)
    )
    model.spec = replace(model.spec, caps=Caps(tree=maybe))
    if maybe:
        try:
            check_tree(model)
        except Exception:
            model.spec = replace(model.spec, caps=Caps(tree=False))
