"""Chains that a model grows alone, against forward by forward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from foretell import LLM, SamplingParams, kernels
from foretell.core.batch import PackedBatch
from foretell.core.errors import InputError
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rng import Purpose, SeqRng
from foretell.core.rows import peak
from foretell.core.stop import PathStop
from foretell.drafters.draft_model import DraftModel
from foretell.drafters.trees.chain import ChainGrower
from foretell.drafters.trees.drive import chain_segment
from foretell.kernels import build
from foretell.models.native.arch import Arch
from foretell.models.native.fused import FusedModel
from foretell.models.quant.formats import FORMATS
from helpers_bitexact import NAMES, random_arch

pytestmark = pytest.mark.skipif(kernels.load() is None, reason=str(kernels.why_not()))
KINDS = (torch.float32, torch.bfloat16, FORMATS["int8"], FORMATS["int4"])


def prefilled(model: Any, r: random.Random, lengths: list[int]) -> list[Any]:
    caches = [model.new_cache() for _ in lengths]
    for cache, n in zip(caches, lengths, strict=True):
        ids = [r.randrange(model.spec.vocab) for _ in range(n)]
        if ids:
            feed(model, cache, ids)
    return caches


def feed(model: Any, cache: Any, ids: list[int]) -> torch.Tensor:
    with model.open([cache]) as txn:
        logits = model.forward(PackedBatch([chain_segment(ids, cache.n)]), txn).logits
        txn.commit([range(len(ids))])
    return logits


def one_by_one(
    model: Any, cache: Any, ids: list[int], levels: int, ends: Any, draw: Any
) -> tuple[list[int], list[float]]:
    """The chain behind `ids`, a forward a token, in float64; the cache is left as it was."""
    n, tokens, scores = cache.n, [], []
    for level in range(levels):
        row = feed(model, cache, ids)[0]
        temperature = draw[0] if draw else 0.0
        p = (row.double() / (temperature or 1.0)).softmax(-1)
        token = int(row.argmax())
        if temperature:
            token = model.race(row, temperature, draw[1][level])
            assert token >= 0
        tokens.append(token)
        scores.append(float(p[token]))
        ids = [token]
        if ends is not None and level + 1 < levels and ends(scores[-1]):
            break
    cache.truncate(n)
    return tokens, scores


@pytest.mark.parametrize("seed", range(16))
def test_they_are_what_forwards_say(seed: int) -> None:
    """Any architecture, format, batch, feed and depth; the committed rows are those of forwards,
    too, to the last bit."""
    r = random.Random(seed)
    model = FusedModel.random(random_arch(r), KINDS[seed % 4], seed, NAMES, 3.0)
    if model._varies:
        assert model.chains(PackedBatch([]), model.open([]), [1]) is None
        return
    model.set_threads(1 + seed % 2)
    vocab, count = model.spec.vocab, r.randint(1, 4)
    caches = prefilled(model, r, [r.randint(0, 70) for _ in range(count)])
    feeds = [[r.randrange(vocab) for _ in range(r.randint(1, 4))] for _ in range(count)]
    levels = [r.randint(1, 6) for _ in range(count)]
    asked, noisy = seed % 3 > 0, seed % 4 > 1
    draws = [
        (r.choice([0.0, 0.7, 1.3]), [SeqRng(b).key(i, Purpose.TARGET) for i in range(levels[b])])
        for b in range(count)
    ]
    heard: list[tuple[int, float]] = []

    def ends(b: int, score: float) -> bool:
        heard.append((b, score))
        return score < 0.2

    wanted = [
        one_by_one(model, caches[b], feeds[b], levels[b], (lambda s: s < 0.2) if asked else None,
                   draws[b] if noisy else None)
        for b in range(count)
    ]  # fmt: skip
    with model.open(caches) as txn:
        batch = PackedBatch([chain_segment(f, c.n) for f, c in zip(feeds, caches, strict=True)])
        found = model.chains(batch, txn, levels, ends if asked else None, draws if noisy else None)
        assert found is not None
        fed = [[*f, *ids[:-1]] for f, (ids, _) in zip(feeds, found, strict=True)]
        assert txn.scratch == [c.used - c.n for c in caches] == list(map(len, fed))
        txn.commit([range(len(f)) for f in fed])
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    for (ids, scores), (_, truth), n in zip(found, wanted, levels, strict=True):
        assert scores == (pytest.approx(truth, rel=1e-4) if asked else [])
        assert len(ids) <= n
    if asked:  # nobody is asked about a token behind which there is no room
        assert len(heard) == sum(
            min(len(i), n - 1) for (i, _), n in zip(found, levels, strict=True)
        )
    for cache, rows in zip(caches, fed, strict=True):
        cache.check()
        twin = model.new_cache()
        twin.copy_prefix(cache, cache.n - len(rows))
        feed(model, twin, rows)
        assert torch.equal(feed(model, twin, [1]), feed(model, cache, [1]))


@pytest.mark.parametrize("isa", build.supported())
@pytest.mark.parametrize("seed", range(6))
def test_stops_end_chains_as_if_they_were_asked(
    seed: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges, rates and least chances in numbers: the same tokens and probabilities; scores on an
    edge belong above it, and behind the last of `least`, or without any, nothing ends."""
    monkeypatch.setenv("FORETELL_KERNELS", isa)
    r = random.Random(seed)
    model = FusedModel.random(Arch.llama(61, 32, 2, 2, 2, 48), seed=seed, gain=3.0)
    count = 3
    caches = prefilled(model, r, [5, 9, 0])
    levels = [7, 3, 8]

    def grow(ends: Any) -> list[tuple[list[int], list[float]]]:
        with model.open(caches) as txn:
            batch = PackedBatch([chain_segment([b], c.n) for b, c in enumerate(caches)])
            found = model.chains(batch, txn, levels, ends)
        assert found is not None
        return found

    whole = grow(lambda b, score: False)
    edges = [sorted(whole[0][1])[3], 0.9, 0.95]  # the first is one of the scores
    assert [len(ids) for ids, _ in whole] == levels

    def stops() -> list[PathStop]:
        rates = [sorted(r.uniform(0.3, 1.0) for _ in range(4)) for _ in range(count)]
        least = [[r.uniform(0.1, 0.6) for _ in range(r.randint(2, 9))] for _ in range(count)]
        never = r.randrange(count)
        rates[never] = least[never] = []
        return [PathStop(edges, a, b) for a, b in zip(rates, least, strict=True)]

    shorter = 0
    for _ in range(12):
        told = stops()
        seen: list[list[float]] = [[] for _ in told]

        def ask(b: int, score: float, told: Any = told, seen: Any = seen) -> bool:
            seen[b].append(score)
            return told[b](seen[b])

        found = grow(told)
        assert found == grow(ask)
        shorter += sum(len(ids) for ids, _ in found) < sum(levels)
    assert shorter > 4


@pytest.mark.parametrize("length", [62, 252])
def test_there_is_room_for_all_of_it(length: int) -> None:
    """The cache is full after two rows more; the table of rotations ends at position 255."""
    model = FusedModel.random(Arch.llama(61, 32, 2, 2, 2, 48), seed=1, gain=3.0)
    (cache,) = prefilled(model, random.Random(0), [length])
    twin = model.new_cache()
    twin.copy_prefix(cache, length)
    if length == 62:
        assert cache.capacity == 64
    wanted, _ = one_by_one(model, twin, [1], 8, None, None)
    model._ropes[0].table = model._ropes[0].table[:256]
    with model.open([cache]) as txn:
        found = model.chains(PackedBatch([chain_segment([1], length)]), txn, [8])
        txn.commit([range(8)])
    assert found is not None
    assert found[0][0] == wanted
    assert cache.capacity >= length + 8
    feed(model, twin, [1, *wanted[:-1]])
    assert torch.equal(feed(model, twin, [2]), feed(model, cache, [2]))


@pytest.mark.parametrize("isa", build.supported())
def test_the_probability_of_a_token(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vocabularies that do not fill their last vector."""
    monkeypatch.setenv("FORETELL_KERNELS", isa)
    for seed in range(6):
        arch = random_arch(random.Random(seed))
        model = FusedModel.random(arch, torch.float32, seed, NAMES, 5.0)
        if model._varies:
            continue
        cache = model.new_cache()
        with model.open([cache]) as txn:
            batch = PackedBatch([chain_segment([1, 2], 0)])
            found = model.chains(batch, txn, [1], lambda b, s: True)
        assert found is not None
        ((ids, scores),) = found
        assert (ids[0], pytest.approx(scores[0], rel=1e-5)) == peak(feed(model, cache, [1, 2]))


def test_what_goes_wrong_in_an_answer_is_heard_of() -> None:
    model = FusedModel.random(random_arch(random.Random(3)), torch.float32, 5, NAMES)
    cache = model.new_cache()

    def ends(b: int, score: float) -> bool:
        raise KeyError("nobody knows")

    batch = PackedBatch([chain_segment([1], 0)])
    with pytest.raises(KeyError, match="nobody knows"), model.open([cache]) as txn:
        model.chains(batch, txn, [3], ends)
    assert (cache.n, cache.used) == (0, 0)
    with model.open([cache]) as txn:
        found = model.chains(batch, txn, [3])
    assert found is not None
    assert len(found[0][0]) == 3
    with pytest.raises(InputError, match="outside"), model.open([cache]) as txn:
        model.chains(PackedBatch([chain_segment([-1], 0)]), txn, [3])


def view(draw: Draw, n: int, **params: Any) -> SeqView:
    return SeqView(list(range(1, n + 1)), n, SamplingParams(**params), SeqRng(7), draw, n - 1)


@pytest.mark.parametrize(
    ("draw", "params", "budget", "alone"),
    [
        (Draw.TOP, {}, Budget(8, 3), (0.0, [])),
        (Draw.NOISE, {"temperature": 0.5}, Budget(2, 3), (0.5, [5, 6])),
        (Draw.NOISE, {"temperature": 0.5}, Budget(8, 3, unsure=lambda e: False), None),
        (Draw.SAMPLE, {"temperature": 0.5}, Budget(8, 3), None),
        (Draw.TOP, {}, Budget(8, 3, unsure=lambda e: False), None),
    ],
)
def test_who_can_be_left_alone(draw: Draw, params: Any, budget: Budget, alone: Any) -> None:
    v = view(draw, 5, **params)
    wanted = alone and (alone[0], [v.rng.key(t, Purpose.TARGET) for t in alone[1]])
    assert ChainGrower(v, budget).alone() == wanted
    v.plain = False
    assert ChainGrower(v, budget).alone() is None


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 3}])
@pytest.mark.parametrize("policy", ["fixed", "confidence", "entropy"])
def test_a_drafter_drafts_the_same(
    params: Any, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled pair: all steps, drafts and tokens, whoever feeds the tokens back."""
    calls, chains = [0], FusedModel.chains

    def counted(self: FusedModel, *args: Any) -> Any:
        calls[0] += 1
        return chains(self, *args)

    def run() -> list[tuple[Any, Any]]:
        llm = LLM.load(draft="auto", policy=policy)
        assert isinstance(llm.drafter, DraftModel)
        sampling = SamplingParams(max_tokens=24, **params)
        out = llm.generate(["The cat and the dog", "One two three"], sampling)
        return [(o.token_ids, (o.stats.drafted, o.stats.steps)) for o in out]

    monkeypatch.setattr(FusedModel, "chains", counted)
    alone = run()
    assert (calls[0] > 0) == (policy != "entropy")
    monkeypatch.setattr(FusedModel, "chains", lambda *_: None)
    assert run() == alone


def test_it_keeps_to_the_budget_and_to_what_its_cache_holds() -> None:
    model = FusedModel.random(Arch.llama(61, 32, 2, 2, 2, 48), seed=1, gain=3.0)
    drafter = DraftModel(model, 61)
    v = view(Draw.TOP, 9)
    state = drafter.begin(v)
    for budget, wanted in ((Budget(2, 5), 2), (Budget(9, 3), 3), (Budget(9, 9), 8)):
        (tree,) = drafter.propose([state], [v], [budget])
        assert len(tree) - tree.n_context == wanted
        assert len(state.fed) == state.cache.n == len(v.tokens) + wanted - 1


@pytest.mark.parametrize("alike", [True, False])
def test_a_stop_knows_whether_it_has_ended_a_draft(alike: bool) -> None:
    """Told in numbers, where all have the same edges, or asked."""
    model = FusedModel.random(Arch.llama(61, 32, 2, 2, 2, 48), seed=1, gain=3.0)
    drafter = DraftModel(model, 61)
    views = [view(Draw.TOP, 9) for _ in range(3)]
    states = [drafter.begin(v) for v in views]
    edges = (0.5,)
    first = PathStop(edges, (1.0, 1.0), (0.0, 2.0))  # behind two tokens
    never = PathStop(edges, (1.0, 1.0), ())
    other = PathStop(edges if alike else (0.0,), (0.0, 1.0), (0.0, 0.0, 0.5))
    budgets = [Budget(9, 5, stop=s) for s in (first, never, other)]
    trees = drafter.propose(states, views, budgets)
    lengths = [len(t) - t.n_context for t in trees]
    assert lengths == [2, 5, 3 if alike else 5]
    assert [first.said, never.said, other.said] == [True, False, alike]
