"""CPU kernels in C++: compiled once on the machine they run on, loaded with ctypes.

`load()` gives the library or None; `why_not()` says in a sentence why there is none. Nothing here
raises because a compiler is missing or broken: the callers have a path in plain torch.

FORETELL_KERNELS chooses: auto (default: the best instruction set of this processor), off, or one of
avx512, avx2, portable. FORETELL_CACHE is the folder that compiled kernels are kept in.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from foretell.core.errors import InputError
from foretell.core.places import cache_folder
from foretell.kernels.build import CHOICES, find_or_build, supported

if TYPE_CHECKING:
    from foretell.kernels.library import Library


def load() -> Library | None:
    """The kernels for this process, or None. The first call may compile (some seconds, once)."""
    return _load(_setting(), str(cache_folder("kernels")))[0]


def why_not() -> str | None:
    """Why `load()` is None, as one sentence; None when the kernels are there."""
    return _load(_setting(), str(cache_folder("kernels")))[1]


def _setting() -> str:
    setting = os.environ.get("FORETELL_KERNELS", "auto").strip().lower() or "auto"
    if setting not in CHOICES:
        raise InputError(f"FORETELL_KERNELS is '{setting}': set it to one of {', '.join(CHOICES)}.")
    return setting


@lru_cache(maxsize=8)
def _load(setting: str, folder: str) -> tuple[Library | None, str | None]:
    if setting == "off":
        return None, "FORETELL_KERNELS is off."
    here = supported()
    if setting != "auto" and setting not in here:
        return None, f"This processor does not run the {setting} kernels."
    from foretell.kernels.library import Library

    reason = None
    for isa in here if setting == "auto" else (setting,):
        path, problem = find_or_build(isa, folder)
        if path is None:
            reason = reason or problem
            continue
        try:
            return Library(path), None
        except (OSError, AttributeError) as error:  # built for another machine, or damaged
            reason = reason or f"The compiled kernels {path} do not load ({error})."
    return None, reason
