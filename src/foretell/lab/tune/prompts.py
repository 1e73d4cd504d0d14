"""The prompts a race is run on: first turns of a workload, families taking turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.engine.llm import LLM
from foretell.lab.bench.prompts import encode_items
from foretell.lab.bench.workloads import load_workloads
from foretell.lab.check.prompts import PROMPTS


def builtin_prompts(llm: LLM, limit: int) -> list[list[int]]:
    return [llm.encode(p) for p in PROMPTS[:limit]]


def workload_prompts(
    llm: LLM, names: Sequence[str], data: Path | None, limit: int, max_tokens: int
) -> list[list[int]]:
    """At most `limit` prompts, as evenly over the families as they come; a prompt that is too long
    loses its middle. A race may end after any of them, so families alternate."""
    items = [i for w in load_workloads(names, data, limit) for i in w.items]
    for item in items:
        item.turns = item.turns[:1]
    room = llm.model.spec.max_positions - max_tokens - 1
    if room < 16:
        raise InputError(f"--max-tokens {max_tokens} leaves no room for a prompt: lower it.")

    def ask(what: str, **given: Any) -> Any:
        if what == "round_trip":
            return None
        if "messages" in given:
            return llm.chat_ids(given["messages"])
        return llm.encode(given.get("text") or given["ids"])

    chat = llm.tokenizer is not None and llm.tokenizer.has_chat_template
    found, _ = encode_items(
        [(i, i.family) for i in items], ask, lambda ids: [], chat=chat, room=room, cut=True
    )
    families: dict[str, list[list[int]]] = {}
    for prompt in found:
        families.setdefault(prompt.family, []).append(prompt.ids)
    mixed = [p for group in zip_longest(*families.values()) for p in group if p is not None]
    return mixed[:limit]
