"""DySpec: grow the tree where the draft expects most to be accepted."""

from __future__ import annotations

from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.trees.calibration import Calibration
from foretell.drafters.trees.greedy import GreedyGrower
from foretell.drafters.trees.options import at_least_one
from foretell.drafters.trees.shape import Shape

BIASED = (
    "admit=path keeps a draft by its own probability, so that unlikely draws would be missing; "
    "use admit=reach (or auto), which looks only at draws that stay, or verify=replay."
)


class DySpec(Shape):
    """`nodes` nodes, each put where it is most likely to count.

    admit=reach: the next draw goes where verification most probably arrives, judged by the draws
    that stay above and before it; that is known before the draw, so the rule is lossless under
    rejection. admit=path: the node whose path, its own token included, is most probably accepted;
    better, but refused under rejection, where it would bias the output. admit=auto takes path where
    it is safe (greedy and replay) and reach where not.

    estimate=draft takes a token's draft probability for its chance to be accepted, as the paper
    does; estimate=learned maps it to what verdicts have shown (see `Calibration`), and is shared by
    all sequences except under rejection, where a seed must mean the same in any company.

    form=heap expands one node after another; the rows of the `ahead` best unexpanded nodes are
    computed together, which changes nothing but the number of forwards. form=threshold expands a
    level at a time, all slots of value above `threshold`, best first while there is room; left out,
    the threshold moves with what earlier rounds of the sequence drafted, so that they fill up.

    Paper: Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure"
    (2024). Promise: keeps that of the verifier.
    """

    name = "dyspec"
    paper = "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure"
    draws = frozenset({Draw.IID})
    summary = "grow greedily by estimated acceptance, node by node or by a threshold"

    def __init__(
        self,
        nodes: int = 16,
        depth: int = 8,
        form: str = "heap",
        threshold: float | None = None,
        admit: str = "auto",
        estimate: str = "learned",
        ahead: int = 4,
    ) -> None:
        at_least_one(self.name, nodes=nodes, depth=depth, ahead=ahead)
        for key, value, known in (
            ("form", form, ("heap", "threshold")),
            ("admit", admit, ("auto", "reach", "path")),
            ("estimate", estimate, ("learned", "draft")),
        ):
            if value not in known:
                raise InputError(f"tree=dyspec,{key}={value}: there are {', '.join(known)}.")
        if threshold is not None and (form != "threshold" or not 0 <= threshold <= 1):
            raise InputError("tree=dyspec,threshold=.. is a number in 0..1, for form=threshold.")
        self.nodes, self.depth, self.ahead, self.admit = nodes, depth, ahead, admit
        self.by_level, self.threshold = form == "threshold", threshold
        self.learns = estimate == "learned"
        self.shared: dict[Draw, Calibration] = {}
        if admit == "path":
            self.unsound = {d: BIASED for d in Draw if d.from_q}

    def bind(self, view: SeqView) -> OneSequence:
        if not self.learns:
            return OneSequence(self, None)
        if view.draw.from_q:
            return OneSequence(self, Calibration(sampled=True))
        return OneSequence(self, self.shared.setdefault(view.draw, Calibration(sampled=False)))

    def grow(self, view: SeqView, budget: Budget) -> GreedyGrower:
        return self.bind(view).grow(view, budget)


class OneSequence(Shape):
    """A DySpec tree for one sequence, and the calibration it uses (None: q is taken as it is)."""

    def __init__(self, shape: DySpec, calibration: Calibration | None) -> None:
        self.shape, self.calibration = shape, calibration
        self.depth, self.holds, self.draws = shape.depth, shape.holds, shape.draws
        self.last: GreedyGrower | None = None
        self.floor = 0.5 / shape.nodes if shape.threshold is None else shape.threshold

    def grow(self, view: SeqView, budget: Budget) -> GreedyGrower:
        shape = self.shape
        budget = shape.within(budget, shape.nodes)
        path = shape.admit == "path" or (shape.admit == "auto" and not view.draw.from_q)
        floor = self.floor if shape.by_level else None
        self.last = GreedyGrower(view, budget, path, floor, shape.ahead, self.calibration)
        return self.last

    def observe(self, tree: TokenTree, verdict: Verdict) -> None:
        last, self.last = self.last, None
        if last is not None and last.tokens and self.shape.threshold is None:
            self.floor = min(0.5, max(1e-4, self.floor * (0.85 if last.room > 0 else 1.1)))
        if self.calibration is not None and last is not None and last.made is tree:
            self.calibration.observe(tree, verdict, last.shares)
