"""From named tensors to what the kernels read: packed matrices, padded vectors.

The plan of a packed model is a mapping name -> tensor:

* ``head`` and ``layers.I.{q,k,v,o,gate,up,down}``: uint8, a packed matrix (kernels/matrix.h);
* the same with ``.bias``: float32 [n];
* ``norm`` and ``layers.I.{attn_norm,mlp_norm,attn_post,mlp_post}`` (and ``.bias``): float32,
  padded with zeros to a multiple of 16, the norm's offset added;
* ``layers.I.{q_norm,k_norm}``: float32 [D], or [heads D] where the norm is over all heads;
* ``slots``: uint8, JSON: [name, n, k, format, group] of every packed matrix.

Embedding and learned positions are not in it: their rows are read from the checkpoint's mapping.
A matrix is packed panel by panel, so that loading holds one packed matrix and one block of it as
floats on top of what is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.kernels.library import PANEL, Library, allocate
from foretell.models.native.arch import Arch
from foretell.models.native.families import Names
from foretell.models.native.layers import Assembler
from foretell.models.native.weights import Source
from foretell.models.quant.checkpoints import QuantisedCheckpoint, integers
from foretell.models.quant.formats import (
    INT8,
    QTensor,
    WeightFormat,
    dequantise,
    format_for,
    quantise,
)

BLOCK = 1 << 21  # numbers packed at a time
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attn_norm", "mlp_norm", "attn_post", "mlp_post")
Kind = torch.dtype | WeightFormat


@dataclass(frozen=True, slots=True)
class Slot:
    """One packed matrix: its place in the plan and its shape."""

    name: str
    n: int
    k: int
    format: str  # float32, bfloat16, int8 or int4
    group: int


def layout(arch: Arch, kind: Kind) -> dict[str, Slot]:
    """The packed matrices of a model, by name, in the order in which a forward reads them."""
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    shapes = {"q": (wide, arch.hidden), "k": (narrow, arch.hidden), "v": (narrow, arch.hidden)}
    shapes |= {"o": (arch.hidden, wide)}
    shapes |= {"gate": (arch.ffn, arch.hidden)} if arch.gated else {}
    shapes |= {"up": (arch.ffn, arch.hidden), "down": (arch.hidden, arch.ffn)}
    named = {
        f"layers.{i}.{role}": shape
        for i in range(len(arch.layers))
        for role, shape in shapes.items()
    }
    named["head"] = (arch.vocab, arch.hidden)
    return {name: _slot(name, n, k, kind) for name, (n, k) in named.items()}


def _slot(name: str, n: int, k: int, kind: Kind) -> Slot:
    if not isinstance(kind, WeightFormat):
        return Slot(name, n, k, str(kind).removeprefix("torch."), 0)
    form = format_for(kind, k, name == "head")
    return Slot(name, n, k, f"int{form.bits}", form.group)


def write_slots(slots: Mapping[str, Slot]) -> Tensor:
    """What a file of packed weights needs to say about itself."""
    rows = [[s.name, s.n, s.k, s.format, s.group] for s in slots.values()]
    return torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)


def read_slots(stored: Tensor) -> dict[str, Slot]:
    rows = json.loads(stored.numpy().tobytes())
    return {row[0]: Slot(*row) for row in rows}


class Packer(Assembler):
    """Reads a source tensor by tensor and yields the plan's entries."""

    def __init__(
        self, arch: Arch, names: Names, source: Source, kind: Kind, library: Library
    ) -> None:
        super().__init__(arch, names, source, torch.float32, torch.device("cpu"))
        self.slots, self.library, self.wanted = layout(arch, kind), library, kind
        # One piece of memory for all matrices, so that huge pages fit; what is not used costs none
        self.room, self.used = allocate(sum(self._most(s) for s in self.slots.values())), 0

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything, layer by layer, the head last."""
        a = self.arch
        for i in range(len(a.layers)):
            yield from self._layer(i)
        yield from self._norm_entries("norm", "norm", None)
        yield "head", self._pack("head", *self._head_rows())
        yield "slots", write_slots(self.slots)

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """(embedding [V, H], learned positions [P, H] or None) as they are stored."""
        a = self.arch
        embedding = _plain(self._stored("embed", None, (a.vocab, a.hidden)))
        if not a.learned_positions:
            return embedding, None
        return embedding, _plain(self._stored("positions", None, (a.learned_positions, a.hidden)))

    def _layer(self, i: int) -> Iterator[tuple[str, Tensor]]:
        a, at = self.arch, f"layers.{i}."
        for role in MATRICES:
            slot = self.slots.get(at + role)
            if slot is None:
                continue
            yield slot.name, self._pack(slot.name, *self._rows(role, i, slot))
            biased = {"o": a.o_bias, "q": a.qkv_bias, "k": a.qkv_bias, "v": a.qkv_bias}
            if biased.get(role, a.mlp_bias):
                yield slot.name + ".bias", self._vector_bias(role, i, slot.n)
        for role in NORMS:
            if a.post_norm if role.endswith("post") else a.pre_norm:
                yield from self._norm_entries(at + role, role, i)
        if a.qk_norm:
            for role, heads in (("q_norm", a.heads), ("k_norm", a.kv_heads)):
                size = a.head_dim if a.qk_norm == "head" else heads * a.head_dim
                w = self.source.get(self._name(role, i) + ".weight", (size,)).float()
                yield at + role, w + a.norm_offset
        self.source.release()

    # -- matrices

    def _rows(self, role: str, i: int, slot: Slot) -> tuple[Tensor | QTensor, str]:
        """(rows [n, k] as stored, or the integers of a quantised checkpoint; name for errors)."""
        fused = "qkv" if role in "qkv" else "gate_up"
        if role in ("o", "down") or not self._fused(fused):
            return self._read(role, i, slot.n, slot.k)
        total, at = self._place(role)
        found, name = self._read(fused, i, total, slot.k)
        if isinstance(found, QTensor):
            return found.rows(self._part(torch.arange(total), role, at, slot.n)), name
        return self._part(found, role, at, slot.n), name

    def _read(self, role: str, i: int, n: int, k: int) -> tuple[Tensor | QTensor, str]:
        name = self._name(role, i) + ".weight"
        found = self._given(name, (n, k), self.names.transposed)
        return (self._stored(role, i, (n, k)) if found is None else found), name

    def _place(self, role: str) -> tuple[int, int]:
        """(rows of the fused matrix, where the role's rows begin)."""
        sizes = {
            r: self.slots[f"layers.0.{r}"].n for r in MATRICES if f"layers.0.{r}" in self.slots
        }
        part = ("q", "k", "v") if role in "qkv" else ("gate", "up") if "gate" in sizes else ("up",)
        before = part[: part.index(role)]
        return sum(sizes[r] for r in part), sum(sizes[r] for r in before)

    def _head_rows(self) -> tuple[Tensor | QTensor, str]:
        a = self.arch
        shape = (a.vocab, a.hidden)
        stem = self._name("embed", None) if a.tied else self._head_name()
        found = self._given(stem + ".weight", shape, head=True)
        return (self.source.get(stem + ".weight", shape) if found is None else found), stem

    def _given(
        self, name: str, shape: tuple[int, int], turned: bool = False, head: bool = False
    ) -> QTensor | None:
        """What a quantised checkpoint says a matrix is; None for floats that are quantised here."""
        if not isinstance(self.wanted, WeightFormat):
            return None
        if not isinstance(self.source, QuantisedCheckpoint):
            return None
        found = integers(self.source, name, shape, self.wanted, transposed=turned, head=head)
        if found.bits == 4 and not found.half:  # the packed form holds float16 scales
            return quantise(dequantise(found), INT8, name=name)
        return found

    def _bytes(self, slot: Slot) -> int:
        return self.library.packed_bytes(slot.format, slot.n, slot.k, slot.group or 32)

    def _most(self, slot: Slot) -> int:
        """Room for a matrix in whatever format a checkpoint has it."""
        wide = max(self._bytes(slot), self._bytes(Slot(slot.name, slot.n, slot.k, "int8", 0)))
        return (wide + 63) // 64 * 64

    def _take(self, size: int) -> Tensor:
        out = self.room[self.used : self.used + size]
        self.used += (size + 63) // 64 * 64
        return out

    def _pack(self, name: str, rows: Tensor | QTensor, what: str) -> Tensor:
        slot, library = self.slots[name], self.library
        if isinstance(rows, QTensor):
            slot = Slot(name, slot.n, slot.k, f"int{rows.bits}", rows.group)
            self.slots[name] = slot
        out = self._take(self._bytes(slot))
        step = max(1, BLOCK // (slot.k * PANEL))
        panels = (slot.n + PANEL - 1) // PANEL
        for begin in range(0, panels, step):
            end = min(begin + step, panels)
            part = slice(begin * PANEL, min(end * PANEL, slot.n))
            block, scale = self._block(slot, rows, part, what)
            library.pack_panels(
                *(slot.format, slot.n, block, scale, begin, end, out, slot.group or 32),
                first=begin * PANEL,
            )
            self.source.release()
        return out

    def _block(
        self, slot: Slot, rows: Tensor | QTensor, part: slice, what: str
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(rows, QTensor):
            return rows.q[part].contiguous(), rows.scale[part]
        block = _plain(rows[part])
        if slot.format in ("int8", "int4"):
            assert isinstance(self.wanted, WeightFormat)
            made = quantise(block, self.wanted, head=slot.name == "head", name=what)
            return made.q, made.scale
        return block, None

    # -- vectors

    def _vector_bias(self, role: str, i: int, size: int) -> Tensor:
        fused = "qkv" if role in "qkv" else "gate_up"
        if role in ("o", "down") or not self._fused(fused):
            return self._bias(role, i, size)
        total, at = self._place(role)
        return self._part(self._bias(fused, i, total), role, at, size).clone()

    def _norm_entries(self, name: str, role: str, i: int | None) -> Iterator[tuple[str, Tensor]]:
        size = self.arch.hidden
        stored = self._name(role, i)
        weight = self.source.get(stored + ".weight", (size,)).float() + self.arch.norm_offset
        yield name, _padded(weight)
        if self.arch.norm_bias:
            yield name + ".bias", _padded(self.source.get(stored + ".bias", (size,)).float())


def _padded(x: Tensor) -> Tensor:
    out = torch.zeros((len(x) + 15) // 16 * 16)
    out[: len(x)] = x
    return out


def _plain(x: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernels read."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return (x if x.dtype in known else x.float()).contiguous()
