"""The native model: any dense decoder that an `Arch` describes, over stock torch operations.

Notation: T packed rows of B sequences, N rows of one of them, S keys, H hidden, F the MLP's width,
Hq / Hkv query / key-value heads, G = Hq / Hkv, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.core.batch import Output, PackedBatch
from foretell.core.errors import InputError
from foretell.core.feedback import Tap
from foretell.core.protocols import Caps, ModelSpec
from foretell.models.cache.contiguous import ContiguousCache, ContiguousTxn
from foretell.models.native.arch import Arch
from foretell.models.native.exact import PIECE, FloatRows, alike, in_pieces
from foretell.models.native.families import LLAMA_NAMES, Names, describe
from foretell.models.native.integer import IntegerProducts
from foretell.models.native.layers import Assembler, Layer
from foretell.models.native.plan import Plan, Planner, SeqPlan
from foretell.models.native.products import products
from foretell.models.native.weights import RandomSource, Source, read_config
from foretell.models.quant.checkpoints import open_checkpoint
from foretell.models.quant.formats import WeightFormat

Progress = Callable[[float, str], None]


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    table = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    return (table | {"gelu_tanh": _gelu_tanh, "gelu_quick": _gelu_quick})[name]


class NativeModel:
    """A `TargetModel` with `LayerAccess`, run by stock torch operations.

    Float results depend in their last bits on how many rows a forward has (the library picks
    another kernel); attention always reduces keys in path order. On a CPU with quantised weights,
    and with floats when `deterministic` is set, a row's results are the same to the last bit in any
    batch (exact.py), which costs attention one call a row.
    """

    def __init__(
        self,
        arch: Arch,
        names: Names,
        source: Source,
        dtype: torch.dtype | WeightFormat,
        device: torch.device | str = "cpu",
        name: str = "",
        progress: Progress | None = None,
        deterministic: bool = False,
    ) -> None:
        """dtype: of weights and activations, or a format of quantised weights, whose activations
        are float32 between products. InputError when `deterministic` cannot be kept."""
        device = torch.device(device)
        if deterministic and device.type != "cpu":
            raise InputError("Results that do not depend on the batch need a CPU: use device cpu.")
        form = dtype if isinstance(dtype, WeightFormat) else None
        dtype = torch.float32 if isinstance(dtype, WeightFormat) else dtype
        self.arch, self.dtype, self.device, self.format = arch, dtype, device, form
        self.exact = device.type == "cpu" and (deterministic or form is not None)
        count = len(arch.layers)
        with torch.inference_mode():
            self.mm, self.addmm_ = self._products()
            parts = Assembler(arch, names, source, dtype, device, form, self.exact)
            self.embedding, self.head = parts.embedding()
            self.positions = parts.positions()
            self.final_norm = parts.final_norm()
            self.layers: list[Layer] = []
            for i, shape in enumerate(arch.layers):
                self.layers.append(parts.layer(i, shape))
                if progress is not None:
                    progress((i + 1) / count, f"layer {i + 1} of {count}")
            self._settle()
        self.planner = Planner(arch, parts.kinds, dtype, device, self.exact)
        self.activation, self.tanh = _activation(arch.act), torch.tanh_
        if self.exact:
            self.activation, self.tanh = in_pieces(self.activation), in_pieces(torch.tanh)
        self.scale, self.groups = arch.scale, arch.groups
        self.block = self._choose_block()
        row = 2 * arch.kv_heads * arch.head_dim * dtype.itemsize * count
        self.spec = ModelSpec(
            vocab=arch.vocab,
            hidden=arch.hidden,
            layers=count,
            max_positions=arch.max_positions,
            caps=Caps(layer_access=True),
            name=name or arch.family,
            row_bytes=row,
            weight_bytes=sum(w.nbytes for w in self._matrices()),
        )

    def _products(self) -> tuple[Any, Any]:
        """(x @ w, acc += alpha * x @ w) for the matrices of this model."""
        if self.format is not None:
            found = IntegerProducts(self.device)
        elif self.exact:
            found = self.float_rows = FloatRows(self.dtype)
        else:
            return products(self.dtype, self.device)
        return found.mm, found.addmm_

    def _settle(self) -> None:
        if self.exact and self.format is None:
            self.float_rows.settle(self._matrices()[-5:])

    def _matrices(self) -> list[Any]:
        """What a forward with logits reads, layer by layer, the head last."""
        each = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return [*each, self.head]

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype | WeightFormat,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        deterministic: bool = False,
    ) -> NativeModel:
        """From a checkpoint directory. InputError when it is damaged or of an unknown family."""
        config = read_config(folder)
        arch, names = describe(config)
        source = open_checkpoint(folder, config)
        return cls(arch, names, source, dtype, device, folder.name, progress, deterministic)

    @classmethod
    def random(
        cls,
        arch: Arch,
        dtype: torch.dtype | WeightFormat = torch.float32,
        seed: int = 0,
        device: torch.device | str = "cpu",
        names: Names = LLAMA_NAMES,
        gain: float = 1.0,
        deterministic: bool = False,
    ) -> NativeModel:
        """Random weights straight in `dtype` (`RandomSource`; float32 ones, quantised, for a
        format); gain: spread of the logits."""
        floats = torch.float32 if isinstance(dtype, WeightFormat) else dtype
        source, name = RandomSource(seed, gain, floats), f"random-{arch.family}"
        return cls(arch, names, source, dtype, device, name, deterministic=deterministic)

    # -- caches

    def new_cache(self, rows: int = 0) -> ContiguousCache:
        shape = (len(self.layers), self.arch.kv_heads, self.arch.head_dim)
        return ContiguousCache(shape, self.dtype, self.device, rows)

    def open(self, caches: Sequence[ContiguousCache]) -> ContiguousTxn:
        return ContiguousTxn(caches)

    # -- the forward

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, txn: ContiguousTxn, taps: Sequence[Tap] = ()) -> Output:
        """Run all layers over `batch` (class docstring; core/protocols.py).

        taps: "embed", a layer index l (the input of layer l; L is the output of the last), "last"
        (after the final norm); each comes back as [T, H].
        """
        plan = self.planner.plan(batch, txn)
        x = self._input(batch)
        hidden: dict[Tap, Tensor] = {}
        block = self.block
        if not taps:
            for layer in self.layers:
                x = block(layer, x, plan)
        else:
            self._check_taps(taps)
            if "embed" in taps:
                hidden["embed"] = x.clone()
            for layer in self.layers:
                if layer.index in taps:
                    hidden[layer.index] = x.clone()
                x = block(layer, x, plan)
            if len(self.layers) in taps:
                hidden[len(self.layers)] = x.clone()
        txn.advance(batch)
        rows = batch.logit_rows()
        if "last" in taps:
            hidden["last"] = last = self.final_norm(x)
            return Output(self._head(last if rows is None else last[self._index(rows)]), hidden)
        if rows is not None and len(rows) < len(x):
            x = x[len(x) - 1 :] if _only_last(rows, len(x)) else x[self._index(rows)]
        return Output(self._head(self.final_norm(x)), hidden)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """[n] int64 -> [n, H], scaled as layer 0 reads it (learned positions left out)."""
        x = self._lookup(tokens.to(self.device))
        if self.arch.embed_scale != 1.0:
            # rounded like the activations: so do the models that were trained with it
            x *= torch.tensor(self.arch.embed_scale, dtype=self.dtype, device=self.device)
        return x

    @torch.inference_mode()
    def unembed(self, hidden: Tensor) -> Tensor:
        """[n, H] after the last layer, before the final norm -> logits [n, V] float32."""
        return self._head(self.final_norm(hidden.to(self.dtype)))

    @torch.inference_mode()
    def run_layers(
        self, hidden: Tensor, batch: PackedBatch, txn: ContiguousTxn, layers: Sequence[int]
    ) -> Tensor:
        """[T, H] -> [T, H] through `layers`, whose K/V go to the scratch rows that begin at
        `txn.scratch`; call `txn.advance(batch)` once all wanted layers have run."""
        known = txn.plan
        if known is None or known[0] is not batch:
            known = txn.plan = (batch, self.planner.plan(batch, txn))
        x = hidden.to(self.device, self.dtype, copy=True)  # blocks work in place
        for i in layers:
            x = self.block(self.layers[i], x, known[1])
        return x

    def _check_taps(self, taps: Sequence[Tap]) -> None:
        for tap in taps:
            inside = isinstance(tap, int) and 0 <= tap <= len(self.layers)
            if not inside and tap not in ("embed", "last"):
                raise InputError(
                    f"There is no hidden state {tap!r}: ask for 'embed', 'last' or a layer "
                    f"0..{len(self.layers)}."
                )

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.as_tensor(rows, device=self.device)

    def _lookup(self, tokens: Tensor) -> Tensor:
        if self.embedding.is_contiguous():
            return self.embedding.index_select(0, tokens).to(self.dtype)
        return self.head.index_select(1, tokens).t().contiguous()

    def _input(self, batch: PackedBatch) -> Tensor:
        """What layer 0 reads: [T, H], ours to overwrite."""
        segments = batch.segments
        ids = torch.cat([torch.from_numpy(s.tokens) for s in segments])
        x = self.embed(ids)
        for s, at in zip(segments, batch.offsets, strict=False):
            for row, vector in (s.embeds or {}).items():
                x[at + row] = vector
        if self.positions is not None:
            where = torch.cat([torch.from_numpy(s.positions) for s in segments])
            if len(where) and int(where.max()) >= len(self.positions):
                raise InputError(
                    f"The text is longer than the {len(self.positions)} positions this model has: "
                    "shorten the prompt or ask for fewer tokens."
                )
            x += self.positions[where.to(self.device)]
        return x

    def _head(self, x: Tensor) -> Tensor:
        a = self.arch
        logits = self.mm(x, self.head).float()
        if a.logit_scale != 1.0:
            logits *= a.logit_scale
        if a.logit_cap is not None:
            logits = self.tanh(logits.div_(a.logit_cap)).mul_(a.logit_cap)
        return logits

    # -- one layer; which form it takes is decided once

    def _choose_block(self) -> Callable[[Layer, Tensor, Plan], Tensor]:
        a = self.arch
        if a.parallel:
            return self._parallel
        if a.post_norm:
            return self._sandwich
        biased = a.o_bias or a.mlp_bias
        return self._plain_biased if biased else self._plain

    def _plain(self, w: Layer, x: Tensor, plan: Plan) -> Tensor:
        """x + o(attention(norm x)), then x + down(mlp(norm x)), in place."""
        alpha = self.arch.residual_scale
        a = self._attention(w, w.attn_norm(x), plan)
        self.addmm_(x, a, w.o, alpha)
        return self.addmm_(x, self._mlp(w, w.mlp_norm(x)), w.down, alpha)

    def _plain_biased(self, w: Layer, x: Tensor, plan: Plan) -> Tensor:
        alpha = self.arch.residual_scale
        a = self._attention(w, w.attn_norm(x), plan)
        self.addmm_(x, a, w.o, alpha)
        if w.o_bias is not None:
            self._add(x, w.o_bias)
        self.addmm_(x, self._mlp(w, w.mlp_norm(x)), w.down, alpha)
        return x if w.down_bias is None else self._add(x, w.down_bias)

    def _sandwich(self, w: Layer, x: Tensor, plan: Plan) -> Tensor:
        """Norms behind attention and MLP (Gemma 2 and 3: before them as well; OLMo-2: only)."""
        a = self._attention(w, x if w.attn_norm is None else w.attn_norm(x), plan)
        y = self._linear(a, w.o, w.o_bias)
        self._add(x, y if w.attn_post is None else w.attn_post(y))
        m = self._mlp(w, x if w.mlp_norm is None else w.mlp_norm(x))
        y = self._linear(m, w.down, w.down_bias)
        return self._add(x, y if w.mlp_post is None else w.mlp_post(y))

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        """x += residual_scale * y, in place."""
        alpha = self.arch.residual_scale
        if self.exact and alpha != 1.0:
            return x.add_(y * alpha)  # two roundings everywhere, not one where a loop fuses them
        return x.add_(y, alpha=alpha)

    def _parallel(self, w: Layer, x: Tensor, plan: Plan) -> Tensor:
        """x + o(attention(norm x)) + down(mlp(norm' x))."""
        a = self._attention(w, w.attn_norm(x), plan)
        m = self._mlp(w, w.mlp_norm(x))
        self.addmm_(x, a, w.o, 1.0)
        self.addmm_(x, m, w.down, 1.0)
        for bias in (w.o_bias, w.down_bias):
            if bias is not None:
                x.add_(bias)
        return x

    def _linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        y = self.mm(x, weight)
        return y if bias is None else y.add_(bias)

    def _mlp(self, w: Layer, x: Tensor) -> Tensor:
        """[T, H] -> [T, F], what `down` reads."""
        y = self._linear(x, w.gate_up, w.gate_up_bias)
        if not self.arch.gated:
            return self.activation(y)
        gate, up = y.chunk(2, 1)
        return self.activation(gate).mul_(up)

    # -- attention

    def _attention(self, w: Layer, x: Tensor, plan: Plan) -> Tensor:
        """[T, H] -> [T, Hq D] with heads ordered as w.o's inputs: (group, kv head), or as stored
        where it is quantised; writes k and v."""
        a = self.arch
        qkv = self._linear(x, w.qkv, w.qkv_bias)
        if w.qk_norm is not None:
            w.qk_norm(qkv)
        out = self._attend_all(w, self._turn_and_write(w, qkv, plan), plan)
        if self.format is not None and self.groups > 1:
            out = (
                out.view(-1, self.groups, a.kv_heads, a.head_dim).transpose(1, 2).reshape(out.shape)
            )
        return out

    def _attend_all(self, w: Layer, q: Tensor, plan: Plan) -> Tensor:
        """q of T Hq D numbers -> [T, Hq D], heads ordered (group, kv head)."""
        a = self.arch
        if self.exact:
            with alike():
                found = [o for seq in plan.seqs for o in self._attend_rows(w, q, seq)]
            return torch.cat(found) if found else q.new_empty(0, a.heads * a.head_dim)
        if len(plan.seqs) == 1:
            return self._attend(w, q, plan.seqs[0])
        out = q.new_empty(plan.rows, a.heads * a.head_dim)
        for seq in plan.seqs:
            if seq.end > seq.begin:
                out[seq.begin : seq.end] = self._attend(w, q[seq.begin : seq.end], seq)
        return out

    def _turn_and_write(self, w: Layer, qkv: Tensor, plan: Plan) -> Tensor:
        """Rotate q and k of qkv [T, (Hq + 2 Hkv) D], write k and v; q of T Hq D numbers."""
        a = self.arch
        t, h, kv, d = plan.rows, a.heads, a.kv_heads, a.head_dim
        if w.rope is None:
            for s in plan.seqs:
                s.rows[w.index].copy_(qkv[s.begin : s.end, h * d :].view(-1, 2, kv, d))
            return qkv[:, : h * d]
        of_q, of_kv = plan.turns[w.rope]
        if self.exact:
            return self._turn_in_pieces(w, qkv, plan)
        if plan.seqs[0].pairs is not None:  # float32 and float64: straight into the cache
            pairs = torch.view_as_complex(qkv.view(t, -1, d // 2, 2))
            qs, kvs = pairs.split((h, 2 * kv), 1)
            if len(plan.seqs) == 1:
                torch.mul(kvs, of_kv, out=plan.seqs[0].pairs[w.index])
            else:
                for s in plan.seqs:
                    part = slice(s.begin, s.end)
                    torch.mul(kvs[part], of_kv[part], out=s.pairs[w.index])
            return torch.view_as_real(qs * of_q)
        wide = qkv.float()
        pairs = torch.view_as_complex(wide.view(t, -1, d // 2, 2))
        pairs[:, : h + kv] *= of_q
        for s in plan.seqs:
            s.rows[w.index].copy_(wide[s.begin : s.end, h * d :].view(-1, 2, kv, d))
        return wide[:, : h * d].to(qkv.dtype)

    def _turn_in_pieces(self, w: Layer, qkv: Tensor, plan: Plan) -> Tensor:
        """As `_turn_and_write`, so many rows at a time that no thread cuts a row in two."""
        a = self.arch
        h, kv, d = a.heads, a.kv_heads, a.head_dim
        assert w.rope is not None
        of_q, of_kv = plan.turns[w.rope]
        wide = qkv if qkv.dtype == torch.float64 else qkv.float()
        pairs = torch.view_as_complex(wide.view(len(qkv), h + 2 * kv, d // 2, 2))
        q, step = torch.empty_like(pairs[:, :h]), max(1, PIECE // (h * d))
        for s in plan.seqs:
            rows = s.rows[w.index]
            for at in range(s.begin, s.end, step):
                part = slice(at, min(at + step, s.end))
                torch.mul(pairs[part, :h], of_q[part], out=q[part])
                turned = torch.view_as_real(pairs[part, h:] * of_kv[part])
                rows[at - s.begin : part.stop - s.begin].copy_(turned.view(-1, 2, kv, d))
        return torch.view_as_real(q).to(qkv.dtype)

    def _attend_rows(self, w: Layer, q: Tensor, seq: SeqPlan) -> list[Tensor]:
        """One sequence, row by row: a list of [1, Hq D]."""
        a, walk = self.arch, seq.walk
        if seq.end == seq.begin:
            return []
        assert walk is not None
        q = q[seq.begin : seq.end].reshape(-1, self.groups, a.kv_heads, a.head_dim).transpose(1, 2)
        found = walk.attend(seq.layers[w.index], w.kind, q, self._one_row)
        return [o.transpose(1, 2).reshape(1, -1) for o in found]

    def _one_row(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.arch.attn_cap is not None:
            return self._capped(q, k, v, None, False)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)

    def _attend(self, w: Layer, q: Tensor, seq: SeqPlan) -> Tensor:
        """One sequence: q (N Hq D numbers) against its keys -> [N, Hq D]."""
        a, reads = self.arch, seq.reads[w.kind]
        n, g, kv, d = seq.end - seq.begin, self.groups, a.kv_heads, a.head_dim
        k, v = reads.keys[w.index], reads.values[w.index]
        if seq.merged:
            q = q.reshape(1, n * g, kv, d).transpose(1, 2)  # [1, Hkv, N G, D]
        else:
            q = q.reshape(n, g, kv, d).permute(1, 2, 0, 3)  # [G, Hkv, N, D]
            if g > 1:
                k, v = k.expand(g, -1, -1, -1), v.expand(g, -1, -1, -1)
        if a.attn_cap is None:
            out = F.scaled_dot_product_attention(
                q, k, v, reads.mask, is_causal=reads.causal, scale=self.scale
            )
        else:
            out = self._capped(q, k, v, reads.mask, reads.causal)
        if seq.merged:
            return out.transpose(1, 2).reshape(n, -1)
        return out.permute(2, 0, 1, 3).reshape(n, -1)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention whose scores pass through cap * tanh(score / cap) before the mask."""
        a = self.arch
        assert a.attn_cap is not None
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = self.tanh(scores.mul_(a.scale / a.attn_cap)).mul_(a.attn_cap)
        if causal:
            n, s = scores.shape[-2:]
            scores += torch.full((n, s), float("-inf"), device=q.device).triu_(s - n + 1)
        elif mask is not None:
            scores += mask
        return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)


def _only_last(rows: np.ndarray, total: int) -> bool:
    return len(rows) == 1 and int(rows[0]) == total - 1
