"""A tiny random checkpoint with a tokenizer, written to disk as a real one would be."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "the quick brown fox jumps over the lazy dog and says hello to the world of words"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
CONTEXT = 512


def write_tokenizer(folder: Path, alphabet: str = "") -> int:
    """A byte-level BPE with chat tokens; returns the vocabulary's size. Bytes of `alphabet` come
    first, so another alphabet gives other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_weights(folder: Path, vocab: int, noise: float = 0.0) -> None:
    """A random Llama. With `noise` a slightly different one: a drafter that often agrees."""
    hidden, ffn, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    sizes = {"self_attn.q_proj": (4 * head, hidden), "self_attn.k_proj": (2 * head, hidden)}
    sizes |= {"self_attn.v_proj": (2 * head, hidden), "self_attn.o_proj": (hidden, 4 * head)}
    sizes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    sizes |= {"mlp.down_proj": (hidden, ffn)}
    one, other = (torch.Generator().manual_seed(s) for s in (0, 1))

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        base = torch.randn(rows, columns, generator=one)
        return (base + noise * torch.randn(rows, columns, generator=other)) * scale

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, 1.0)}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, (rows, columns) in sizes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, columns**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
    tensors["model.norm.weight"] = torch.ones(hidden)
    tensors["lm_head.weight"] = matrix(vocab, hidden, 3 * hidden**-0.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = SHAPE | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
