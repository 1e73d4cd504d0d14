"""Random pairs of distributions, and what every rule accepts on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from foretell.core.errors import InputError
from foretell.lab.verifiers import chain, level

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """Target logits are normal with standard deviation `scale`; the drafter's are as wide and
    correlate with them by `agreement`. Temperature divides both."""

    vocab: int = 50
    counts: Sequence[int] = (1, 2, 4)  # k, children of the node
    temperatures: Sequence[float] = (0.6, 1.0, 1.5)
    pairs: int = 20
    scale: float = 3.0
    agreement: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, rule: str) -> None:
            if not ok:
                raise InputError(rule)

        need(self.vocab >= 2, f"A vocabulary of {self.vocab} tokens leaves no choice: at least 2.")
        ks = list(self.counts)
        need(bool(ks) and all(1 <= k <= self.vocab for k in ks), "k lies in 1..vocab.")
        need(
            bool(self.temperatures) and all(t > 0 for t in self.temperatures),
            "Temperatures are positive: at 0 every rule is the greedy walk.",
        )
        need(self.pairs >= 1, "At least one pair of distributions is needed.")
        need(self.scale >= 0 and -1 <= self.agreement <= 1, "scale >= 0 and agreement in -1..1.")


@dataclass(slots=True)
class Row:
    """The mean acceptance of one rule."""

    temperature: float
    k: int
    rule: str
    drawn: str  # how its children are drawn
    accepted: float
    bound: float  # the most that any rule accepts with children drawn so
    best: float  # the highest bound of all ways of drawing k children

    @property
    def share(self) -> float:
        return self.accepted / self.bound if self.bound > 0 else 1.0

    @property
    def share_of_best(self) -> float:
        return self.accepted / self.best if self.best > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "share_of_best": self.share_of_best}


Pair = tuple[np.ndarray, np.ndarray]


def random_pair(s: Settings, random: np.random.Generator, temperature: float) -> Pair:
    """(p, q), each [V] float64."""
    target, other = s.scale * random.standard_normal((2, s.vocab))
    draft = s.agreement * target + np.sqrt(1 - s.agreement**2) * other
    return _softmax(target / temperature), _softmax(draft / temperature)


def levels(s: Settings, advance: Advance = lambda n: None) -> list[Row]:
    """One level, every temperature, k and rule; the same random logits at every temperature."""
    rows = []
    for temperature in s.temperatures:
        random = np.random.default_rng(s.seed)
        pairs = [random_pair(s, random, temperature) for _ in range(s.pairs)]
        for k in s.counts:
            rows += compare(pairs, k, temperature)
            advance(1)
    return rows


def compare(pairs: Iterable[Pair], k: int, temperature: float) -> list[Row]:
    """The mean over pairs of what each rule and each bound say, for k children."""
    pairs = list(pairs)
    bounds = {
        drawn: float(np.mean([f(p, q, k) for p, q in pairs])) for drawn, f in level.BOUNDS.items()
    }
    return [
        Row(
            temperature,
            k,
            rule,
            drawn,
            float(np.mean([accept(p, q, k) for p, q in pairs])),
            bounds[drawn],
            max(bounds.values()),
        )
        for rule, (accept, drawn) in level.RULES.items()
    ]


def depths(
    s: Settings, depth: int, vocab: int, paths: Sequence[int], advance: Advance = lambda n: None
) -> list[dict[str, Any]]:
    """Expected accepted tokens over `depth` levels of rules for chains, for a vocabulary so small
    that every chain can be followed."""
    import torch

    small = Settings(vocab, (1,), s.temperatures, s.pairs, s.scale, s.agreement, s.seed)
    results = []
    for temperature in s.temperatures:
        sums: dict[str, float] = {}
        for i in range(s.pairs):
            made: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

            def rows(u: tuple[int, ...], which: int, i=i, made=made, t=temperature):
                if u not in made:
                    random = np.random.default_rng([s.seed, i, len(u), *u])
                    p, q = random_pair(small, random, t)
                    made[u] = torch.from_numpy(p), torch.from_numpy(q)
                return made[u][which]

            def p(u: tuple[int, ...], rows=rows) -> torch.Tensor:
                return rows(u, 0)

            def q(u: tuple[int, ...], rows=rows) -> torch.Tensor:
                return rows(u, 1)

            found = chain.expected(p, q, vocab, depth, paths)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value / s.pairs
            advance(1)
        results.append({"temperature": temperature, "depth": depth, "vocab": vocab, **sums})
    return results


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
