"""Random numbers: uniform, independent, keyed by (seed, position, purpose), the same for ever."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from foretell.core import rng
from foretell.core.rng import Purpose, SeqRng, fresh_seed, mix

PURPOSES = list(Purpose)


def test_seeds_mean_the_same_for_ever() -> None:
    """A failure here means that every seed anyone wrote down now gives another text."""
    rng = SeqRng(7)
    assert mix(1) == PINNED["mix"]
    assert rng.key(3, Purpose.TARGET) == PINNED["key"]
    assert rng.key(3, Purpose.DRAFT, salt=9) == PINNED["salted"]
    assert rng.uniform(5, Purpose.ACCEPT) == PINNED["uniform"]
    assert rng.uniform(5, Purpose.ACCEPT, 2) == PINNED["second"]
    assert rng.fork(0) == 7
    assert rng.fork(1) == PINNED["fork"]
    race = rng.race([0, 11], Purpose.TARGET, 4)
    torch.testing.assert_close(race, torch.tensor(PINNED["race"]), rtol=1e-6, atol=0)
    assert rng.pick(torch.ones(1000), 4) == PINNED["pick"]


PINNED: dict = {
    "mix": 6238072747940578789,
    "key": 6875110694074790513,
    "salted": 8921441803101625063,
    "uniform": 0.898455400516749,
    "second": 0.9779816757968754,
    "fork": 7257487685388012734,
    "race": [
        [1.7617899179458618, 1.5775254964828491, 0.0467684306204319, 1.3438606262207031],
        [0.0019748846534639597, 0.39693957567214966, 1.6837738752365112, 0.8174514770507812],
    ],
    "pick": 883,
}


def test_uniforms_are_uniform_and_never_0_or_1() -> None:
    u = np.array([SeqRng(1).uniform(t, Purpose.ACCEPT) for t in range(20_000)])
    assert 0 < u.min() < u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("vary", ["seed", "index", "salt"])
def test_uniforms_are_uniform_along_every_key(vary: str) -> None:
    u = []
    for i in range(5000):
        seed = i if vary == "seed" else 1
        more = {vary: i} if vary != "seed" else {}
        u.append(SeqRng(seed).uniform(3, Purpose.ACCEPT, **more))
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_race_is_exponential_in_rows_and_columns() -> None:
    e = SeqRng(3).race(range(300), Purpose.TARGET, 200)
    assert e.dtype == torch.float32
    assert torch.isfinite(e).all()
    assert (e > 0).all()
    assert stats.kstest(e.flatten().numpy(), "expon").pvalue > 1e-3
    rows = [stats.kstest(e[i].numpy(), "expon").pvalue for i in range(0, 300, 10)]
    columns = [stats.kstest(e[:, i].numpy(), "expon").pvalue for i in range(0, 200, 10)]
    assert stats.kstest(rows + columns, "uniform").pvalue > 1e-3


def test_race_winners_follow_the_weights() -> None:
    p = torch.tensor([0.5, 0.2, 0.0, 0.3])
    e = SeqRng(4).race(range(20_000), Purpose.TARGET, 4)
    winners = np.bincount((p / e).argmax(-1).numpy(), minlength=4)
    assert winners[2] == 0
    assert stats.chisquare(winners[[0, 1, 3]], [10_000, 4000, 6000]).pvalue > 1e-3


def test_the_two_largest_are_a_draw_without_replacement() -> None:
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    e = SeqRng(6).race(range(20_000), Purpose.DRAFT, 3, salt=1)
    first, second = (p / e).topk(2).indices.T.numpy()
    pairs = list(itertools.permutations(range(3), 2))
    counts = [int(((first == a) & (second == b)).sum()) for a, b in pairs]
    law = [float(p[a] * p[b] / (1 - p[a])) for a, b in pairs]
    assert stats.chisquare(counts, np.array(law) * 20_000).pvalue > 1e-3


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.corrcoef(a, b)[0, 1])) * len(a) ** 0.5  # ~ |N(0, 1)|


def test_positions_purposes_tokens_and_seeds_are_independent() -> None:
    def row(seed: int, position: int, purpose: Purpose, salt: int = 0) -> np.ndarray:
        return SeqRng(seed).race([position], purpose, 5000, salt=salt)[0].numpy()

    base = row(1, 10, Purpose.TARGET)
    others = [row(1, 11, Purpose.TARGET), row(2, 10, Purpose.TARGET), row(1, 10, Purpose.TARGET, 1)]
    others += [row(1, 10, p) for p in PURPOSES if p is not Purpose.TARGET]
    others += [row(0, 12, Purpose.TARGET), np.roll(base, 1), np.roll(base, 7)]
    assert max(correlation(base, o) for o in others) < 4
    u = np.array([SeqRng(1).uniform(t, Purpose.ACCEPT) for t in range(5001)])
    assert correlation(u[1:], u[:-1]) < 4


def test_race_at_is_the_generators_own_noise() -> None:
    rng = SeqRng(77)
    ids = np.array([[0, 5, 99], [3, 3, 1]])
    for salts in ([0, 0], [7, 123456789]):
        got = rng.race_at([4, 9], Purpose.DRAFT, ids, salts)
        for i, t in enumerate((4, 9)):
            row = rng.race([t], Purpose.DRAFT, 100, salt=salts[i])[0]
            assert (got[i] == row[ids[i].tolist()].numpy()).all()


def rows_to_pick_from(vocab: int) -> dict[str, torch.Tensor]:
    x = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    rows = {f"spread {s}": (x * s).softmax(-1) for s in (0.0, 0.3, 1.0, 4.0, 20.0)}
    rows["few"] = torch.zeros(vocab)
    rows["few"][:: max(1, vocab // 3)] = 0.25
    rows["one"] = torch.nn.functional.one_hot(torch.tensor(vocab - 1), vocab).float()
    rows["tiny"] = rows["spread 1.0"] * 1e-30
    return rows


@pytest.mark.parametrize("vocab", [1, 3, 1000, 32000])
def test_pick_is_the_argmax_over_the_row_of_noise(vocab: int) -> None:
    for name, p in rows_to_pick_from(vocab).items():
        for t in range(60):
            for purpose in (Purpose.RESIDUAL, Purpose.TARGET):
                noise = SeqRng(t).race([7], purpose, vocab)[0]
                want = int((p / noise).argmax())
                assert SeqRng(t).pick(p, 7, purpose) == want, (name, t)
                assert SeqRng(t).pick(p.double(), 7, purpose) == int((p.double() / noise).argmax())
                known = SeqRng(t)
                known.race([7, 8], purpose, vocab)
                assert known.pick(p, 7, purpose) == want


def test_pick_of_what_is_no_distribution() -> None:
    p = torch.rand(500)
    p[[40, 300]] = float("nan")
    assert SeqRng(1).pick(p, 0) == 40  # as torch: the first NaN is largest
    assert SeqRng(1).pick(torch.zeros(500), 0) == 0


def test_pick_looks_closer_where_bounds_cannot_tell() -> None:
    """Two tokens within rounding of each other: the first of the bounds is not the best score."""
    said, wanted = [], []
    for t in range(400):
        noise = SeqRng(t).race([0], Purpose.RESIDUAL, 50)[0]
        p = noise.clone() * (1 + 1e-7 * torch.rand(50))  # all scores are 1, or next to it
        said.append(SeqRng(t).pick(p, 0))
        wanted.append(int((p / noise).argmax()))
    assert said == wanted


def test_keys_do_not_collide() -> None:
    keys = {
        SeqRng(seed).key(position, purpose, salt)
        for seed in range(8)
        for position in range(200)
        for purpose in PURPOSES
        for salt in range(4)
    }
    assert len(keys) == 8 * 200 * len(PURPOSES) * 4


@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 100, 1003, 32000])
def test_rows_are_the_same_alone_and_together(vocab: int) -> None:
    """Bit for bit: that is what makes replay exact."""
    positions = [5, 6, 7, 8, 40]
    for purpose, salt in ((Purpose.TARGET, 0), (Purpose.DRAFT, 3)):
        together = SeqRng(9).race(positions, purpose, vocab, salt=salt)
        for row, t in zip(together, positions, strict=True):
            alone = SeqRng(9).race([t], purpose, vocab, salt=salt)[0]
            assert torch.equal(row, alone)


@pytest.mark.parametrize("sizes", [(10, 100), (7, 8), (1000, 1003)])
def test_a_larger_vocabulary_only_adds_columns(sizes: tuple[int, int]) -> None:
    small, large = (SeqRng(2).race([3, 4], Purpose.TARGET, v) for v in sizes)
    assert torch.equal(small, large[:, : sizes[0]])


def test_remembered_rows_equal_fresh_ones() -> None:
    """The rows of the last positions are kept: asking again, in any mix, changes nothing."""
    rng = SeqRng(5)
    for start in range(0, 300, 3):
        positions = [start + 1, start, start + 2, max(0, start - 5)]
        got = rng.race(positions, Purpose.TARGET, 20)
        assert torch.equal(got, SeqRng(5).race(positions, Purpose.TARGET, 20))
        assert torch.equal(got, rng.race(positions, Purpose.TARGET, 20))


def test_flip_accepts_with_the_ratio() -> None:
    rng = SeqRng(8)
    for p, w in ((0.3, 1.0), (0.2, 0.5), (0.0, 0.5), (0.6, 0.5), (0.5, 0.5)):
        n = 4000
        hits = sum(rng.flip(p, w, t, 0) for t in range(n))
        want = min(1.0, p / w)
        assert stats.binomtest(hits, n, want).pvalue > 1e-3
    assert not rng.flip(0.0, 0.0, 1, 1), "a draft of probability zero under both is refused"


def test_forks_are_valid_and_different_seeds() -> None:
    seeds = [SeqRng(3).fork(i) for i in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= s < 1 << 63 for s in seeds)
    assert [SeqRng(3).fork(i) for i in range(100)] == seeds


def test_fresh_seeds_differ() -> None:
    assert len({fresh_seed() for _ in range(50)}) == 50
    assert all(0 <= fresh_seed() < 1 << 63 for _ in range(50))


def test_huge_seeds_and_positions() -> None:
    for seed in (0, (1 << 63) - 1, 1 << 64, 10**30):
        e = SeqRng(seed).race([0, 10**6], Purpose.TARGET, 9)
        assert torch.isfinite(e).all()


def test_the_host_and_the_device_way_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [0, 1, (1 << 64) - 1, 12345678901234567890]
    host = rng._race_on_host(keys, 5000)
    monkeypatch.setattr(rng, "_race_on_host", lambda *a: pytest.fail("this is the device's way"))
    device = rng._race(keys, 5000, "cpu:0")
    assert (host == device.numpy()).all()
