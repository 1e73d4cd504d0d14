"""The machine a run was made on, and who else used it meanwhile. Linux's /proc and /sys; elsewhere
what cannot be read is null."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.core.machine import processor, processor_flags

FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
POWER = Path("/sys/class/powercap")


def hardware() -> dict[str, Any]:
    """Processor, its vector units, cores, memory, operating system."""
    known = processor_flags()
    total = re.search(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"), re.M)
    return {
        "cpu": processor(),
        "flags": [f for f in FLAGS if f in known],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": int(total[1]) * 1024 if total else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "system": platform.platform(),
        "load_average": load_average(),
    }


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> list[float] | None:
    with suppress(OSError, AttributeError):
        return [round(x, 2) for x in os.getloadavg()]
    return None


@dataclass(slots=True)
class Ticks:
    """Processor time in clock ticks, summed over cores, since the machine started."""

    busy: int = 0
    idle: int = 0
    steal: int = 0  # taken by other guests of a virtual machine's host
    ours: int = 0  # of the processes asked about

    @classmethod
    def now(cls, pids: tuple[int, ...] = ()) -> Ticks | None:
        first = _read("/proc/stat").split("\n", 1)[0].split()
        if len(first) < 9 or first[0] != "cpu":
            return None
        user, nice, system, idle, wait, irq, soft, steal = map(int, first[1:9])
        ours = sum(_process(pid) for pid in (*pids, os.getpid()))
        return cls(user + nice + system + irq + soft, idle + wait, steal, ours)

    def since(self, before: Ticks) -> dict[str, float]:
        """Shares of all cores' time: what other processes used, and what the host took away."""
        busy, steal = self.busy - before.busy, self.steal - before.steal
        total = busy + steal + self.idle - before.idle
        if total <= 0:
            return {"other": 0.0, "steal": 0.0}
        other = max(0, busy - (self.ours - before.ours))
        return {"other": round(other / total, 4), "steal": round(steal / total, 4)}


def _process(pid: int) -> int:
    """Processor time of a process, of its threads, and of its children that have ended."""
    tail = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, tail[11:15])) if len(tail) > 14 else 0


class Energy:
    """Joules of the processor packages, where the system lets us read them."""

    def __init__(self, root: Path = POWER) -> None:
        self.counters: list[tuple[Path, int]] = []
        for zone in sorted(root.glob("*")) if root.is_dir() else []:
            with suppress(OSError, ValueError):
                if re.fullmatch(r"package-\d+|psys", (zone / "name").read_text().strip()):
                    limit = int((zone / "max_energy_range_uj").read_text())
                    int((zone / "energy_uj").read_text())
                    self.counters.append((zone / "energy_uj", limit))

    def read(self) -> list[int] | None:
        """Microjoules of each counter; None when there is none."""
        try:
            return [int(p.read_text()) for p, _ in self.counters] or None
        except (OSError, ValueError):
            return None

    def joules(self, before: list[int] | None, after: list[int] | None) -> float | None:
        """What was used in between; a counter that wrapped around counts on."""
        if before is None or after is None:
            return None
        limits = [limit for _, limit in self.counters]
        used = ((b - a) % (m + 1) for a, b, m in zip(before, after, limits, strict=True))
        return sum(used) / 1e6


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
