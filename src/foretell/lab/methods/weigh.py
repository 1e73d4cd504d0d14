"""How many bytes a drafter's state of one sequence holds, found by walking its objects."""

from __future__ import annotations

import mmap
import sys
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from foretell.core.protocols import SeqView

# Not state: code, and what the engine itself keeps of a sequence.
SKIPPED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, SeqView)
MAPPED = (np.memmap, mmap.mmap)  # page cache, not memory of the process


def held(state: Any, known: set[int] | None = None) -> int:
    """Bytes of tensors, arrays and Python objects that are reachable from `state`, each counted
    once. known: ids not to count; those found are added, so that a second call counts the rest."""
    known = set() if known is None else known
    total, todo = 0, [state]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            key = storage.data_ptr()
            size = storage.nbytes()
        elif isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            key, size = id(item), _array(item)
            if item.dtype == object:
                todo += item.ravel().tolist()
        else:
            key, size = id(item), 0
        if key in known or item is None or isinstance(item, (*SKIPPED, *MAPPED)):
            continue
        known.add(key)
        if not isinstance(item, torch.Tensor | np.ndarray):
            size = sys.getsizeof(item)
            todo += _parts(item)
        total += size
    return total


def _array(array: np.ndarray) -> int:
    base = array.base
    if isinstance(base, memoryview):
        base = base.obj
    return 0 if isinstance(array, MAPPED) or isinstance(base, MAPPED) else array.nbytes


def _parts(item: Any) -> list[Any]:
    """What an object refers to."""
    if isinstance(item, str | bytes | bytearray | int | float | bool | complex | memoryview):
        return []
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset | deque):
        return list(item)
    if isinstance(item, types.MethodType):
        return [item.__self__]
    found = list(getattr(item, "__dict__", {}).values())
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                found.append(getattr(item, name))
    return found


class Weighed:
    """A drafter that weighs what a sequence of it holds when the sequence ends; one at a time."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.bytes = drafter, 0
        self.view: SeqView | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def begin(self, view: SeqView) -> Any:
        self.view = view
        return self.drafter.begin(view)

    def end(self, state: Any) -> None:
        if state is not None:
            shared: set[int] = set()
            held(self.drafter, shared)  # what belongs to all requests
            if self.view is not None:
                held([self.view.tokens, self.view.cache], shared)  # and to the engine
            self.bytes = max(self.bytes, held(state, shared))
        self.drafter.end(state)
