"""Early exit: the target's first layers draft for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, BuildContext, SeqView, TargetModel
from foretell.core.tree import TokenTree
from foretell.drafters.self_draft import SelfDraft, check_threshold, shape_of, stop_below
from foretell.drafters.trees.chain import Chain
from foretell.drafters.trees.shape import TreeShape


@dataclass(slots=True)
class ExitState:
    shape: TreeShape


class EarlyExit(SelfDraft):
    """Runs the first `layer` layers of the target (default: a quarter of them), then its final norm
    and head, and drafts a chain of `tokens`, or ``tree=NAME`` with that tree's options. Drafting
    stops below a token whose probability is under `threshold`.

    No weights and no cache of its own: the first layers' keys and values of the committed text are
    the target's, exactly. The target computes the drafts' first layers once more when it verifies
    them. It pays with models trained to exit early; others agree too seldom.

    Paper: Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding"
    (2024). Draws follow the verifier (q rows for rejection): keeps its promise.
    """

    name = "early-exit"
    paper = "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding"
    summary = "the target's first layers and its head draft for the whole of it"

    def __init__(
        self,
        model: TargetModel,
        layer: int | None = None,
        threshold: float = 0.0,
        shape: TreeShape | None = None,
    ) -> None:
        super().__init__(model, shape or Chain(4))
        total = model.spec.layers
        layer = max(1, total // 4) if layer is None else layer
        if not 1 <= layer < total:
            raise InputError(f"early-exit:layer={layer} is not one of 1..{total - 1}.")
        self.threshold = check_threshold(self.name, threshold)
        self.layers = tuple(range(layer))

    @classmethod
    def build(
        cls,
        context: BuildContext,
        layer: int | None = None,
        tokens: int = 4,
        threshold: float = 0.0,
        tree: str | None = None,
        **options: Any,
    ) -> EarlyExit:
        own = ("layer", "tokens", "threshold", "tree")
        shape = shape_of(cls.name, context, tokens, tree, options, own)
        return cls(context.target, layer, threshold, shape)

    def begin(self, view: SeqView) -> ExitState:
        return ExitState(self.shape.bind(view))

    def propose(
        self, states: Sequence[ExitState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        limited = [stop_below(b, self.threshold) for b in budgets]
        return self.draft(states, views, limited, [self.layers] * len(views))
