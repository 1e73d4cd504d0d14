"""From items of a workload to the token ids that every system decodes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.lab.bench.workloads import Item

ALIKE = 0.9  # share of ids that text survives being decoded and encoded again with


@dataclass(slots=True)
class Prompt:
    """One turn, as ids. `cut`: ids taken out of its middle to make it fit."""

    key: str
    family: str
    turn: int
    ids: list[int]
    cut: int = 0


@dataclass(slots=True)
class Unit:
    """What one call decodes: one prompt, or `batch` prompts of a family."""

    key: str
    family: str
    prompts: list[list[int]]


Ask = Callable[..., Any]  # a worker's `ask`


def encode_items(
    items: Iterable[tuple[Item, str]],
    ask: Ask,
    plain: Callable[[list[int]], list[int]],
    *,
    chat: bool,
    room: int,
    cut: bool,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[list[Prompt], dict[str, int]]:
    """(prompts, how many of each family did not fit).

    items: with the family name to show. plain: ids -> plain decoding's answer, which later turns of
    a conversation are asked after: every method gets the same prompts. chat: use the model's chat
    template. room: ids a prompt may have; longer ones are left out, or lose their middle (`cut`).
    """
    prompts: list[Prompt] = []
    skipped: dict[str, int] = {}
    for item, family in items:
        texts: list[str] = []
        for turn in range(max(1, len(item.turns))):
            ids = _turn(item, turn, texts, ask, chat)
            lost = len(ids) - room
            if lost > 0 and not cut:
                skipped[family] = skipped.get(family, 0) + max(1, len(item.turns)) - turn
                break
            if lost > 0:
                head = room - room // 2
                ids = ids[:head] + ids[len(ids) - room // 2 :]
            key = f"{item.key}#{turn + 1}" if len(item.turns) > 1 else item.key
            prompts.append(Prompt(key, family, turn + 1, ids, max(0, lost)))
            if turn + 1 < len(item.turns):
                texts += [item.turns[turn], ask("decode", ids=plain(ids))]
        advance(1)
    return prompts, skipped


def _turn(item: Item, turn: int, texts: list[str], ask: Ask, chat: bool) -> list[int]:
    """The ids of a turn after `texts`: what was said before, user and model by turns."""
    if item.ids is not None:
        _refuse_noise(item, ask)
        return ask("encode", ids=item.ids)
    said = item.turns[turn] if item.turns else ""
    if chat:
        roles = ("user", "assistant")
        before = [{"role": roles[i % 2], "content": t or " "} for i, t in enumerate(texts)]
        messages = [*item.messages, *before]
        if item.turns:
            messages.append({"role": "user", "content": said})
        return ask("encode", messages=messages)
    if item.messages:
        return ask("encode", text="\n\n".join(m["content"] for m in item.messages))
    if turn == 0 and item.raw is not None:
        said = item.raw
    return ask("encode", text="\n\n".join([*texts, said]))


def _refuse_noise(item: Item, ask: Ask) -> None:
    """Ids of a text come back from being decoded and encoded again; random ids do not."""
    assert item.ids is not None
    again = ask("round_trip", ids=item.ids)
    if again is None or len(item.ids) < 8:
        return
    alike = difflib.SequenceMatcher(None, item.ids, again, autojunk=False).ratio()
    if alike < ALIKE:
        raise InputError(
            f"The ids of {item.key} are no text of this model's tokenizer ({alike:.0%} survive "
            "being decoded and encoded again): acceptance on random tokens means nothing."
        )


def units(prompts: Iterable[Prompt], batch: int) -> list[Unit]:
    """Groups of `batch` prompts of the same family, in order."""
    groups: dict[str, list[Prompt]] = {}
    for p in prompts:
        groups.setdefault(p.family, []).append(p)
    found = []
    for family, members in groups.items():
        for at in range(0, len(members), batch):
            part = members[at : at + batch]
            key = part[0].key + (f"+{len(part) - 1}" if len(part) > 1 else "")
            found.append(Unit(key, family, [p.ids for p in part]))
    return found


def write(path: Path, prompts: Iterable[Prompt]) -> None:
    """One JSON object a line; the file appears whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(asdict(p)) + "\n" for p in prompts), encoding="utf-8")
    part.replace(path)


def read(path: Path) -> list[Prompt]:
    return [Prompt(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
