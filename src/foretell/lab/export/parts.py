"""The tensors of a checkpoint by their role, whatever a family calls, fuses or transposes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from foretell.core.errors import InputError
from foretell.models.native.arch import Arch
from foretell.models.native.families import Names, describe
from foretell.models.native.weights import Checkpoint, Source, read_config, read_json

FUSED = (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up")))


def matrix_shapes(a: Arch) -> dict[str, tuple[int, int]]:
    """Role -> [out, in] of the matrices of one layer."""
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = {"q": (q, a.hidden), "k": (kv, a.hidden), "v": (kv, a.hidden), "o": (a.hidden, q)}
    shapes |= {"gate": (a.ffn, a.hidden)} if a.gated else {}
    return shapes | {"up": (a.ffn, a.hidden), "down": (a.hidden, a.ffn)}


def layer_norms(a: Arch) -> list[str]:
    """Roles of the norms over H that every layer has."""
    before = ["attn_norm", "mlp_norm"] if a.pre_norm else []
    return before + (["attn_post", "mlp_post"] if a.post_norm else [])


def has_bias(a: Arch, role: str) -> bool:
    if role in ("q", "k", "v", "qkv"):
        return a.qkv_bias
    return a.o_bias if role == "o" else a.mlp_bias


class Parts:
    """Reads a checkpoint directory; tensors come as stored (dtype), matrices as [out, in].

    InputError when the directory is no checkpoint, is damaged or of a family without a runner.
    """

    def __init__(self, folder: Path, source: Source | None = None) -> None:
        self.folder, self.config = folder, read_config(folder)
        if self.config.get("quantization_config"):
            raise InputError(f"{folder} is quantised: take the checkpoint it was made from.")
        self.arch, self.names = describe(self.config)
        self.source: Source = Checkpoint(folder) if source is None else source
        self.prefix = prefix_of(self.names, self.source)

    def name(self, role: str, layer: int | None = None) -> str:
        """Path of a module, without `.weight`."""
        return self.prefix + self.names.body[role].format(layer)

    def embedding(self) -> Tensor:
        """[V, H]"""
        shape = (self.arch.vocab, self.arch.hidden)
        return self.source.get(self.name("embed") + ".weight", shape)

    def positions(self) -> Tensor:
        """[P, H], of families with learned positions."""
        shape = (self.arch.learned_positions, self.arch.hidden)
        return self.source.get(self.name("positions") + ".weight", shape)

    @property
    def head_name(self) -> str:
        """Of the output matrix, where it is not the embedding."""
        found = [h for h in self.names.heads if self.source.has(h + ".weight")]
        return (found or list(self.names.heads))[0]

    def head(self) -> Tensor | None:
        """[V, H], or None where the head is the embedding."""
        a = self.arch
        return None if a.tied else self.source.get(self.head_name + ".weight", (a.vocab, a.hidden))

    def matrix(self, role: str, layer: int) -> Tensor:
        """[out, in] of q, k, v, o, gate, up or down."""
        shapes = matrix_shapes(self.arch)
        fused, mates = self._fused(role)
        if fused is None:
            return self._stored(role, layer, shapes[role])
        total = sum(shapes[m][0] for m in mates)
        whole = self._stored(fused, layer, (total, self.arch.hidden))
        return self._part(whole, role, mates)

    def bias(self, role: str, layer: int) -> Tensor | None:
        """[out], or None where the family has none."""
        if not has_bias(self.arch, role):
            return None
        shapes = matrix_shapes(self.arch)
        fused, mates = self._fused(role)
        if fused is None:
            return self.source.get(self.name(role, layer) + ".bias", (shapes[role][0],))
        total = sum(shapes[m][0] for m in mates)
        return self._part(self.source.get(self.name(fused, layer) + ".bias", (total,)), role, mates)

    def norm(self, role: str, layer: int | None = None) -> Tensor:
        """The weight of a norm as stored (offset not added): [H], or [D] / [heads D] of q_norm."""
        a, size = self.arch, self.arch.hidden
        if role in ("q_norm", "k_norm"):
            heads = a.heads if role == "q_norm" else a.kv_heads
            size = a.head_dim if a.qk_norm == "head" else heads * a.head_dim
        return self.source.get(self.name(role, layer) + ".weight", (size,))

    def norm_bias(self, role: str, layer: int | None = None) -> Tensor:
        return self.source.get(self.name(role, layer) + ".bias", (self.arch.hidden,))

    def _fused(self, role: str) -> tuple[str | None, tuple[str, ...]]:
        for fused, mates in FUSED:
            if role in mates and fused in self.names.body:
                return fused, mates
        return None, ()

    def _stored(self, role: str, layer: int, shape: tuple[int, int]) -> Tensor:
        name = self.name(role, layer) + ".weight"
        if self.names.transposed:
            return self.source.get(name, shape[::-1]).t()
        return self.source.get(name, shape)

    def _part(self, whole: Tensor, role: str, mates: tuple[str, ...]) -> Tensor:
        a = self.arch
        if self.names.qkv_by_head and role in "qkv":
            heads = whole.view(a.heads, 3, a.head_dim, *whole.shape[1:])
            return heads[:, "qkv".index(role)].flatten(0, 1)
        shapes, at = matrix_shapes(a), 0
        for mate in mates:
            if mate == role:
                break
            at += shapes[mate][0]
        return whole[at : at + shapes[role][0]]


def prefix_of(names: Names, source: Source) -> str:
    embed = names.body["embed"] + ".weight"
    found = [p for p in names.prefixes if source.has(p + embed)]
    return found[0] if found else names.prefixes[0]


def weight_files(folder: Path) -> list[Path]:
    """The files that `Checkpoint` reads, in order of their names."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.exists():
            table = read_json(index, "the list of weight files").get("weight_map") or {}
            return [folder / name for name in sorted(set(table.values()))]
    return []


def weights_sha256(folder: Path) -> str:
    """Of all weight files behind one another; for one file what `sha256sum` says."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
