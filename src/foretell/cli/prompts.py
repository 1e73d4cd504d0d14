"""Prompts from the command line, standard input, and files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError

Message = dict[str, str]
JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(slots=True)
class Item:
    """One prompt, or one conversation that is decoded turn by turn.

    ``raw`` is a text or a list of ids that goes to the model as it is; otherwise every entry of
    ``turns`` is what a user says next after ``messages``. A conversation without turns ends with
    the last of its messages.
    """

    where: str  # for error messages: "line 3 of prompts.jsonl"
    id: Any = None
    raw: str | list[int] | None = None
    messages: list[Message] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return max(1, len(self.turns))


def one_prompt(text: str, where: str = "the prompt") -> Item:
    """Check a prompt that was given as text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{_capital(where)} is not valid UTF-8: convert it first.") from None
    if not text:
        raise InputError(f"{_capital(where)} is empty: give at least one character.")
    return Item(where, raw=text)


def from_stdin() -> Item:
    return one_prompt(_decode(sys.stdin.buffer.read(), "standard input"), "standard input")


def from_file(path: Path) -> list[Item]:
    """A .txt file is one prompt; JSON lines hold one object each, with `prompt` (a text, or token
    ids), `turns`, `messages` or `question`, and perhaps `id`, `task_id` or `question_id`."""
    try:
        text = _decode(path.read_bytes(), str(path))
    except OSError as e:
        raise InputError(f"The prompt file {path} cannot be read ({e.strerror}).") from None
    if path.suffix not in JSON_LINES and (path.suffix == ".txt" or not _looks_like_json(text)):
        return [one_prompt(text, str(path))]
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            items.append(_item(line, f"line {number} of {path}"))
    if not items:
        raise InputError(f"The prompt file {path} is empty: give one JSON object a line.")
    return items


def as_chat(item: Item, chat: bool, system: str | None) -> Item:
    """Apply --chat (a raw text becomes what the user says) and --system."""
    if chat and isinstance(item.raw, str):
        item.turns, item.raw = [item.raw], None
    if system is not None:
        if item.raw is not None:
            raise InputError("--system needs a conversation: add --chat.")
        rest = [m for m in item.messages if m["role"] != "system"]
        item.messages = [{"role": "system", "content": system}, *rest]
    return item


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{_capital(where)} is not valid UTF-8 (byte {e.start}): convert it first."
        ) from None


def _looks_like_json(text: str) -> bool:
    first = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _item(line: str, where: str) -> Item:
    try:
        entry = json.loads(line)
    except ValueError as e:
        raise InputError(f"{_capital(where)} is no JSON ({e}).") from None
    if not isinstance(entry, dict):
        raise InputError(f"{_capital(where)} is no JSON object.")
    named = [entry[k] for k in ("id", "task_id", "question_id") if entry.get(k) is not None]
    item = Item(where, id=named[0] if named else None)
    if "messages" in entry:
        item.messages = _messages(entry["messages"], where)
    elif "turns" in entry:
        item.turns = _texts(entry["turns"], where, "turns")
    elif "prompt" in entry:
        item.raw = _prompt(entry["prompt"], where)
    elif "question" in entry:
        item.turns = _texts([entry["question"]], where, "question")
    else:
        raise InputError(f"{_capital(where)} has no prompt, turns, messages or question.")
    return item


def _prompt(value: Any, where: str) -> str | list[int]:
    if isinstance(value, str):
        return one_prompt(value, where).raw or ""
    ids = isinstance(value, list) and all(type(t) is int for t in value)
    if not ids or not value:
        raise InputError(f"{_capital(where)}: prompt is a text or a list of token ids.")
    return value


def _texts(value: Any, where: str, name: str) -> list[str]:
    fine = isinstance(value, list) and value and all(isinstance(t, str) and t for t in value)
    if not fine:
        raise InputError(f"{_capital(where)}: {name} holds no text, or an empty one.")
    return value


def _messages(value: Any, where: str) -> list[Message]:
    fine = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )
    if not fine:
        raise InputError(
            f"{_capital(where)}: messages is a list of objects with a role and a content."
        )
    return value


def _capital(text: str) -> str:
    return text if "/" in text.split(" ")[0] else text[:1].upper() + text[1:]
