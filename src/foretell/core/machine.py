"""What the processor of this machine is called and can do."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path


def processor() -> str:
    """The name of the processor."""
    facts = _cpuinfo()
    return (
        facts.get("model name") or facts.get("Model") or platform.processor() or platform.machine()
    )


def processor_flags() -> frozenset[str]:
    """What the processor can do, in the words of /proc/cpuinfo; empty where there is none."""
    facts = _cpuinfo()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    """Key -> value, as the first processor (or, for keys that none has, the board) says."""
    facts: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return facts
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts
