"""What is registered, as data: the rows of `foretell methods` and of the table of methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.core.registry import BUILTIN, Spec, lookup, names, parameters, suggest
from foretell.lab.bench.methods import PLAIN, Method

DRAFT = "draft-model"
POLICY_DRAFT = f"{DRAFT}:tokens=8"  # long enough for a policy to shorten it
# Drafters made of others, and what the table makes them of; --spec says otherwise.
PARTS = {"fallback": {"of": f"suffix+{DRAFT}", "least": "2"}, "merge": {"of": f"{DRAFT}+suffix"}}
STORE_OPTION = {"retrieval": "path"}  # the option that names a datastore


def kinds() -> list[str]:
    return list(BUILTIN)


def describe(kind: str, name: str) -> dict[str, Any]:
    """name, kind, promise, paper, summary and options (with their defaults; None = none, or no
    limit) of a method. One that cannot be imported says so in its summary."""
    try:
        cls = lookup(kind, name)
    except (ImportError, AttributeError, InputError) as error:  # somebody else's broken plug-in
        cls = type("Broken", (), {"summary": f"cannot be loaded ({error})", "promise": "none"})
        return _row(kind, name, cls, {})
    options = {
        name: None if p.default is p.empty else p.default for name, p in parameters(cls).items()
    }
    return _row(kind, name, cls, options)


def _row(kind: str, name: str, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        # A policy or a tree only says what to draft: it keeps the verifier's promise.
        "promise": str(getattr(cls, "promise", "exact")),
        "paper": getattr(cls, "paper", ""),
        "summary": getattr(cls, "summary", (cls.__doc__ or "").strip().partition("\n")[0]),
        "options": {k: _setting(v) for k, v in options.items()},
    }


def _setting(value: Any) -> Any:
    unlimited = isinstance(value, int) and value >= 1 << 30
    return None if unlimited else value


@dataclass(slots=True)
class Entry:
    """One registered method, how it is measured, and what came of it."""

    facts: dict[str, Any]  # of `describe`
    method: Method | None = None  # None = nothing of its kind is measured
    reason: str = ""  # why it was not measured, as a sentence
    needs: str = ""
    shared_bytes: int | None = None  # of what all requests share; None = it cannot tell
    sequence_bytes: int | None = None  # the most that a sequence held

    @property
    def kind(self) -> str:
        return self.facts["kind"]

    @property
    def key(self) -> str:
        """Its name in records: plain decoding is what everything is compared with."""
        plain = self.kind == "drafter" and self.facts["name"] == PLAIN
        return PLAIN if plain else f"{self.kind}/{self.facts['name']}"


def catalogue(
    only: Iterable[str] = (), specs: Iterable[str] = (), store: Path | None = None
) -> list[Entry]:
    """All registered methods, or those named in `only` and plain decoding.

    only: NAME or KIND/NAME. specs: ``[KIND/]NAME:key=value,...``, the options to measure a method
    with. store: a datastore for the drafters that read one. InputError for names that do not exist.
    """
    known = [(kind, name) for kind in kinds() for name in names(kind)]
    wanted = {found for text in only for found in _find(text, known)}
    options: dict[tuple[str, str], dict[str, Any]] = {}
    for text in specs:
        spec = Spec.parse(text)
        found = _find(spec.name, known)
        if len(found) > 1:
            several = " or ".join(f"{k}/{n}" for k, n in found)
            raise InputError(f"'{spec.name}' is a method of several kinds: say {several}.")
        options[found[0]] = spec.options
    return [
        _entry(kind, name, options.get((kind, name)), store)
        for kind, name in known
        if not wanted or (kind, name) in wanted or (kind, name) == ("drafter", PLAIN)
    ]


def _find(text: str, known: list[tuple[str, str]]) -> list[tuple[str, str]]:
    kind, slash, name = text.strip().rpartition("/")
    found = [(k, n) for k, n in known if n == name and (not slash or k == kind)]
    if not found:
        hint = suggest(
            text.strip(), {f"{k}/{n}" for k, n in known} if slash else {n for _, n in known}
        )
        raise InputError(f"There is no method '{text.strip()}': {hint}")
    return found


def _entry(kind: str, name: str, options: Mapping[str, Any] | None, store: Path | None) -> Entry:
    facts = describe(kind, name)
    if options is None:
        options = PARTS.get(name, {}) if kind == "drafter" else {}
        if kind == "drafter" and store is not None and name in STORE_OPTION:
            options = {STORE_OPTION[name]: str(store)}
    spec = str(Spec(name, dict(options)))
    if kind == "drafter":
        stored = store is not None and str(store) in spec  # a passing file: its name says nothing
        return Entry(facts, Method(name if stored else spec, spec))
    if kind == "tree":
        tail = "".join(f",{k}={v}" for k, v in options.items())
        return Entry(facts, Method(spec, f"{DRAFT}:tree={name}{tail}"))
    if kind == "verifier":
        return Entry(facts, Method(spec, DRAFT, verify=spec))
    if kind == "policy":
        return Entry(facts, Method(spec, POLICY_DRAFT, policy=spec))
    return Entry(facts)


def needs_of(kind: str, part: Any) -> str:
    """What a method (or its class) asks of the engine and the target, in words."""
    found: list[str] = []
    if kind == "verifier":
        draw = getattr(part, "draw", None)
        shapes = [s for s in ("chain", "tree") if s in getattr(part, "accepts", ())]
        found.append("drafts: " + " or ".join(shapes))
        if draw is not None:
            found.append(DRAWN[draw.value])
    needs = getattr(part, "needs", None)
    if needs is None:
        return "; ".join(found)
    if needs.taps:
        found.append("hidden states of the target: " + ", ".join(map(str, needs.taps)))
    if needs.prompt_logits:
        found.append("logits of the whole prompt")
    elif needs.logits:
        found.append("logits of every draft")
    if needs.own_model:
        found.append("a draft model")
    if needs.layer_access:
        found.append("single layers of the target")
    return "; ".join(found)


DRAWN = {
    "top": "the most probable tokens",
    "noise": "drawn with the target's noise",
    "sample": "drawn from q, siblings without replacement",
    "iid": "drawn from q, siblings independently",
    "top-one": "the most probable siblings and one draw",
    "paths": "independent chains drawn from q",
}
