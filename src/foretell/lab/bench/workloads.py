"""Prompts to measure on: the public sets from local files, and anybody's JSON lines."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.core.registry import suggest

MT_BENCH = frozenset(
    {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
)
MEANINGLESS = frozenset(
    {"random", "random-tokens", "random_tokens", "synthetic", "dummy", "filler", "noise"}
)
Row = dict[str, Any]


@dataclass(slots=True)
class Item:
    """One prompt, or one conversation whose `turns` a user says one after the other.

    Exactly one of turns, messages and ids is given. `raw` is what a model without a chat template
    continues in place of the first turn, where that is another text.
    """

    key: str  # unique in the run: "spec_bench/qa/321"
    workload: str
    family: str
    turns: list[str] = field(default_factory=list)
    raw: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] | None = None


def _spec_bench(row: Row) -> Row:
    category = row["category"]
    family = "mt_bench" if category in MT_BENCH else category
    return {"family": family, "turns": row["turns"], "id": row["question_id"]}


def _mt_bench(row: Row) -> Row:
    return {"family": row["category"], "turns": row["turns"], "id": row["question_id"]}


def _humaneval(row: Row) -> Row:
    code = row["prompt"]
    ask = f"Complete this Python function. Answer with the whole function.\n\n```python\n{code}```"
    return {"turns": [ask], "raw": code, "id": row["task_id"].rpartition("/")[2]}


def _gsm8k(row: Row) -> Row:
    question = row["question"]
    return {"turns": [question], "raw": f"Question: {question}\nAnswer:"}


def _math500(row: Row) -> Row:
    problem = row["problem"]
    return {"turns": [problem], "raw": f"Problem: {problem}\nSolution:", "id": row.get("unique_id")}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a public set lies under the data folder, and how its rows read."""

    files: tuple[str, ...]  # the first that exists, each perhaps with .gz behind it
    read: Callable[[Row], Row]


SOURCES = {
    "spec_bench": Source(("spec_bench/question.jsonl",), _spec_bench),
    "mt_bench": Source(("mt_bench/question.jsonl",), _mt_bench),
    "humaneval": Source(("humaneval/humaneval.jsonl", "humaneval/HumanEval.jsonl"), _humaneval),
    "gsm8k": Source(("gsm8k/test.jsonl",), _gsm8k),
    "math500": Source(("math500/test.jsonl",), _math500),
}
ALIASES = {"spec-bench": "spec_bench", "mt-bench": "mt_bench", "math-500": "math500"}


@dataclass(slots=True)
class Workload:
    """What was read, and from which file."""

    name: str
    path: Path
    sha256: str
    items: list[Item]

    def to_json(self) -> dict[str, Any]:
        """Which file and which of its prompts."""
        keys = hashlib.sha256("\n".join(i.key for i in self.items).encode()).hexdigest()
        return {
            "name": self.name,
            "path": str(self.path),
            "sha256": self.sha256,
            "prompts": len(self.items),
            "keys_sha256": keys,
        }


def load_workloads(
    names: Iterable[str],
    data: Path | None,
    limit: int | None = None,
    families: Iterable[str] = (),
) -> list[Workload]:
    """Names of public sets, or paths of JSON-lines and text files.

    limit: prompts of each family, taken evenly over its list. InputError says what is missing.
    """
    wanted = frozenset(families)
    found = [_load(name.strip(), data) for name in names if name.strip()]
    if not found:
        raise InputError("--workload names nothing: give one of " + ", ".join(SOURCES) + ".")
    known = {i.family for w in found for i in w.items}
    for family in wanted - known:
        raise InputError(f"--family {family} is not in this workload: {suggest(family, known)}")
    for workload in found:
        kept = [i for i in workload.items if not wanted or i.family in wanted]
        workload.items = evenly(kept, limit)
    keys = [i.key for w in found for i in w.items]
    if len(set(keys)) != len(keys):
        raise InputError("The same workload is named twice, or two of its prompts share an id.")
    return found


def evenly(items: list[Item], limit: int | None) -> list[Item]:
    """`limit` items of every family, spread over its list; the order stays."""
    if limit is None:
        return items
    chosen: set[str] = set()
    for family in {i.family for i in items}:
        group = [i for i in items if i.family == family]
        n = min(limit, len(group))
        chosen |= {group[k * len(group) // n].key for k in range(n)}
    return [i for i in items if i.key in chosen]


def _load(name: str, data: Path | None) -> Workload:
    if name.lower() in MEANINGLESS:
        raise InputError(
            f"--workload {name}: how many drafts a model accepts depends on the text, and on "
            "random tokens it is a number that no user will ever see; choose real prompts, such as "
            "spec_bench or a JSON-lines file."
        )
    name = ALIASES.get(name.lower(), name)
    if name not in SOURCES:
        return _own_file(name)
    if data is None:
        raise InputError(
            f"--workload {name} needs its files: name their folder with --data or FORETELL_DATA."
        )
    source = SOURCES[name]
    tried = [data / (f + tail) for f in source.files for tail in ("", ".gz")]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise InputError(f"--workload {name}: there is no file {tried[0]} (see --data).")
    items = []
    for number, row, where in _rows(path):
        try:
            parts = source.read(row)
        except (KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{where} is not a row of {name} ({e} is missing).") from None
        family = str(parts.get("family") or name)
        at = parts.get("id") if parts.get("id") is not None else number
        turns = _texts(parts["turns"], where)
        items.append(Item(f"{name}/{family}/{at}", name, family, turns, parts.get("raw")))
    return Workload(name, path, digest(path), items)


def _own_file(name: str) -> Workload:
    path = Path(name).expanduser()
    if not path.is_file():
        hint = suggest(name, SOURCES)
        raise InputError(f"--workload {name} is no file and no known set: {hint}")
    label = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    if path.suffix == ".txt":
        text = _text(path)
        if not text.strip():
            raise InputError(f"{path} is empty.")
        return Workload(label, path, digest(path), [Item(f"{label}/1", label, label, [text])])
    items = []
    for number, row, where in _rows(path):
        family = str(row.get("family") or row.get("category") or label)
        named = (row.get(k) for k in ("id", "task_id", "question_id", "unique_id"))
        at = next((n for n in named if n is not None), number)
        item = Item(f"{label}/{family}/{at}", label, family)
        prompt = row.get("prompt")
        if "messages" in row:
            item.messages = _messages(row["messages"], where)
        elif "turns" in row:
            item.turns = _texts(row["turns"], where)
        elif isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt):
            item.ids = prompt
        elif "prompt" in row:
            item.turns = _texts([prompt], where)
        elif "question" in row or "problem" in row:
            item.turns = _texts([row.get("question", row.get("problem"))], where)
        else:
            raise InputError(f"{where} has no prompt, turns, messages, question or problem.")
        items.append(item)
    return Workload(label, path, digest(path), items)


def _rows(path: Path) -> Iterable[tuple[int, Row, str]]:
    lines = _text(path).split("\n")
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty: give one JSON object a line.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError as e:
            raise InputError(f"{where} is no JSON ({e}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} is no JSON object.")
        yield number, row, where


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not valid UTF-8 (byte {e.start}).") from None
    except (OSError, EOFError) as e:
        raise InputError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}).") from None


def _texts(value: Any, where: str) -> list[str]:
    if isinstance(value, list) and value and all(isinstance(t, str) and t for t in value):
        return value
    raise InputError(f"{where} holds no text, or an empty one.")


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    fine = isinstance(value, list) and value
    fine = fine and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not fine:
        raise InputError(f"{where}: messages is a list of objects with a role and a content.")
    return value


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
