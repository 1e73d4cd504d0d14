"""What the rules for whole chains accept over several levels, by enumeration of all chains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from foretell.lab.verifiers.bound import longest_match, transport
from foretell.verify.block import block_chances
from foretell.verify.multipath import selection

Table = Callable[[tuple[int, ...]], Tensor]  # prefix -> distribution [V] float64


def token_level(p: Table, q: Table, vocab: int, depth: int) -> float:
    """Expected accepted tokens of `rejection` on one drafted chain."""
    return sum(
        chance * on_draft(torch.stack(rows), torch.stack(laws), chain)[0]
        for chain, chance, rows, laws in _chains(p, q, vocab, depth, 1)
    )


def block(p: Table, q: Table, vocab: int, depth: int, paths: int = 1) -> float:
    """Expected accepted tokens of `block`, or of `multipath` with several paths."""
    return sum(
        chance * on_draft(torch.stack(rows), torch.stack(laws), chain)[1]
        for chain, chance, rows, laws in _chains(p, q, vocab, depth, paths)
    )


def bound(p: Table, q: Table, vocab: int, depth: int, paths: int = 1) -> float:
    """The most expected accepted tokens of any rule that sees `paths` independent chains (and,
    unlike real rules, p everywhere), by linear programming."""
    chains = {c: chance for c, chance, _, _ in _chains(p, q, vocab, depth, 1)}
    texts: dict[tuple, float] = {}
    for text in itertools.product(range(vocab), repeat=depth):
        chance = float(np.prod([float(p(text[:i])[x]) for i, x in enumerate(text)]))
        if chance > 0:
            texts[text] = chance
    drafts: dict[tuple, float] = {}
    for chosen in itertools.combinations_with_replacement(sorted(chains), paths):
        orders = len(set(itertools.permutations(chosen)))
        drafts[chosen] = orders * float(np.prod([chains[c] for c in chosen]))
    return transport(drafts, texts, longest_match)


def on_draft(p: Tensor, q: Tensor, tokens: Sequence[int]) -> tuple[float, float]:
    """Tokens that `rejection` and `block` accept of ONE drafted chain, in expectation over their
    own draws; p [n or n + 1, V] and q [n, V] are the rows along it."""
    _, chances = block_chances(p, q, tokens)
    stands, by_token, by_block, fails = 1.0, 0.0, 0.0, 1.0
    for i, x in enumerate(tokens):
        stands *= min(1.0, float(p[i, x]) / max(float(q[i, x]), 1e-300))
        by_token += stands
    for chance in reversed(chances):
        fails *= 1 - chance
        by_block += 1 - fails
    return by_token, by_block


def _chains(p: Table, q: Table, vocab: int, depth: int, paths: int):
    """Every chain with the probability that it is the one verified, the target's rows along it
    (depth + 1) and the rows of its law (depth)."""
    for chain in itertools.product(range(vocab), repeat=depth):
        chance, better, mass = 1.0, 0.0, 1.0
        rows: list[Tensor] = []
        laws: list[Tensor] = []
        for i, x in enumerate(chain):
            here, drafted = p(chain[:i]), q(chain[:i])
            _, law, before = selection(here, drafted, paths, better, mass)
            rows.append(here)
            laws.append(law)
            chance *= float(law[x])
            better, mass = better + mass * float(before[x]), mass * float(drafted[x])
        if chance > 0:
            yield chain, chance, [*rows, p(chain)], laws


def expected(p: Table, q: Table, vocab: int, depth: int, paths: Sequence[int]) -> dict[str, float]:
    """All of it under one name each; `multipath 2` is two chains."""
    found = {
        "rejection": token_level(p, q, vocab, depth),
        "block": block(p, q, vocab, depth),
        "bound 1": bound(p, q, vocab, depth),
    }
    for k in paths:
        found[f"multipath {k}"] = block(p, q, vocab, depth, k)
        found[f"bound {k}"] = bound(p, q, vocab, depth, k)
    return found
