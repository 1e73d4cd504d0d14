"""Groups of options as parameters of commands.

A group is a dataclass whose fields carry typer metadata. A command takes whole groups as
parameters, and `command` spells them out for typer and puts them together again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Spell out, for typer, the parameters of `function` whose type is a group of options."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, type] = {}
    spelled: list[inspect.Parameter] = []
    for p in signature.parameters.values():
        if not is_dataclass(p.annotation):
            spelled.append(p.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[p.name] = p.annotation  # type: ignore[assignment]
        hints = get_type_hints(p.annotation, include_extras=True)
        spelled += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(f),
                annotation=hints[f.name],
            )
            for f in fields(p.annotation)
        ]

    def run(**values: Any) -> Any:
        for name, group in groups.items():
            taken = {f.name: values.pop(f.name) for f in fields(group)}
            values[name] = group(**taken)
        return function(**values)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(spelled)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in spelled}
    return run


def _default(f: Field[Any]) -> Any:
    return inspect.Parameter.empty if f.default is MISSING else f.default
