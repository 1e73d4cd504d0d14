"""What is lossy by design: the rule `lexical-units`, and superposed suggestions."""

from __future__ import annotations

import pytest
import torch

from foretell import LLM, InputError, SamplingParams
from foretell.core.rng import SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.engine.superposed import Draft, extended, superposed, weights
from foretell.models.native.arch import Arch
from foretell.models.native.runner import NativeModel
from foretell.verify.lexical_units import LexicalUnits
from foretell.verify.replay import Replay
from helpers_model import pair

PROMPTS = [[1, 2, 3, 4, 5, 1, 2, 3], [7], [2, 1, 2, 1, 2]]


class Given:
    """The target's rows as a table: token before -> distribution."""

    host = True

    def __init__(self, tree: TokenTree, rows: dict[int, list[float]], greedy: bool) -> None:
        self.tree, self.rows, self.deterministic = tree, rows, greedy

    def probs(self, nodes, read=None):
        return torch.tensor([self.rows[int(self.tree.tokens[n])] for n in nodes])

    def greedy(self, nodes):
        return self.probs(nodes).argmax(-1).tolist()

    def hidden(self, tap, nodes):
        raise AssertionError


ROWS = {
    0: [0.0, 0.55, 0.45, 0.0],
    1: [0.1, 0.2, 0.3, 0.4],
    2: [0.0, 0.6, 0.2, 0.2],
    3: [0.25, 0.25, 0.25, 0.25],
}


def verdict(threshold: float, tokens: list[int], parents: list[int], seed: int | None = None):
    tree = TokenTree.build([0], tokens, parents)
    rows = Given(tree, ROWS, seed is None)
    return LexicalUnits(threshold)(tree, rows, SeqRng(seed or 0), 1)  # type: ignore[arg-type]


def test_a_likely_token_stands_though_it_is_not_the_answer() -> None:
    assert verdict(0.4, [2, 1], [-1, 0]).tokens == [2, 1, 3]  # 0.45, then the argmax
    assert verdict(0.46, [2, 1], [-1, 0]).tokens == [1]
    assert verdict(0.4, [2, 1], [-1, -1]).tokens == [1, 3], "the answer goes before other tokens"
    assert verdict(0.2, [1, 1, 2], [-1, 0, 0]).tokens == [1, 2, 1], "of two the more probable"


def test_a_token_below_the_threshold_ends_the_unit_and_a_dead_one_never_stands() -> None:
    assert verdict(0.3, [1, 2, 2, 1], [-1, 0, 1, 2]).tokens == [1, 2, 1]
    assert verdict(0.3, [1, 2, 2, 1], [-1, 0, 1, 2]).checked == 3
    assert verdict(0.25, [1, 3, 0], [-1, 0, 1]).tokens == [1, 3, 0, 1], "at least the threshold"
    tree = TokenTree.build([0], [2], [-1])
    tree.kind[1] = Kind.DEAD
    got = LexicalUnits(0.1)(tree, Given(tree, ROWS, True), SeqRng(0), 1)  # type: ignore[arg-type]
    assert (got.path, got.tokens) == ([], [1])


def test_no_threshold_and_the_rule_is_replay() -> None:
    differs = 0
    for seed in range(60):
        tree = TokenTree.build([0], [2, 1, 1, 3], [-1, -1, 0, 1])
        rows = Given(tree, ROWS, False)
        want = Replay()(tree, rows, SeqRng(seed), 1)  # type: ignore[arg-type]
        got = verdict(1.01, [2, 1, 1, 3], [-1, -1, 0, 1], seed)
        assert (got.path, got.tokens, got.checked) == (want.path, want.tokens, want.checked)
        differs += verdict(0.2, [2, 1, 1, 3], [-1, -1, 0, 1], seed).tokens != want.tokens
    assert differs > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_unreachable_threshold_is_plain_decoding(temperature: float) -> None:
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3)
    target, context = pair(sharpness=1.0)
    want = [o.token_ids for o in LLM(target, context=context).generate(PROMPTS, params)]
    got, steps = {}, {}
    for threshold in (2, 0.2):
        llm = LLM(
            target,
            draft="draft-model:tokens=4",
            verify=f"lexical-units:threshold={threshold}",
            context=context,
            allow_lossy=True,
        )
        outputs = llm.generate(PROMPTS, params)
        assert {o.promise for o in outputs} == {"lossy"}
        got[threshold] = [o.token_ids for o in outputs]
        steps[threshold] = sum(o.stats.steps for o in outputs)
    assert got[2] == want
    assert got[0.2] != want
    assert steps[0.2] < steps[2], "what it changes buys fewer steps"


def test_it_is_opt_in_and_refuses_nonsense() -> None:
    target, context = pair()
    with pytest.raises(InputError, match="lossy"):
        LLM(target, verify="lexical-units", context=context)
    with pytest.raises(InputError, match="above 0"):
        LexicalUnits(0)


# --- superposed


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return NativeModel.random(Arch.llama(13, 16, 3, 4, 2, 24, max_positions=64), gain=2.0)


def test_weights_are_those_of_the_drafts_summed_over_equal_ends() -> None:
    drafts = [Draft((5, 1), -1.0), Draft((5, 2), -2.0), Draft((6, 1), -3.0)]
    w = torch.tensor([-1.0, -2.0, -3.0]).softmax(-1).tolist()
    assert weights(drafts) == pytest.approx({1: w[0] + w[2], 2: w[1]})
    assert sum(weights([Draft((1,), -900.0), Draft((2,), -901.0)]).values()) == pytest.approx(1)


def test_drafts_are_extended_by_the_best_pairs() -> None:
    logs = torch.tensor([0.1, 0.6, 0.3]).log()
    drafts = [Draft((7,), -0.1), Draft((8,), -0.5)]
    got = extended(drafts, logs + 4.0, 3)  # logits, not log-probabilities
    assert [d.tokens for d in got] == [(7, 1), (8, 1), (7, 2)]
    assert [d.logprob for d in got] == pytest.approx(
        [-0.1 + float(logs[1]), -0.5 + float(logs[1]), -0.1 + float(logs[2])]
    )


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_drafts_are_distinct_and_cost_one_row_a_token(model, k: int, monkeypatch) -> None:
    rows, forward = [], model.forward

    def counted(batch, txn, taps=()):
        rows.append(batch.rows)
        return forward(batch, txn, taps)

    monkeypatch.setattr(model, "forward", counted)
    drafts, forwards = superposed(model, PROMPTS[0], k, 12)
    assert rows == [len(PROMPTS[0]), *[1] * 11]
    assert forwards == 11
    assert len({d.tokens for d in drafts}) == k
    assert all(len(d.tokens) == 12 for d in drafts)
    assert [d.logprob for d in drafts] == sorted((d.logprob for d in drafts), reverse=True)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_suggestion_is_greedy_decoding(model, prompt: list[int]) -> None:
    want = LLM(model).generate([prompt], SamplingParams(max_tokens=20))[0].token_ids
    ((draft,), _) = superposed(model, prompt, 1, 20)
    assert list(draft.tokens) == want
    assert LLM(model).suggest(prompt, 1, 20).suggestions[0].token_ids == want


def test_the_superposed_row_is_the_weighted_mean_of_the_embeddings(model, monkeypatch) -> None:
    seen, forward = [], model.forward

    def looked(batch, txn, taps=()):
        seen.append(batch.segments[0].embeds)
        return forward(batch, txn, taps)

    monkeypatch.setattr(model, "forward", looked)
    first, _ = superposed(model, PROMPTS[0], 2, 1)
    assert seen == [None]
    superposed(model, PROMPTS[0], 2, 2)
    shares = weights(first)
    want = sum(w * model.embed(torch.tensor([t]))[0] for t, w in shares.items())
    torch.testing.assert_close(seen[-1][0], want)


def test_finished_drafts_step_aside_and_the_others_go_on(model) -> None:
    free, _ = superposed(model, PROMPTS[0], 3, 10)
    end = free[0].tokens[2]
    drafts, forwards = superposed(model, PROMPTS[0], 3, 10, {end})
    assert len({d.tokens for d in drafts}) == 3
    assert any(d.tokens[-1] == end and len(d.tokens) < 10 for d in drafts)
    assert all(end not in d.tokens[:-1] for d in drafts)
    assert superposed(model, PROMPTS[0], 1, 10, set(range(13)))[1] == 0
    assert forwards <= 9


def test_suggestions_say_that_they_are_lossy_and_nonsense_is_refused(model) -> None:
    llm = LLM(model)
    told = llm.suggest(PROMPTS[0], 3, 5).to_json()
    assert told["promise"] == "lossy"
    assert len(told["suggestions"]) == 3
    assert told["usage"] == {"prompt_tokens": 8, "completion_tokens": 15, "forwards": 4}
    for k, max_tokens, prompt in ((0, 5, [1]), (14, 5, [1]), (2, 0, [1]), (2, 5, [1] * 64)):
        with pytest.raises(InputError):
            llm.suggest(prompt, k, max_tokens)
    assert len(llm.suggest([1] * 60, 2, 50).suggestions[0].token_ids) == 4
