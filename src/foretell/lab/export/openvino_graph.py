"""A decoder as an OpenVINO graph with its key/value cache as state, the form OpenVINO GenAI runs.

Inputs: input_ids, attention_mask, position_ids [B, N] int64, beam_idx [B] int32. Output: logits
[B, N, V] float32. The pieces (RMS norm, rotation by halves, cache as ReadValue -> Gather -> Concat
in front of one attention node) have the form that OpenVINO's fusions and its rewriting to paged
attention look for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from foretell.core.errors import InputError
from foretell.lab.export.parts import Parts

HIDDEN = -65504.0  # added to the score of a key that a row must not see


class GraphBuilder:
    """Builds `ov.Model`s from a checkpoint; constants are float32."""

    def __init__(self, parts: Parts, ov: Any) -> None:
        check(parts)
        self.parts, self.ov, self.op = parts, ov, ov.opset13
        self.sinks: list[Any] = []
        self.turns: dict[int, tuple[Any, Any]] = {}

    def build(self, progress: Any) -> Any:
        ov, op, p, a = self.ov, self.op, self.parts, self.parts.arch
        inputs = [
            self._input(name, ov.Type.i64, [-1, -1])
            for name in ("input_ids", "attention_mask", "position_ids")
        ]
        self.beams = self._input("beam_idx", ov.Type.i32, [-1])
        ids, mask, self.positions = inputs
        shape = op.shape_of(ids)
        self.batch = op.gather(shape, self._ints([0]), self._int(0))
        self.mask = self._causal(shape, mask)
        table = self._constant(p.embedding(), "embedding")
        x = op.gather(table, op.convert(ids, "i32"), self._int(0))
        if a.embed_scale != 1.0:
            x = op.multiply(x, self._float(a.embed_scale))
        for i in range(len(a.layers)):
            x = self._layer(i, x)
            p.source.release()
            progress((i + 1) / len(a.layers), "building the graph")
        # GenAI looks for MatMul -> Result or MatMul -> Divide -> Tanh -> Multiply -> Result
        x = self._norm(x, p.norm("norm"), a.logit_scale)
        head = p.head()
        head = table if head is None else self._constant(head, "head")
        logits = op.matmul(x, head, False, True)
        if a.logit_cap is not None:
            capped = op.tanh(op.divide(logits, self._float(a.logit_cap)))
            logits = op.multiply(capped, self._float(a.logit_cap))
        result = op.result(logits)
        result.output(0).set_names({"logits"})
        result.set_friendly_name("logits")
        return ov.Model([result], self.sinks, [*inputs, self.beams], p.folder.name)

    # -- one layer

    def _layer(self, i: int, x: Any) -> Any:
        p, a = self.parts, self.parts.arch
        y = self._norm(x, p.norm("attn_norm", i)) if a.pre_norm else x
        y = self._attention(i, y)
        x = self._residual(x, self._norm(y, p.norm("attn_post", i)) if a.post_norm else y)
        y = self._norm(x, p.norm("mlp_norm", i)) if a.pre_norm else x
        y = self._mlp(i, y)
        return self._residual(x, self._norm(y, p.norm("mlp_post", i)) if a.post_norm else y)

    def _residual(self, x: Any, y: Any) -> Any:
        if self.parts.arch.residual_scale != 1.0:
            y = self.op.multiply(y, self._float(self.parts.arch.residual_scale))
        return self.op.add(x, y)

    def _mlp(self, i: int, x: Any) -> Any:
        op, act = self.op, self.parts.arch.act
        gate = self._linear("gate", i, x)
        if act == "silu":
            gate = op.swish(gate)
        elif act == "relu":
            gate = op.relu(gate)
        else:
            gate = op.gelu(gate, "tanh" if act == "gelu_tanh" else "erf")
        return self._linear("down", i, op.multiply(gate, self._linear("up", i, x)))

    def _attention(self, i: int, x: Any) -> Any:
        op, p, a = self.op, self.parts, self.parts.arch
        q, k, v = (self._linear(role, i, x) for role in "qkv")
        if a.qk_norm == "full":
            q, k = self._norm(q, p.norm("q_norm", i)), self._norm(k, p.norm("k_norm", i))
        q, k, v = (
            op.reshape(y, self._ints([0, 0, n, a.head_dim]), True)
            for y, n in ((q, a.heads), (k, a.kv_heads), (v, a.kv_heads))
        )
        if a.qk_norm == "head":
            q, k = self._norm(q, p.norm("q_norm", i)), self._norm(k, p.norm("k_norm", i))
        q, k, v = (op.transpose(y, self._ints([0, 2, 1, 3])) for y in (q, k, v))
        rope = a.layers[i].rope
        if rope is not None:
            q, k = self._turn(q, rope), self._turn(k, rope)
        k, v = self._remember(i, "key", k), self._remember(i, "value", v)
        more = [] if a.attn_scale is None else [self._float(a.scale)]
        y = op.scaled_dot_product_attention(q, k, v, self.mask, *more)
        y = op.transpose(y, self._ints([0, 2, 1, 3]))
        y = op.reshape(y, self._ints([0, 0, a.heads * a.head_dim]), True)
        return self._linear("o", i, y)

    def _remember(self, i: int, what: str, new: Any) -> Any:
        """[B, Hkv, N, D] -> [B, Hq, S, D]: all rows so far, a copy for every reader."""
        op, a = self.op, self.parts.arch
        size = [self._ints([a.kv_heads]), self._ints([0]), self._ints([a.head_dim])]
        empty = op.broadcast(self._float(0.0), op.concat([self.batch, *size], 0))
        name = f"past_key_values.{i}.{what}present.{i}.{what}"
        shape = self.ov.PartialShape([-1, a.kv_heads, -1, a.head_dim])
        old = op.read_value(empty, name, self.ov.Type.f32, shape)
        rows = op.concat([op.gather(old, self.beams, self._int(0)), new], 2)
        self.sinks.append(op.assign(rows, name))
        if a.groups == 1:
            return rows
        each = [self._ints([a.kv_heads]), self._ints([a.groups]), self._ints([1])]
        wide = op.concat([self.batch, *each, self._ints([a.head_dim])], 0)
        rows = op.broadcast(op.unsqueeze(rows, self._int(2)), wide, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(rows, self._ints([0, a.heads, -1, a.head_dim]), True)

    def _turn(self, x: Any, index: int) -> Any:
        """[B, heads, N, D]: coordinate d turns with d + half."""
        op, rope = self.op, self.parts.arch.ropes[index]
        cos, sin = self._turns(index)
        part, half = x, rope.dim // 2
        if rope.dim < self.parts.arch.head_dim:
            part = self._slice(x, 0, rope.dim)
        flipped = op.multiply(self._slice(part, half, np.iinfo(np.int64).max), self._float(-1.0))
        swapped = op.concat([flipped, self._slice(part, 0, half)], -1)
        turned = op.add(op.multiply(part, cos), op.multiply(swapped, sin))
        if part is x:
            return turned
        return op.concat([turned, self._slice(x, rope.dim, np.iinfo(np.int64).max)], -1)

    def _turns(self, index: int) -> tuple[Any, Any]:
        """Cosine and sine, each [B, 1, N, dim]; the same nodes for every layer."""
        if index not in self.turns:
            op, rope = self.op, self.parts.arch.ropes[index]
            frequencies = rope.frequencies().numpy()[None, :, None]
            ones = op.concat([self.batch, self._ints([1]), self._ints([1])], 0)
            turning = op.broadcast(op.constant(frequencies), ones, broadcast_spec="BIDIRECTIONAL")
            at = op.convert(op.unsqueeze(self.positions, self._int(1)), "f32")
            angles = op.transpose(op.matmul(turning, at, False, False), self._ints([0, 2, 1]))
            angles = op.concat([angles, angles], -1)
            made = [op.unsqueeze(f(angles), self._int(1)) for f in (op.cos, op.sin)]
            if rope.attention != 1.0:
                made = [op.multiply(m, self._float(rope.attention)) for m in made]
            self.turns[index] = (made[0], made[1])
        return self.turns[index]

    # -- small pieces

    def _norm(self, x: Any, weight: Tensor, scale: float = 1.0) -> Any:
        op, a = self.op, self.parts.arch
        square = op.reduce_mean(op.power(x, self._float(2.0)), self._ints([-1]), True)
        root = op.sqrt(op.add(square, self._float(a.eps)))
        normal = op.multiply(x, op.divide(self._float(1.0), root))
        weight = (weight.float() + a.norm_offset) * scale
        return op.multiply(normal, op.constant(weight.numpy()))

    def _linear(self, role: str, i: int, x: Any) -> Any:
        p = self.parts
        y = self.op.matmul(x, self._constant(p.matrix(role, i), f"{role}.{i}"), False, True)
        bias = p.bias(role, i)
        return y if bias is None else self.op.add(y, self.op.constant(bias.float().numpy()))

    def _causal(self, shape: Any, mask: Any) -> Any:
        """[B, 1, N, S] added to scores: keys up to the row's own, and none of the padding."""
        op = self.op
        one, zero = self._int(1), self._int(0)
        rows = op.squeeze(op.gather(shape, self._ints([1]), zero), zero)
        keys = op.squeeze(op.gather(op.shape_of(mask), self._ints([1]), zero), zero)
        own = op.add(op.range(zero, rows, one, "i64"), op.subtract(keys, rows))
        past = op.less_equal(
            op.unsqueeze(op.range(zero, keys, one, "i64"), zero), op.unsqueeze(own, one)
        )
        real = op.not_equal(op.unsqueeze(mask, self._ints([1, 2])), zero)
        seen = op.logical_and(op.unsqueeze(past, self._ints([0, 1])), real)
        return op.select(seen, self._float(0.0), self._float(HIDDEN))

    def _slice(self, x: Any, begin: int, end: int) -> Any:
        ints = [self._ints([v]) for v in (begin, end, 1, 3)]
        return self.op.slice(x, *ints)

    def _constant(self, x: Tensor, name: str) -> Any:
        node = self.op.constant(x.float().contiguous().numpy())
        node.set_friendly_name(name)
        return node

    def _input(self, name: str, kind: Any, shape: list[int]) -> Any:
        node = self.op.parameter(shape, kind)
        node.set_friendly_name(name)  # the rewriting to paged attention asks for this one
        node.output(0).set_names({name})
        return node

    def _ints(self, values: list[int]) -> Any:
        return self.op.constant(np.asarray(values, np.int64))

    def _int(self, value: int) -> Any:
        return self.op.constant(np.asarray(value, np.int64))

    def _float(self, value: float) -> Any:
        return self.op.constant(np.asarray(value, np.float32))


def check(parts: Parts) -> None:
    """InputError for what these graphs do not have."""
    a = parts.arch
    if a.norm != "rms" or a.parallel or not a.gated:
        raise InputError(f"{a.family} cannot be written as an OpenVINO model here.")
    if a.attn_cap is not None or len(a.ropes) > 1:
        raise InputError(
            f"{a.family} cannot be written as an OpenVINO model here: its paged attention knows no "
            "soft cap and one set of rotary positions."
        )
    if any(r.varies for r in a.ropes):
        raise InputError("Rotary positions that depend on the length cannot be written here.")
    if a.act == "gelu_quick":
        raise InputError("The activation quick_gelu cannot be written as an OpenVINO model here.")
