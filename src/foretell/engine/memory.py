"""How much memory is free, here and now."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from foretell.core.protocols import TargetModel


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on `device`; on a CPU what the system would give without
    swapping, at most what is left of the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _field("/proc/meminfo", "MemAvailable:")
    if free is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = _container()
    return free if left is None else min(free, left)


def default_rows(model: TargetModel, max_batch: int) -> int:
    """KV rows that `max_batch` full contexts need, at most what half of the free memory holds."""
    rows = max_batch * model.spec.max_positions
    if not model.spec.row_bytes:
        return rows
    free = free_memory(model.device)
    return max(1024, min(rows, free // 2 // model.spec.row_bytes))


def mapped_memory() -> int:
    """Bytes of files that this process has in memory. The system counts them as free."""
    return _field("/proc/self/status", "RssFile:") or 0


def _field(file: str, name: str) -> int | None:
    """A line such as `MemAvailable:  123 kB`, in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(file).read_text("utf-8").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def _container() -> int | None:
    """What a control group leaves this process; None where there is no limit."""
    for limit, used, files in (
        ("memory.max", "memory.current", "memory.stat"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        base = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError):
            most, now = int((base / limit).read_text()), int((base / used).read_text())
            for line in (base / files).read_text().splitlines():
                if line.startswith("inactive_file "):
                    now -= int(line.split()[1])  # given back on demand
            return max(0, most - now) if most < 1 << 60 else None
    return None
