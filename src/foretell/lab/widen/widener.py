"""Make a checkpoint bigger without changing what it computes, so that a small trained model has the
cost of a large one (and its own, real text).

Residual stream: H numbers become H'. Where norms are RMS norms the new ones are zero: the mean
square over H' is H / H' of the old one, so norm weights are multiplied with sqrt(H / H') and eps
with H / H'. LayerNorm subtracts a mean, so there the stream is repeated k = H' / H times, which
leaves mean and variance as they are.

A norm's new weights (or the ones of further copies) multiply zeros or are zero: everything that
reads a norm reads zeros behind the first H numbers.

Heads and MLP: new query, key, value, gate and up rows and columns hold random numbers, so that a
runtime has nothing to gain from them; the columns of o and down that read new rows are zero. They
are `QUIET` times the size of the trained ones: a quantiser that scales a row of weights or
activations by its largest number still scales by a trained one, and trained inputs come first, so
groups along the input stay all old or all new.

Layers: new ones go to the end, random but for v and up, which read only the zeros behind the first
H numbers: o and down get zeros. (No matrix is zero as a whole, or a runtime would keep a single
copy; only where the width stays must v and up be.)

What it is not: a model whose features, layers or quantisation error mean anything beyond the cost.
Methods that skip layers find dead ones here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.lab.export.parts import Parts, has_bias, layer_norms, matrix_shapes
from foretell.lab.widen.shape import Shape, wider

QUIET = 0.25  # size of new rows relative to trained ones
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class Widener:
    """The tensors and the config.json of `parts`' model at the sizes of `shape`."""

    def __init__(self, parts: Parts, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        """dtype: of the matrices; vectors that it cannot hold exactly stay float32."""
        a = parts.arch
        if "text_config" in parts.config:
            raise InputError(
                "This is the text part of an image model, which cannot be widened: take a "
                "checkpoint whose config.json has the model_type gemma3_text."
            )
        self.parts, self.old, self.new = parts, a, wider(a, shape)
        self.dtype, self.seed = dtype, seed
        self.copies = self.new.hidden // a.hidden if a.norm == "layer" else 1
        self.ratio = 1.0 if a.norm == "layer" else a.hidden / self.new.hidden
        self.shrink = math.sqrt(self.ratio)  # what norm weights are multiplied with
        # Gemma multiplies embeddings with sqrt(H), which the new width would change
        self.embed_scale = self.shrink if a.family.startswith("gemma") else 1.0
        if self.embed_scale != 1.0 and dtype != torch.float32 and math.frexp(self.shrink)[0] != 0.5:
            raise InputError(
                f"{a.family} scales its embeddings with its width, and {self.embed_scale:.3g} "
                f"times them does not fit {str(dtype)[6:]}: choose --hidden {4 * a.hidden}, or "
                "--dtype float32."
            )

    # -- config.json

    def config(self) -> dict[str, Any]:
        """The original's, with the new sizes; every runtime reads plain fields only."""
        a, n = self.old, self.new
        names = {
            "hidden_size": n.hidden,
            "num_hidden_layers": len(n.layers),
            "num_attention_heads": n.heads,
            "num_key_value_heads": n.kv_heads,
            "intermediate_size": n.ffn,
            "head_dim": n.head_dim,
            "rms_norm_eps": a.eps * self.ratio,
        }
        if a.family == "gpt2":
            names = {"n_embd": n.hidden, "n_layer": len(n.layers), "n_head": n.heads}
            names["n_inner"] = n.ffn
        elif a.family == "gpt_neox":
            for key in ("num_key_value_heads", "head_dim", "rms_norm_eps"):
                del names[key]
        c = {**self.parts.config, **names}
        for key in ("layer_types", "no_rope_layers"):
            if isinstance(c.get(key), list):
                c[key] = (c[key] * len(n.layers))[: len(n.layers)]
        kind = str(self.dtype).removeprefix("torch.")
        for key in ("torch_dtype", "dtype"):
            if key in c:
                c[key] = kind
        return c if "dtype" in c else c | {"torch_dtype": kind}

    # -- tensors

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint by name, made one at a time."""
        p, a = self.parts, self.old
        columns = self._stream(p.embedding() * self.embed_scale, 1)
        yield p.name("embed") + ".weight", self._matrix(columns)
        if a.learned_positions:
            positions = self._stream(p.positions(), 1)
            yield p.name("positions") + ".weight", self._matrix(positions)
        head = p.head()
        if head is not None:
            yield p.head_name + ".weight", self._matrix(_pad(head, 1, self.new.hidden))
        for layer in range(len(self.new.layers)):
            yield from self._layer(layer)
            p.source.release()
        # where the head is the embedding and that was scaled, the norm makes up for it
        scale = self.shrink / (self.embed_scale if a.tied else 1.0)
        weight, bias = p.norm("norm"), p.norm_bias("norm") if a.norm_bias else None
        at = p.name("norm")
        yield at + ".weight", self._vector(self._norm(weight, scale))
        if bias is not None:
            yield at + ".bias", self._vector(_pad(bias, 0, self.new.hidden))

    def _layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        p, a = self.parts, self.old
        model = layer % len(a.layers)  # whose sizes a new layer takes
        dead = layer >= len(a.layers)
        body = p.names.body
        for role in [r for r in (*FUSED, *matrix_shapes(a)) if r in body]:
            mates = FUSED.get(role, (role,))
            if role not in FUSED and any(role in FUSED[f] for f in FUSED if f in body):
                continue
            made = [self.matrix(m, model, dead, layer) for m in mates]
            whole = self._fuse(made) if role in FUSED else made[0]
            if p.names.transposed:
                whole = whole.t()
            yield p.name(role, layer) + ".weight", self._matrix(whole)
            if has_bias(a, role):
                biases = [self.bias(m, model, dead) for m in mates]
                whole = self._fuse(biases) if role in FUSED else biases[0]
                yield p.name(role, layer) + ".bias", self._vector(whole)
        for role in layer_norms(a):
            at = p.name(role, layer)
            yield at + ".weight", self._vector(self._norm(p.norm(role, model), self.shrink))
            if a.norm_bias:
                bias = _pad(p.norm_bias(role, model), 0, self.new.hidden)
                yield at + ".bias", self._vector(bias)
        for role in ("q_norm", "k_norm") if a.qk_norm else ():
            weight = self._qk_norm(role, p.norm(role, model).float())
            yield p.name(role, layer) + ".weight", self._vector(weight)

    def matrix(self, role: str, layer: int, dead: bool = False, place: int | None = None) -> Tensor:
        """[out', in'] of a role, in the source's precision; dead: of a layer that does nothing,
        modelled on `layer`. place: the layer it is for (another one has other random numbers)."""
        old = self.parts.matrix(role, layer).float()
        shape = matrix_shapes(self.new)[role]
        rows, columns = self._rows(role), self._columns(role)
        if role in ("o", "down") and not dead:
            new = torch.zeros(shape)
            for copy in range(self.copies):
                new[rows[:, None] + copy * self.old.hidden, columns] = old
            return new
        where = layer if place is None else place
        seed = (zlib.crc32(f"{role}{where}".encode()) << 20) ^ self.seed
        new = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        new.mul_(float(old.std()) * (1.0 if dead else QUIET))
        if dead and role in ("v", "up"):
            new[:, columns] = 0  # what is left reads zeros
        elif not dead:
            if role in "qk" and self.old.qk_norm == "full":
                new.zero_()  # a norm over all heads would see the new ones
            new[rows[:, None], columns] = old * self._qk_scale(role, old)
        return new

    def bias(self, role: str, layer: int, dead: bool) -> Tensor:
        """[out'] of a role."""
        new = torch.zeros(matrix_shapes(self.new)[role][0])
        old = self.parts.bias(role, layer)
        assert old is not None
        if not dead:
            rows = self._rows(role)
            weight = self.parts.matrix(role, layer).float() if role in "qk" else None
            scale = 1.0 if weight is None else self._qk_scale(role, weight)
            for copy in range(self.copies if role in ("o", "down") else 1):
                new[rows + copy * self.old.hidden] = old.float() * scale
        return new

    # -- where trained numbers go

    def _rows(self, role: str) -> Tensor:
        """Rows of the new matrix that hold the trained ones."""
        if role == "q":
            return self._query_numbers()
        return torch.arange(matrix_shapes(self.old)[role][0])

    def _columns(self, role: str) -> Tensor:
        if role == "o":
            return self._query_numbers()
        return torch.arange(matrix_shapes(self.old)[role][1])

    def _query_numbers(self) -> Tensor:
        """Of trained query heads: the first ones of each trained key/value head's readers."""
        a, n = self.old, self.new
        heads = torch.arange(a.kv_heads)[:, None] * n.groups + torch.arange(a.groups)
        return (heads.flatten()[:, None] * a.head_dim + torch.arange(a.head_dim)).flatten()

    def _fuse(self, parts: list[Tensor]) -> Tensor:
        """One matrix or bias of q, k and v (or of gate and up), in the order the family wants."""
        if self.parts.names.qkv_by_head and len(parts) == 3:
            n = self.new
            by_head = [p.view(n.heads, 1, n.head_dim, *p.shape[1:]) for p in parts]
            return torch.cat(by_head, 1).flatten(0, 2)
        return torch.cat(parts)

    def _stream(self, x: Tensor, dim: int) -> Tensor:
        """A vector of the residual stream at its new width: repeated, or followed by zeros."""
        if self.copies > 1:
            return x.repeat([self.copies if d == dim else 1 for d in range(x.dim())])
        return _pad(x, dim, self.new.hidden)

    # -- norms

    def _norm(self, weight: Tensor, scale: float) -> Tensor:
        """[H'] weight of a norm; of copies only the first passes."""
        offset = self.old.norm_offset
        true = (weight.float() + offset) * scale
        pad = true.new_full((self.new.hidden - len(true),), scale if self.copies == 1 else 0.0)
        return torch.cat([true, pad]) - offset

    def _qk_numbers(self, role: str) -> tuple[int, int]:
        """How many numbers the norm of q or k sees, before and after."""
        a, n = self.old, self.new
        if a.qk_norm == "head":
            return 1, 1
        return (a.heads, n.heads) if role == "q" else (a.kv_heads, n.kv_heads)

    def _qk_scale(self, role: str, weight: Tensor) -> float:
        """q and k are scaled so that the norm behind them sees the new eps as the old one; not
        where that would round the weights (eps then changes by a negligible amount)."""
        if role not in "qk" or self.old.qk_norm is None:
            return 1.0
        before, after = self._qk_numbers(role)
        scale = math.sqrt(self.ratio * after / before)
        scaled = weight * scale
        exact = self.dtype == torch.float32 or torch.equal(scaled.to(self.dtype).float(), scaled)
        return scale if exact else 1.0

    def _qk_norm(self, role: str, weight: Tensor) -> Tensor:
        if self.old.qk_norm == "head":
            return weight
        before, after = self._qk_numbers(role[0])
        new = torch.ones(after * self.new.head_dim)
        new[self._rows(role[0])] = weight * math.sqrt(before / after)
        return new

    # -- storing

    def _matrix(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, copy=True, memory_format=torch.contiguous_format)

    def _vector(self, x: Tensor) -> Tensor:
        x = x.float()
        small = x.to(self.dtype, copy=True)
        return small if torch.equal(small.float(), x) else x.clone()


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def labelled(config: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
    """config.json that says it was widened, and from what."""
    return {**config, "foretell": {**config.get("foretell", {}), "widened_from": label}}
