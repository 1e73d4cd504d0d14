"""Names -> methods. One line a method; the class is imported only when it is asked for.

Third parties add methods through entry points in the groups ``foretell.drafters``,
``foretell.verifiers``, ``foretell.policies`` and ``foretell.trees``.
"""

from __future__ import annotations

import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from foretell.core.errors import InputError

BUILTIN: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {
        "drafter": {
            "none": "foretell.drafters.none:NoDrafter",
            "prompt-lookup": "foretell.drafters.ngram:PromptLookup",
            "draft-model": "foretell.drafters.draft_model:DraftModel",
            "token-recycling": "foretell.drafters.recycling:TokenRecycling",
            "suffix": "foretell.drafters.suffix:Suffix",
            "aggressive": "foretell.drafters.aggressive:Aggressive",
            "aded": "foretell.drafters.aded:Aded",
            "stand": "foretell.drafters.stand:Stand",
            "retrieval": "foretell.drafters.retrieval:Retrieval",
            "lookahead": "foretell.drafters.lookahead:Lookahead",
            "early-exit": "foretell.drafters.early_exit:EarlyExit",
            "self-skip": "foretell.drafters.self_skip:SelfSkip",
            "del": "foretell.drafters.del_exit:DynamicExit",
            "fallback": "foretell.drafters.fallback:Fallback",
            "merge": "foretell.drafters.merge:Merge",
            "blend": "foretell.drafters.blend:Blend",
            "bandit": "foretell.drafters.bandit:Bandit",
            "choice": "foretell.drafters.choice:Choice",
            "rasd": "foretell.drafters.rasd:Rasd",
            "graft": "foretell.drafters.graft:Graft",
        },
        "verifier": {
            "greedy": "foretell.verify.greedy:Greedy",
            "replay": "foretell.verify.replay:Replay",
            "rejection": "foretell.verify.rejection:Rejection",
            "specinfer": "foretell.verify.specinfer:SpecInfer",
            "spectr": "foretell.verify.spectr:SpecTr",
            "greedy-draft": "foretell.verify.greedy_draft:GreedyDraft",
            "block": "foretell.verify.block:Block",
            "multipath": "foretell.verify.multipath:MultiPath",
            "typical": "foretell.verify.typical:Typical",
            "reflective": "foretell.verify.reflective:Reflective",
            "judge": "foretell.verify.judge:Judge",
            "lexical-units": "foretell.verify.lexical_units:LexicalUnits",
        },
        "policy": {
            "fixed": "foretell.control.length.fixed:Fixed",
            "confidence": "foretell.control.length.confidence:Confidence",
            "entropy": "foretell.control.length.entropy:Entropy",
            "adaptive": "foretell.control.length.adaptive:Adaptive",
            "specdec++": "foretell.control.length.specdecpp:SpecDecPlusPlus",
            "goodput": "foretell.control.length.goodput.policy:Goodput",
            "pearl": "foretell.control.length.pearl:Pearl",
        },
        "tree": {
            "chain": "foretell.drafters.trees.chain:Chain",
            "k-ary": "foretell.drafters.trees.k_ary:KAry",
            "static": "foretell.drafters.trees.static:Static",
            "sequoia": "foretell.drafters.trees.sequoia:Sequoia",
            "optimal": "foretell.drafters.trees.optimal:Optimal",
            "dyspec": "foretell.drafters.trees.dyspec:DySpec",
            "eagle2": "foretell.drafters.trees.eagle2:Eagle2",
            "rsd-c": "foretell.drafters.trees.rsd_c:RsdC",
            "rsd-s": "foretell.drafters.trees.rsd_s:RsdS",
            "specinfer": "foretell.drafters.trees.specinfer:SpecInfer",
        },
        "mode": {  # ways to generate that draft nothing
            "superposed": "foretell.engine.superposed:Superposed",
        },
    }
)


def split(
    text: str,
    separators: str,
    brackets: str = "()",
    cuts: Callable[[str, str], bool] = lambda separator, rest: True,
) -> list[str]:
    """`text.split`, at any of `separators`, that leaves what stands in `brackets` (pairs) alone.
    cuts: asked of a separator and all that follows it."""
    opening, closing = brackets[::2], brackets[1::2]
    pieces, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in opening) - (char in closing)
        if char in separators and depth == 0 and cuts(char, text[at + 1 :]):
            pieces.append(text[start:at])
            start = at + 1
    return [*pieces, text[start:]]


@dataclass(frozen=True, slots=True)
class Spec:
    """A method's name and options, from ``name:key=value,key=value`` or a JSON object."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str | Mapping[str, Any] | Spec) -> Spec:
        """Accepts a Spec, ``name:key=value,...``, or a mapping / JSON object with the keys of
        vLLM's ``--speculative-config`` (method, model, num_speculative_tokens, ...)."""
        if isinstance(text, Spec):
            return text
        if isinstance(text, Mapping):
            return cls._from_config(text)
        if text.lstrip().startswith("{"):
            try:
                return cls._from_config(json.loads(text))
            except json.JSONDecodeError as e:
                raise InputError(f"The method's JSON cannot be read ({e}).") from None
        name, _, rest = text.strip().partition(":")
        options: dict[str, Any] = {}
        for item in filter(None, split(rest, ",")):
            key, eq, value = item.partition("=")
            if not eq or not key.strip():
                raise InputError(f"'{item}' in '{text}' is not of the form key=value.")
            options[key.strip()] = value.strip()
        return cls(name, options)

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> Spec:
        known = dict(config)
        name = known.pop("method", None) or ("draft-model" if "model" in known else None)
        if name is None:
            raise InputError("The method's JSON needs a 'method' (or a 'model' to draft with).")
        names = {"ngram": "prompt-lookup", "draft_model": "draft-model"}
        keys = {
            "model": "path",
            "num_speculative_tokens": "tokens",
            "prompt_lookup_max": "max_ngram",
            "prompt_lookup_min": "min_ngram",
        }
        return cls(names.get(name, name), {keys.get(k, k): v for k, v in known.items()})

    def __str__(self) -> str:
        tail = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}:{tail}" if tail else self.name


def names(kind: str) -> dict[str, str]:
    """All methods of a kind: name -> 'module:Class', built-in ones first."""
    found = dict(BUILTIN[kind])
    group = {"policy": "foretell.policies"}.get(kind, f"foretell.{kind}s")
    for point in metadata.entry_points(group=group):
        found.setdefault(point.name, point.value)
    return found


def suggest(wrong: str, known: typing.Iterable[str]) -> str:
    """', did you mean X?' or the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(wrong, known, 1, 0.5)
    return f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(known)}."


def check_name(kind: str, name: str) -> None:
    """InputError with a suggestion when there is no method of that name."""
    if name not in (table := names(kind)):
        raise InputError(f"Unknown {kind} '{name}': {suggest(name, table)}")


def check_specs(draft: str, verify: str, policy: str) -> None:
    """InputError when one of three specs names nothing that exists; "auto" does."""
    for kind, text in (("drafter", draft), ("verifier", verify), ("policy", policy)):
        name = Spec.parse(text).name
        if name != "auto":
            check_name(kind, name)


def lookup(kind: str, name: str) -> type:
    """The class behind a name; InputError with a suggestion when there is none."""
    check_name(kind, name)
    table = names(kind)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def create(kind: str, spec: str | Mapping[str, Any] | Spec, context: Any = None) -> Any:
    """Build a method from its spec.

    Options are those of `parameters`, converted to the annotated types. Where a class without
    `from_context` takes ``**others``, unknown options are handed on as they are.
    """
    spec = Spec.parse(spec)
    cls = lookup(kind, spec.name)
    build = getattr(cls, "build", None)
    options = _convert(spec, cls)
    return cls(**options) if build is None else build(context, **options)


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The options of a method: the keyword parameters of ``build(context, **options)`` if the class
    has one, otherwise of its constructor.

    Where ``cls.from_context`` names the parameters of the constructor that `build` makes out of the
    context, the constructor's others are options too, which `build` hands on.
    """
    build = getattr(cls, "build", None)
    made = _named(cls.__init__)
    if build is None:
        return made
    own, given = _named(build), getattr(cls, "from_context", None)
    if given is None:
        return own
    first = {name: p for name, p in own.items() if name not in made}
    rest = {name: own.get(name, p) for name, p in made.items() if name in own or name not in given}
    return first | rest


def _named(function: Any) -> dict[str, inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        p.name: p
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "context") and p.kind not in variadic
    }


def _open_ended(cls: type) -> bool:
    """Whether options it does not name are its own business."""
    function: Any = getattr(cls, "build", None) or cls.__init__
    if function is object.__init__ or hasattr(cls, "from_context"):
        return False
    kinds = (p.kind for p in inspect.signature(function).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _convert(spec: Spec, cls: type) -> dict[str, Any]:
    known, open_ended = parameters(cls), _open_ended(cls)
    functions: list[Any] = [getattr(cls, "build", None) or cls.__init__]
    if hasattr(cls, "from_context"):
        functions.insert(0, cls.__init__)
    hints = {name: hint for f in functions for name, hint in typing.get_type_hints(f).items()}
    result = {}
    for key, value in spec.options.items():
        if key not in known and open_ended:
            result[key] = value
            continue
        if key not in known:
            hint = suggest(key, known) if known else "it takes no options."
            raise InputError(f"'{spec.name}' has no option '{key}': {hint}")
        result[key] = _cast(spec.name, key, value, hints.get(key, str))
    needed = (name for name, p in known.items() if p.default is p.empty)
    missing = [name for name in needed if name not in result]
    if missing:
        raise InputError(f"'{spec.name}' needs {missing[0]}=...: {spec.name}:{missing[0]}=VALUE.")
    return result


def _cast(name: str, key: str, value: Any, hint: Any) -> Any:
    choices = [t for t in typing.get_args(hint) if t is not type(None)] or [hint]
    if not isinstance(value, str | int | float | None):
        return value
    value = str(value)
    if type(None) in typing.get_args(hint) and value.lower() == "none":
        return None
    for kind in choices:
        try:
            if kind is bool:
                return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            return kind(value)
        except (ValueError, KeyError):
            continue
    wanted = " or ".join(getattr(k, "__name__", str(k)) for k in choices)
    raise InputError(f"'{name}:{key}={value}' is not a valid {wanted}.")
