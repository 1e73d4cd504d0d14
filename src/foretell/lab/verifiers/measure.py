"""What rules accept on real models: tokens a step, and the bound from the models' own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.params import SamplingParams
from foretell.core.protocols import Draws, Needs, TargetRows, Verifier
from foretell.core.tree import TokenTree
from foretell.engine.llm import LLM
from foretell.lab.verifiers.chain import on_draft
from foretell.lab.verifiers.problems import Pair
from foretell.verify.block import p_rows, q_rows

Advance = Callable[[int], None]


class Watched:
    """A rule that counts its verdicts and keeps some of the rows that it saw at the tip."""

    def __init__(self, rule: Verifier, keep: int = 0, every: int = 1) -> None:
        self.rule, self.keep, self.every = rule, keep, every
        self.steps = self.accepted = self.first = 0
        self.pairs: list[Pair] = []
        self.equal: list[tuple[float, float]] = []
        self.name, self.promise, self.paper = rule.name, rule.promise, rule.paper
        self.accepts, self.draw = rule.accepts, rule.draw
        self.needs = getattr(rule, "needs", Needs())
        self.extend = getattr(rule, "extend", None)

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        verdict = self.rule(tree, p, rng, position)
        self._equal_drafts(tree, p)
        children = tree.children(tree.tip)
        if children:
            self.steps += 1
            self.accepted += verdict.accepted
            self.first += verdict.accepted > 0
            row = -1 if tree.qrow is None else int(tree.qrow[children[0]])
            if row >= 0 and len(self.pairs) < self.keep and self.steps % self.every == 0:
                assert tree.q is not None
                rows = p.probs([tree.tip])[0], tree.q[row]
                p_row, q_row = (r.double().cpu().numpy() for r in rows)
                self.pairs.append((p_row / p_row.sum(), q_row / q_row.sum()))
        return verdict

    def _equal_drafts(self, tree: TokenTree, p: TargetRows) -> None:
        """What `rejection` and `block` would accept of this very chain."""
        nodes = [tree.tip]
        while len(children := tree.children(nodes[-1])) == 1:
            nodes.append(children[0])
        if not self.keep or children or len(nodes) == 1:
            return
        nodes, rows = p_rows(tree, nodes, p)
        tokens = tree.tokens[nodes[1:]].tolist()
        self.equal.append(on_draft(rows, q_rows(tree, nodes, rows), tokens))


@dataclass(slots=True)
class Measured:
    """One rule with one way of drafting."""

    verify: str
    draft: str
    tokens: int = 0
    steps: int = 0  # target forwards of each sequence, the prefill left out
    drafted: int = 0
    first: float = 0.0  # share of drafts whose first token was accepted
    pairs: list[Pair] = field(default_factory=list)
    equal: list[tuple[float, float]] = field(default_factory=list)
    """For every drafted chain what `rejection` and `block` accept of it, in expectation."""
    by_prompt: list[tuple[int, int]] = field(default_factory=list)  # tokens, steps

    @property
    def error(self) -> float:
        """Standard error of `per_step`, prompts being independent (a ratio estimate)."""
        n = len(self.by_prompt)
        if n < 2:
            return float("nan")
        off = [tokens - self.per_step * steps for tokens, steps in self.by_prompt]
        return float(np.std(off, ddof=1) / np.sqrt(n) / (self.steps / n))

    @property
    def per_step(self) -> float:
        return self.tokens / max(1, self.steps)

    @property
    def on_equal_drafts(self) -> dict[str, float]:
        """Mean accepted tokens of `rejection` and `block` on the same drafts."""
        if not self.equal:
            return {}
        by_token, by_block = np.array(self.equal).T
        gain = by_block - by_token
        return {
            "drafts": len(gain),
            "rejection": float(by_token.mean()),
            "block": float(by_block.mean()),
            "difference": float(gain.mean()),
            "standard_error": float(gain.std() / np.sqrt(len(gain))),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "verify": self.verify,
            "draft": self.draft,
            "tokens": self.tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "tokens_per_step": self.per_step,
            "standard_error": self.error,
            "first_accepted": self.first,
            "on_equal_drafts": self.on_equal_drafts,
        }


def measure(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    verify: str,
    draft: str,
    nodes: int = 16,
    keep: int = 0,
    advance: Advance = lambda n: None,
) -> Measured:
    """Decode all prompts under one rule, with seeds 0, 1, ... by prompt, drafting at most `nodes`
    tokens a step; keep the rows of `keep` steps."""
    rule = registry.create("verifier", verify, llm.context)
    watched = Watched(rule, keep, every=7)
    rule_: Any = watched  # its attributes are those of the rule it wraps
    engine = llm.with_methods(draft, rule_, policy=f"fixed:nodes={nodes}", allow_lossy=True)
    result = Measured(verify, draft)
    for i, prompt in enumerate(prompts):
        sample = engine.generate([list(prompt)], replace(params, seed=i))[0].samples[0]
        result.by_prompt.append((len(sample.token_ids), sample.stats.steps))
        result.drafted += sample.stats.drafted
        advance(1)
    result.tokens, result.steps = (sum(x) for x in zip(*result.by_prompt, strict=True))
    if not watched.steps:
        raise InputError(f"'{draft}' drafted nothing for these prompts: nothing to measure.")
    result.first = watched.first / watched.steps
    result.pairs, result.equal = watched.pairs, watched.equal
    return result


def line_up(drafter: str, nodes: int) -> list[tuple[str, str, str, int]]:
    """(label, rule, draft spec, nodes a step): chains, and trees of as many nodes or levels."""

    def run(rule: str, levels: int, width: int, most: int) -> tuple[str, str, str, int]:
        spec = f"{drafter}{',' if ':' in drafter else ':'}tokens={levels},branching={width}"
        if rule in ("multipath", "spectr"):
            shape = f"{width} chains of {levels}"
        else:
            shape = f"chain of {levels}" if width == 1 else f"{width} children, {most} nodes"
        return f"{rule}, {shape}", rule, spec, most

    half, third = max(1, nodes // 2), max(1, nodes // 3)
    runs = [run(rule, nodes, 1, nodes) for rule in ("rejection", "block")]
    for rule in ("multipath", "spectr"):
        for levels, width in ((half, 2), (third, 3), (nodes, 2), (nodes, 3)):
            runs.append(run(rule, levels, width, levels * width))
    for rule in ("rejection", "specinfer", "greedy-draft"):
        runs.append(run(rule, half, 2, 2 * half))
    return list(dict.fromkeys(runs))
