"""`foretell methods`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foretell.cli.common import dumps
from foretell.core.registry import names

app = typer.Typer(add_completion=False)
TITLES = {
    "tree": "trees (draft-model:tree=NAME,key=value,...)",
    "verifier": "verification rules",
    "policy": "length policies",
}


@app.command()
def methods(
    json: Annotated[bool, typer.Option("--json", help="A JSON list, on one line.")] = False,
) -> None:
    """List every drafter, token tree, verification rule, length policy and mode.

    foretell lab methods measures them.
    """
    from foretell.lab.methods.catalogue import describe, kinds

    rows = [describe(kind, name) for kind in kinds() for name in names(kind)]
    if json:
        print(dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    for kind in kinds():
        table = Table(title=TITLES.get(kind, f"{kind}s"), title_justify="left", expand=False)
        promised = kind not in ("policy", "tree")  # those keep the promise of the rule
        headings = ["name", *(["promise"] if promised else []), "what it does", "options", "paper"]
        for heading in headings:
            whole = heading in ("name", "promise")
            table.add_column(heading, no_wrap=whole, overflow="ellipsis" if whole else "fold")
        for row in rows:
            if row["kind"] == kind:
                cells = {**row, "what it does": row["summary"], "options": _options(row["options"])}
                table.add_row(*(cells[h] for h in headings))
        Console().print(table)


def _options(options: dict[str, Any]) -> str:
    return ", ".join(k if v is None else f"{k}={v}" for k, v in options.items())
