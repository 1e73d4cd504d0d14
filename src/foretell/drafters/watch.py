"""Choosing among drafters by what each would have got: bursts of looks instead of pulls."""

from __future__ import annotations

from dataclasses import dataclass, field

from foretell.drafters.bursts import Burst

EVEN = 8  # bursts begin in one of so many steps, wherever in a text it is
APART = 0.618  # multiples of it, modulo 1, are spread evenly: they say in which
PROOF = 3  # bursts before the first drafter is left
SHARE = 0.02  # of the time decoded, what looking may take
EAGER = 6  # bursts of the first class for which it may take twice that
CALM = 8  # bursts with the same leader after which it may take half of that
RAREST = 0.2  # of `SHARE`, what it may take in any case
MEMORY = 16.0  # bursts that count; older ones fade
MARGIN = 0.02  # by how much another has to be better
SURE = 0.7  # and by how many standard errors of that
SKEW = 0.4  # of a burst's time, what one of a kind not seen yet may save
SLOW = 0.1  # weight of the last step in what a drafter's steps take beyond the model of them
FORGET = 0.1  # of what was found out so about a drafter that plays no more, at every burst
FRESH = 3  # steps that count of such a drafter when it plays again


@dataclass(slots=True)
class Purse:
    """Seconds that looking may take, in all classes of requests together."""

    credit: float = 0.0


@dataclass(slots=True)
class Watch:
    """What each of `count` drafters would have got in one class of requests.

    In a burst (`Burst`) all drafters walk over the same text, each in steps of its own: it drafts
    where its last step ended, and the text that came says how far that step went. So they are
    compared on the same text, whoever decoded it, and no step is spent on a drafter to get to know
    it. What a step takes is modelled (its drafting, measured, and the forward by the cost model);
    how far that is off is learnt of every drafter when it plays.

    Bursts are paid from `SHARE` of the time, the first from twice that, and from less while they
    show nothing new. In simulation (tests/unit/test_watch.py) up to 4 % is lost over 600 steps
    against the best of four drafters, most of it before the first bursts are judged.
    """

    count: int
    tokens: float = 0.0  # of the texts of bursts, fading
    seconds: list[float] = field(init=False)  # that each takes for them
    spread: list[list[float]] = field(init=False)  # squares of the seconds i saves against j
    off: list[float] = field(init=False)  # measured over modelled seconds of its steps
    steps: list[int] = field(init=False)  # that it played, as far as they count
    ticks: int = 0  # steps
    bursts: int = 0
    judged: int = 0
    calm: int = 0  # bursts since another drafter took the lead
    leader: int = 0  # who plays
    purse: Purse = field(default_factory=Purse)

    def __post_init__(self) -> None:
        self.seconds = [0.0] * self.count
        self.spread = [[0.0] * self.count for _ in range(self.count)]
        self.off, self.steps = [1.0] * self.count, [0] * self.count

    def heir(self) -> Watch:
        """For another class: what is known here is the first guess there, to be looked over."""
        new = Watch(self.count, bursts=EAGER, purse=self.purse)
        new.judged = min(self.judged, PROOF // 2)
        weight = new.judged / max(1, self.judged)
        new.tokens, new.seconds = weight * self.tokens, [weight * s for s in self.seconds]
        new.spread = [[weight * s for s in row] for row in self.spread]
        new.off, new.leader = list(self.off), self.leader
        return new

    def due(self) -> bool:
        """Whether a burst is to begin with this step. They are spread over texts, since in the
        beginning of a text there is less to copy."""
        self.ticks += 1
        return self.purse.credit > 0 and APART * self.ticks % 1 < 1 / EVEN

    def rate(self, i: int) -> float:
        """Tokens per second that are expected of a drafter."""
        return self.tokens / self.takes(i) if self.tokens else 0.0

    def takes(self, i: int) -> float:
        """Seconds that a drafter would have taken for the texts of the bursts."""
        return self.seconds[i] * self.off[i]

    def choose(self) -> None:
        """The leader stays until another is better beyond doubt: it would have saved more than a
        few percent, and more than bursts that agree on nothing show by accident."""
        if self.judged < PROOF:
            return
        best, lead = min(range(self.count), key=self.takes), self.leader
        saved = self.takes(lead) - self.takes(best)
        if saved > MARGIN * self.takes(best) + SURE * self.spread[best][lead] ** 0.5:
            self.leader, self.calm = best, 0

    def begin(self, player: int, at: int) -> Burst:
        self.bursts += 1
        return Burst.begin(player, self.count, at)

    def looked(self, seconds: float) -> None:
        """The walks took so long."""
        self.purse.credit -= seconds

    def saw(self, burst: Burst) -> None:
        """A burst that is judged."""
        self.judged += 1
        self.calm += 1
        keep, spent = 1 - 1 / MEMORY, burst.seconds()
        # Copies come in rare long runs: what was not among the first bursts may come yet.
        unseen = (SKEW * max(spent)) ** 2 if not self.tokens else 0.0
        self.tokens = keep * self.tokens + burst.end - burst.start
        for i, seconds in enumerate(spent):
            self.seconds[i] = keep * self.seconds[i] + seconds
            for j, other in enumerate(spent):
                gap = seconds * self.off[i] - other * self.off[j]
                self.spread[i][j] = keep * self.spread[i][j] + gap * gap + unseen
            if i != self.leader:  # what was measured once may have been an accident
                self.off[i] += FORGET * (1.0 - self.off[i])
                self.steps[i] = min(self.steps[i], FRESH)
        self.choose()

    def earned(self, seconds: float) -> None:
        """A step took so long: part of it may be spent on looking."""
        share = 2.0 if self.bursts < EAGER else max(RAREST, CALM / (CALM + self.calm))
        self.purse.credit = min(self.purse.credit + share * SHARE * seconds, seconds)

    def took(self, arm: int, modelled: float, seconds: float) -> None:
        """A step of `arm` took so long."""
        self.steps[arm] += 1
        new = min(2.0, max(0.5, seconds / modelled))
        self.off[arm] += max(SLOW, 1 / (self.steps[arm] + 1)) * (new - self.off[arm])
        self.choose()
