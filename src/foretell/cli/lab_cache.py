"""`foretell lab cache`: the packed weights kept on disk."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from foretell.cli.common import dumps

app = typer.Typer(add_completion=False)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything in it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
) -> int:
    """List the cache of packed weights, last used first, or clear it.

    FORETELL_CACHE names its parent folder; FORETELL_CACHE_GB bounds its size (20; 0 = no cache).
    """
    from foretell.core.places import cache_folder
    from foretell.models.quant import store

    folder = cache_folder("weights")
    freed = store.clear() if clear else None
    files = store.cached()
    if json:
        entries = [
            {"file": c.path.name, "bytes": c.bytes, "used": c.used, **c.about} for c in files
        ]
        print(
            dumps(
                {
                    "folder": str(folder),
                    "limit": store.limit_bytes(),
                    "freed": freed,
                    "files": entries,
                }
            )
        )
        return 0
    if freed is not None:
        print(f"Freed {freed / 1e6:.1f} MB in {folder}.")
        return 0
    total = sum(c.bytes for c in files)
    for c in files:
        when = datetime.fromtimestamp(c.used).isoformat(" ", "minutes")
        about = ", ".join(str(v) for v in c.about.values()) or c.path.name
        print(f"{c.bytes / 1e6:10.1f} MB  {when}  {about}")
    print(f"{total / 1e6:10.1f} MB of at most {store.limit_bytes() / 1e6:.0f} MB in {folder}")
    return 0
