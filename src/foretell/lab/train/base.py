"""Recipe: train a small Llama-shaped model and its drafter from plain text, export both.

Read `train_base` from top to bottom. Target: next-token cross-entropy. Drafter: the same rows,
cross-entropy mixed with distillation (KL divergence) from the target, because a drafter is worth
what it agrees with its target, not what it knows (DistillSpec, Zhou et al. 2023).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from foretell.core.errors import InputError
from foretell.lab.train import data, measure
from foretell.lab.train.export import ModelCard, NetworkReport, export_pair
from foretell.lab.train.loop import Loss, Plan, save_text_atomically, train_network
from foretell.lab.train.network import Llama, LlamaShape

DISTILLATION_SHARE = 0.7  # of the drafter's loss; the rest is cross-entropy on the text
PRESETS: dict[str, dict[str, dict[str, int]]] = {
    "cpu": {
        "target": {"hidden": 256, "layers": 10, "heads": 8, "kv_heads": 4, "ffn": 640},
        "draft": {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 320},
        "batch": {"batch_tokens": 4096, "row": 512, "long_row": 2048},
    },
    "gpu": {
        "target": {"hidden": 512, "layers": 10, "heads": 8, "kv_heads": 4, "ffn": 1280},
        "draft": {"hidden": 256, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 640},
        "batch": {"batch_tokens": 65536, "row": 1024, "long_row": 2048},
    },
}


@dataclass(frozen=True)
class BaseSettings:
    """Everything a user can choose; `None` means: the preset or the default decides."""

    out: Path
    run_dir: Path
    corpora: dict[str, Path] = field(default_factory=dict)  # name -> file, beside the stdlib
    weights: dict[str, float] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    size: str | None = None
    minutes: float | None = None
    tokens: int | None = None  # target's budget in tokens, instead of minutes
    draft_share: float = 0.28  # of the budget
    vocab: int = 4096
    target_shape: dict[str, int] = field(default_factory=dict)
    draft_shape: dict[str, int] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)
    stdlib: bool = True
    checkpoint_minutes: float = 3.0
    compile: bool = True
    seed: int = 0
    command: str = "foretell train base"  # as the user typed it, for the model card


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
    corpora = []
    if settings.stdlib:
        corpora.append(data.split_corpus("python", data.python_sources(), is_code=True))
    for name, path in settings.corpora.items():
        corpora.append(data.split_corpus(name, data.read_corpus(path)))

    tokenizer_path = settings.run_dir / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        say(f"building a tokenizer of {settings.vocab:,} pieces")
        tokenizer = data.build_tokenizer(corpora, settings.vocab)
        save_text_atomically(tokenizer.to_str(pretty=True), tokenizer_path)
    if tokenizer.get_vocab_size() != settings.vocab:
        raise InputError(
            f"the corpora only give {tokenizer.get_vocab_size()} pieces; "
            f"give more text or a --vocab of at most that."
        )
    say("encoding the corpora")
    domains = [data.encode_corpus(c, tokenizer, weights[c.name], settings.seed) for c in corpora]
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

    # The drafter: fresh streams, so it sees the rows in the order the target did.
    domains = [data.encode_corpus(c, tokenizer, weights[c.name], settings.seed) for c in corpora]
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
    data.render_chat(
        "Tom has 5 boxes with 12 pencils each. He gives away 15 pencils. "
        "How many pencils does Tom have left?",
        "",
    ).removesuffix(f"{data.TURN_END}\n"),
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


def plan_for(
    settings: BaseSettings,
    batch: dict[str, int],
    share: float,
    matrix_lr: float,
    vector_lr: float,
) -> Plan:
    return Plan(
        seconds=None if settings.minutes is None else settings.minutes * 60 * share,
        tokens=None if settings.tokens is None else int(settings.tokens * share),
        matrix_lr=matrix_lr,
        vector_lr=vector_lr,
        checkpoint_seconds=settings.checkpoint_minutes * 60,
        **batch,
    )


def shape_of(vocab: int, sizes: dict[str, int]) -> LlamaShape:
    """Checked sizes; the sentence names what does not fit."""
    known = ("hidden", "layers", "heads", "kv_heads", "ffn")
    unknown = sizes.keys() - set(known)
    if unknown:
        raise InputError(f"unknown size '{min(unknown)}'; use {', '.join(known)}.")
    if min(sizes.values()) < 1:
        raise InputError("every size of a network must be at least 1.")
    if sizes["hidden"] % (2 * sizes["heads"]) or sizes["heads"] % sizes["kv_heads"]:
        raise InputError(
            f"hidden={sizes['hidden']} must be a multiple of 2 * heads={sizes['heads']}, "
            f"and heads a multiple of kv_heads={sizes['kv_heads']}."
        )
    return LlamaShape(vocab=vocab, **sizes)


def mixture_weights(names: list[str], chosen: dict[str, float]) -> dict[str, float]:
    """Chosen shares; whoever was given none splits what is left equally."""
    unknown = chosen.keys() - set(names)
    if unknown:
        raise InputError(f"--weight names '{min(unknown)}', which is none of: {', '.join(names)}.")
    if min(chosen.values(), default=1.0) <= 0:
        raise InputError("every --weight must be above 0.")
    rest = [name for name in names if name not in chosen]
    left = max(1.0 - sum(chosen.values()), 0.0)
    if rest and left == 0.0:
        raise InputError(f"the weights leave nothing for {', '.join(rest)}.")
    return chosen | {name: left / len(rest) for name in rest}


def prepare_folders(
    settings: BaseSettings, target: LlamaShape, draft: LlamaShape, batch: dict[str, int]
) -> None:
    """Make both folders; refuse to continue a run that was started with other settings."""
    if (settings.minutes is None) == (settings.tokens is None):
        raise InputError("give either --minutes or --tokens.")
    if not settings.stdlib and not settings.corpora:
        raise InputError("there is nothing to train on: give a --corpus or leave the stdlib in.")
    if not 260 <= settings.vocab <= 65536:
        raise InputError("--vocab must lie between 260 and 65536.")
    for path in settings.corpora.values():
        if not path.is_file():
            raise InputError(f"there is no corpus file {path}.")
    for folder in (settings.out, settings.run_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}.") from None
    identity = {
        "target": target.as_dict(),
        "draft": draft.as_dict(),
        "batch": batch,
        "corpora": sorted(settings.corpora),
        "stdlib": settings.stdlib,
        "seed": settings.seed,
    }
    record = settings.run_dir / "run.json"
    if record.exists() and json.loads(record.read_text()) != identity:
        raise InputError(
            f"{settings.run_dir} holds a run with other settings; "
            f"name another --run-dir or delete it."
        )
    save_text_atomically(json.dumps(identity, indent=1), record)


def per_domain(title: str, values: dict[str, float]) -> str:
    return f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def start_over(run_dir: Path) -> None:
    """Forget what an earlier run left; only files a run writes are removed."""
    for name in ("run.json", "tokenizer.json", "target.pt", "draft.pt"):
        (run_dir / name).unlink(missing_ok=True)
