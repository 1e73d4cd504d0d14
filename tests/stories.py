"""llama2.c files -> a Hugging Face checkpoint: `python stories.py model.bin tok.bin OUT`.

The format is that of `legacy_export` and `tokenizer.py` in llama2.c: seven int32 (dim, hidden,
layers, heads, kv heads, vocabulary, positions), float32 weights, rotary pairs side by side; the
tokenizer has one (score, length, bytes) a piece, merged by best score.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE


def convert(model: Path, tokenizer: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config, weights = read_model(model)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    read_tokenizer(tokenizer, config["vocab_size"]).save(str(out / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(names | kind, indent=1))


def read_model(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    raw = path.read_bytes()
    dim, ffn, layers, heads, kv, vocab, positions = struct.unpack("<7i", raw[:28])
    data = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy())
    at, size, tied, vocab = 0, dim // heads, vocab > 0, abs(vocab)

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return data[at - count : at].view(shape)

    def halves(w: torch.Tensor) -> torch.Tensor:
        """Rotary pairs from side by side to half a head apart."""
        return w.view(-1, size // 2, 2, dim).transpose(1, 2).reshape(-1, dim)

    embed = take(vocab, dim)
    read = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv * size, dim),
        "self_attn.v_proj": take(layers, kv * size, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, ffn, dim),
        "mlp.down_proj": take(layers, dim, ffn),
        "mlp.up_proj": take(layers, ffn, dim),
    }
    weights = {"model.embed_tokens.weight": embed, "model.norm.weight": take(dim)}
    take(2, positions, size // 2)  # rotary tables, recomputed by everybody
    if not tied:
        weights["lm_head.weight"] = take(vocab, dim)
    for name, stack in read.items():
        for i in range(layers):
            w = halves(stack[i]) if name.endswith(("q_proj", "k_proj")) else stack[i]
            weights[f"model.layers.{i}.{name}.weight"] = w.contiguous()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return config, {k: v.clone() for k, v in weights.items()}


def read_tokenizer(path: Path, vocab: int) -> Tokenizer:
    raw, at = path.read_bytes(), 4
    pieces: list[tuple[float, str]] = []
    for i in range(vocab):
        score, length = struct.unpack("<fi", raw[at : at + 8])
        text = raw[at + 8 : at + 8 + length].decode()
        pieces.append((score, ["<unk>", "<s>", "</s>"][i] if i < 3 else text))
        at += 8 + length
    ids = {}
    for i, (_, text) in enumerate(pieces):
        ids.setdefault(text, i)
    merges = []
    for text in sorted(ids, key=lambda t: -pieces[ids[t]][0]):
        splits = [(text[:k], text[k:]) for k in range(1, len(text))]
        splits = [s for s in splits if s[0] in ids and s[1] in ids]
        merges += sorted(splits, key=lambda s: (ids[s[0]], ids[s[1]]))
    model = BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:4]))
