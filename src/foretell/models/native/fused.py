"""The fused model: one call of the compiled kernels runs all layers of a forward.

Notation: T packed rows of B sequences, H hidden, L layers, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from foretell import kernels
from foretell.core.batch import Output, PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.feedback import Tap
from foretell.core.protocols import Caps, ModelSpec
from foretell.kernels.library import FORMATS, Library
from foretell.models.cache.contiguous import ContiguousCache, ContiguousTxn
from foretell.models.native.arch import Arch
from foretell.models.native.chains import ChainCall, Draws, Ends, Question
from foretell.models.native.families import LLAMA_NAMES, Names, describe
from foretell.models.native.packing import MATRICES, NORMS, Kind, Packer, read_slots
from foretell.models.native.rotations import Rotations
from foretell.models.native.weights import RandomSource, Source, read_config
from foretell.models.quant.checkpoints import open_checkpoint
from foretell.models.quant.formats import WeightFormat
from foretell.models.quant.packed import cached_weights, keep

Progress = Callable[[float, str], None]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu")
STAGES = ("embed", "norm", "qkv", "attention", "o", "up", "quantise", "down", "head")
_TABLES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
_P, _L = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "ft_model_new": (_P, (_L, _P, _P)),
    "ft_model_free": (None, (_P,)),
    "ft_model_layer": (None, (_P, _L, _L, _L, _L)),
    "ft_model_matrix": (None, (_P, _L, _L, _L, _L, _L, _L, _P, _P)),
    "ft_model_norm": (None, (_P, _L, _L, _P, _P)),
    "ft_model_table": (None, (_P, _L, _P, _L, _L)),
    "ft_forward": (ctypes.c_int, (_P, _P)),
    "ft_chain": (ctypes.c_int, (_P, _P, _P)),
}
_INT64 = np.dtype(np.int64)
_SHORT_TABLE = 5  # an Outcome of the same header
_CALL = 22  # numbers of a Call (kernels/forward.h), before its lists


class FusedModel:
    """A `TargetModel` with `LayerAccess` on the compiled CPU kernels.

    Weights are float32, bfloat16, int8 or int4; activations and hidden states float32; the cache
    float32 beside float32 weights, else bfloat16. Results are bit-exact: the logits of a node do
    not depend on the batch, the tree, how the text before it was chunked, or the threads (but where
    a model's rotary frequencies depend on the length of the prompt, on that length).
    """

    device = torch.device("cpu")
    dtype = torch.float32  # of hidden states

    def __init__(
        self,
        arch: Arch,
        names: Names,
        source: Source,
        kind: Kind,
        name: str = "",
        progress: Progress | None = None,
        packed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """packed: the plan's tensors (packing.py), e.g. mapped from a file; else made here.

        Raises InputError where the kernels are not there.
        """
        library = kernels.load()
        if library is None:
            raise InputError(f"The fused model needs the CPU kernels. {kernels.why_not()}")
        self.arch, self.source = arch, source
        self.format = str(kind).removeprefix("torch.")
        self.kind = kind
        self.threads = 0  # as many as torch has
        self._cdll = _declare(library)
        self.build = library.build
        self.race, self.topk = library.race, library.topk  # core/protocols.py, `Races`, `Ranks`
        with torch.inference_mode():
            packer = Packer(arch, names, source, kind, library)
            self.packed = _collect(packer, progress) if packed is None else dict(packed)
            self.embedding, self.places = packer.tables()
        self._slots = read_slots(self.packed["slots"])
        self._handle: int = self._build()
        self._ropes = [Rotations(rope) for rope in arch.ropes]
        self._question = Question()
        self._varies = any(rope.varies for rope in arch.ropes)
        self._layers = np.arange(len(arch.layers))
        self.cache_dtype = torch.float32 if kind == torch.float32 else torch.bfloat16
        self.spec = ModelSpec(
            vocab=arch.vocab,
            hidden=arch.hidden,
            layers=len(arch.layers),
            max_positions=arch.max_positions,
            caps=Caps(layer_access=True),
            name=name or arch.family,
            row_bytes=2
            * arch.kv_heads
            * arch.head_dim
            * self.cache_dtype.itemsize
            * len(arch.layers),
            weight_bytes=sum(t.nbytes for t in self.packed.values()),
        )

    @classmethod
    def load(cls, folder: Path, kind: Kind, progress: Progress | None = None) -> FusedModel:
        """From a checkpoint directory. InputError when it is damaged or of an unknown family."""
        config = read_config(folder)
        arch, names = describe(config)
        source = open_checkpoint(folder, config)
        key, packed = cached_weights(folder, kind, progress)
        model = cls(arch, names, source, kind, folder.name, progress, packed)
        if key is not None and packed is None:
            keep(key, model.packed, folder.name, kind)
        return model

    @classmethod
    def random(
        cls,
        arch: Arch,
        kind: Kind = torch.float32,
        seed: int = 0,
        names: Names = LLAMA_NAMES,
        gain: float = 1.0,
    ) -> FusedModel:
        """Random weights (`RandomSource`), those of `NativeModel.random` with the same seed."""
        stored = torch.float32 if isinstance(kind, WeightFormat) else kind
        source = RandomSource(seed, gain, stored)
        return cls(arch, names, source, kind, f"random-{arch.family}")

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", 0), 0
        if handle:
            self._cdll.ft_model_free(handle)

    def set_threads(self, count: int) -> None:
        """CPU threads of every forward from now on; 0: as many as torch has."""
        self.threads = count

    # -- caches

    def new_cache(self, rows: int = 0) -> ContiguousCache:
        shape = (len(self.arch.layers), self.arch.kv_heads, self.arch.head_dim)
        return ContiguousCache(shape, self.cache_dtype, self.device, rows)

    def open(self, caches: Sequence[ContiguousCache]) -> ContiguousTxn:
        return ContiguousTxn(caches)

    # -- the forward

    def forward(self, batch: PackedBatch, txn: ContiguousTxn, taps: Sequence[Tap] = ()) -> Output:
        """Run all layers over `batch` (core/protocols.py).

        taps: "embed", a layer index l (the input of layer l; L is the output of the last), "last"
        (after the final norm); each comes back as [T, H] float32.
        """
        # A forward streams all weights through the caches, so this code runs cold every time: what
        # counts is how many different things it touches.
        hidden = self._buffers(taps, batch.rows) if taps else {}
        segments = batch.segments
        wanted = segments[0].logits if len(segments) == 1 else batch.logit_rows()
        count = batch.rows if wanted is None else len(wanted)
        logits, best = torch.empty(count, self.arch.vocab), np.empty(count, np.int64)
        self._run(batch, txn, self._layers, logits=logits, best=best, wanted=wanted, hidden=hidden)
        txn.plan = None
        for i, segment in enumerate(segments):  # `txn.advance`; the positions are written already
            n = len(segment.tokens)
            txn.caches[i].used += n
            txn.scratch[i] += n
        return Output(logits, hidden, best)

    def chains(
        self,
        batch: PackedBatch,
        txn: ContiguousTxn,
        levels: Sequence[int],
        ends: Ends | None = None,
        draws: Draws | None = None,
    ) -> list[tuple[list[int], list[float]]] | None:
        """Feed back what the rows say (core/protocols.py, `Chains`)."""
        if self._varies:
            return None
        chain = ChainCall(levels, self._question, ends, draws)
        try:
            self._run(
                *(batch, txn, self._layers),
                logits=torch.empty(len(levels), self.arch.vocab),
                best=np.empty(len(levels), np.int64),
                wanted=batch.logit_rows(),
                chain=chain,
            )
        finally:
            self._question.settle()
        found = chain.found()
        for i, (segment, (ids, _)) in enumerate(zip(batch.segments, found, strict=True)):
            n = len(segment.tokens) + len(ids) - 1
            txn.caches[i].used += n
            txn.scratch[i] += n
        return found

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """[n] int64 -> [n, H] float32, scaled as layer 0 reads it (learned positions left out)."""
        return self.embedding.index_select(0, tokens.cpu()).float() * self._embed_scale

    @torch.inference_mode()
    def unembed(self, hidden: Tensor) -> Tensor:
        """[n, H] after the last layer, before the final norm -> logits [n, V] float32."""
        x = hidden.to(self.device, torch.float32).contiguous()
        logits = torch.empty(len(x), self.arch.vocab)
        code = self._call([0] * _CALL, len(x), x_in=x, logits=logits)
        if code:
            raise self._problem(code)
        return logits

    @torch.inference_mode()
    def run_layers(
        self, hidden: Tensor, batch: PackedBatch, txn: ContiguousTxn, layers: Sequence[int]
    ) -> Tensor:
        """[T, H] -> [T, H] through `layers`, whose K/V go to the scratch rows that begin at
        `txn.scratch`; call `txn.advance(batch)` once all wanted layers have run."""
        x = hidden.to(self.device, torch.float32).contiguous()
        out = torch.empty_like(x)
        chosen = np.asarray(layers, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self._layers):
            raise IndexError(f"layers {layers} of {len(self._layers)}")
        self._run(batch, txn, chosen, x_in=x, x_out=out)
        return out

    @property
    def _embed_scale(self) -> float:
        scale = self.arch.embed_scale
        if self.kind == torch.bfloat16:  # so do the models that were trained in it
            return float(torch.tensor(scale, dtype=torch.bfloat16))
        return scale

    def _buffers(self, taps: Sequence[Tap], rows: int) -> dict[Tap, Tensor]:
        for tap in taps:
            inside = isinstance(tap, int) and 0 <= tap <= len(self._layers)
            if not inside and tap not in ("embed", "last"):
                raise InputError(
                    f"There is no hidden state {tap!r}: ask for 'embed', 'last' or a layer "
                    f"0..{len(self._layers)}."
                )
        return {tap: torch.empty(rows, self.arch.hidden) for tap in taps}

    def _run(
        self,
        batch: PackedBatch,
        txn: ContiguousTxn,
        layers: np.ndarray,
        *,
        logits: Tensor | None = None,
        best: np.ndarray | None = None,
        wanted: np.ndarray | None = None,
        hidden: Mapping[Tap, Tensor] = MappingProxyType({}),
        x_in: Tensor | None = None,
        x_out: Tensor | None = None,
        chain: ChainCall | None = None,
    ) -> None:
        """Lay out a `Call` with its lists behind it in one array, and run it and what `chain` has
        follow it."""
        room = 0 if chain is None else chain.room
        segments, caches = batch.segments, txn.caches
        if len(segments) != len(caches):
            raise ValueError("one segment a cache, please")
        if not txn.open:
            raise RuntimeError("the transaction is closed")
        keep: list[object] = []  # what the addresses point into
        numbers = [0] * _CALL
        for segment, cache, at in zip(segments, caches, batch.offsets, strict=False):
            n, used = len(segment.tokens), cache.used
            kv = cache.kv
            if used + n + room > kv.shape[1]:
                cache.ensure(used + n + room)
                kv = cache.kv
            ancestors, width = segment.ancestors, used - cache.n + n
            if ancestors is not None:
                if ancestors.shape != (n, width):
                    raise ValueError(f"ancestors are {ancestors.shape}, the rows want {(n, width)}")
                ancestors = np.ascontiguousarray(ancestors, np.bool_)
                keep.append(ancestors)
            numbers += (
                *(at, n, kv.data_ptr(), kv.shape[1], cache.n, used, _address(cache.positions)),
                *(0 if ancestors is None else _address(ancestors), width),
            )
        tokens, positions = _joined(segments)
        if x_in is None:
            numbers[4] = _address(tokens)
        numbers[2], numbers[5] = len(segments), _address(positions)
        turns = len(numbers)
        if self._ropes:
            numbers[9] = len(self._ropes)
            for table, index in self._turns(batch, caches, positions):
                keep += (table, index)
                numbers += (table.data_ptr(), _address(index), len(table))
        numbers[10], numbers[11] = _address(layers), len(layers)
        if wanted is not None:
            wanted = _plain(wanted)
            numbers[12] = _address(wanted)
        taps = len(numbers)
        for tap, buffer in hidden.items():
            if tap == "last":
                numbers[17] = buffer.data_ptr()
            else:
                numbers += (0 if tap == "embed" else tap, buffer.data_ptr())  # type: ignore[list-item]
        embeds = len(numbers)
        for segment, at in zip(segments, batch.offsets, strict=False):
            for row, vector in (segment.embeds or {}).items():
                vector = vector.to("cpu", torch.float32).contiguous()
                keep.append(vector)
                numbers += (at + row, vector.data_ptr())
        numbers[16], numbers[19] = (embeds - taps) // 2, (len(numbers) - embeds) // 2
        lists = ((3, _CALL), (8, turns), (15, taps), (18, embeds))
        if best is not None:
            numbers[21] = _address(best)
        code = self._call(
            numbers, batch.rows, lists, x_in=x_in, x_out=x_out, logits=logits, chain=chain
        )
        if code == _SHORT_TABLE and not self._varies:
            for rope in self._ropes:
                rope.grow(int(positions.max()) + room)
            if int(positions.min()) >= 0:
                self._run(
                    *(batch, txn, layers),
                    logits=logits,
                    best=best,
                    wanted=wanted,
                    hidden=hidden,
                    x_in=x_in,
                    x_out=x_out,
                    chain=chain,
                )
                return
        if code:
            raise self._problem(code)

    def _turns(
        self, batch: PackedBatch, caches: Sequence[ContiguousCache], positions: np.ndarray
    ) -> list[tuple[Tensor, np.ndarray]]:
        """(table, rows of it) of every rope."""
        if not self._varies:
            return [(rope.table, positions) for rope in self._ropes]
        lengths = self._lengths(batch, caches, positions)
        return [rope.at(positions, lengths) for rope in self._ropes]

    def _call(
        self,
        numbers: list[int],
        rows: int,
        lists: Sequence[tuple[int, int]] = (),
        *,
        x_in: Tensor | None = None,
        x_out: Tensor | None = None,
        logits: Tensor | None = None,
        chain: ChainCall | None = None,
    ) -> int:
        numbers[0], numbers[1] = self.threads or torch.get_num_threads(), rows
        numbers[6] = 0 if x_in is None else x_in.data_ptr()
        numbers[7] = 0 if x_out is None else x_out.data_ptr()
        if logits is not None:
            numbers[13], numbers[14] = len(logits), logits.data_ptr()
        numbers[20] = 0 if self.seconds is None else _address(self.seconds)
        memory = array("q", numbers)
        base = memory.buffer_info()[0]
        for field, at in lists:
            memory[field] = base + 8 * at
        if chain is not None:
            return self._cdll.ft_chain(self._handle, base, chain.address)
        return self._cdll.ft_forward(self._handle, base)

    def _problem(self, code: int) -> Exception:
        if code == 1:
            return InputError(f"A token id lies outside 0..{self.arch.vocab - 1}.")
        if code == 2:
            return InputError(
                f"The text is longer than the {self.arch.learned_positions} positions this model "
                "has: shorten the prompt or ask for fewer tokens."
            )
        if code == _SHORT_TABLE:
            return IndexError("a position is negative")
        if code == 4:
            return IndexError("logits were asked for a row that the batch does not have")
        return MemoryError("no memory for the activations of this forward")

    def _lengths(
        self, batch: PackedBatch, caches: Sequence[ContiguousCache], positions: np.ndarray
    ) -> np.ndarray:
        """[T] the text length that decides each row's frequencies (plan.py says which)."""
        lengths = positions + 1
        for s, c, at in zip(batch.segments, caches, batch.offsets, strict=False):
            if c.used == 0 and len(s):
                lengths[at : at + len(s)] = s.positions.max() + 1
        return lengths

    # -- the model in the library

    seconds: np.ndarray | None = None
    """[len(STAGES)] float64 that every forward adds the time of its stages to, when set."""

    def _build(self) -> int:
        a, c = self.arch, self._cdll
        sizes = np.array(
            [
                *(a.hidden, a.heads, a.kv_heads, a.head_dim, a.ffn, a.vocab),
                *(a.norm == "layer", ACTIVATIONS.index(a.act), a.parallel),
                *((None, "head", "full").index(a.qk_norm), self.kind != torch.float32),
            ],
            np.int64,
        )
        reals = np.array(
            [
                *(a.eps, a.scale, a.attn_cap or 0.0, a.logit_cap or 0.0, a.logit_scale),
                *(a.residual_scale, self._embed_scale),
            ],
            np.float64,
        )
        handle = c.ft_model_new(len(a.layers), _address(sizes), _address(reals))
        for i, layer in enumerate(a.layers):
            dim = 0 if layer.rope is None else a.ropes[layer.rope].dim
            rope = -1 if layer.rope is None else layer.rope
            c.ft_model_layer(handle, i, rope, dim, layer.window or 0)
            for role, name in enumerate(MATRICES):
                self._matrix(handle, i, role, f"layers.{i}.{name}")
            for role, name in enumerate((*NORMS, "q_norm", "k_norm")):
                self._norm(handle, i, role, f"layers.{i}.{name}")
        self._matrix(handle, -1, 0, "head")
        self._norm(handle, -1, 0, "norm")
        for which, table in enumerate((self.embedding, self.places)):
            if table is not None:
                kind = _TABLES[table.dtype]
                c.ft_model_table(handle, which, table.data_ptr(), kind, len(table))
        return handle

    def _matrix(self, handle: int, layer: int, role: int, name: str) -> None:
        slot = self._slots.get(name)
        if slot is None:
            return
        data, bias = self.packed[name].data_ptr(), _at(self.packed.get(name + ".bias"))
        form = FORMATS[slot.format]
        self._cdll.ft_model_matrix(
            handle, layer, role, form, slot.n, slot.k, slot.group, data, bias
        )

    def _norm(self, handle: int, layer: int, role: int, name: str) -> None:
        if name in self.packed:
            weight, bias = self.packed[name], self.packed.get(name + ".bias")
            self._cdll.ft_model_norm(handle, layer, role, weight.data_ptr(), _at(bias))


def _collect(packer: Packer, progress: Progress | None) -> dict[str, Tensor]:
    found, count = {}, len(packer.arch.layers)
    for name, tensor in packer.entries():
        found[name] = tensor
        if progress is not None and name.endswith(".down"):
            done = int(name.split(".")[1]) + 1
            progress(done / (count + 1), f"layer {done} of {count}")
    if progress is not None:
        progress(1.0, "head")
    return found


def refusal(arch: Arch, kind: Kind) -> str | None:
    """Why the fused model cannot run a model, or None."""
    if not isinstance(kind, WeightFormat) and kind not in (torch.float32, torch.bfloat16):
        return f"There are no kernels for {kind}."
    if arch.act not in ACTIVATIONS or (arch.parallel and arch.post_norm):
        return "The kernels do not know this kind of layer."
    return kernels.why_not()


def _declare(library: Library) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library.cdll, name)
        function.restype, function.argtypes = result, list(arguments)
    return library.cdll


def _joined(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of all segments, contiguous int64."""
    if len(segments) == 1:
        tokens, positions = segments[0].tokens, segments[0].positions
    elif segments:
        tokens = np.concatenate([s.tokens for s in segments])
        positions = np.concatenate([s.positions for s in segments])
    else:
        tokens = positions = np.empty(0, np.int64)
    return _plain(tokens), _plain(positions)


def _plain(a: np.ndarray) -> np.ndarray:
    return a if a.dtype is _INT64 and a.strides == (8,) else np.ascontiguousarray(a, np.int64)


def _address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
