"""Recipe: train a small Llama-shaped model and its drafter from plain text, export both.

Read `train_base` from top to bottom. Target: next-token cross-entropy. Drafter: the same rows,
cross-entropy mixed with distillation (KL divergence) from the target, because a drafter is worth
what it agrees with its target, not what it knows (DistillSpec, Zhou et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from foretell.core.errors import InputError
from foretell.lab.train import corpora, data, measure
from foretell.lab.train.export import ModelCard, NetworkReport, export_pair
from foretell.lab.train.loop import Loss, save_text_atomically, train_network
from foretell.lab.train.network import Llama
from foretell.lab.train.settings import (
    PRESETS,
    BaseSettings,
    mixture_weights,
    plan_for,
    prepare_folders,
    shape_of,
)
from foretell.lab.train.tokenizer import TURN_END, build_tokenizer, render_chat

DISTILLATION_SHARE = 0.7  # of the drafter's loss; the rest is cross-entropy on the text


def train_base(settings: BaseSettings) -> None:
    """Tokenizer, target, drafter, export. Every stage already done in `run_dir` is skipped."""
    say = Console(stderr=True).print
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = PRESETS[settings.size or ("gpu" if device.type == "cuda" else "cpu")]
    target_shape = shape_of(settings.vocab, preset["target"] | settings.target_shape)
    draft_shape = shape_of(settings.vocab, preset["draft"] | settings.draft_shape)
    batch = preset["batch"] | settings.batch
    names = ["python"] * settings.stdlib + list(settings.corpora)
    weights = mixture_weights(names, settings.weights)
    prepare_folders(settings, target_shape, draft_shape, batch)

    say("reading the corpora")
    texts = []
    if settings.stdlib:
        texts.append(corpora.split_corpus("python", corpora.python_sources(), is_code=True))
    for name, path in settings.corpora.items():
        texts.append(corpora.split_corpus(name, corpora.read_corpus(path)))

    tokenizer_path = settings.run_dir / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        say(f"building a tokenizer of {settings.vocab:,} pieces")
        tokenizer = build_tokenizer(texts, settings.vocab)
        save_text_atomically(tokenizer.to_str(pretty=True), tokenizer_path)
    if tokenizer.get_vocab_size() != settings.vocab:
        raise InputError(
            f"the corpora only give {tokenizer.get_vocab_size()} pieces; "
            f"give more text or a --vocab of at most that."
        )
    say("encoding the corpora")
    domains = [data.encode_corpus(t, tokenizer, weights[t.name], settings.seed) for t in texts]
    for domain in domains:
        say(
            f"  {domain.name}: {len(domain.stream.ids):,} tokens to train on, "
            f"{len(domain.held_out):,} held out, weight {domain.weight:.2f}"
        )
    token_bytes = measure.bytes_per_token(tokenizer)

    def held_out(network: Llama, limit: int = measure.FINAL_TOKENS) -> dict[str, float]:
        return measure.bits_per_byte(network, domains, token_bytes, batch["row"], limit)

    def agreement(limit: int = measure.FINAL_TOKENS) -> dict[str, float]:
        return measure.agreement(target, draft, domains, batch["row"], limit)

    # The target.
    torch.manual_seed(settings.seed)
    target = Llama(target_shape).to(device)
    trained = train_network(
        target,
        next_token_loss(target),
        data.Mixture(domains),
        plan_for(settings, batch, 1.0 - settings.draft_share, matrix_lr=5e-3, vector_lr=4e-3),
        settings.run_dir / "target.pt",
        "target",
        lambda: per_domain("held-out bits/byte", held_out(target, measure.PROGRESS_TOKENS)),
        settings.compile,
    )
    round_to_bfloat16(target)  # from here on it is the network that ships
    target.requires_grad_(False)
    target_report = NetworkReport(trained, target.parameter_count(), held_out(target))

    # The drafter, on the same rows in the same order.
    torch.manual_seed(settings.seed + 1)
    draft = Llama(draft_shape).to(device)

    def draft_numbers() -> str:
        bits = per_domain("held-out bits/byte", held_out(draft, measure.PROGRESS_TOKENS))
        agree = per_domain("agrees with target", agreement(measure.PROGRESS_TOKENS))
        return f"{bits}; {agree}"

    trained = train_network(
        draft,
        distillation_loss(target, draft),
        data.Mixture(domains),
        plan_for(settings, batch, settings.draft_share, matrix_lr=8e-3, vector_lr=6e-3),
        settings.run_dir / "draft.pt",
        "draft",
        draft_numbers,
        settings.compile,
    )
    round_to_bfloat16(draft)
    draft_report = NetworkReport(trained, draft.parameter_count(), held_out(draft))

    card = ModelCard(
        command=settings.command,
        target=target_report,
        draft=draft_report,
        agreement=agreement(),
        corpora=[
            (d.name, settings.licences.get(d.name, "see its source"), w, len(d.stream.ids))
            for d, w in zip(domains, data.Mixture(domains).shares, strict=True)
        ],
        samples=[(p, measure.greedy_sample(target, tokenizer, p, 120)) for p in SAMPLE_PROMPTS],
        device=device.type,
    )
    export_pair(target, draft, tokenizer, card, settings.out)
    say(f"exported to {settings.out} and {settings.out / 'draft'}")


SAMPLE_PROMPTS = [
    'def is_even(n):\n    """Return True if n is an even number."""\n',
    "import os\n\n\nclass Counter:\n    def __init__(self, start=0):\n",
    render_chat(
        "Tom has 5 boxes with 12 pencils each. He gives away 15 pencils. "
        "How many pencils does Tom have left?",
        "",
    ).removesuffix(f"{TURN_END}\n"),
    "It was late in the evening when the carriage",
]


def next_token_loss(network: Llama) -> Loss:
    """Mean cross-entropy of every next token."""

    def loss(ids: Tensor) -> Tensor:  # [B, T + 1]
        logits = network(ids[:, :-1]).flatten(0, 1)  # [B * T, V]
        return F.cross_entropy(logits, ids[:, 1:].flatten())

    return loss


def distillation_loss(target: Llama, draft: Llama) -> Loss:
    """KL(target || draft) mixed with the text's own cross-entropy."""

    def loss(ids: Tensor) -> Tensor:
        with torch.no_grad():
            p = F.softmax(target(ids[:, :-1]).flatten(0, 1).float(), dim=-1)  # [B * T, V]
        log_q = F.log_softmax(draft(ids[:, :-1]).flatten(0, 1).float(), dim=-1)
        # Cross-entropy against p: the KL divergence without the target's entropy, a constant.
        towards_target = -(p * log_q).sum(-1).mean()
        towards_text = F.nll_loss(log_q, ids[:, 1:].flatten())
        return DISTILLATION_SHARE * towards_target + (1 - DISTILLATION_SHARE) * towards_text

    return loss


@torch.no_grad()
def round_to_bfloat16(network: Llama) -> None:
    """Round every weight to the precision it is stored in, so that what is measured is shipped."""
    for weight in network.parameters():
        weight.copy_(weight.bfloat16())


def per_domain(title: str, values: dict[str, float]) -> str:
    return f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items())
