"""Every family against transformers' own classes, random small shapes, float32, eager attention."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foretell import kernels
from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.tree import TokenTree
from foretell.models.load import load_model
from foretell.models.native.families import describe
from foretell.models.native.fused import FusedModel
from foretell.models.native.runner import NativeModel

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=["torch", "kernels"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that `load_model` has to choose."""
    if request.param == "torch":
        monkeypatch.setenv("FORETELL_KERNELS", "off")
        return NativeModel
    if kernels.load() is None:
        pytest.skip(str(kernels.why_not()))
    return FusedModel


TOLERANCE = 1e-4  # of the largest logit
SEEDS = range(4)
PROMPT = 9  # positions before the steps; the tiny models' pretraining ends at 16 or 24


def base(r: random.Random, **more: object) -> dict:
    """Sizes that are all different, odd multiples, grouped or single key/value heads."""
    kv = r.choice([1, 2, 3])
    heads = kv * r.choice([1, 2, 3])
    head_dim = r.choice([8, 12, 16])
    sizes = {
        "vocab_size": r.choice([61, 83]),
        "hidden_size": heads * head_dim,
        "intermediate_size": r.choice([40, 53]),
        "num_hidden_layers": r.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 256,
        "tie_word_embeddings": r.random() < 0.5,
        "rms_norm_eps": r.choice([1e-5, 1e-6]),
        "rope_theta": r.choice([100.0, 10000.0]),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return sizes | more


def scaling(r: random.Random, c: dict) -> dict | None:
    kinds = [
        None,
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
        {"rope_type": "dynamic", "factor": 3.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "mscale": 0.9,
            "mscale_all_dim": 0.4,
            "truncate": False,
            "beta_fast": 8,
        },
    ]
    return kinds[r.randrange(len(kinds))]


def llama(r: random.Random) -> dict:
    c = base(r, attention_bias=r.random() < 0.5, mlp_bias=r.random() < 0.5)
    c["rope_scaling"] = scaling(r, c)
    if c["rope_scaling"] and c["rope_scaling"]["rope_type"] == "dynamic":
        c["max_position_embeddings"] = 16
    if r.random() < 0.5:
        c["head_dim"] = 10
    return c


def mistral(r: random.Random) -> dict:
    return base(r, sliding_window=r.choice([None, 5, 11]), head_dim=r.choice([8, 20]))


def qwen2(r: random.Random) -> dict:
    windowed = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    return base(r, **(windowed if r.random() < 0.5 else {}))


def qwen3(r: random.Random) -> dict:
    c = qwen2(r) | {"head_dim": r.choice([8, 20]), "attention_bias": r.random() < 0.5}
    return c | {"rope_scaling": scaling(r, c), "max_position_embeddings": 16}


def gemma(r: random.Random) -> dict:
    act = r.choice([{}, {"hidden_act": "gelu_pytorch_tanh"}])
    return base(r, head_dim=r.choice([8, 20])) | {"tie_word_embeddings": True} | act


def gemma2(r: random.Random) -> dict:
    return gemma(r) | {
        "query_pre_attn_scalar": r.choice([7, 30]),
        "sliding_window": r.choice([4, 7]),
        "attn_logit_softcapping": r.choice([2.0, 50.0]),
        "final_logit_softcapping": r.choice([None, 3.0]),
        "num_hidden_layers": 3,
        "attention_bias": r.random() < 0.5,
    }


def gemma3(r: random.Random) -> dict:
    return gemma(r) | {
        "query_pre_attn_scalar": r.choice([7, 30]),
        "sliding_window": r.choice([4, 7]),
        "num_hidden_layers": r.choice([3, 7]),
        "rope_theta": 5000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": r.choice([None, {"rope_type": "linear", "factor": 8.0}]),
        "layer_types": None,
    }


def phi3(r: random.Random) -> dict:
    c = base(r, sliding_window=r.choice([None, 6]), partial_rotary_factor=r.choice([1.0, 0.5]))
    if r.random() < 0.75:
        share = c["partial_rotary_factor"]
        half = int(c["hidden_size"] // c["num_attention_heads"] * share) // 2
        c["original_max_position_embeddings"] = 16
        c["rope_scaling"] = {
            "type": "longrope",
            "short_factor": [1 + 0.1 * i for i in range(half)],
            "long_factor": [2 + 0.3 * i for i in range(half)],
        }
    return c


def olmo2(r: random.Random) -> dict:
    return base(r, attention_bias=r.random() < 0.5)


def smollm3(r: random.Random) -> dict:
    window = {"use_sliding_window": True, "sliding_window": 5} if r.random() < 0.5 else {}
    return base(r, **window) | {
        "num_hidden_layers": 4,
        "no_rope_layer_interval": r.choice([2, 4]),
        "attention_bias": r.random() < 0.5,
        "mlp_bias": r.random() < 0.5,
    }


def granite(r: random.Random) -> dict:
    return base(
        r,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.2,
        logits_scaling=5.0,
        attention_bias=r.random() < 0.5,
        mlp_bias=r.random() < 0.5,
    )


def gpt2(r: random.Random) -> dict:
    heads = r.choice([2, 3])
    return {
        "vocab_size": 61,
        "n_embd": heads * r.choice([7, 8]),
        "n_head": heads,
        "n_layer": 3,
        "n_inner": r.choice([None, 37]),
        "n_positions": 64,
        "activation_function": r.choice(["gelu_new", "gelu", "relu"]),
        "scale_attn_weights": r.random() < 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def neox(r: random.Random) -> dict:
    c = base(r, hidden_act=r.choice(["gelu", "gelu_new"]))
    heads = c["num_attention_heads"]
    return c | {
        "hidden_size": heads * 16,
        "rotary_pct": r.choice([0.25, 0.5, 1.0]),
        "rotary_emb_base": r.choice([100, 10000]),
        "use_parallel_residual": r.random() < 0.6,
        "attention_bias": r.random() < 0.6,
    }


FAMILIES: dict[str, tuple[str, str, Callable[[random.Random], dict]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", llama),
    "mistral": ("MistralConfig", "MistralForCausalLM", mistral),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", qwen2),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", qwen3),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", gemma),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", gemma2),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", gemma3),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", phi3),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", olmo2),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", smollm3),
    "granite": ("GraniteConfig", "GraniteForCausalLM", granite),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", gpt2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", neox),
}


class Reference:
    """A transformers model with weights large enough that every part of it matters."""

    def __init__(self, config: object, cls: type, seed: int) -> None:
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        self.model = cls(config).eval()
        zero_centred = "gemma" in config.model_type
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.dim() >= 2:
                    conv = config.model_type == "gpt2" and ".h." in name
                    p.normal_(0, 1.2 * p.shape[0 if conv else 1] ** -0.5)
                elif name.endswith("bias"):
                    p.normal_(0, 0.3)
                else:
                    p.normal_(0.0 if zero_centred else 1.0, 0.2)

    def _fresh(self) -> None:
        """Forget the lengths that dynamic rotary positions have seen."""
        for m in self.model.modules():
            if hasattr(m, "original_inv_freq"):
                # A copy, because transformers 5 switches longrope frequencies in place.
                m.inv_freq = m.original_inv_freq.clone()
                m.max_seq_len_cached = m.original_max_seq_len

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> torch.Tensor:
        """[n, V] of one forward."""
        self._fresh()
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    @torch.no_grad()
    def steps(self, prompt: list[int], rest: list[int]) -> torch.Tensor:
        """[1 + len(rest), V]: the prompt's last row, then one row a token, fed one by one."""
        self._fresh()
        cache = transformers.DynamicCache()
        rows = []
        for ids in [prompt, *([t] for t in rest)]:
            out = self.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1])
        return torch.stack(rows)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.dtype == torch.float32
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


def chain(ids: list[int], start: int = 0) -> Segment:
    return Segment(np.asarray(ids, np.int64), np.arange(start, start + len(ids)))


def random_tree(r: random.Random, context: list[int], nodes: int, vocab: int) -> TokenTree:
    parents = [r.randrange(-1, i) for i in range(nodes)]
    return TokenTree.build(context, [r.randrange(3, vocab) for _ in parents], parents)


def check_model(ours: Any, theirs: Reference, r: random.Random) -> None:
    vocab = ours.spec.vocab
    ids = [r.randrange(3, vocab) for _ in range(41)]
    varies = any(rope.varies for rope in ours.arch.ropes)

    whole = theirs.prefill(ids)
    with ours.open([ours.new_cache()]) as txn:
        out = ours.forward(PackedBatch([chain(ids)]), txn)
    assert_close(out.logits, whole, "prefill")

    prompt, rest = ids[:PROMPT], ids[PROMPT:]
    reference = theirs.steps(prompt, rest)
    cache = ours.new_cache(3)
    with ours.open([cache]) as txn:
        got = [ours.forward(PackedBatch([chain(prompt)]), txn).logits[-1:]]
        txn.commit([range(PROMPT)])
    at = PROMPT
    for n in (1, 1, 3, 2, 16, 1):  # rolled back, then fed again
        wrong = [r.randrange(3, vocab) for _ in range(r.randrange(1, 6))]
        with ours.open([cache]) as txn:
            ours.forward(PackedBatch([chain(wrong, at)]), txn)
        with ours.open([cache]) as txn:
            got.append(ours.forward(PackedBatch([chain(ids[at : at + n], at)]), txn).logits)
            txn.commit([range(n)])
        at += n
    cache.check()
    assert_close(torch.cat(got), reference[: at - PROMPT + 1], "chain steps after rollbacks")

    if not varies:  # a chunk boundary moves frequencies that depend on the length
        cache, got, at = ours.new_cache(), [], 0
        while at < len(ids):
            n = min(r.randrange(1, 20), len(ids) - at)
            with ours.open([cache]) as txn:
                got.append(ours.forward(PackedBatch([chain(ids[at : at + n], at)]), txn).logits)
                txn.commit([range(n)])
            at += n
        assert_close(torch.cat(got), whole, "chunked prefill")

    # a ragged batch: a tree, a chain behind a shorter prompt, a prefill, a tree of many nodes
    starts = [PROMPT, 4, 0, 17]
    caches = [ours.new_cache() for _ in starts]
    with ours.open(caches[:2] + caches[3:]) as txn:
        ours.forward(PackedBatch([chain(ids[:n]) for n in starts if n]), txn)
        txn.commit([range(n) for n in starts if n])
    trees = [
        random_tree(r, ids[PROMPT : PROMPT + 2], 12, vocab),
        TokenTree.context(ids[4:9]),
        TokenTree.context(ids[:7]),
        random_tree(r, ids[17:18], 25, vocab),
    ]
    batch = PackedBatch([segment_of(t, s, None) for t, s in zip(trees, starts, strict=True)])
    with ours.open(caches) as txn:
        logits = ours.forward(batch, txn).logits
        chosen = []
        for b, (tree, start) in enumerate(zip(trees, starts, strict=True)):
            leaf = r.randrange(tree.n_context - 1, len(tree))
            chosen.append([*range(tree.n_context), *tree.path(leaf)])
            for node in range(len(tree)):
                lead = tree.tokens[: min(node + 1, tree.n_context)].tolist()
                path = lead + tree.path_tokens(node)
                row = logits[batch.offsets[b] + node]
                if varies and start:
                    expected = theirs.steps(ids[:start], path)[-1]
                else:
                    expected = theirs.prefill(ids[:start] + path)[-1]
                assert_close(row, expected, f"sequence {b}, node {node}")
        txn.commit(chosen)
    for cache, start, tree, nodes in zip(caches, starts, trees, chosen, strict=True):
        cache.check()
        text = tree.tokens[nodes].tolist()
        with ours.open([cache]) as txn:  # what was committed behaves like what was fed alone
            row = ours.forward(PackedBatch([chain([5], cache.n)]), txn).logits[0]
        if varies and start:
            expected = theirs.steps(ids[:start], [*text, 5])[-1]
        else:
            expected = theirs.prefill([*ids[:start], *text, 5])[-1]
        assert_close(row, expected, "the step after a committed path")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(family: str, seed: int, runner: type, tmp_path) -> None:
    r = random.Random(f"{family} {seed}")
    config_name, model_name, build = FAMILIES[family]
    config = getattr(transformers, config_name)(**build(r))
    theirs = Reference(config, getattr(transformers, model_name), seed)
    theirs.model.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype="float32", device="cpu")
    assert type(ours) is runner
    check_model(ours, theirs, r)


def test_gemma3_with_images_gives_its_text_part(runner: type, tmp_path) -> None:
    r = random.Random(7)
    text = gemma3(r) | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = Reference(
        transformers.Gemma3TextConfig(**text), transformers.Gemma3ForCausalLM, seed=7
    )
    weights = theirs.model.state_dict()
    config = {"model_type": "gemma3", "text_config": theirs.model.config.to_dict()}
    for prefix in ("language_model.model.", "model.language_model."):  # older and newer files
        named = {prefix + k.removeprefix("model."): v.clone() for k, v in weights.items()}
        named.pop(prefix + "lm_head.weight", None)
        folder = tmp_path / prefix
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(named, folder / "model.safetensors")
        check_model(load_model(folder, device="cpu"), theirs, random.Random(1))


def rotary_spellings(family: str, options: dict) -> tuple[dict, dict]:
    """config.json as transformers 4 and as transformers 5 would write it.

    The installed library gives everything but the rotary keys; those are made of `options`, which
    are in the old spelling, so that neither spelling depends on the version.
    """
    words = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")
    shares = ("partial_rotary_factor", "rotary_pct", "rotary_emb_base")
    written = getattr(transformers, FAMILIES[family][0])(**copy.deepcopy(options)).to_dict()
    rest = {k: v for k, v in written.items() if k not in (*words, *shares)}
    old = rest | {k: options[k] for k in (*words, *shares) if k in options}
    theta = options.get("rotary_emb_base", options["rope_theta"])
    if "rotary_emb_base" in options:  # the older of its two names; `rope_theta` says the same
        old["rope_theta"] = theta
    scaled = dict(options.get("rope_scaling") or {"rope_type": "default"})
    scaled.setdefault("rope_type", scaled.pop("type", "default"))
    if scaled["rope_type"] == "longrope":  # stated twice
        scaled["original_max_position_embeddings"] = options["original_max_position_embeddings"]
    scaled["rope_theta"] = theta
    share = options.get("partial_rotary_factor", options.get("rotary_pct"))
    if share is not None:
        scaled["partial_rotary_factor"] = share
    if family == "gemma3_text":
        near = {"rope_type": "default", "rope_theta": options["rope_local_base_freq"]}
        return old, rest | {
            "rope_parameters": {"full_attention": scaled, "sliding_attention": near}
        }
    return old, rest | {"rope_parameters": scaled}


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "gpt_neox", "smollm3"])
def test_both_spellings_of_rotary_positions_mean_the_same(family: str) -> None:
    config_name, _, build = FAMILIES[family]
    for seed in range(6):
        options = build(random.Random(seed))
        old, new = rotary_spellings(family, options)
        written = getattr(transformers, config_name)(**copy.deepcopy(options)).to_dict()
        assert describe(new)[0] == describe(old)[0] == describe(written)[0]


def test_phi3_defaults_and_older_kinds() -> None:
    """What its configuration class fills in, and the names longrope had before."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 40, "vocab_size": 61}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = {"type": "longrope", **factors}
    for longest in ({}, {"max_position_embeddings": 16384}):
        options = sizes | longest | {"rope_scaling": scaling}
        written = transformers.Phi3Config(**copy.deepcopy(options)).to_dict()
        arch = describe({"model_type": "phi3"} | options)[0]
        assert arch == describe(written)[0]
        assert (arch.ropes[0].kind, arch.ropes[0].original) == ("longrope", 4096)
        for kind in ("su", "yarn"):  # transformers 5 fails on these: compare with the name of today
            config = {"model_type": "phi3"} | options
            assert describe(config | {"rope_scaling": scaling | {"type": kind}})[0] == arch
            new = {k: v for k, v in config.items() if k != "rope_scaling"}
            new["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **factors}
            assert describe(new)[0] == arch
            new["rope_parameters"] |= {"factor": 3.0}  # transformers 5 believes it
            assert describe(new)[0].ropes[0].factor == 3.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "gemma2"])
def test_low_precision_stays_near(family: str, dtype: str, runner: type, tmp_path) -> None:
    r = random.Random(3)
    config_name, model_name, build = FAMILIES[family]
    config = getattr(transformers, config_name)(**build(r))
    theirs = Reference(config, getattr(transformers, model_name), 3)
    theirs.model.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=dtype, device="cpu")
    ids = [r.randrange(3, 61) for _ in range(12)]
    cache, rows = ours.new_cache(), []
    for at in (0, 1, 2, 6):  # one row and several take different products
        n = {0: 1, 1: 1, 2: 4, 6: 6}[at]
        with ours.open([cache]) as txn:
            rows.append(ours.forward(PackedBatch([chain(ids[at : at + n], at)]), txn).logits)
            txn.commit([range(n)])
    expected = theirs.prefill(ids)
    error = (torch.cat(rows) - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == "bfloat16" else 0.02)
