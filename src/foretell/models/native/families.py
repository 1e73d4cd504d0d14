"""config.json -> Arch, and where each family keeps its tensors. One small function a family.

Both spellings of rotary positions are read: `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). Keys that are missing get Hugging Face's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from foretell.core.errors import InputError
from foretell.models.native.arch import Arch, LayerArch, Rope

Config = Mapping[str, Any]

_ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "quick_gelu": "gelu_quick",
        "relu": "relu",
    }
)


@dataclass(frozen=True, slots=True)
class Names:
    """Where the tensors are: role -> module path below one of `prefixes`, {} is the layer.

    Roles: embed, positions, norm; of a layer q, k, v or qkv; o; gate, up or gate_up; down;
    attn_norm, mlp_norm (before), attn_post, mlp_post (after), q_norm, k_norm.
    """

    body: Mapping[str, str]
    prefixes: tuple[str, ...] = ("model.", "")
    heads: tuple[str, ...] = ("lm_head",)
    transposed: bool = False  # matrices are stored [in, out]
    qkv_by_head: bool = False  # the fused qkv holds q, k, v of head 0, then of head 1, ...


_LLAMA = {
    "embed": "embed_tokens",
    "norm": "norm",
    "q": "layers.{}.self_attn.q_proj",
    "k": "layers.{}.self_attn.k_proj",
    "v": "layers.{}.self_attn.v_proj",
    "o": "layers.{}.self_attn.o_proj",
    "gate": "layers.{}.mlp.gate_proj",
    "up": "layers.{}.mlp.up_proj",
    "down": "layers.{}.mlp.down_proj",
    "attn_norm": "layers.{}.input_layernorm",
    "mlp_norm": "layers.{}.post_attention_layernorm",
    "q_norm": "layers.{}.self_attn.q_norm",
    "k_norm": "layers.{}.self_attn.k_norm",
}
_SANDWICH = _LLAMA | {
    "attn_post": "layers.{}.post_attention_layernorm",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "mlp_post": "layers.{}.post_feedforward_layernorm",
}
_PHI3 = _LLAMA | {
    "qkv": "layers.{}.self_attn.qkv_proj",
    "gate_up": "layers.{}.mlp.gate_up_proj",
}
_GPT2 = {
    "embed": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "qkv": "h.{}.attn.c_attn",
    "o": "h.{}.attn.c_proj",
    "up": "h.{}.mlp.c_fc",
    "down": "h.{}.mlp.c_proj",
    "attn_norm": "h.{}.ln_1",
    "mlp_norm": "h.{}.ln_2",
}
_NEOX = {
    "embed": "embed_in",
    "norm": "final_layer_norm",
    "qkv": "layers.{}.attention.query_key_value",
    "o": "layers.{}.attention.dense",
    "up": "layers.{}.mlp.dense_h_to_4h",
    "down": "layers.{}.mlp.dense_4h_to_h",
    "attn_norm": "layers.{}.input_layernorm",
    "mlp_norm": "layers.{}.post_attention_layernorm",
}
LLAMA_NAMES = Names(MappingProxyType(_LLAMA))


def llama(c: Config, **more: Any) -> Arch:
    """Llama 1-3.x, SmolLM, and what differs from them by data only (`more`)."""
    heads = _need(c, "num_attention_heads")
    attention_bias = bool(c.get("attention_bias", False))
    mlp_bias = bool(c.get("mlp_bias", False))
    given: dict[str, Any] = {
        "vocab": _need(c, "vocab_size"),
        "hidden": _need(c, "hidden_size"),
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": _head_dim(c),
        "ffn": _need(c, "intermediate_size"),
        "max_positions": c.get("max_position_embeddings", 2048),
        "family": c["model_type"],
        "eps": c.get("rms_norm_eps", 1e-6),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "act": _act(c, c.get("hidden_act", "silu")),
        "tied": bool(c.get("tie_word_embeddings", False)),
    }
    given |= more
    if "layers" not in given:
        given["layers"] = (LayerArch(),) * _need(c, "num_hidden_layers")
    if "ropes" not in given:
        given["ropes"] = (_rope(c, given["head_dim"]),)
    return Arch(**given)


def mistral(c: Config) -> Arch:
    window = c.get("sliding_window", 4096)
    layers = (LayerArch(0, window),) * _need(c, "num_hidden_layers")
    return llama(c, layers=layers, eps=c.get("rms_norm_eps", 1e-6), qkv_bias=False, o_bias=False)


def qwen2(c: Config) -> Arch:
    return llama(c, layers=_qwen_layers(c), qkv_bias=True, o_bias=False)


def qwen3(c: Config) -> Arch:
    head_dim = c.get("head_dim") or 128
    return llama(c, layers=_qwen_layers(c), head_dim=head_dim, qk_norm="head")


def gemma(c: Config, **more: Any) -> Arch:
    act = c.get("hidden_activation") or c.get("hidden_act") or "gelu_pytorch_tanh"
    gemma_like: dict[str, Any] = {
        "head_dim": c.get("head_dim") or 256,
        "act": _act(c, act),
        "norm_offset": 1.0,
        "embed_scale": math.sqrt(_need(c, "hidden_size")),
        "tied": bool(c.get("tie_word_embeddings", True)),
        "max_positions": c.get("max_position_embeddings", 8192),
    }
    return llama(c, **(gemma_like | more))


def gemma1(c: Config) -> Arch:
    # transformers ignores hidden_activation here unless hidden_act is missing
    act = c.get("hidden_act") or "gelu_pytorch_tanh"
    return gemma(c, act=_act(c, "gelu_pytorch_tanh" if act == "gelu" else act))


def gemma2(c: Config) -> Arch:
    n = _need(c, "num_hidden_layers")
    kinds = c.get("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(n)
    ]
    return gemma(
        c,
        layers=_windows(kinds, c.get("sliding_window", 4096)),
        post_norm=True,
        attn_scale=c.get("query_pre_attn_scalar", 256) ** -0.5,
        attn_cap=c.get("attn_logit_softcapping", 50.0),
        logit_cap=c.get("final_logit_softcapping", 30.0),
    )


def gemma3(c: Config) -> Arch:
    text = c.get("text_config")
    if text is not None:  # image and text: the text part, whose keys may all be missing
        defaults = {
            "model_type": "gemma3_text",
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        }
        tied = {k: c[k] for k in ("tie_word_embeddings",) if k in c}
        c = defaults | tied | dict(text)
    n, head_dim = _need(c, "num_hidden_layers"), c.get("head_dim") or 256
    every = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    kinds = c.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)
    ]
    window = c.get("sliding_window", 4096)
    both = c.get("rope_parameters") or {}
    if "full_attention" in both:  # transformers 5: one set of parameters a kind of layer
        known = {"rope_theta": 1e6} | dict(c)
        wide = _rope({**known, "rope_parameters": both["full_attention"]}, head_dim)
        near = _rope({**c, "rope_parameters": both["sliding_attention"]}, head_dim)
    else:
        wide = _rope({"rope_theta": 1e6} | dict(c), head_dim)
        near = Rope(head_dim, float(c.get("rope_local_base_freq", 10000.0)))
    return gemma(
        c,
        layers=tuple(
            LayerArch(1, window) if k == "sliding_attention" else LayerArch(0) for k in kinds
        ),
        ropes=(wide, near),
        post_norm=True,
        qk_norm="head",
        attn_scale=c.get("query_pre_attn_scalar", 256) ** -0.5,
        attn_cap=c.get("attn_logit_softcapping"),
        logit_cap=c.get("final_logit_softcapping"),
        max_positions=c.get("max_position_embeddings", 131072),
    )


def phi3(c: Config) -> Arch:
    known = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    c = {**known, **c}
    for key in ("rope_scaling", "rope_parameters"):
        p = c.get(key) or {}
        if "yarn" in (p.get("type"), p.get("rope_type")):  # an older name of longrope here
            c[key] = {**p, "rope_type": "longrope"}
    layers = (LayerArch(0, c.get("sliding_window")),) * _need(c, "num_hidden_layers")
    return llama(c, layers=layers, eps=c.get("rms_norm_eps", 1e-5), qkv_bias=False, o_bias=False)


def olmo2(c: Config) -> Arch:
    eps = c.get("rms_norm_eps", 1e-5)
    return llama(c, pre_norm=False, post_norm=True, qk_norm="full", eps=eps)


def smollm3(c: Config) -> Arch:
    n = _need(c, "num_hidden_layers")
    every = c.get("no_rope_layer_interval", 4)
    turns = c.get("no_rope_layers")
    if turns is None:
        turns = [int((i + 1) % every != 0) for i in range(n)]
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    kinds = c.get("layer_types") or [
        "sliding_attention" if window is not None and not t else "full_attention" for t in turns
    ]
    layers = tuple(
        LayerArch(0 if t else None, window if k == "sliding_attention" else None)
        for t, k in zip(turns, kinds, strict=True)
    )
    return llama(
        {"rope_theta": 2000000.0} | dict(c),
        layers=layers,
        tied=bool(c.get("tie_word_embeddings", True)),
        max_positions=c.get("max_position_embeddings", 32768),
    )


def granite(c: Config) -> Arch:
    return llama(
        c,
        embed_scale=c.get("embedding_multiplier", 1.0),
        residual_scale=c.get("residual_multiplier", 1.0),
        attn_scale=c.get("attention_multiplier", 1.0),
        logit_scale=1.0 / c.get("logits_scaling", 1.0),
    )


def gpt2(c: Config) -> Arch:
    if c.get("scale_attn_by_inverse_layer_idx"):
        raise _unsupported(c, "scale_attn_by_inverse_layer_idx")
    hidden, heads = _need(c, "n_embd"), _need(c, "n_head")
    positions = c.get("n_positions", 1024)
    return Arch(
        vocab=_need(c, "vocab_size"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=c.get("n_inner") or 4 * hidden,
        layers=(LayerArch(None),) * _need(c, "n_layer"),
        max_positions=positions,
        family="gpt2",
        norm="layer",
        norm_bias=True,
        eps=c.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated=False,
        act=_act(c, c.get("activation_function", "gelu_new")),
        learned_positions=positions,
        attn_scale=None if c.get("scale_attn_weights", True) else 1.0,
        tied=bool(c.get("tie_word_embeddings", True)),
    )


def neox(c: Config) -> Arch:
    heads, hidden = _need(c, "num_attention_heads"), _need(c, "hidden_size")
    bias = bool(c.get("attention_bias", True))
    share = c.get("rotary_pct", c.get("partial_rotary_factor", 0.25))
    known = {"rope_theta": c.get("rotary_emb_base", 10000), "partial_rotary_factor": share}
    return Arch(
        vocab=_need(c, "vocab_size"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=_need(c, "intermediate_size"),
        layers=(LayerArch(),) * _need(c, "num_hidden_layers"),
        ropes=(_rope(known | dict(c), hidden // heads),),
        max_positions=c.get("max_position_embeddings", 2048),
        family="gpt_neox",
        norm="layer",
        norm_bias=True,
        eps=c.get("layer_norm_eps", 1e-5),
        parallel=bool(c.get("use_parallel_residual", True)),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        gated=False,
        act=_act(c, c.get("hidden_act", "gelu")),
        tied=bool(c.get("tie_word_embeddings", False)),
    )


_GEMMA3_NAMES = Names(
    MappingProxyType(_SANDWICH),
    prefixes=("model.language_model.", "language_model.model.", "model.", ""),
    heads=("lm_head", "language_model.lm_head"),
)
_SANDWICH_NAMES = Names(MappingProxyType(_SANDWICH))
FAMILIES: Mapping[str, tuple[Callable[[Config], Arch], Names]] = MappingProxyType(
    {
        "llama": (llama, LLAMA_NAMES),
        "mistral": (mistral, LLAMA_NAMES),
        "qwen2": (qwen2, LLAMA_NAMES),
        "qwen3": (qwen3, LLAMA_NAMES),
        "gemma": (gemma1, LLAMA_NAMES),
        "gemma2": (gemma2, _SANDWICH_NAMES),
        "gemma3_text": (gemma3, _GEMMA3_NAMES),
        "gemma3": (gemma3, _GEMMA3_NAMES),
        "phi3": (phi3, Names(MappingProxyType(_PHI3))),
        "olmo2": (olmo2, _SANDWICH_NAMES),
        "smollm3": (smollm3, LLAMA_NAMES),
        "granite": (granite, LLAMA_NAMES),
        "gpt2": (gpt2, Names(MappingProxyType(_GPT2), ("transformer.", ""), transposed=True)),
        "gpt_neox": (
            neox,
            Names(MappingProxyType(_NEOX), ("gpt_neox.", ""), ("embed_out",), qkv_by_head=True),
        ),
    }
)


def describe(config: Config) -> tuple[Arch, Names]:
    """The architecture a config.json states. InputError when foretell has no runner for it."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise _unsupported(config, f"model_type '{kind}'")
    build, names = FAMILIES[kind]
    arch = build(config)
    if arch.heads % arch.kv_heads:
        raise InputError(
            f"config.json asks for {arch.heads} heads over {arch.kv_heads} key/value heads, which "
            "does not divide: the file is damaged."
        )
    return arch, names


def _unsupported(config: Config, what: str) -> InputError:
    return InputError(
        f"foretell's own runner does not know {what}: install 'foretell[hf]' and load it through "
        "transformers (backend 'hf')."
    )


def _need(c: Config, key: str) -> Any:
    if c.get(key) is None:
        raise InputError(f"config.json of this {c.get('model_type')} model lacks '{key}'.")
    return c[key]


def _head_dim(c: Config) -> int:
    return c.get("head_dim") or _need(c, "hidden_size") // _need(c, "num_attention_heads")


def _act(c: Config, name: str) -> str:
    if name not in _ACTIVATIONS:
        raise _unsupported(c, f"the activation '{name}'")
    return _ACTIVATIONS[name]


def _windows(kinds: list[str], window: int | None) -> tuple[LayerArch, ...]:
    return tuple(LayerArch(0, window if k == "sliding_attention" else None) for k in kinds)


def _qwen_layers(c: Config) -> tuple[LayerArch, ...]:
    n = _need(c, "num_hidden_layers")
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    first = c.get("max_window_layers", 28)
    kinds = c.get("layer_types") or [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(n)
    ]
    return _windows(kinds, window)


def _rope(c: Config, head_dim: int) -> Rope:
    """Rotary positions from either spelling; `c` may also bring defaults."""
    new = c.get("rope_parameters") or {}
    p = new or c.get("rope_scaling") or {}
    kind = p.get("rope_type") or p.get("type") or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn", "longrope"):
        raise _unsupported(c, f"rotary positions of the kind '{kind}'")
    theta = float(new.get("rope_theta") or c.get("rope_theta") or 10000.0)
    share = new.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    longest = c.get("max_position_embeddings", 2048)
    factor = float(p.get("factor") or 1.0)
    pretrained = p.get("original_max_position_embeddings")
    more: dict[str, Any] = {}
    if kind == "dynamic":  # transformers counts from the stated maximum
        more = {"original": longest}
    elif kind == "llama3":
        more = {
            "original": pretrained or longest,
            "low_freq": float(p["low_freq_factor"]),
            "high_freq": float(p["high_freq_factor"]),
        }
    elif kind == "yarn":
        more = {
            "original": pretrained or longest,
            "beta_fast": float(p.get("beta_fast") or 32),
            "beta_slow": float(p.get("beta_slow") or 1),
            "truncate": bool(p.get("truncate", True)),
            "attention": _yarn_attention(p, factor),
        }
    elif kind == "longrope":
        original = c.get("original_max_position_embeddings") or pretrained
        if original and not new.get("factor"):  # transformers 4 takes no other factor
            factor = longest / original
        original = original or longest
        attention = p.get("attention_factor")
        if attention is None:
            grown = 1 + math.log(factor) / math.log(original) if factor > 1 else 1.0
            attention = math.sqrt(grown)
        more = {
            "original": original,
            "short": tuple(p["short_factor"]),
            "long": tuple(p["long_factor"]),
            "attention": float(attention),
        }
    return Rope(int(head_dim * share), theta, kind, factor, **more)


def _yarn_attention(p: Config, factor: float) -> float:
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)
