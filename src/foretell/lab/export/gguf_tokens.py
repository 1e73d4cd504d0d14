"""The tokenizer section of a GGUF file, from any tokenizer foretell loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.models.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """What llama.cpp wants to know; `kind` is its name for the algorithm, `pre` for how text is cut
    into words ("default" where foretell knows no name: ids are right, other text may be cut
    differently)."""

    kind: str  # gpt2 (byte-level BPE), llama (sentencepiece), no_vocab
    size: int
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pre: str = "default"
    add_bos: bool = False
    add_space: bool = False
    template: str | None = None
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, unk, pad


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint of `size` embeddings; kind no_vocab where there is none."""
    try:
        tokenizer = Tokenizer.load(folder)
    except InputError:
        return Vocabulary("no_vocab", size)
    spec = json.loads(tokenizer.backend.to_str())
    model = spec["model"]
    kind = {"BPE": "llama" if model.get("byte_fallback") else "gpt2", "Unigram": "llama"}
    found = Vocabulary(kind.get(model["type"], "no_vocab"), size)
    if found.kind == "no_vocab":
        return found
    _tokens(found, tokenizer, model)
    if found.kind == "gpt2":
        found.merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        found.pre = word_rule(spec.get("pre_tokenizer"))
    else:
        found.scores = _scores(found.tokens, model)
        found.add_space = _space(spec)
    found.add_bos = tokenizer.encode("")[:1] == [tokenizer.bos_id]
    found.template = tokenizer.config.templates.get("default")
    _special(found, tokenizer)
    return found


def _tokens(found: Vocabulary, tokenizer: Tokenizer, model: dict[str, Any]) -> None:
    by_id = {i: t for t, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = set(tokenizer.backend.get_added_tokens_decoder())
    unknown = model.get("unk_token")
    for i in range(found.size):
        text = by_id.get(i)
        if text is None:
            kind, text = UNUSED, f"[unused {i}]"
        elif i in tokenizer.special_ids:
            kind = UNKNOWN if text == unknown else CONTROL
        elif found.kind == "llama" and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        else:
            kind = USER_DEFINED if i in added else NORMAL
        found.tokens.append(text)
        found.types.append(kind)


def _special(found: Vocabulary, tokenizer: Tokenizer) -> None:
    named = tokenizer.config.named
    for role in ("bos", "eos", "unk", "pad"):
        token = tokenizer.token_id(named.get(f"{role}_token", ""))
        if token is not None and token < found.size:
            found.ids[role] = token
    ends = [i for i in sorted(tokenizer.eos_ids) if i < found.size]
    if ends:
        found.ids.setdefault("eos", ends[0])
        others = [i for i in ends if i != found.ids["eos"]]
        if others:
            found.ids["eot"] = others[-1]


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """sentencepiece joins the pair whose result scores best."""
    if model["type"] == "Unigram":
        known = {text: float(score) for text, score in model["vocab"]}
    else:
        known: dict[str, float] = {}
        for rank, pair in enumerate(model["merges"]):
            known.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), -rank)
    return [known.get(t, -1e6 if t.startswith("<0x") else 0.0) for t in tokens]


def _space(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    for part in _flat(spec.get("normalizer")) + _flat(spec.get("pre_tokenizer")):
        if part["type"] == "Prepend":
            return True
        if part["type"] == "Metaspace":
            return part.get("prepend_scheme", "always") != "never"
    return False


def word_rule(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of the rule that cuts a text into words, as near as it has one."""
    parts = _flat(pre_tokenizer)
    patterns = [p["pattern"].get("Regex", "") for p in parts if p["type"] == "Split"]
    if any(r"\p{N}{1,3}" in p for p in patterns):
        return "llama-bpe"
    if any(r"|\p{N}|" in p for p in patterns):
        return "qwen2"
    if not patterns and any(p["type"] == "Digits" for p in parts):
        return "smollm"
    if not patterns and any(p["type"] == "ByteLevel" and p.get("use_regex", True) for p in parts):
        return "gpt-2"
    return "default"


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("pretokenizers") or part.get("normalizers") or []
    return [p for one in inner for p in _flat(one)]
