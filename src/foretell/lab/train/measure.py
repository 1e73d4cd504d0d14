"""What a trained network is worth: held-out bits per byte, agreement of two networks, samples."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from foretell.lab.train.data import Domain
from foretell.lab.train.network import Llama
from foretell.lab.train.tokenizer import SPECIAL_TOKENS

FINAL_TOKENS, PROGRESS_TOKENS = 32_768, 8_192  # held-out tokens per domain


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for; 0 for special tokens."""
    special = set(SPECIAL_TOKENS)
    # In the byte-level alphabet one character is one byte.
    pieces = (tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return np.array([0 if piece is None or piece in special else len(piece) for piece in pieces])


def held_out_rows(domain: Domain, row: int, limit: int) -> Tensor:
    """Consecutive windows of the held-out ids, `[B, T + 1]`."""
    ids = domain.held_out[: limit + 1]
    row = min(row, len(ids) - 1)
    rows = (len(ids) - 1) // row
    return torch.from_numpy(np.stack([ids[i * row : i * row + row + 1] for i in range(rows)]))


@torch.no_grad()
def score_rows(network: Llama, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of every next token and the network's own first choice, both `[B, T]`."""
    device = next(network.parameters()).device
    nats, choices = [], []
    for chunk in rows.split(8):
        logits = network(chunk[:, :-1].to(device)).float()
        target = chunk[:, 1:].to(device)
        nats.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu())
        choices.append(logits.argmax(-1).cpu())
    return torch.cat(nats), torch.cat(choices)


def bits_per_byte(
    network: Llama, domains: list[Domain], token_bytes: np.ndarray, row: int, limit: int
) -> dict[str, float]:
    """Held-out loss of every domain, special tokens left out of both bits and bytes."""
    result = {}
    for domain in domains:
        rows = held_out_rows(domain, row, limit)
        nats, _ = score_rows(network, rows)
        counted = torch.from_numpy(token_bytes)[rows[:, 1:]]
        result[domain.name] = float(
            nats[counted > 0].sum() / math.log(2) / counted.sum().clamp(min=1)
        )
    return result


def agreement(
    target: Llama, draft: Llama, domains: list[Domain], row: int, limit: int
) -> dict[str, float]:
    """How often both networks' most likely next token is the same, on held-out text."""
    result = {}
    for domain in domains:
        rows = held_out_rows(domain, row, limit)
        _, first = score_rows(target, rows)
        _, second = score_rows(draft, rows)
        result[domain.name] = float((first == second).float().mean())
    return result


@torch.no_grad()
def greedy_sample(network: Llama, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> str:
    """Plain greedy continuation, recomputed from scratch every token: samples for a model card."""
    ids = tokenizer.encode(prompt).ids
    device = next(network.parameters()).device
    stop = {tokenizer.token_to_id(piece) for piece in SPECIAL_TOKENS}
    new: list[int] = []
    for _ in range(max_tokens):
        logits = network(torch.tensor([ids + new], device=device))
        chosen = int(logits[0, -1].argmax())
        if chosen in stop:
            break
        new.append(chosen)
    return tokenizer.decode(new)
