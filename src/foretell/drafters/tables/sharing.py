"""When requests may learn from each other."""

from __future__ import annotations

from foretell.core.errors import InputError
from foretell.core.protocols import SeqView

SHARE = ("exact", "always", "never")


def check_share(name: str, share: str) -> str:
    if share not in SHARE:
        raise InputError(f"{name}:share={share} is not one of {', '.join(SHARE)}.")
    return share


def shares(view: SeqView, share: str) -> bool:
    """Whether a sequence reads and writes what all share.

    What greedy and replay verification say does not depend on the draft, so there sharing can
    change speed only. A rejection rule is lossless whatever is drafted, but *which* of the equally
    lawful texts a seed gives depends on the drafts: with ``exact`` such requests keep to their own
    tables, so that a seed repeats its text in any company.
    """
    return share == "always" or (share == "exact" and not view.draw.from_q)
