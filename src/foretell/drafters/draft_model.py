"""A smaller model that drafts for a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import (
    Budget,
    BuildContext,
    Needs,
    Promise,
    SeqView,
    TargetModel,
)
from foretell.core.registry import suggest
from foretell.core.tree import TokenTree
from foretell.drafters.own_model import OwnCache, OwnModel
from foretell.drafters.trees.chain import Chain
from foretell.drafters.trees.k_ary import KAry
from foretell.drafters.trees.shape import TreeShape, make_shape


@dataclass(slots=True)
class DraftState(OwnCache):
    """The drafter's own cache of one sequence, and the shape of its drafts."""

    shape: TreeShape | None = None


USUAL, MOST = 3, 8  # levels of a chain: by itself, and where a policy decides


class DraftModel:
    """Any smaller checkpoint with the target's tokenizer drafts a chain of `tokens`, or a tree.

    Without `tokens` a chain has three levels, or as many as the policy says, up to eight.
    ``tree=NAME`` picks the tree (``foretell methods`` lists them), whose own options may follow:
    ``draft-model:tree=dyspec,nodes=16``; `tokens` then limits its levels. ``branching=b`` is short
    for ``tree=k-ary,branching=b``. Draws follow the verifier: the most probable tokens (greedy),
    the target's own noise of that position (replay), or draws from q, q rows handed over
    (rejection). The drafter keeps a KV cache of its own and catches up with whatever was committed,
    so it may sleep for any number of steps.

    Papers: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023);
    Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling" (2023).
    Promise: keeps that of the verifier.
    """

    name = "draft-model"
    promise = Promise.EXACT
    paper = "Fast Inference from Transformers via Speculative Decoding"
    summary = "a smaller model drafts a chain, or a tree of any form"
    needs = Needs(own_model=True)
    own_trees_only = True  # a shape learns from the ranks of its own nodes

    def __init__(
        self,
        model: TargetModel,
        vocab: int,
        tokens: int | None = None,
        branching: int = 1,
        shape: TreeShape | None = None,
    ) -> None:
        """tokens: most levels (default: what the shape is set to)."""
        if (tokens is not None and tokens < 1) or branching < 1:
            raise InputError("draft-model needs tokens >= 1 and branching >= 1.")
        usual = tokens
        if shape is None:
            usual = tokens or USUAL
            shape = Chain(tokens or MOST) if branching == 1 else KAry(branching, usual)
        if "chain" not in shape.holds and not model.spec.caps.tree:
            raise InputError("This draft model cannot score trees: let it draft a chain.")
        self.model, self.vocab, self.shape = model, vocab, shape
        self.tokens, self.branching = tokens or shape.depth, branching
        self.usual = usual or self.tokens  # levels, where the policy leaves it open
        self.shapes, self.draws, self.unsound = shape.holds, shape.draws, shape.unsound
        self._own = OwnModel(model, vocab)

    @classmethod
    def build(
        cls,
        context: BuildContext,
        path: str | None = None,
        tokens: int | None = None,
        branching: int = 1,
        tree: str | None = None,
        **options: Any,
    ) -> DraftModel:
        """`path`: a checkpoint directory or hub id; by default the drafter beside the target.
        options: the tree's own."""
        shape = None
        if tree is not None:
            shape = make_shape(
                context, tree, options if branching == 1 else {**options, "branching": branching}
            )
        elif options:
            wrong = next(iter(options))
            raise InputError(
                f"'draft-model' has no option '{wrong}' (those of a tree follow tree=NAME): "
                f"{suggest(wrong, ('path', 'tokens', 'branching', 'tree'))}"
            )
        path = path or context.default_draft
        if path is None:
            raise InputError(
                "draft-model needs a smaller checkpoint: --draft draft-model:path=DIR "
                "(only the bundled model brings a drafter of its own)."
            )
        assert context.load_model is not None, "an engine that creates draft-model can load models"
        return cls(context.load_model(path), context.target.spec.vocab, tokens, branching, shape)

    def begin(self, view: SeqView) -> DraftState:
        return DraftState(self.model.new_cache(), shape=self.shape.bind(view))

    def end(self, state: DraftState) -> None:
        state.cache.truncate(0)

    def observe(self, states: Sequence[DraftState], feedback: Sequence[Feedback]) -> None:
        """The cache reads the committed tokens when it next proposes; the shape may learn."""
        for state, f in zip(states, feedback, strict=True):
            self._shape(state).observe(f.tree, f.verdict)

    def propose(
        self, states: Sequence[DraftState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        start = perf_counter()
        room = [self.model.spec.max_positions - len(v.tokens) for v in views]
        budgets = [
            b.clamp(nodes=b.nodes, depth=min(self.usual if b.free else self.tokens, r))
            for b, r in zip(budgets, room, strict=True)
        ]
        self.shape.plan([v for v, b in zip(views, budgets, strict=True) if not b.none])
        growers = [
            self._shape(s).grow(v, b) for s, v, b in zip(states, views, budgets, strict=True)
        ]
        awake = [i for i, g in enumerate(growers) if g.frontier()]
        if awake:
            chain = "chain" in self.shape.holds or all(budgets[i].branching == 1 for i in awake)
            feeds = [self._own.skip_ahead(states[i], views[i].tokens) for i in awake]
            run = self._own.grow_chains if chain else self._own.grow_trees
            forwards = run([states[i] for i in awake], feeds, [growers[i] for i in awake])
            self.shape.spent(forwards, perf_counter() - start)
        return [g.tree() for g in growers]

    def imagine(
        self,
        states: Sequence[DraftState],
        views: Sequence[SeqView],
        budgets: Sequence[Budget],
        known: Sequence[int],
    ) -> list[TokenTree]:
        """As `propose`, on texts of which only the first known[b] ids are committed."""
        trees = self.propose(states, views, budgets)
        for state, n in zip(states, known, strict=True):
            state.sure = min(state.sure, n)
        return trees

    def _shape(self, state: DraftState) -> TreeShape:
        return state.shape or self.shape
