"""From named tensors to the layers the runner executes: fused, permuted, in their final dtype.

Matrices are [in, out], contiguous on a CPU (its GEMMs are up to twice as fast that way for 1 to 16
rows), views of [out, in] memory elsewhere. Two permutations are built in, invisible from outside:

* the coordinates of q and k heads are interleaved, so that the pairs that rotary positions turn
  lie side by side and a rotation is one complex product;
* query heads are ordered (group, key/value head), so that the rows of one key/value head's whole
  group form one matrix without copying, and attention reads every key once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.models.native.arch import Arch, LayerArch
from foretell.models.native.exact import make_exact_norm, normed
from foretell.models.native.families import Names
from foretell.models.native.integer import QWeight
from foretell.models.native.weights import Source
from foretell.models.quant.checkpoints import integers
from foretell.models.quant.formats import QTensor, WeightFormat, stack

BLOCK = 1 << 21  # numbers converted at a time: bounds the memory that loading needs on top
Norm = Callable[[Tensor], Tensor]


class Layer:
    """Weights of one layer. Norms are closures; a norm or bias that the family lacks is None."""

    __slots__ = (
        "attn_norm",
        "attn_post",
        "down",
        "down_bias",
        "gate_up",
        "gate_up_bias",
        "index",
        "kind",
        "mlp_norm",
        "mlp_post",
        "o",
        "o_bias",
        "qk_norm",
        "qkv",
        "qkv_bias",
        "rope",
    )

    index: int
    kind: int  # index into the model's attention kinds (windows)
    rope: int | None
    attn_norm: Any  # Norm, or None; which of the four are there decides the runner's block
    attn_post: Any
    mlp_norm: Any
    mlp_post: Any
    qk_norm: Callable[[Tensor], None] | None  # in place on qkv [T, (Hq + 2 Hkv) D]
    qkv: Any  # [H, (Hq + 2 Hkv) D]; the four are Tensors, or QWeights of that shape
    o: Any  # [Hq D, H]; a QWeight's inputs keep the checkpoint's order of heads
    gate_up: Any  # [H, 2 F], or [H, F] where the MLP has no gate
    down: Any  # [F, H]
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class Assembler:
    """Takes tensors from a source and puts them where the runner wants them."""

    def __init__(
        self,
        arch: Arch,
        names: Names,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        form: WeightFormat | None = None,
        exact: bool = False,
    ) -> None:
        """dtype: of floats; form: of matrices that are to be integers; exact: norms whose rows come
        out the same in any company."""
        self.arch, self.names, self.source = arch, names, source
        self.dtype, self.device, self.form, self.exact = dtype, device, form, exact
        embed = names.body["embed"] + ".weight"
        found = [p for p in names.prefixes if source.has(p + embed)]
        self.prefix = found[0] if found else names.prefixes[0]
        kinds = {layer.window for layer in arch.layers}
        self.kinds = sorted(kinds, key=lambda w: (w is not None, w))  # windows, None first
        self.q_order, self.k_order, self.o_order = _orders(arch)

    # -- what the runner asks for

    def embedding(self) -> tuple[Tensor, Any]:
        """(embedding [V, H], head [H, V]); when tied they share their memory, unless the head is
        quantised."""
        a = self.arch
        stored = self._stored("embed", None, (a.vocab, a.hidden))
        if self.form is not None:
            where = self._name("embed", None) if a.tied else self._head_name()
            head = QWeight([self._integers(where + ".weight", (a.vocab, a.hidden), head=True)])
            self.source.release()
            return stored.to(self.device), head
        if not a.tied:
            head = self._empty(a.hidden, a.vocab)
            self._fill(head, self.source.get(self._head_name() + ".weight", (a.vocab, a.hidden)))
            if stored.dtype == self.dtype and stored.device == self.device:
                return stored, head  # the mapping itself: only rows that are used are ever read
            embed = torch.empty(a.vocab, a.hidden, dtype=self.dtype, device=self.device)
            self._fill(embed.t(), stored)
            return embed, head
        head = self._empty(a.hidden, a.vocab)
        self._fill(head, stored)
        return head.t(), head

    def positions(self) -> Tensor | None:
        a = self.arch
        if not a.learned_positions:
            return None
        stored = self._stored("positions", None, (a.learned_positions, a.hidden))
        table = torch.empty(stored.shape, dtype=self.dtype, device=self.device)
        table.copy_(stored)
        return table

    def final_norm(self) -> Norm:
        return self._norm("norm", None)

    def layer(self, index: int, shape: LayerArch) -> Layer:
        a, w = self.arch, Layer()
        w.index, w.rope, w.kind = index, shape.rope, self.kinds.index(shape.window)
        rotated = shape.rope is not None
        q_rows, k_rows = a.heads * a.head_dim, a.kv_heads * a.head_dim
        orders = {
            "q": self.q_order[rotated],
            "k": self.k_order[rotated],
            "v": None,
        }
        sizes = {"q": q_rows, "k": k_rows, "v": k_rows}
        w.qkv, w.qkv_bias = self._stack(index, sizes, orders, a.qkv_bias)
        w.o = self._matrix("o", index, (a.hidden, q_rows), self.o_order)
        w.o_bias = self._bias("o", index, a.hidden) if a.o_bias else None
        parts = {"gate": a.ffn, "up": a.ffn} if a.gated else {"up": a.ffn}
        w.gate_up, w.gate_up_bias = self._stack(index, parts, {}, a.mlp_bias)
        w.down = self._matrix("down", index, (a.hidden, a.ffn))
        w.down_bias = self._bias("down", index, a.hidden) if a.mlp_bias else None
        w.attn_norm = self._norm("attn_norm", index) if a.pre_norm else None
        w.mlp_norm = self._norm("mlp_norm", index) if a.pre_norm else None
        w.attn_post = self._norm("attn_post", index) if a.post_norm else None
        w.mlp_post = self._norm("mlp_post", index) if a.post_norm else None
        w.qk_norm = self._qk_norm(index, orders) if a.qk_norm else None
        self.source.release()
        return w

    # -- how

    def _name(self, role: str, layer: int | None) -> str:
        return self.prefix + self.names.body[role].format(layer)

    def _stored(self, role: str, layer: int | None, shape: tuple[int, int]) -> Tensor:
        """A matrix [out, in] as a view of what is stored."""
        name = self._name(role, layer) + ".weight"
        if self.names.transposed and layer is not None:
            return self.source.get(name, shape[::-1]).t()
        return self.source.get(name, shape)

    def _head_name(self) -> str:
        found = next((h for h in self.names.heads if self.source.has(h + ".weight")), None)
        return found or self.names.heads[0]

    def _matrix(
        self, role: str, layer: int, shape: tuple[int, int], columns: Tensor | None = None
    ) -> Any:
        """One matrix [out, in] as the runner wants it. columns: order of a float matrix's inputs;
        an integer one keeps the stored order, which its groups follow."""
        if self.form is not None:
            name = self._name(role, layer) + ".weight"
            return QWeight([self._integers(name, shape, self._turned(layer))])
        out = self._empty(shape[1], shape[0])
        self._fill(out, self._stored(role, layer, shape), columns=columns)
        return out

    def _turned(self, layer: int | None) -> bool:
        return self.names.transposed and layer is not None

    def _integers(
        self, name: str, shape: tuple[int, int], turned: bool = False, head: bool = False
    ) -> QTensor:
        """A matrix [out, in] as integers: those of the checkpoint, or its floats quantised."""
        assert self.form is not None
        found = integers(self.source, name, shape, self.form, transposed=turned, head=head)
        self.source.release()
        return found.to(self.device)

    def _bias(self, role: str, layer: int, size: int) -> Tensor:
        stored = self.source.get(self._name(role, layer) + ".bias", (size,))
        return stored.to(self.device, self.dtype, copy=True)

    def _empty(self, rows: int, columns: int) -> Tensor:
        if self.device.type == "cpu":
            return torch.empty(rows, columns, dtype=self.dtype)
        return torch.empty(columns, rows, dtype=self.dtype, device=self.device).t()

    def _fill(
        self,
        out: Tensor,
        stored: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """out [in, out] <- stored [out, in], its rows / columns reordered, block by block."""
        n, width = stored.shape
        step = max(1, BLOCK // max(1, width))
        for i in range(0, n, step):
            block = stored[i : i + step] if rows is None else stored[rows[i : i + step]]
            if columns is not None:
                block = block[:, columns]
            out[:, i : i + step].copy_(block.to(self.device, self.dtype).t())
            self.source.release()

    def _stack(
        self,
        layer: int,
        sizes: dict[str, int],
        orders: dict[str, Tensor | None],
        bias: bool,
    ) -> tuple[Any, Tensor | None]:
        """Several products of the same input as one: [H, sum of sizes] and its bias."""
        total, hidden = sum(sizes.values()), self.arch.hidden
        fused = "qkv" if "q" in sizes else "gate_up"
        biases = self._biases(layer, sizes, orders, fused) if bias else None
        if self.form is not None:
            return self._stack_integers(layer, sizes, orders, fused), biases
        out = self._empty(hidden, total)
        whole = self._stored(fused, layer, (total, hidden)) if self._fused(fused) else None
        at = 0
        for role, size in sizes.items():
            if whole is None:
                stored = self._stored(role, layer, (size, hidden))
            else:
                stored = self._part(whole, role, at, size)
            self._fill(out[:, at : at + size], stored, orders.get(role))
            at += size
        return out, biases

    def _biases(
        self, layer: int, sizes: dict[str, int], orders: dict[str, Tensor | None], fused: str
    ) -> Tensor:
        """The biases of a stack."""
        total, found, at = sum(sizes.values()), [], 0
        whole = self._bias(fused, layer, total) if self._fused(fused) else None
        for role, size in sizes.items():
            b = self._bias(role, layer, size) if whole is None else whole
            b = b if whole is None else self._part(b, role, at, size)
            order = orders.get(role)
            found.append(b if order is None else b[order.to(b.device)])
            at += size
        return torch.cat(found)

    def _stack_integers(
        self, layer: int, sizes: dict[str, int], orders: dict[str, Tensor | None], fused: str
    ) -> QWeight:
        total, hidden = sum(sizes.values()), self.arch.hidden
        turned, whole, at = self._turned(layer), None, 0
        if self._fused(fused):
            name = self._name(fused, layer) + ".weight"
            whole = self._integers(name, (total, hidden), turned)
        parts = []
        for role, size in sizes.items():
            if whole is None:
                name = self._name(role, layer) + ".weight"
                part = self._integers(name, (size, hidden), turned)
            else:
                part = whole.rows(self._part(torch.arange(total), role, at, size).to(self.device))
            order = orders.get(role)
            parts.append(part if order is None else part.rows(order.to(self.device)))
            at += size
        alike = len({p.group for p in parts}) == 1
        return QWeight([stack(parts)] if alike else parts)

    def _fused(self, role: str) -> bool:
        return role in self.names.body

    def _part(self, whole: Tensor, role: str, at: int, size: int) -> Tensor:
        """The rows of one role in a fused matrix (or bias)."""
        if not self.names.qkv_by_head or role not in "qkv":
            return whole[at : at + size]
        heads = whole.view(self.arch.heads, 3, self.arch.head_dim, *whole.shape[1:])
        return heads[:, "qkv".index(role)].flatten(0, 1)

    def _norm(self, role: str, layer: int | None) -> Norm:
        name = self._name(role, layer)
        size = (self.arch.hidden,)
        weight = self.source.get(name + ".weight", size).to(self.device, torch.float32, copy=True)
        weight += self.arch.norm_offset
        bias = None
        if self.arch.norm_bias:
            bias = self.source.get(name + ".bias", size).to(self.device, self.dtype, copy=True)
        if self.exact:
            return make_exact_norm(self.arch.norm, weight, bias, self.arch.eps, self.dtype)
        return make_norm(self.arch, weight, bias, self.dtype)

    def _qk_norm(self, layer: int, orders: dict[str, Tensor | None]) -> Callable[[Tensor], None]:
        """The norms of q and k, in place on a fused qkv."""
        a = self.arch
        per_head = a.qk_norm == "head"
        weights = []
        for role, heads in (("q", a.heads), ("k", a.kv_heads)):
            size = a.head_dim if per_head else heads * a.head_dim
            w = self.source.get(self._name(role + "_norm", layer) + ".weight", (size,))
            w = w.float().to(self.device) + a.norm_offset
            w = w.repeat(heads) if per_head else w
            order = orders[role]
            weights.append(w if order is None else w[order.to(w.device)])
        return make_qk_norm(a, weights[0], weights[1], self.dtype, self.exact)


def _orders(a: Arch) -> tuple[dict[bool, Tensor], dict[bool, Tensor | None], Tensor | None]:
    """Row orders of q and of k (by whether the layer rotates), and column order of o."""
    d = a.head_dim
    grouped = torch.arange(a.heads).view(a.kv_heads, a.groups).t().flatten()
    plain = torch.arange(d)
    turned = plain
    if a.ropes:
        turn = a.ropes[0].dim
        pairs = plain[:turn].view(2, turn // 2).t().flatten()
        turned = torch.cat([pairs, plain[turn:]])

    def rows(heads: Tensor, inside: Tensor) -> Tensor:
        return (heads[:, None] * d + inside).flatten()

    keys = torch.arange(a.kv_heads)
    q = {False: rows(grouped, plain), True: rows(grouped, turned)}
    k: dict[bool, Tensor | None] = {False: None, True: rows(keys, turned)}
    return q, k, rows(grouped, plain) if a.groups > 1 else None


def make_norm(a: Arch, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Norm:
    """The norm of an architecture as the quickest closure for its dtype and device.

    weight: [H] float32, offset added. x: [T, H].
    """
    size, eps = tuple(weight.shape), a.eps
    if a.norm == "layer":
        w = weight.to(dtype)
        return lambda x: F.layer_norm(x, size, w, bias, eps)
    if dtype in (torch.float32, torch.float64) and weight.device.type == "cpu":
        # F.rms_norm is a chain of seven small operations on a CPU; this one has four
        w, small = weight.to(dtype), torch.tensor(eps, dtype=dtype)
        share = 1.0 / size[0]

        def norm(x: Tensor) -> Tensor:
            length = torch.linalg.vector_norm(x, 2, -1, True)
            return (x * torch.addcmul(small, length, length, value=share).rsqrt_()).mul_(w)

        return norm
    if a.norm_offset and dtype not in (torch.float32, torch.float64):
        # 1 + w does not fit bfloat16 without losing bits of w
        return lambda x: F.rms_norm(x.float(), size, weight, eps).to(dtype)
    w = weight.to(dtype)
    return lambda x: F.rms_norm(x, size, w, eps)


def make_qk_norm(
    a: Arch, q: Tensor, k: Tensor, dtype: torch.dtype, exact: bool = False
) -> Callable[[Tensor], None]:
    """In place on qkv [T, (Hq + 2 Hkv) D]. q, k: float32 weights of the full widths."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    nq, nk, d, eps = len(q), len(k), a.head_dim, a.eps
    weight = torch.cat([q, k]).to(wide)
    if exact:
        widths = [d] * ((nq + nk) // d) if a.qk_norm == "head" else [nq, nk]

        def one_by_one(qkv: Tensor) -> None:
            part = qkv[:, : nq + nk]
            if a.qk_norm == "head":
                x = normed(part.to(wide).reshape(-1, d), eps).view(len(qkv), -1)
            else:
                x = torch.cat([normed(p, eps) for p in part.to(wide).split(widths, 1)], 1)
            part.copy_(x.mul_(weight))

        return one_by_one
    if a.qk_norm == "head":

        def per_head(qkv: Tensor) -> None:
            part = qkv[:, : nq + nk]
            x = part.view(len(qkv), -1, d).to(wide)
            part.copy_(F.rms_norm(x, (d,), None, eps).view(len(qkv), -1).mul_(weight))

        return per_head
    q, k = q.to(wide), k.to(wide)

    def full(qkv: Tensor) -> None:
        for part, w in ((qkv[:, :nq], q), (qkv[:, nq : nq + nk], k)):
            part.copy_(F.rms_norm(part.to(wide), (len(w),), w, eps))

    return full
