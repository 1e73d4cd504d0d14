"""The transformers adapter against plain forwards of tiny random models."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.errors import InputError, NoRollback
from foretell.core.protocols import KVCache, TargetModel
from foretell.core.tree import TokenTree
from foretell.models.hf import HFModel

transformers = pytest.importorskip("transformers")

V = 97
COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GLU = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GLU),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_bigcode": ("GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "falcon": ("Falcon", COMMON),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "cohere": ("Cohere", {**GLU, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    # chains only: positions from the mask, or sliding windows
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon-alibi": ("Falcon", {**COMMON, "alibi": True}),
    "mistral-window": ("Mistral", {**GLU, "sliding_window": 8}),
    "gemma2-window": ("Gemma2", {**GLU, "head_dim": 8, "sliding_window": 8}),
    "gpt_neo-local": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
        },
    ),
    # forward only
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "jamba": (
        "Jamba",
        {
            **GLU,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
}
TREES = ["llama", "gpt2", "gpt_bigcode", "opt", "falcon", "gptj", "cohere"]
CHAINS = ["bloom", "falcon-alibi", "mistral-window", "gemma2-window", "gpt_neo-local"]
STATES = ["mamba", "rwkv", "jamba"]


# Mamba's recurrence amplifies rounding: at 4, a plain forward is 1e-4 off its double precision.
SPREAD = {"mamba": 3.0}


def _module(name: str, spread: float | None = None) -> Any:
    family, options = MODELS[name]
    spread = SPREAD.get(name, 4.0) if spread is None else spread
    config = getattr(transformers, f"{family}Config")(vocab_size=V, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # spread the logits: the usual small weights hide mistakes
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(spread)
    return model


@pytest.fixture(scope="module")
def get() -> Callable[[str], HFModel]:
    made: dict[str, HFModel] = {}

    def build(name: str) -> HFModel:
        if name not in made:
            made[name] = HFModel(_module(name))
        return made[name]

    return build


def _ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, V, n).tolist()


def _plain(m: HFModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return m.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def _chain(ids: list[int], start: int, logits: list[int] | None = None) -> Segment:
    wanted = None if logits is None else np.asarray(logits, np.int64)
    return Segment(np.asarray(ids), np.arange(start, start + len(ids)), None, wanted)


def _feed(m: HFModel, cache: Any, ids: list[int]) -> torch.Tensor:
    with m.open([cache]) as txn:
        out = m.forward(PackedBatch([_chain(ids, cache.n)]), txn)
        txn.commit([range(len(ids))])
    cache.check()
    return out.logits


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_caps_and_spec(name: str, get) -> None:
    m = get(name)
    caps = m.spec.caps
    assert caps.tree == (name in TREES)
    assert caps.rollback == (name not in STATES)
    assert caps.recurrent == (name in STATES)
    assert (m.spec.vocab, m.spec.hidden) == (V, 32)
    assert isinstance(m, TargetModel)
    assert isinstance(m.new_cache(), KVCache)


@pytest.mark.parametrize("name", MODELS)
def test_chain_steps(name: str, get) -> None:
    """Prefill, chunks and single rows, beyond every window; logits as asked for."""
    m, ids = get(name), _ids(30)
    reference = _plain(m, ids)
    cache, at = m.new_cache(64), 0
    for n in (12, 1, 3, 1, 5, 8):
        _close(_feed(m, cache, ids[at : at + n]), reference[at : at + n])
        at += n
    assert cache.n == 30
    cache = m.new_cache()
    with m.open([cache]) as txn:
        assert m.forward(PackedBatch([_chain(ids[:9], 0, [])]), txn).logits.shape == (0, V)
        out = m.forward(PackedBatch([_chain(ids[9:13], 9, [1, 3])]), txn)
        assert out.logits.dtype == torch.float32
        _close(out.logits, reference[[10, 12]])
        assert txn.scratch == [13]
        txn.commit([range(13)])


@pytest.mark.parametrize("name", [*TREES, *CHAINS])
def test_rollback(name: str, get) -> None:
    m, ids, other = get(name), _ids(24), _ids(24, 1)
    reference = _plain(m, ids)
    cache = m.new_cache()
    _feed(m, cache, ids[:14])
    with m.open([cache]) as txn:  # left without a commit
        m.forward(PackedBatch([_chain(other[:4], 14)]), txn)
    cache.check()
    assert cache.n == 14
    with m.open([cache]) as txn:  # partly right
        draft = [*ids[14:17], *other[:3]]
        _close(m.forward(PackedBatch([_chain(draft, 14)]), txn).logits[:3], reference[14:17])
        txn.commit([range(3)])
    _close(_feed(m, cache, ids[17:20]), reference[17:20])
    cache.truncate(10)
    _close(_feed(m, cache, ids[10:24]), reference[10:])
    with contextlib.suppress(KeyError), m.open([cache]) as txn:  # an error rolls back as well
        m.forward(PackedBatch([_chain(other[:4], 24)]), txn)
        raise KeyError
    assert cache.n == 24
    cache.check()
    twin = m.new_cache()
    twin.copy_prefix(cache, 9)
    twin.check()
    cache.truncate(0)
    _close(_feed(m, twin, other[:6]), _plain(m, [*ids[:9], *other[:6]])[9:])
    _close(_feed(m, cache, ids[:5]), reference[:5])


@pytest.mark.parametrize("name", [*TREES, *CHAINS])
def test_several_forwards_in_a_transaction(name: str, get) -> None:
    m, ids = get(name), _ids(20)
    reference = _plain(m, ids)
    cache = m.new_cache()
    _feed(m, cache, ids[:6])
    with m.open([cache]) as txn:
        for at in (6, 9, 10):
            n = 3 if at == 6 else 1
            out = m.forward(PackedBatch([_chain(ids[at : at + n], at)]), txn)
            _close(out.logits, reference[at : at + n])
        assert txn.scratch == [5]
        txn.commit([[0, 1, 2, 3]])
    _close(_feed(m, cache, ids[10:14]), reference[10:14])


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(2))
def test_trees(name: str, seed: int, get) -> None:
    """Every node has the logits of the line that leads to it; committed paths stay right."""
    m, rng = get(name), np.random.default_rng(seed)
    text = _ids(9, seed)
    cache = m.new_cache()
    _feed(m, cache, text[:6])
    for _ in range(3):
        pending, n = text[cache.n :], int(rng.integers(2, 9))
        parents = [int(rng.integers(-1, i)) for i in range(n)]
        tree = TokenTree.build(pending, rng.integers(3, V, n).tolist(), parents)
        tree.kill(np.arange(len(tree)) == len(tree) - 1)  # one node is not computed
        with m.open([cache]) as txn:
            out = m.forward(PackedBatch([segment_of(tree, cache.n, None)]), txn)
            for row, node in enumerate(tree.live):
                if node >= tree.tip:
                    line = [*text, *tree.path_tokens(node)]
                    _close(out.logits[row], _plain(m, line)[-1])
            end = int(rng.choice(tree.live[tree.live >= tree.tip]))
            # a second forward: one more row below `end`
            row = int(np.flatnonzero(tree.live == end)[0])
            live = tree.ancestors()[np.ix_(tree.live, tree.live)]
            seen = np.append(live[row], True)[None]
            position = cache.n + tree.depth[end] + 1
            extra = Segment(np.asarray([5]), np.asarray([position]), seen)
            again = m.forward(PackedBatch([extra]), txn).logits
            line = [*text, *tree.path_tokens(end)]
            _close(again[0], _plain(m, [*line, 5])[-1])
            path = [
                *range(len(pending)),
                *(int(np.flatnonzero(tree.live == p)[0]) for p in tree.path(end)),
            ]
            txn.commit([path])
        cache.check()
        text = [*line, int(rng.integers(3, V)), int(rng.integers(3, V))]
        assert cache.n == len(line)
    _close(_feed(m, cache, text[cache.n :]), _plain(m, text)[-2:])


@pytest.mark.parametrize("name", [*CHAINS, *STATES])
def test_trees_are_refused(name: str, get) -> None:
    m = get(name)
    tree = TokenTree.build([5], [6, 7], [-1, -1])
    with pytest.raises(ValueError, match="chains only"), m.open([m.new_cache()]) as txn:
        m.forward(PackedBatch([segment_of(tree, 0, None)]), txn)


def test_windows_longer_than_the_probe() -> None:
    """No short measurement sees them, so the configuration decides."""

    def tree(family: str, **options: Any) -> bool:
        config = getattr(transformers, f"{family}Config")(vocab_size=V, **GLU, **options)
        return HFModel(transformers.AutoModelForCausalLM.from_config(config)).spec.caps.tree

    assert not tree("Mistral", sliding_window=64)
    assert tree("Mistral", sliding_window=None)
    assert not tree("Qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    assert tree("Qwen2", use_sliding_window=False)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_batches(name: str, get) -> None:
    """Two sequences of different length in one batch, with different fates."""
    m, a, b = get(name), _ids(12), _ids(9, 3)
    caches = [m.new_cache(), m.new_cache()]
    _feed(m, caches[0], a[:8])
    with m.open(caches) as txn:
        batch = PackedBatch([_chain(a[8:12], 8, [0, 3]), _chain(b, 0, [8])])
        out = m.forward(batch, txn, taps=("last", "embed", 1))
        _close(out.logits[:2], _plain(m, a)[[8, 11]])
        _close(out.logits[2], _plain(m, b)[-1])
        assert {h.shape for h in out.hidden.values()} == {(13, 32)}
        txn.commit([range(4), range(9)])
    assert [c.n for c in caches] == [12, 9]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gptj", "mamba"])
def test_hidden_states(name: str, get) -> None:
    m, ids = get(name), _ids(7)
    layers = m.spec.layers
    rollback = m.spec.caps.rollback
    taps = ("embed", "last", 1, *([layers] if rollback else []))
    with torch.no_grad():
        plain = m.module(input_ids=torch.tensor([ids]), output_hidden_states=True)
    with m.open([m.new_cache()]) as txn:
        out = m.forward(PackedBatch([_chain(ids, 0, [6])]), txn, taps=taps)
    _close(out.hidden["last"], plain.hidden_states[-1][0])
    _close(out.hidden["embed"], plain.hidden_states[0][0])
    _close(out.hidden[1], plain.hidden_states[1][0])
    _close(m._head(out.hidden["last"].clone())[6], out.logits[0])
    if rollback:
        _close(m.unembed(out.hidden[layers]), plain.logits[0])
    with pytest.raises(InputError, match="'nothing'"), m.open([m.new_cache()]) as txn:
        m.forward(PackedBatch([_chain(ids, 0)]), txn, taps=("nothing",))


def test_embed_and_given_rows(get) -> None:
    m, ids = get("llama"), _ids(6)
    row = m.embed(torch.tensor([ids[2]]))[0]
    segment = _chain([*ids[:2], 0, *ids[3:]], 0)
    segment.embeds = {2: row}
    with m.open([m.new_cache()]) as txn:
        _close(m.forward(PackedBatch([segment]), txn).logits, _plain(m, ids))


@pytest.mark.parametrize("name", ["cohere", "gemma2-window"])
def test_logits_that_are_more_than_a_product(name: str, get) -> None:
    with pytest.raises(InputError, match="scored alone"):
        get(name).unembed(torch.zeros(1, 32))
    small = HFModel(_module(name, spread=1.0))  # a cap that small logits do not feel
    with pytest.raises(InputError, match="scored alone"):
        small.unembed(torch.zeros(1, 32))


@pytest.mark.parametrize("name", STATES)
def test_recurrent_models_never_pretend(name: str, get) -> None:
    m, ids = get(name), _ids(12)
    reference = _plain(m, ids)
    cache = m.new_cache()
    _feed(m, cache, ids[:6])
    with pytest.raises(NoRollback, match="cannot forget"):
        cache.truncate(3)
    with pytest.raises(NoRollback, match="whole state"):
        m.new_cache().copy_prefix(cache, 3)
    twin = m.new_cache()
    twin.copy_prefix(cache, 6)
    with m.open([cache]) as txn:
        m.forward(PackedBatch([_chain(ids[6:9], 6)]), txn)
        with pytest.raises(NoRollback, match="cannot drop"):
            txn.commit([[0]])
        txn.commit([[0, 1, 2]])  # the refusal changed nothing
    _close(_feed(m, cache, ids[9:12]), reference[9:])
    _close(_feed(m, twin, ids[6:8]), reference[6:8])  # a copy has a state of its own
    with pytest.raises(NoRollback, match="cannot undo"), m.open([twin]) as txn:
        m.forward(PackedBatch([_chain(ids[:1], 8)]), txn)
    with pytest.raises(NoRollback, match="start the sequence again"):
        m.open([twin])
    twin.truncate(0)
    _close(_feed(m, twin, ids), reference)
    with m.open([twin]):
        pass  # nothing was read, nothing to undo
    twin.check()


def test_misuse(get) -> None:
    m, ids = get("llama"), _ids(6)
    cache = m.new_cache()
    with m.open([cache]) as txn:
        m.forward(PackedBatch([_chain(ids, 0)]), txn)
        for path in ([1, 0], [6], [-1], [0, 0]):
            with pytest.raises(ValueError, match="rising"):
                txn.commit([path])
        with pytest.raises(ValueError, match="2 paths"):
            txn.commit([[0], [0]])
        with pytest.raises(RuntimeError, match="open"):
            cache.truncate(0)
        with pytest.raises(RuntimeError, match="open"):
            m.open([cache])
        with pytest.raises(ValueError, match="2 segments"):
            m.forward(PackedBatch([_chain(ids, 6), _chain(ids, 6)]), txn)
        txn.commit([[0, 1]])
        with pytest.raises(RuntimeError, match="closed"):
            txn.commit([[0]])
        with pytest.raises(RuntimeError, match="closed"):
            m.forward(PackedBatch([_chain(ids, 0)]), txn)
    assert cache.n == 2
    with pytest.raises(ValueError, match="keep 3 of 2"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="twice"):
        m.open([cache, cache])


def test_load(tmp_path: Path, get) -> None:
    _module("llama").save_pretrained(tmp_path)
    told: list[tuple[float, str]] = []
    m = HFModel.load(tmp_path, "float32", "cpu", progress=lambda f, what: told.append((f, what)))
    assert told[-1] == (1.0, "ready")
    ids = _ids(8)
    _close(_feed(m, m.new_cache(), ids), _plain(get("llama"), ids))
    half = HFModel.load(tmp_path, "bfloat16")
    assert half.dtype == torch.bfloat16
    assert _feed(half, half.new_cache(), ids).dtype == torch.float32
    with pytest.raises(InputError, match="int8"):
        HFModel.load(tmp_path, "int8")
    with pytest.raises(InputError, match="transformers cannot load"):
        HFModel.load(tmp_path / "missing")


def test_wrong_claims_are_noticed() -> None:
    """A model whose cache forgets, and one whose attention ignores the tree."""
    module = _module("llama")
    forward = module.forward

    def deaf(*args: Any, attention_mask: Any = None, **kw: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return forward(*args, attention_mask=attention_mask, **kw)

    deaf.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    module.forward = deaf
    assert HFModel(module).spec.caps.tree is False
    module.forward = forward

    def forgets(*args: Any, past_key_values: Any = None, **kw: Any) -> Any:
        return forward(*args, **kw)

    forgets.__signature__ = deaf.__signature__  # type: ignore[attr-defined]
    module.forward = forgets
    with pytest.raises(InputError, match="step by step"):
        HFModel(module)


def test_transformers_is_imported_inside_functions() -> None:
    import foretell.models.hf as hf

    folder = Path(hf.__file__).parent
    for path in folder.glob("hf*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "transformers" not in ast.unparse(node), path.name
