"""Every drafter, tree and effort policy on the bundled pair says, token for token, what plain
decoding says: greedy, and sampled by replay with a seed.

The default run takes one setting of each on three prompts; `make test-all` takes every setting on
sixty prompts that come from no data set.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

import foretell
from foretell.core.errors import InputError
from foretell.drafters.tables.datastore.writer import StoreWriter
from foretell.engine.llm import LLM
from foretell.models.load import bundled_model
from methods import DRAFTERS, POLICIES, TREES
from sixty import sixty

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (bundled_model() / "model.safetensors").exists(), reason="no bundled model here"
    ),
]
MODES = {"greedy": {}, "replay": {"temperature": 0.8, "top_p": 0.95, "seed": 11}}
HERE = {  # settings of the contract tests that only fit their toy model, and what stands for them
    "retrieval": ["retrieval:path={store}"],
    "rasd": ["rasd:nodes=12", "rasd:of=draft-model(tokens=2)+retrieval(path={store}),keep=4"],
    "graft": ["graft:nodes=12,prune=0.2", "graft:of=draft-model(tokens=2)+retrieval(path={store})"],
}
SPECS = [spec for name, found in DRAFTERS.items() for spec in HERE.get(name, found)]
FIRST = {HERE.get(name, found)[0] for name, found in DRAFTERS.items()}
FIRST |= {f"draft-model:{found[0]}" for found in TREES.values()}
EFFORTS = [spec for found in POLICIES.values() for spec in found]
THINLY = [i for i, text in enumerate(sixty()) if i in (0, 1, 21)]


@lru_cache(maxsize=1)
def base() -> LLM:
    return foretell.load(draft="none", dtype="float32", max_batch=8)


@lru_cache(maxsize=8)
def plain(mode: str, few: bool) -> list[list[int]]:
    return said(base().with_methods("none", verify="auto", max_batch=8), mode, few)


def said(llm: LLM, mode: str, few: bool) -> list[list[int]]:
    texts = [sixty()[i] for i in THINLY] if few else sixty()
    return [o.token_ids for o in llm.generate(texts, max_tokens=24 if few else 64, **MODES[mode])]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A datastore of the model's own answers to half of the prompts."""
    llm = base()
    path = tmp_path_factory.mktemp("store") / "own.store"
    with path.open("wb") as f:
        mark = {"tokenizer": getattr(llm.tokenizer, "fingerprint", None)}
        writer = StoreWriter(f, llm.model.spec.vocab, mark)
        for output in llm.generate(sixty()[:6], max_tokens=32):
            writer.add(np.array([*output.prompt_ids, *output.token_ids]))
        writer.finish()
    return str(path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", sorted(FIRST - {"none"}))
def test_drafters_on_a_few(spec: str, mode: str, store: str) -> None:
    llm = base().with_methods(spec.format(store=store), max_batch=8)
    assert said(llm, mode, few=True) == plain(mode, True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [s for s in SPECS if s != "none"])
def test_drafters_on_sixty(spec: str, mode: str, store: str) -> None:
    llm = base().with_methods(spec.format(store=store), max_batch=8)
    assert said(llm, mode, few=False) == plain(mode, False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", EFFORTS)
@pytest.mark.parametrize("spec", ["draft-model", "suffix"])
def test_policies_on_sixty(spec: str, policy: str, mode: str) -> None:
    if policy.startswith("pearl") and spec == "suffix":
        with pytest.raises(InputError, match="go on from text"):
            base().with_methods(spec, policy=policy, max_batch=8)
        return
    llm = base().with_methods(spec, policy=policy, max_batch=8)
    assert said(llm, mode, few=False) == plain(mode, False)
