"""The compiled kernels as Python functions on torch tensors (CPU, contiguous).

Threads: `threads=0` everywhere means `set_threads(n)`, or one per core this process may use. ctypes
releases the GIL, and concurrent callers share one team of threads.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foretell.core.errors import InputError

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
PANEL = 32
_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_PROBLEMS = {
    1: "holds integers outside the format's range",
    2: "has int4 scales that are no float16 values; round them first",
    3: "could not be packed: out of memory",
    4: "cannot be packed: no such format, or its group does not divide the inputs",
    5: "holds weights that are not finite: the checkpoint is damaged; download it again",
}
PTR, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "ft_isa": (ctypes.c_char_p, ()),
    "ft_threads": (INT, ()),
    "ft_max_threads": (INT, ()),
    "ft_set_threads": (None, (INT,)),
    "ft_packed_bytes": (LONG, (INT, LONG, LONG, INT)),
    "ft_padded_inputs": (LONG, (INT, LONG)),
    "ft_pack_panels": (INT, (INT, LONG, LONG, INT, INT, PTR, PTR, PTR, LONG, LONG, LONG, PTR, INT)),
    "ft_unpack": (INT, (INT, LONG, LONG, INT, PTR, PTR, PTR, PTR, INT)),
    "ft_quantise_rows": (None, (PTR, LONG, LONG, LONG, LONG, PTR, PTR, PTR, INT)),
    "ft_product": (
        None,
        (
            *(INT, LONG, LONG, INT, PTR, PTR),
            *(LONG, PTR, LONG, PTR, PTR, PTR),
            *(LONG, LONG, PTR, LONG, INT, FLOAT, INT),
        ),
    ),
    "ft_run_products": (None, (PTR, LONG, LONG, PTR, LONG, PTR, LONG, PTR, PTR, PTR, LONG, INT)),
    "ft_stream": (LONG, (PTR, LONG, INT)),
    "ft_race": (LONG, (PTR, LONG, ctypes.c_double, ctypes.c_uint64)),
    "ft_topk": (LONG, (PTR, LONG, LONG, LONG, PTR, LONG, LONG, PTR, PTR)),
    "ft_automaton_create": (PTR, (LONG, LONG, LONG)),
    "ft_automaton_destroy": (None, (PTR,)),
    "ft_automaton_bytes": (LONG, (PTR,)),
    "ft_automaton_begin": (None, (PTR,)),
    "ft_automaton_extend": (LONG, (PTR, PTR, LONG)),
    "ft_automaton_state": (LONG, (PTR, LONG, PTR)),
    "ft_automaton_repeated": (LONG, (PTR,)),
    "ft_automaton_follow": (LONG, (PTR, LONG, LONG, PTR, LONG)),
    "ft_automaton_draft": (LONG, (PTR, *[LONG] * 5, *[ctypes.c_double] * 4, PTR, PTR)),
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [n outputs, k inputs] in panels (layouts: matrix.h).

    data: uint8, 64-byte aligned, may be read-only memory; bias: float32 [n] or None; group: inputs
    per scale (int4).
    """

    format: str
    n: int
    k: int
    group: int
    data: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of activations: q int8 [T, kp], scale float32 [T], sums int32 [T, kp / 32]."""

    q: Tensor
    scale: Tensor
    sums: Tensor


def allocate(size: int) -> Tensor:
    """`size` bytes of zeros, page aligned, in huge pages where the system gives them.

    Streaming weights over 4 KB pages costs a page walk every 64 lines; with 2 MB pages none.
    """
    # Private: shared anonymous memory is a kind of file, and gets no huge pages.
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class Library:
    """One loaded library. `cdll` is the ctypes handle, for further entry points."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cdll = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.cdll, name)
            function.restype, function.argtypes = result, list(arguments)
        self.isa: str = self.cdll.ft_isa().decode()

    @property
    def build(self) -> str:
        """A name of what was compiled, and of how: other sources are another build."""
        return f"{self.path.parent.name}/{self.path.name}"

    # threads ---------------------------------------------------------------------------------
    @property
    def threads(self) -> int:
        """How many threads `threads=0` stands for."""
        return self.cdll.ft_threads()

    def set_threads(self, count: int) -> None:
        """From now on; 0: one per core that this process may use."""
        self.cdll.ft_set_threads(count)

    # packing ---------------------------------------------------------------------------------
    def packed_bytes(self, format: str, n: int, k: int, group: int = 32) -> int:
        size = self.cdll.ft_packed_bytes(FORMATS[format], n, k, group)
        if size < 0:
            raise InputError(f"A {format} matrix [{n}, {k}] {_PROBLEMS[4]} (group {group}).")
        return size

    def pack(
        self,
        format: str,
        rows: Tensor,
        scale: Tensor | None = None,
        *,
        group: int = 32,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        out: Tensor | None = None,
        threads: int = 0,
    ) -> Packed:
        """Pack rows [n, k]: floats (quantised here for int8 and int4), or int8 with their scale.

        scale: float32 [n], or [n, k / group] for int4. index: int64 [n'], the row that each output
        takes (the matrix then has n' outputs). out: packed_bytes(...) bytes to write to.
        Raises InputError.
        """
        n, k = (rows.shape[0] if index is None else index.shape[0]), rows.shape[1]
        size = self.packed_bytes(format, n, k, group)
        out = allocate(size) if out is None else out
        if out.numel() * out.element_size() < size or out.data_ptr() % 64:
            raise InputError(f"Packing needs {size} bytes at a multiple of 64.")
        self.pack_panels(
            format, n, rows, scale, 0, (n + PANEL - 1) // PANEL, out, group, index, 0, threads
        )
        return Packed(format, n, k, group, out, bias)

    def pack_panels(
        self,
        format: str,
        n: int,
        rows: Tensor,
        scale: Tensor | None,
        begin: int,
        end: int,
        out: Tensor,
        group: int = 32,
        index: Tensor | None = None,
        first: int = 0,
        threads: int = 0,
    ) -> None:
        """Pack the panels [begin, end) of a matrix of n outputs into `out`, where all of it starts.

        rows: those of the checkpoint from row `first` on; they must hold what the panels need.
        Raises InputError.
        """
        kind = _SOURCES.get(rows.dtype)
        if kind is None or rows.dim() != 2 or not rows.is_contiguous() or rows.device.type != "cpu":
            raise InputError(f"Cannot pack a {rows.dtype} tensor of shape {tuple(rows.shape)}.")
        if (kind == 3) != (scale is not None):
            raise InputError("Integer weights come with scales, float weights without.")
        last = min(end * PANEL, n)
        used = index[begin * PANEL : last] if index is not None else None
        low, high = (
            (begin * PANEL, last - 1) if used is None else (int(used.min()), int(used.max()))
        )
        if not 0 <= begin < end or low < first or high >= first + rows.shape[0]:
            raise InputError(f"The panels [{begin}, {end}) need rows that were not handed over.")
        groups = rows.shape[1] // group if format == "int4" else 1
        if scale is not None:
            scale = scale.to(torch.float32).contiguous()
            if scale.numel() != rows.shape[0] * groups:
                raise InputError(f"There are {scale.numel()} scales for {rows.shape[0]} rows.")
        if index is not None:
            index = index.to(torch.int64).contiguous()
        problem = self.cdll.ft_pack_panels(
            *(FORMATS[format], n, rows.shape[1], group, kind, rows.data_ptr(), _at(scale)),
            *(_at(index), first, begin, end, out.data_ptr(), threads),
        )
        if problem:
            raise InputError(f"A {format} matrix {_PROBLEMS[problem]}.")

    def unpack(self, m: Packed, threads: int = 0) -> tuple[Tensor, Tensor | None]:
        """(weights float32 [n, k], None) or (q int8 [n, k], scale [n] or [n, k / group])."""
        if m.format in ("float32", "bfloat16"):
            x = torch.empty(m.n, m.k)
            self.cdll.ft_unpack(*_shape(m), x.data_ptr(), None, None, threads)
            return x, None
        q = torch.empty(m.n, m.k, dtype=torch.int8)
        scale = torch.empty(m.n, m.k // m.group) if m.format == "int4" else torch.empty(m.n)
        self.cdll.ft_unpack(*_shape(m), None, q.data_ptr(), scale.data_ptr(), threads)
        return q, scale

    # products --------------------------------------------------------------------------------
    def quantise_rows(self, x: Tensor, threads: int = 0) -> QuantisedRows:
        """Activations float32 [T, k] to int8, every row by itself."""
        x = x.contiguous()
        rows, k = x.shape
        kp = self.cdll.ft_padded_inputs(FORMATS["int8"], k)
        made = QuantisedRows(
            torch.empty(rows, kp, dtype=torch.int8),
            torch.empty(rows),
            torch.empty(rows, kp // 32, dtype=torch.int32),
        )
        self.cdll.ft_quantise_rows(
            *(x.data_ptr(), k, rows, k, kp, made.q.data_ptr(), made.scale.data_ptr()),
            *(made.sums.data_ptr(), threads),
        )
        return made

    def product(
        self,
        m: Packed,
        x: Tensor,
        *,
        panels: tuple[int, int] | None = None,
        add_to: Tensor | None = None,
        alpha: float = 1.0,
        threads: int = 0,
    ) -> Tensor:
        """x [T, k] float32 -> [T, n], of the panels asked for; add_to += alpha * it where given."""
        if x.dim() != 2 or x.shape[1] != m.k or x.dtype != torch.float32:
            raise InputError(f"A product with [{m.n}, {m.k}] needs float32 rows of {m.k}.")
        begin, end = panels or (0, (m.n + PANEL - 1) // PANEL)
        x = x.contiguous()
        width = min(end * PANEL, m.n) - begin * PANEL
        out = torch.empty(x.shape[0], width) if add_to is None else add_to
        if out.shape != (x.shape[0], width) or out.stride(1) != 1 or out.dtype != torch.float32:
            raise InputError(f"add_to must be float32 [{x.shape[0]}, {width}].")
        rows = self.quantise_rows(x, threads) if m.format in ("int8", "int4") else None
        self.cdll.ft_product(
            *_shape(m),
            *(_at(m.bias), x.shape[0], x.data_ptr(), x.stride(0)),
            *((None, None, None) if rows is None else map(_at, (rows.q, rows.scale, rows.sums))),
            *(begin, end, out.data_ptr(), out.stride(0), int(add_to is not None), alpha, threads),
        )
        return out

    def stream_bandwidth(self, size: int = 1 << 28, repeats: int = 5, threads: int = 0) -> float:
        """Bytes per second of reading `size` bytes front to back: what a forward can hope for.

        The best of `repeats`. `size` must be far above the caches (default 256 MiB).
        """
        memory = allocate(size)
        memory.fill_(1)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            self.cdll.ft_stream(memory.data_ptr(), size, threads)
            best = min(best, time.perf_counter() - start)
        return size / best

    # sampling --------------------------------------------------------------------------------
    def race(self, logits: Tensor, temperature: float, key: int) -> int:
        """``argmax(softmax(logits / temperature) / E)`` for logits [V] float32 and the row of
        exponential noise E that `core.rng` makes of `key`; -1 where it is too close to call. On the
        calling thread."""
        if logits.stride(0) != 1 or logits.dtype != torch.float32 or not temperature > 0:
            return -1
        return self.cdll.ft_race(logits.data_ptr(), len(logits), temperature, key)

    def topk(
        self, rows: Tensor, k: int, at: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What `core.rows.topk_rows` says of float32 rows [n, V] for k = 1..min(V, 128), to the
        bit; None for others. On the calling thread."""
        if rows.dtype != torch.float32 or rows.stride(1) != 1:
            return None
        count, width = rows.shape
        index = None if at is None else torch.from_numpy(np.ascontiguousarray(at, np.int64))
        n = count if index is None else len(index)
        values, columns = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
        problem = self.cdll.ft_topk(
            *(rows.data_ptr(), count, rows.stride(0), width, _at(index), n, k),
            *(values.data_ptr(), columns.data_ptr()),
        )
        return None if problem else (values.numpy(), columns.numpy())


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _shape(m: Packed) -> tuple[int, int, int, int, int]:
    return FORMATS[m.format], m.n, m.k, m.group, m.data.data_ptr()
