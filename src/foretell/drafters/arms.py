"""Arms of a bandit that plays for tokens per second: what each earned, and which to play next."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field

LATE = 3  # pulls that are enough to contradict a mean
# what counts as a contradiction: late pulls, pulls the mean must rest on, how far off at least (in
# logarithms), and in how many standard deviations
SURPRISES = ((LATE, 2 * LATE, 0.15, 3.0), (1, 2, 0.7, 5.0))
FADE = 0.97  # of what is known of a resting arm, what is left after every pull of others
REST = 12  # pulls an arm is left alone before it is looked at again
START = 5.0  # pulls of the leader's that exploring may cost before it has earned anything
RATE = 0.3  # EXP3: how fast weights grow


@dataclass(slots=True)
class Arm:
    """What one drafter earned in one class of requests, discounted."""

    tokens: float = 0.0
    seconds: float = 0.0
    pulls: float = 0.0
    squares: float = (
        0.0  # of the deviations of the logarithm of a pull's rate from that of the mean
    )
    rested: int = 0  # pulls of others since it was last played
    weight: float = 0.0  # EXP3: log
    last: list[tuple[int, float]] = field(default_factory=list)  # tokens, seconds of late pulls

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def spread(self) -> float:
        """Of the logarithm of a pull's rate; a half until something else is known."""
        return math.sqrt((1.0 + self.squares) / (4.0 + self.pulls))

    def forget(self, pulls: float) -> None:
        """Keep the mean, but be no surer of it than after so many pulls."""
        scale = min(1.0, pulls / self.pulls) if self.pulls else 1.0
        self.pulls, self.tokens = self.pulls * scale, self.tokens * scale
        self.seconds *= scale

    def add(self, tokens: int, seconds: float, discount: float) -> bool:
        """One pull; true if the late ones say that something has changed: the past is forgotten."""
        self.last = [*self.last[-(LATE - 1) :], (tokens, seconds)]
        for n, known, least, widths in SURPRISES:
            if self.pulls < known:
                continue
            late_tokens, late_seconds = (sum(x) for x in zip(*self.last[-n:], strict=True))
            off = abs(math.log(late_tokens / late_seconds / self.rate))
            if off > max(least, widths * self.spread / math.sqrt(n)):
                self.tokens, self.seconds, self.pulls = late_tokens, late_seconds, float(n)
                return True
        if self.pulls:
            off = math.log(tokens / seconds / self.rate)
            self.squares = discount * self.squares + off * off
        self.tokens = discount * self.tokens + tokens
        self.seconds = discount * self.seconds + seconds
        self.pulls = discount * self.pulls + 1
        return False


@dataclass(slots=True)
class Arms:
    """The arms of one class of requests: a bandit for tokens per second.

    ucb: the leader is the arm of the highest mean rate. Others are played while they might be
    better (rate plus a width that shrinks with the square root of their pulls), and now and then
    to see whether they still are worse. What that costs against the leader is paid from a credit,
    which starts at `START` pulls and grows by `share` of the time played: exploring never takes
    more than that, however bad the arms are, and the worse an arm, the rarer it is looked at.
    Where the late pulls of an arm contradict its mean the past is forgotten, and that of the
    others counts for little.

    exp3: weights for the adversarial case, drawn in proportion.
    """

    count: int
    rule: str = "ucb"
    width: float = 0.8
    discount: float = 0.93
    share: float = 0.015
    margin: float = 0.03
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    arms: list[Arm] = field(init=False)
    leader: int = 0
    credit: float = 0.0  # in pulls of the leader
    playing: int = 0
    met: bool = False  # whether each has been played

    def __post_init__(self) -> None:
        self.arms = [Arm() for _ in range(self.count)]
        self.credit = START

    @property
    def pulls(self) -> float:
        """What is known, of all arms together."""
        return sum(a.pulls for a in self.arms)

    def heir(self) -> Arms:
        """A bandit for other requests, which takes this one's means for a first guess."""
        new = copy.deepcopy(self)
        for arm in new.arms:
            arm.forget(LATE)
            arm.last, arm.weight, arm.rested = [], 0.0, 0
        new.credit = START if new.met else new.credit
        return new

    def choose(self) -> int:
        fresh = [i for i, a in enumerate(self.arms) if a.pulls == 0]
        if not fresh and not self.met:  # now it is known what it cost to look at each
            self.met, top = True, max(a.rate for a in self.arms)
            self.credit = START - sum(top / a.rate - 1 for a in self.arms)
        if fresh:
            self.playing = fresh[0]
        elif self.rule == "exp3":
            self.playing = self.dice.choices(range(self.count), self._shares())[0]
        else:
            self.playing = self._optimist()
        chosen = self.arms[self.playing]  # what was known of it is as old as its rest is long
        chosen.forget(max(1.0, chosen.pulls * FADE**chosen.rested))
        for i, a in enumerate(self.arms):
            a.rested = 0 if i == self.playing else a.rested + 1
        return self.playing

    def _optimist(self) -> int:
        arms = self.arms
        best = max(range(self.count), key=lambda i: arms[i].rate)
        if arms[best].rate > (1 + self.margin) * arms[self.leader].rate:
            self.leader = best  # a tie is not worth switching for
        top, others = arms[self.leader].rate, [i for i in range(self.count) if i != self.leader]
        cost = [max(0.0, top / a.rate - 1.0) for a in arms]  # of a pull, in pulls of the leader
        hopes = [a.rate * (1 + self.width * a.spread / math.sqrt(a.pulls)) for a in arms]
        hope = max(others, key=lambda i: hopes[i])
        if hopes[hope] > top and self.credit >= cost[hope]:
            return hope
        stale = max(others, key=lambda i: arms[i].rested / (0.1 + cost[i]))
        if arms[stale].rested >= REST and self.credit >= min(cost[stale], START):
            return stale
        return self.leader

    def _shares(self) -> list[float]:
        top = max(a.weight for a in self.arms)
        powers = [math.exp(a.weight - top) for a in self.arms]
        total, mix = sum(powers), 0.05
        return [(1 - mix) * p / total + mix / self.count for p in powers]

    def reward(self, arm: int, tokens: int, seconds: float) -> None:
        """A pull of `arm` emitted `tokens` in `seconds`."""
        if seconds <= 0 or tokens <= 0:
            return
        if self.rule == "exp3":
            share = self._shares()[arm]
            top = max([tokens / seconds, *(x.rate for x in self.arms)])
            self.arms[arm].weight += RATE * tokens / seconds / top / share / self.count
        self._pay(arm, tokens, seconds)
        if self.arms[arm].add(tokens, seconds, self.discount):
            for i, a in enumerate(self.arms):  # who was worse may be better now
                a.forget(LATE)
                a.rested += 0 if i == arm else 10 * REST
            self.credit = START

    def _pay(self, arm: int, tokens: int, seconds: float) -> None:
        """What a pull cost against the leader, in pulls of the leader."""
        lead = self.arms[self.leader]
        if not self.met:
            return
        alone = lead.seconds / lead.pulls
        lost = (seconds - tokens / lead.rate) / alone if arm != self.leader else 0.0
        self.credit = min(START, self.credit + self.share * seconds / alone - lost)
