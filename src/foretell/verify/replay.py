"""Replay verification: sampled decoding whose output does not depend on what was drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foretell.core.feedback import Verdict
from foretell.core.protocols import BuildContext, Draw, Draws, Promise, TargetRows
from foretell.core.rng import Purpose
from foretell.core.rows import argmax_rows
from foretell.core.tree import TokenTree
from foretell.verify.walk import Ask, answers, follow

Race = Callable[..., int]  # `core.protocols.Races.race`


class Replay:
    """The token at absolute position t is ``argmax(p / E(seed, t))``, with exponential noise E that
    is keyed by seed and position alone (the Gumbel trick: ``argmax(log p + Gumbel)``). A drafted
    token is accepted iff it equals that token, so the output is, token for token, that of plain
    sampled decoding with the same seed. Drafters that know their q use the same noise to agree
    more often (Draw.NOISE). Cost: one noise row per token that is emitted; per depth of the tree
    where rows lie on a device and all of them are asked for at once.

    Paper: the sample-and-match rule of Leviathan, Kalman, Matias, "Fast Inference from
    Transformers via Speculative Decoding" (2023), under common random numbers. Promise: exact.
    """

    name = "replay"
    promise = Promise.EXACT
    paper = "Fast Inference from Transformers via Speculative Decoding"
    summary = "accept what equals the token that (seed, position) would draw anyway"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.NOISE

    def __init__(self, model: object = None) -> None:
        """model: the target, for a quicker way to the same tokens where it has one (`Races`)."""
        self.race: Race | None = getattr(model, "race", None)

    @classmethod
    def build(cls, context: BuildContext) -> Replay:
        return cls(context.target)

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        return follow(tree, answers(tree, p, replayed(tree, p, rng, position, self.race)))


def replayed(
    tree: TokenTree, p: TargetRows, rng: Draws, position: int, race: Race | None = None
) -> Ask:
    """Asks for the tokens that the noise picks after nodes."""

    def ask(nodes: Sequence[int]) -> list[int]:
        levels = [tree.level(n) for n in nodes]
        if len(nodes) == 1:
            return [one(nodes[0], position + levels[0])]
        probs = p.probs(nodes)
        depth = max(levels) + 1
        positions = range(position, position + depth)
        noise = rng.race(positions, Purpose.TARGET, probs.shape[-1], probs.device)
        if levels != list(range(depth)):  # a tree: siblings share their position's noise
            noise = noise[levels]
        return argmax_rows(probs / noise)

    def one(node: int, here: int) -> int:
        if race is not None and (raw := p.raw(node)) is not None:
            token = race(*raw, rng.key(here, Purpose.TARGET))
            if token >= 0:
                return token
        return rng.pick(p.probs([node])[0], here, Purpose.TARGET)

    return ask
