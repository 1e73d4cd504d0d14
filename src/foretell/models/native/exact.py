"""What the runner does differently when a row's result must not depend on its company.

Stock operations may round a number differently depending on where it lies: a vector loop's tail is
done by scalar code, threads cut a tensor anywhere, and a matrix library picks its blocking by the
shape. So that a row comes out the same to the last bit alone and in any batch, on one thread and on
several:

* elementwise functions that are more than one rounding run on pieces that no thread cuts, padded to
  whole vectors (`in_pieces`);
* norms use row sums of one fixed order and operations of one rounding each;
* attention runs row by row over that row's own keys in path order (`Walk`);
* float products run in blocks of which this machine shows that rows come out alike (`FloatRows`);
* where the matrix library rounds otherwise on several threads, it gets one (`alike`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import Segment
from foretell.models.cache.contiguous import ContiguousCache

PIECE = 1 << 14  # numbers: half of what torch begins to share out among threads
VECTOR = 64  # numbers: a multiple of what one turn of a vector loop takes on any processor
INNER = 512  # inputs of one product: more, and the library may cut them by the number of threads
HEIGHTS = (64, 16, 4)  # rows of one product, the largest that this machine allows
LEASTS = (2, 4)  # and the fewest: few rows, and above all one alone, may take another kernel
WIDTH = 8  # outputs of one product, or a multiple: a narrow rest may take another one as well


def in_pieces(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An elementwise function such that each number's result depends on that number only."""

    def run(x: Tensor) -> Tensor:
        count = x.numel()
        padded = x.new_zeros(-(-count // VECTOR) * VECTOR)
        padded[:count].view(x.shape).copy_(x)
        for piece in padded.split(PIECE):
            piece.copy_(function(piece))
        return padded[:count].view(x.shape)

    return run


@contextmanager
def alike() -> Iterator[None]:
    """Float products inside are what they are on one thread."""
    threads = torch.get_num_threads()
    if threads == 1 or threads_agree(threads):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=8)
def threads_agree(threads: int) -> bool:
    """Whether products of many shapes are the same to the last bit on one thread and on so many. (A
    library may cut them into shapes for which it has other kernels: MKL does on processors that are
    not Intel's.)"""
    before = torch.get_num_threads()
    g = torch.Generator().manual_seed(0)
    try:
        for t, inner, outer in product((4, 7, 17, 64), (16, 64, 100, 512), (8, 32, 96, 160, 1024)):
            x, w = torch.randn(t, inner, generator=g), torch.randn(inner, outer, generator=g)
            found = []
            for count in (1, threads):
                torch.set_num_threads(count)
                found.append(torch.zeros(t, outer).addmm_(x, w))
            if not torch.equal(*found):
                return False
    finally:
        torch.set_num_threads(before)
    return True


def row_sums(x: Tensor) -> Tensor:
    """[T, n] -> [T, 1]: sums of rows by folding halves onto each other."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        if x.shape[1] % 2:
            folded = torch.cat([folded, x[:, -1:]], 1)
        x = folded
    return x


def normed(x: Tensor, eps: float, centred: bool = False) -> Tensor:
    """Rows [T, n] over their root mean square; centred: their mean is taken off first."""
    share = 1.0 / x.shape[1]
    if centred:
        x = x - row_sums(x) * share
    return x / (row_sums(x * x) * share + eps).sqrt_()


def make_exact_norm(
    kind: str, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The RMS or layer norm ("rms", "layer"; only the latter takes its bias) of rows [T, n];
    computed in float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = weight.to(wide)
    shift = None if bias is None or kind == "rms" else bias.to(wide)

    def norm(x: Tensor) -> Tensor:
        y = normed(x.to(wide), eps, kind == "layer").mul_(weight)
        return (y if shift is None else y.add_(shift)).to(dtype)

    return norm


class Walk:
    """The keys each of a sequence's rows reads, as steps over its cache: before row i is attended,
    its path's rows are put in order behind the committed ones, so that every key list is a slice of
    the cache, the one it would be had only this path been fed."""

    def __init__(
        self, segment: Segment, cache: ContiguousCache, windows: Sequence[int | None]
    ) -> None:
        n, used, self.committed = len(segment), cache.used, cache.n
        earlier = used - self.committed
        self.width = earlier + n
        positions = np.concatenate([cache.positions[:used], segment.positions])
        lies = np.arange(self.width)  # which scratch row lies at each place now
        self.steps: list[tuple[int, Tensor | None]] = []  # first place, scratch rows to put there
        self.spans: list[list[tuple[int, int]]] = [[] for _ in windows]  # by window, row: low, high
        for i in range(n):
            if segment.ancestors is None:
                path = np.arange(earlier + i + 1)
            else:
                path = np.flatnonzero(segment.ancestors[i])
            wrong = np.flatnonzero(lies[: len(path)] != path)
            if len(wrong):
                at = int(wrong[0])
                lies[at : len(path)] = path[at:]
                rows = torch.from_numpy(path[at:].astype(np.int64)).to(cache.kv.device)
                self.steps.append((at, rows))
            else:
                self.steps.append((0, None))
            high = self.committed + len(path)
            for window, spans in zip(windows, self.spans, strict=True):
                low = 0
                if window is not None:
                    seen = np.concatenate(
                        [positions[: self.committed], positions[self.committed + path]]
                    )
                    oldest = int(segment.positions[i]) - window
                    low = int(np.searchsorted(seen, oldest, side="right"))
                spans.append((low, high))
        self.moved = bool((lies != np.arange(self.width)).any())
        self.tree = any(rows is not None for _, rows in self.steps)

    def attend(
        self,
        kv: Tensor,
        kind: int,
        q: Tensor,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        """kv [capacity, 2, Hkv, D] of one layer, whose rows are written; q [N, Hkv, G, D];
        attention(q [1, Hkv, G, D], k and v [1, Hkv, S, D]) -> [1, Hkv, G, D]."""
        scratch = kv[self.committed : self.committed + self.width]
        saved = scratch.clone() if self.tree else scratch
        by_head = kv.transpose(0, 2)  # [Hkv, 2, capacity, D]
        keys, values = by_head[None, :, 0], by_head[None, :, 1]
        found = []
        for i, ((at, rows), (low, high)) in enumerate(
            zip(self.steps, self.spans[kind], strict=True)
        ):
            if rows is not None:
                scratch[at : at + len(rows)] = saved.index_select(0, rows)
            own = q[i : i + 1].clone(
                memory_format=torch.contiguous_format
            )  # aligned like one alone
            found.append(attention(own, keys[:, :, low:high], values[:, :, low:high]))
        if self.moved:
            scratch.copy_(saved)
        return found


class FloatRows:
    """x @ w for float weights [in, out] on a CPU, rows independent of one another.

    The library's kernel may depend on the number of rows (and, of a row alone, on where it lies in
    memory). `settle` finds, on the real matrices, the largest block of rows within which they come
    out alike in every number, from `least` on, and place; fewer are filled up with zeros.
    """

    def __init__(self, dtype: torch.dtype, buffer: int = 160 * 1024, columns: int = 8192) -> None:
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtype, self.buffer, self.columns = dtype, buffer, columns
        self.height, self.least = HEIGHTS[0], LEASTS[0]

    def settle(self, weights: Sequence[Tensor]) -> None:
        """Try the matrices of a model and keep the largest height they all allow."""
        g = torch.Generator().manual_seed(0)
        seen: dict[tuple[int, ...], Tensor] = {tuple(w.shape): w for w in weights}
        for self.height in HEIGHTS:
            for self.least in LEASTS:
                if all(self._alike(w, g) for w in seen.values()):
                    return
        self.height = self.least = 1  # nothing better is known

    def _alike(self, w: Tensor, g: torch.Generator) -> bool:
        x = torch.randn(self.height, w.shape[0], generator=g).to(self.dtype)
        pairs = torch.cat([self._wide(x[i : i + 2], w) for i in (0, self.height - 2)])
        counts = {2, 3, 5, 8, 16, 17, 33, self.height - 1, self.height}
        for n in sorted(c for c in counts if 2 <= c <= self.height):
            first, last = self._wide(x[:n], w), self._wide(x[self.height - n :], w)
            if not torch.equal(first[:2], pairs[:2]) or not torch.equal(last[-2:], pairs[2:]):
                return False
        return torch.equal(self._wide(x[:1], w), pairs[:1])

    def mm(self, x: Tensor, w: Tensor) -> Tensor:
        return self._wide(x, w).to(x.dtype)

    def addmm_(self, acc: Tensor, x: Tensor, w: Tensor, alpha: float) -> Tensor:
        y = self._wide(x, w)
        return acc.add_((y if alpha == 1.0 else y.mul_(alpha)).to(acc.dtype))

    @alike()
    def _wide(self, x: Tensor, w: Tensor) -> Tensor:
        """[T, in] -> [T, out] in `wide`: blocks of inputs in ascending order."""
        t, (inner, outer) = len(x), w.shape
        over = t % self.height
        padded = t + max(0, self.least - over) if over else t
        rows = x.new_zeros(padded, inner, dtype=self.wide)
        rows[:t] = x
        ragged = -outer % WIDTH
        out = rows.new_zeros(padded, outer + ragged)
        same = w.dtype == self.wide
        for c in range(0, outer, outer if same else self.columns):
            part = out[:, c:] if same else out[:, c : c + self.columns]
            step = INNER if same else min(INNER, max(8, self.buffer // part.shape[1]))
            for k in range(0, inner, step):
                block = w[k : k + step, c : c + part.shape[1]].to(self.wide)
                if block.shape[1] < part.shape[1]:
                    block = torch.nn.functional.pad(block, (0, ragged))
                for r in range(0, len(rows), self.height):
                    part[r : r + self.height].addmm_(rows[r : r + self.height, k : k + step], block)
        return out[:t, :outer]
