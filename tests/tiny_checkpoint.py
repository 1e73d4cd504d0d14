"""A tiny random Llama checkpoint directory, and a tokenizer of bytes for those who need one."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from foretell.models.native.arch import Arch
from foretell.models.native.weights import write_random_checkpoint


def tiny_checkpoint(folder: Path, layers: int = 2, vocab: int = 61, tied: bool = True) -> Path:
    arch = Arch.llama(vocab, 32, layers, 4, 2, 64, tied=tied, max_positions=128)
    write_random_checkpoint(folder, arch, torch.float32, gain=1.5)
    return folder


def byte_tokenizer(folder: Path) -> None:
    """tokenizer.json in which every byte is a token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab | {"ab": 256}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
