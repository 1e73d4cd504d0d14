"""What drafters that run some of the target's own layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import (
    Budget,
    BuildContext,
    KVCache,
    LayerAccess,
    Needs,
    Promise,
    SeqView,
    TargetModel,
    Txn,
)
from foretell.core.registry import suggest
from foretell.core.tree import TokenTree
from foretell.drafters.trees.chain import Chain
from foretell.drafters.trees.drive import Scratch, grow_level_by_level
from foretell.drafters.trees.shape import Grower, TreeShape, make_shape

FEW = 16  # with more pending ids (a prompt) a draft would cost a part of the prefill again


class Shaped(Protocol):
    """What the state of a sequence has."""

    shape: TreeShape


class SelfDraft:
    """Base of drafters that grow drafts with some layers of the target on the target's own cache,
    copying nothing. A state per sequence has the `shape` that `self.shape.bind` gave.

    Committed rows hold the K/V of every layer, so a draft reads exact keys of the layers it runs;
    its own rows live in a transaction that is rolled back. What the layers it leaves out would
    write is never read: they do not run.
    """

    name: ClassVar[str]
    promise = Promise.EXACT
    needs = Needs(layer_access=True)
    own_trees_only = True  # a shape learns from the ranks of its own nodes

    def __init__(self, model: TargetModel, shape: TreeShape) -> None:
        """InputError when the model cannot run single layers, or has too few of them."""
        if not model.spec.caps.layer_access:
            raise InputError(
                f"'{self.name}' runs single layers of the target, which this model's adapter "
                "cannot do: choose another drafter."
            )
        if model.spec.layers < 2:
            raise InputError(f"'{self.name}' needs a target of at least two layers.")
        if "chain" not in shape.holds and not model.spec.caps.tree:
            raise InputError("This model cannot score trees: let it draft a chain.")
        self.model, self.shape = model, shape
        self.shapes, self.draws, self.unsound = shape.holds, shape.draws, shape.unsound

    def observe(self, states: Sequence[Any], feedback: Sequence[Feedback]) -> None:
        """The shape may learn."""
        for state, f in zip(states, feedback, strict=True):
            state.shape.observe(f.tree, f.verdict)

    def end(self, state: Any) -> None:
        """The rows were the target's."""

    def draft(
        self,
        states: Sequence[Shaped],
        views: Sequence[SeqView],
        budgets: Sequence[Budget],
        layers: Sequence[tuple[int, ...]],
    ) -> list[TokenTree]:
        """One tree a sequence, drafted by its own `layers`; () = do not draft."""
        start, none = perf_counter(), Budget(0, 0)
        budgets = [
            b if run and v.cache is not None and len(v.pending) <= FEW else none
            for v, b, run in zip(views, budgets, layers, strict=True)
        ]
        self.shape.plan([v for v, b in zip(views, budgets, strict=True) if not b.none])
        growers = [s.shape.grow(v, b) for s, v, b in zip(states, views, budgets, strict=True)]
        awake = [i for i, g in enumerate(growers) if g.frontier()]
        forwards = 0
        for run in dict.fromkeys(layers[i] for i in awake):
            alike = [i for i in awake if layers[i] == run]
            forwards += self._grow([growers[i] for i in alike], [views[i] for i in alike], run)
        if forwards:
            self.shape.spent(forwards, perf_counter() - start)
        return [g.tree() for g in growers]

    def _grow(self, growers: list[Grower], views: list[SeqView], layers: tuple[int, ...]) -> int:
        caches = [cast(KVCache, v.cache) for v in views]
        scratch = Scratch(growers, [v.pending for v in views], [c.n for c in caches])
        with self.model.open(caches) as txn:
            return grow_level_by_level(
                growers,
                lambda frontiers: run_some(self.model, scratch.segments(frontiers), txn, layers),
            )


@torch.inference_mode()
def run_some(
    model: TargetModel, segments: Sequence[Segment], txn: Txn, layers: Sequence[int]
) -> Tensor:
    """Logits [R, V] of the rows that ask for them, after `layers` alone and the target's head."""
    batch = PackedBatch(list(segments))
    ids = torch.cat([torch.from_numpy(s.tokens) for s in segments])
    x = cast(LayerAccess, model).run_layers(model.embed(ids), batch, txn, layers)
    txn.advance(batch)
    rows = batch.logit_rows()
    if rows is not None:
        x = x[torch.as_tensor(rows, device=x.device)]
    return model.unembed(x)


def stop_below(budget: Budget, threshold: float) -> Budget:
    """The budget, with drafting below a token less probable than `threshold` stopped."""
    if threshold <= 0 or budget.none:
        return budget
    before = budget.stop

    def stop(scores: Sequence[float]) -> bool:
        return scores[-1] < threshold or (before is not None and before(scores))

    return replace(budget, stop=stop)


def shape_of(
    name: str,
    context: BuildContext,
    tokens: int,
    tree: str | None,
    options: dict[str, Any],
    own: Sequence[str],
) -> TreeShape:
    """A chain of `tokens`, or ``tree=NAME`` with its options; own: option names of the drafter."""
    if tokens < 1:
        raise InputError(f"{name}:tokens is at least 1.")
    if tree is not None:
        return make_shape(context, tree, options)
    if options:
        wrong = next(iter(options))
        raise InputError(
            f"'{name}' has no option '{wrong}' (those of a tree follow tree=NAME): "
            f"{suggest(wrong, own)}"
        )
    return Chain(tokens)


def check_threshold(name: str, threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise InputError(f"{name}:threshold={threshold} is not a probability between 0 and 1.")
    return threshold
