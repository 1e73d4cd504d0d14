"""Write a trained pair as Hugging Face checkpoints, with a model card that says what was measured.

Every file is written beside its place and moved there, so a reader never meets half a file; the
weights go last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from tokenizers import Tokenizer

from foretell.lab.train.loop import Outcome
from foretell.lab.train.network import Llama
from foretell.lab.train.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    special_id,
)


@dataclass(frozen=True)
class NetworkReport:
    """One network's training in numbers; bits per byte are of the exported weights."""

    trained: Outcome
    parameters: int
    bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class ModelCard:
    command: str
    target: NetworkReport
    draft: NetworkReport
    agreement: dict[str, float]  # domain -> share of equal first choices
    corpora: list[tuple[str, str, float, int]]  # name, licence, mixture share, tokens
    samples: list[tuple[str, str]]  # prompt, greedy continuation
    device: str


def export_pair(
    target: Llama, draft: Llama, tokenizer: Tokenizer, card: ModelCard, out: Path
) -> None:
    """The target into `out`, the drafter into `out/draft`."""
    write_checkpoint(draft, tokenizer, draft_card(card), out / "draft")
    write_checkpoint(target, tokenizer, target_card(card), out)


def write_checkpoint(network: Llama, tokenizer: Tokenizer, readme: str, folder: Path) -> None:
    end_of_text = special_id(tokenizer, END_OF_TEXT)
    eos = [end_of_text, special_id(tokenizer, TURN_END)]
    config = network.shape.hf_config(eos, bos=end_of_text, pad=end_of_text)
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    tokenizer_config = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": network.shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "chat_template": CHAT_TEMPLATE,
    }
    special_tokens = {**names, "additional_special_tokens": SPECIAL_TOKENS[1:]}
    generation = {"bos_token_id": end_of_text, "eos_token_id": eos, "pad_token_id": end_of_text}
    # The head is the embedding, so the checkpoint holds it once, as transformers saves it.
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in network.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": as_json(tokenizer_config),
        "special_tokens_map.json": as_json(special_tokens),
        "generation_config.json": as_json(generation),
        "config.json": as_json(config),
        "README.md": readme.encode(),
        "model.safetensors": serialise(weights, metadata={"format": "pt"}),
    }
    for name, content in files.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def target_card(card: ModelCard) -> str:
    rows = "".join(
        f"| {name} | {licence} | {share:.0%} | {tokens:,} | "
        f"{card.target.bits_per_byte[name]:.3f} | {card.draft.bits_per_byte[name]:.3f} | "
        f"{card.agreement[name]:.1%} |\n"
        for name, licence, share, tokens in card.corpora
    )
    samples = "".join(
        f"Prompt:\n````text\n{prompt}\n````\nContinuation:\n````text\n{text}\n````\n\n"
        for prompt, text in card.samples
    )
    return f"""# A tiny language model for demonstrations and tests

{card.target.parameters:,} parameters, Llama-shaped, with a drafter of
{card.draft.parameters:,} parameters in `draft/` (same tokenizer). It exists so that speculative
decoding can be tried, tested and measured without a download. It writes recognisable Python and
step-by-step arithmetic, and it is **wrong most of the time**: do not rely on anything it says.

Trained {datetime.now(UTC):%Y-%m-%d} on {card.device} with

```
{card.command}
```

| | parameters | tokens seen | optimizer steps | minutes |
|---|---|---|---|---|
| target | {card.target.parameters:,} | {card.target.trained.tokens:,} | \
{card.target.trained.steps:,} | {card.target.trained.seconds / 60:.1f} |
| drafter | {card.draft.parameters:,} | {card.draft.trained.tokens:,} | \
{card.draft.trained.steps:,} | {card.draft.trained.seconds / 60:.1f} |

Held-out text is one segment in fifty, never trained on; numbers are of the stored bfloat16
weights. Agreement: how often the drafter's most likely next token is the target's.

| text | licence | share of the batches | tokens in the corpus | target bits/byte | \
drafter bits/byte | agreement |
|---|---|---|---|---|---|---|
{rows}
Chat format: `{TURN_START}role`, newline, text, `{TURN_END}`; the template is in
`tokenizer_config.json`. `{END_OF_TEXT}` separates documents. Context: trained on rows of up to
2,048 tokens, mostly shorter.

## Greedy samples

{samples}"""


def draft_card(card: ModelCard) -> str:
    return f"""# Drafter of the model in the folder above

{card.draft.parameters:,} parameters, Llama-shaped, same tokenizer; trained after its target on the
same text with cross-entropy mixed with distillation from the target's probabilities. On its own it
is a poor language model. Numbers are in the target's card.
"""
