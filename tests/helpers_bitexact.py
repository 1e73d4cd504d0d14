"""Random cases for bit-exactness: a node's logits in a random batch against the node fed alone.

A case takes a small random model, gives several sequences random histories (one-shot or chunked
prefill, rolled-back drafts, committed branches of trees), runs one ragged batch of random trees and
chains over all of them with one or two threads, and compares each row, bit for bit, with what plain
decoding gives: a fresh cache, one token a forward, one thread.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.tree import TokenTree
from foretell.models.native.arch import Arch, LayerArch, Rope
from foretell.models.native.families import Names
from foretell.models.native.fused import FusedModel
from foretell.models.quant.formats import FORMATS

KINDS = (torch.float32, torch.bfloat16, FORMATS["int8"], FORMATS["int4"])
VOCAB = 61
_ROLES = ("q", "k", "v", "o", "gate", "up", "down", "attn_norm", "mlp_norm", "attn_post")
NAMES = Names(
    {
        **{role: f"layers.{{}}.{role}" for role in (*_ROLES, "mlp_post", "q_norm", "k_norm")},
        **{"embed": "embed", "positions": "positions", "norm": "norm"},
    },
    prefixes=("",),
)


def random_arch(r: random.Random) -> Arch:
    """Two or three layers with a random choice of everything that `Arch` can say."""
    kv = r.choice([1, 2, 3])
    heads, size = kv * r.choice([1, 2, 3, 4, 5]), r.choice([8, 10, 16, 32])
    turning = r.random() < 0.8
    share = r.choice([1.0, 1.0, 0.5])
    turns = int(size * share) // 2 * 2
    ropes = (Rope(turns, 100.0), Rope(turns, 5000.0)) if turning else ()
    window = r.choice([None, None, 3, 7, 20])
    layers = tuple(
        LayerArch(r.choice([0, 1, None]) if ropes else None, r.choice([window, None]))
        for _ in range(r.choice([1, 2, 3]))
    )
    pre = r.random() < 0.85
    parallel = pre and r.random() < 0.2
    norm = r.choice(["rms", "layer"])
    return Arch(
        vocab=VOCAB,
        hidden=r.choice([32, 48, 64, 96, 100]),
        heads=heads,
        kv_heads=kv,
        head_dim=size,
        ffn=r.choice([32, 53, 64, 96, 160]),
        layers=layers,
        ropes=ropes,
        norm=norm,
        norm_offset=r.choice([0.0, 1.0]),
        norm_bias=norm == "layer" and r.random() < 0.6,
        pre_norm=pre,
        post_norm=not pre or (not parallel and r.random() < 0.3),
        qk_norm=r.choice([None, None, "head", "full"]),
        parallel=parallel,
        qkv_bias=r.random() < 0.4,
        o_bias=r.random() < 0.3,
        mlp_bias=r.random() < 0.3,
        gated=r.random() < 0.7,
        act=r.choice(["silu", "gelu", "gelu_tanh", "gelu_quick", "relu"]),
        learned_positions=0 if turning else 256,
        embed_scale=r.choice([1.0, 7.0]),
        residual_scale=r.choice([1.0, 0.3]),
        attn_scale=r.choice([None, 0.4]),
        logit_scale=r.choice([1.0, 0.5]),
        attn_cap=r.choice([None, None, 5.0]),
        logit_cap=r.choice([None, 20.0]),
        tied=r.random() < 0.5,
    )


def random_model(r: random.Random, kind: Any) -> FusedModel:
    return FusedModel.random(random_arch(r), kind, r.randrange(1 << 20), names=NAMES)


def chain(ids: Sequence[int], start: int) -> Segment:
    return Segment(np.asarray(ids, np.int64), np.arange(start, start + len(ids)))


def random_tree(r: random.Random, context: Sequence[int], most: int) -> TokenTree:
    """A tree of up to `most` drafted nodes, some of them DEAD."""
    n = r.randrange(most + 1)
    wide = r.random()
    parents = [i - 1 if r.random() > wide else r.randrange(-1, i) for i in range(n)]
    tree = TokenTree.build(context, [r.randrange(VOCAB) for _ in parents], parents)
    if n and r.random() < 0.5:
        illegal = np.array([False] * len(context) + [r.random() < 0.25 for _ in parents])
        tree.kill(illegal)
    return tree


def history(model: FusedModel, r: random.Random, length: int) -> tuple[Any, list[int]]:
    """(cache, committed ids) after a random way to get there."""
    cache, text = model.new_cache(), []
    while len(text) < length:
        left = length - len(text)
        context = [r.randrange(VOCAB) for _ in range(r.choice([1, left, r.randint(1, left)]))]
        tree = random_tree(r, context, r.choice([0, 0, 6]))
        live = tree.live.tolist()
        with model.open([cache]) as txn:
            model.forward(PackedBatch([segment_of(tree, len(text), [0])]), txn)
            if r.random() < 0.15:
                continue  # rolled back
            node = r.choice([n for n in live if n >= tree.tip])
            nodes = [*range(tree.n_context), *tree.path(node)]
            txn.commit([[live.index(n) for n in nodes]])
        text += tree.tokens[nodes].tolist()
    return cache, text


class Plain:
    """Plain decoding of one sequence: one token a forward, one thread, from an empty cache."""

    def __init__(self, model: FusedModel, text: Sequence[int]) -> None:
        self.model, self.cache = model, model.new_cache()
        for token in text:
            self.feed(token)

    def feed(self, token: int) -> torch.Tensor:
        with self.model.open([self.cache]) as txn:
            out = self.model.forward(PackedBatch([chain([token], self.cache.n)]), txn)
            txn.commit([[0]])
        return out.logits[0]

    def tree(self, tree: TokenTree) -> dict[int, torch.Tensor]:
        """Logits [V] of every live node, each behind nothing but its own path."""
        start, found = self.cache.n, {}
        for node in tree.live.tolist():
            before = start + int(tree.depth[node])
            parent = int(tree.parent[node])
            if self.path_of != (parent, before):
                self.cache.truncate(start)
                for n in self._lead(tree, parent):
                    self.feed(int(tree.tokens[n]))
            found[node] = self.feed(int(tree.tokens[node]))
            self.path_of = (node, before + 1)
        return found

    path_of: tuple[int, int] | None = None

    @staticmethod
    def _lead(tree: TokenTree, node: int) -> list[int]:
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(tree.parent[node])
        return nodes[::-1]


def differences(model: FusedModel, r: random.Random, threads: Callable[[], int]) -> int:
    """Rows of one random batch that differ from plain decoding in any bit."""
    sequences = []
    for _ in range(r.choice([1, 1, 2, 3])):
        model.set_threads(threads())
        cache, text = history(model, r, r.choice([0, 1, 5, r.randrange(40)]))
        context = [r.randrange(VOCAB) for _ in range(r.choice([1, 1, 2, r.randint(1, 24)]))]
        sequences.append((cache, text, random_tree(r, context, r.choice([0, 3, 8, 16]))))
    model.set_threads(threads())
    batch = PackedBatch([segment_of(tree, len(text), None) for _, text, tree in sequences])
    with model.open([cache for cache, _, _ in sequences]) as txn:
        logits = model.forward(batch, txn).logits
    model.set_threads(1)
    wrong = 0
    for (_, text, tree), at in zip(sequences, batch.offsets, strict=False):
        alone = Plain(model, text).tree(tree)
        for row, node in enumerate(tree.live.tolist()):
            wrong += not torch.equal(logits[at + row], alone[node])
    return wrong
