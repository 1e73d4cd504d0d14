"""What is measured: method specs, and the modes of other systems.

A method is `draft[+verify=RULE][+policy=POLICY][+name=TEXT]`, each part a spec of its own:

    draft-model:tokens=4
    draft-model:tokens=4,branching=2+policy=confidence:threshold=0.5
    prompt-lookup+verify=rejection

`;` separates methods. A comma does so only when what follows is not `key=value`, so that
`prompt-lookup,draft-model:tokens=4,branching=2` is two methods. `@FILE` reads one JSON object a
line with `draft`, and perhaps `verify`, `policy` and `name`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.registry import Spec, check_specs, suggest

PLAIN = "none"
KEYS = ("draft", "verify", "policy", "name")
_PART = re.compile(r"\+(?=(?:verify|policy|name)=)")
_OPTION = re.compile(r"\s*[A-Za-z_][\w-]*\s*=")


@dataclass(frozen=True, slots=True)
class Method:
    """One way of decoding by foretell; `name` is what tables call it."""

    name: str
    draft: str = PLAIN
    verify: str = "auto"
    policy: str = "fixed"

    @classmethod
    def make(
        cls, draft: str, verify: str = "auto", policy: str = "fixed", name: str = ""
    ) -> Method:
        """InputError when a part names nothing that exists."""
        check_specs(draft, verify, policy)
        label = draft.strip()
        label += f"+verify={verify}" if verify != "auto" else ""
        label += f"+policy={policy}" if policy != "fixed" else ""
        return cls(name or label, draft.strip(), verify, policy)

    def to_json(self) -> dict[str, str]:
        return {k: getattr(self, k) for k in KEYS}


def parse_methods(texts: Iterable[str]) -> list[Method]:
    """Every `--methods` in order, without repetitions; plain decoding always comes first."""
    found = {PLAIN: Method(PLAIN)}
    for text in texts:
        for method in _parse(text):
            if found.setdefault(method.name, method) != method:
                raise InputError(f"Two methods are called '{method.name}': give one another name.")
    return list(found.values())


def _parse(text: str) -> Iterator[Method]:
    text = text.strip()
    if text.startswith("@"):
        yield from _from_file(Path(text[1:]).expanduser())
    elif text.startswith("{"):
        yield _from_json(text, "--methods")
    else:
        for piece in split(text):
            yield _one(piece)


def split(text: str) -> list[str]:
    """Cut a list of method specs; brackets and quotes of any kind protect what they enclose."""

    def cuts(separator: str, rest: str) -> bool:
        return separator == ";" or not _OPTION.match(rest)

    pieces = registry.split(text, ",;", "()[]{}", cuts)
    return [p.strip() for p in pieces if p.strip()]


def _one(text: str) -> Method:
    draft, *parts = _PART.split(text)
    if "=" in draft.partition(":")[0]:
        raise InputError(
            f"'{text}' begins with an option, not with a drafter: write it like "
            "draft-model:tokens=4+policy=confidence."
        )
    values: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key in values:
            raise InputError(f"'{text}' gives {key} twice.")
        values[key] = value
    return Method.make(draft, **values)


def _from_file(path: Path) -> Iterator[Method]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"The file of methods {path} cannot be read ({reason}).") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _from_json(line, f"line {number} of {path}")


def _from_json(text: str, where: str) -> Method:
    try:
        value: Any = json.loads(text)
    except ValueError as e:
        raise InputError(f"The method in {where} is no JSON ({e}).") from None
    if not isinstance(value, dict):
        raise InputError(f"The method in {where} is no JSON object.")
    if "draft" not in value:  # the keys of vLLM's --speculative-config
        return Method.make(str(Spec.parse(value)))
    wrong = next((k for k in value if k not in KEYS), None)
    if wrong is not None:
        raise InputError(f"The method in {where} has no part '{wrong}': {suggest(wrong, KEYS)}")
    parts = {k: str(Spec.parse(v)) if k != "name" else str(v) for k, v in value.items()}
    return Method.make(**parts)


@dataclass(frozen=True, slots=True)
class PeerMode:
    """One way of decoding by another system, e.g. transformers with prompt lookup."""

    system: str  # transformers, llamacpp, openvino, or the path of an adapter file
    mode: str  # plain, lookup, draft, or what the adapter offers
    tokens: int | None = None  # drafted a step; None = the peer's own default

    @property
    def title(self) -> str:
        return Path(self.system).stem if self.system.endswith(".py") else self.system

    @property
    def name(self) -> str:
        tail = f":tokens={self.tokens}" if self.tokens is not None else ""
        return f"{self.title}/{self.mode}{tail}"


MODES = ("plain", "lookup", "draft")
SYSTEMS = ("transformers", "llamacpp", "openvino")


def parse_peers(texts: Iterable[str], tokens: Iterable[int] = ()) -> list[PeerMode]:
    """`transformers,llamacpp:plain+draft,path/adapter.py` -> modes.

    tokens: lengths of drafts to try; the modes that draft appear once for each.
    """
    found: dict[str, PeerMode] = {}
    lengths: list[int | None] = list(tokens) or [None]
    for text in (t.strip() for part in texts for t in part.split(",")):
        if not text:
            continue
        system, _, wanted = text.partition(":")
        own_file = system.endswith(".py")
        if own_file and not Path(system).expanduser().is_file():
            raise InputError(f"--peers: there is no adapter file {system}.")
        if not own_file and system not in SYSTEMS:
            raise InputError(f"Unknown peer '{system}': {suggest(system, SYSTEMS)}")
        for mode in wanted.split("+") if wanted else MODES:
            if not own_file and mode not in MODES:
                raise InputError(f"'{system}' has no mode '{mode}': {suggest(mode, MODES)}")
            for n in lengths if mode != "plain" else [None]:
                peer = PeerMode(system, mode, n)
                found[peer.name] = peer
    return list(found.values())
