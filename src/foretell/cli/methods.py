"""`foretell methods`: what there is to choose from."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from foretell.cli.common import dumps
from foretell.core.errors import InputError
from foretell.core.registry import BUILTIN, lookup, names

app = typer.Typer(add_completion=False)


@app.command()
def methods(
    json: Annotated[bool, typer.Option("--json", help="A JSON list, on one line.")] = False,
) -> None:
    """List every drafter, verification rule, length policy and token tree."""
    rows = [_row(kind, name) for kind in BUILTIN for name in names(kind)]
    if json:
        print(dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    for kind in BUILTIN:
        table = Table(title=f"{kind}s".replace("ys", "ies"), title_justify="left", expand=False)
        for heading in ("name", "promise", "what it does", "options", "paper"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            if row["kind"] == kind:
                options = ", ".join(
                    k if v is None else f"{k}={v}" for k, v in row["options"].items()
                )
                table.add_row(row["name"], row["promise"], row["summary"], options, row["paper"])
        Console().print(table)


def _row(kind: str, name: str) -> dict[str, Any]:
    try:
        cls = lookup(kind, name)
    except (ImportError, AttributeError, InputError) as error:  # somebody else's broken plug-in
        cls = type("Broken", (), {"summary": f"cannot be loaded ({error})", "promise": "none"})
        return _describe(kind, name, cls, {})
    function = getattr(cls, "build", None) or cls.__init__
    options = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "context") and p.default is not p.empty
    }
    return _describe(kind, name, cls, options)


def _describe(kind: str, name: str, cls: type, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        # A policy only says how much to draft: it keeps the verifier's promise.
        "promise": str(getattr(cls, "promise", "exact")),
        "paper": getattr(cls, "paper", ""),
        "summary": getattr(cls, "summary", (cls.__doc__ or "").strip().partition("\n")[0]),
        "options": {k: _setting(v) for k, v in options.items()},
    }


def _setting(value: Any) -> Any:
    """An option's default; None = none, or no limit."""
    unlimited = isinstance(value, int) and value >= 1 << 30
    return None if unlimited else value
