"""Which layers to leave out: a search by tries, some of them chosen by a model of the others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

BAYES = 5  # every so many tries the model of past tries picks the candidate
PATIENCE = 60  # tries without a better set before the search ends
MOST = 64  # tries that are remembered
KAPPA = 2.5  # how much an uncertain set is preferred


@dataclass(slots=True)
class Search:
    """Looks for the best set of `skip` layers among `choices`, one try at a time."""

    choices: tuple[int, ...]
    skip: int
    random: random.Random
    best: tuple[int, ...] = ()
    score: float = -1.0  # of `best`; -1 = not tried yet
    tries: int = 0
    idle: int = 0  # tries since `best` was found
    tried: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # every second layer is where the paper starts; more only where `skip` says so
        first = sorted(self.choices, key=lambda i: (i % 2 == 0, i))[: self.skip]
        self.best = tuple(sorted(first))

    def done(self, enough: float) -> bool:
        return self.score >= enough or self.idle >= PATIENCE or self.skip == len(self.choices)

    def candidate(self) -> tuple[int, ...]:
        """The set to try next; the first try is the set that is in use."""
        if self.score < 0:
            return self.best
        if self.tries % BAYES or len(self.tried) < 3:
            return self._draw()
        pool = list({self._draw() for _ in range(32)})
        known = list(self.tried)
        points = [[[c in s for c in self.choices] for s in sets] for sets in (known, pool)]
        mean, spread = gaussian_process(
            np.array(points[0], float), np.array(list(self.tried.values())), np.array(points[1])
        )
        return pool[int((mean + KAPPA * spread).argmax())]

    def _draw(self) -> tuple[int, ...]:
        return tuple(sorted(self.random.sample(self.choices, self.skip)))

    def tell(self, layers: tuple[int, ...], score: float) -> None:
        self.tries += 1
        self.idle += 1
        if score > self.score:
            self.best, self.score, self.idle = layers, score, 0
        self.tried[layers] = score
        if len(self.tried) > MOST:
            del self.tried[next(iter(self.tried))]


def gaussian_process(
    known: np.ndarray, values: np.ndarray, asked: np.ndarray, noise: float = 1e-2
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation [m] at `asked` [m, d], given values [n] at `known`
    [n, d] (0 or 1 each): squared-exponential kernel, whose length is that of a quarter of the bits,
    values centred and scaled."""
    length = max(1.0, known.shape[1] / 4)
    centre, scale = values.mean(), values.std() or 1.0

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None, :] - b[None, :, :]) ** 2).sum(-1) / (2 * length))

    asked = np.asarray(asked, float)
    within = kernel(known, known) + noise * np.eye(len(known))
    across = kernel(asked, known)
    mean = across @ np.linalg.solve(within, (values - centre) / scale)
    left = 1.0 - (across * np.linalg.solve(within, across.T).T).sum(-1)
    return centre + scale * mean, scale * np.sqrt(np.maximum(left, 0.0))
