"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """Where `part` (kernels, weights, cost, bench) is kept: in the folder that FORETELL_CACHE
    names, else in the user's cache folder."""
    named = os.environ.get("FORETELL_CACHE")
    if named:
        return Path(named).expanduser() / part
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "foretell" / part
