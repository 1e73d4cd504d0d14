"""Any causal language model of the transformers library as a `TargetModel`.

For families without a native runner. It is honest rather than fast: on construction it measures
what the model can do (`hf_probe`) and claims only what was shown.

- Models with a growing key/value cache get one plain `DynamicCache` a sequence. It keeps every row,
  also of layers with a sliding window (the mask hides what the window has left behind), so rows can
  be undone.
- Trees need an attention that honours a 4-D mask and position ids. Shown on construction: every
  node of a small tree must have the logits of the chain that leads to it.
- Recurrent and hybrid models, and all whose cached steps do not reproduce a plain forward, run the
  way `generate` runs them, token by token after the prompt; they cannot roll back.

Batches run sequence by sequence. Logits of one row may differ in the last bits between shapes
of a batch: that is the library's arithmetic, so near-ties can fall either way here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretell.core.batch import Output, PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.feedback import Tap
from foretell.core.protocols import ModelSpec
from foretell.models import hf_probe as probe
from foretell.models.hf_cache import HFCache, HFTxn, RowStore, StateStore, additive_mask

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFModel:
    """A `TargetModel` around a transformers module; see the module's text for what it can do.

    `spec.vocab` is the width of the logits, padding included.
    """

    def __init__(self, model: Any, name: str = "") -> None:
        """model: an instance that `AutoModelForCausalLM` could have returned, in eval mode.

        Raises InputError when its cached steps do not reproduce its own plain forward.
        """
        self.module = model.eval()
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._accepts = set(inspect.signature(model.forward).parameters)
        text = model.config.get_text_config()
        self._head: nn.Module = model.get_output_embeddings()
        self._norm: nn.Module | None = None
        self._stateful = bool(getattr(model, "_is_stateful", False))
        self._picks_logits = False
        self._counts_new = _counts_new(model)
        self.spec = ModelSpec(
            vocab=int(text.vocab_size),
            hidden=int(text.hidden_size),
            layers=int(text.num_hidden_layers),
            max_positions=probe.max_positions(text),
            name=name or str(getattr(model.config, "model_type", "")),
        )
        probe.measure(self)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "bfloat16",
        device: str | torch.device = "cpu",
        progress: Callable[[float, str], None] | None = None,
    ) -> HFModel:
        """Load a checkpoint directory. progress(fraction, what) is told when a part is done.

        Raises InputError when transformers is missing or cannot read the checkpoint.
        """
        if dtype not in _DTYPES:
            raise InputError(f"dtype={dtype} needs a native model; use {', '.join(_DTYPES)}.")
        try:
            from transformers.models.auto.modeling_auto import AutoModelForCausalLM
        except ImportError:
            raise InputError(
                "This model family needs transformers; install it with: pip install foretell[hf]"
            ) from None
        say = progress or (lambda fraction, what: None)
        say(0.0, "reading weights")
        # The argument's name changed in 4.56; the old one warns in every later version.
        new = tuple(int(v) for v in version("transformers").split(".")[:2]) >= (4, 56)
        options = {"dtype" if new else "torch_dtype": _DTYPES[dtype]}
        try:
            model = AutoModelForCausalLM.from_pretrained(str(path), **options)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
            reason = str(e).strip().split("\n")[0]
            raise InputError(f"transformers cannot load {path}: {reason}") from None
        say(0.9, "checking what the model can do")
        made = cls(nn.Module.to(model, device), str(path))
        say(1.0, "ready")
        return made

    # TargetModel

    def new_cache(self, rows: int = 0) -> HFCache:
        if self._stateful:
            return HFCache(StateStore())
        from transformers.cache_utils import DynamicCache

        return HFCache(RowStore(DynamicCache))

    def open(self, caches: Sequence[HFCache]) -> HFTxn:
        return HFTxn(caches)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, txn: HFTxn, taps: Sequence[Tap] = ()) -> Output:
        """Run `batch`, whose segment b belongs to cache b of `txn`; logits [R, V] float32, hidden
        states [T, H] by tap.

        Raises ValueError for a tree where `spec.caps.tree` is false (the engine clamps to chains).
        """
        if not txn.open:
            raise RuntimeError("the transaction is closed")
        if len(batch.segments) != len(txn.caches):
            raise ValueError(f"{len(batch.segments)} segments for {len(txn.caches)} caches")
        logits: list[Tensor] = []
        hidden: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
        run = self._run_state if self._stateful else self._run_rows
        for b, segment in enumerate(batch.segments):
            if len(segment) == 0:
                continue
            out, states = run(segment, txn.caches[b], txn.scratch[b], taps)
            txn.scratch[b] += len(segment)
            logits.append(out)
            for tap in taps:
                hidden[tap].append(states[tap])
        empty = torch.empty(0, self.spec.vocab, device=self.device)
        states = {t: torch.cat(h) for t, h in hidden.items() if h}
        return Output(torch.cat(logits) if logits else empty, states)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """[n] -> [n, H] as the embedding module gives them (Gemma scales them afterwards)."""
        return self.module.get_input_embeddings()(tokens.to(self.device))

    @torch.inference_mode()
    def unembed(self, hidden: Tensor) -> Tensor:
        """[n, H] before the final norm -> logits [n, V] float32. Raises InputError for a model
        whose logits are more than a norm and a product."""
        if self._norm is None:
            raise InputError(f"{self.spec.name} does not let its hidden states be scored alone.")
        return self._head(self._norm(hidden)).float()

    # key/value caches

    def _run_rows(
        self, segment: Segment, cache: HFCache, earlier: int, taps: Sequence[Tap]
    ) -> tuple[Tensor, dict[Tap, Tensor]]:
        n, start = len(segment), cache.n + earlier
        positions = np.asarray(segment.positions, np.int64)
        chain = _is_chain(segment, earlier)
        straight = chain and bool((positions == np.arange(start, start + n)).all())
        if not straight and not self.spec.caps.tree:
            raise ValueError(f"{self.spec.name} runs chains only, and this batch holds a tree")
        where = torch.arange(start, start + n, device=self.device)
        given: dict[str, Any] = {"past_key_values": cache.store.kv, "cache_position": where}
        if straight:
            given["attention_mask"] = torch.ones(1, start + n, dtype=torch.long, device=self.device)
        else:
            given["attention_mask"] = additive_mask(
                cache.n, segment.ancestors, n, earlier, self.dtype, self.device
            )
        given["position_ids"] = torch.from_numpy(positions)[None].to(self.device)
        return self._call(segment, self._ids(segment), given, taps)

    def _ids(self, segment: Segment) -> Tensor:
        return torch.from_numpy(np.asarray(segment.tokens, np.int64))[None].to(self.device)

    def _call(
        self, segment: Segment, ids: Tensor, given: dict[str, Any], taps: Sequence[Tap]
    ) -> tuple[Tensor, dict[Tap, Tensor]]:
        """One forward of one sequence: logits [wanted, V] float32 and the tapped states [n, H]."""
        given = {k: v for k, v in given.items() if k in self._accepts}
        if segment.embeds:
            rows = self.module.get_input_embeddings()(ids).clone()
            for i, row in segment.embeds.items():
                rows[0, i] = row.to(rows)
            given["inputs_embeds"] = rows
        else:
            given["input_ids"] = ids
        rest = None if segment.logits is None else np.asarray(segment.logits, np.int64)
        if rest is not None and self._picks_logits:
            if len(rest):
                given["logits_to_keep"], rest = torch.from_numpy(rest).to(self.device), None
            else:  # here 0 would mean all: ask for one row, and pick none of it below
                given["logits_to_keep"] = 1
        seen: list[Tensor] = []
        hooks = []
        if self.spec.layers in taps:
            if self._norm is None:
                raise InputError(f"{self.spec.name} does not show the states after its last layer.")
            hooks = [self._norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
        try:
            out = self.module(
                **given, use_cache=True, return_dict=True, output_hidden_states=bool(taps)
            )
        finally:
            for hook in hooks:
                hook.remove()
        logits = out.logits[0] if rest is None else out.logits[0][torch.from_numpy(rest)]
        states = {t: self._state(t, out.hidden_states, seen) for t in taps}
        return logits.float(), states

    def _state(self, tap: Tap, states: Sequence[Tensor], seen: list[Tensor]) -> Tensor:
        if tap == self.spec.layers:
            return seen[0].reshape(-1, seen[0].shape[-1])
        index = {"embed": 0, "last": -1}.get(tap, tap)  # type: ignore[call-overload]
        if not isinstance(index, int) or not -1 <= index < self.spec.layers:
            raise InputError(f"{self.spec.name} has no hidden state called {tap!r}.")
        return states[index][0]

    # recurrent models: the loop of `generate`, one call of it at a time

    def _run_state(
        self, segment: Segment, cache: HFCache, earlier: int, taps: Sequence[Tap]
    ) -> tuple[Tensor, dict[Tap, Tensor]]:
        start = cache.n + earlier
        straight = bool((segment.positions == np.arange(start, start + len(segment))).all())
        if not straight or not _is_chain(segment, earlier):
            raise ValueError(f"{self.spec.name} runs chains only, and this batch holds a tree")
        if segment.embeds:
            raise InputError(f"{self.spec.name} takes token ids only.")
        ids = np.asarray(segment.tokens, np.int64).tolist()
        # A whole prompt at once into an empty state; later rows singly, as these models demand.
        parts = [ids] if start == 0 else [[i] for i in ids]
        logits, states = [], []
        for part in parts:
            out = self._advance(cache.store, part, bool(taps))
            logits.append(out.logits[0].float())
            states.append({t: self._state(t, out.hidden_states, []) for t in taps})
        rows = torch.cat(logits)
        if segment.logits is not None:
            rows = rows[np.asarray(segment.logits, np.int64)]
        return rows, {t: torch.cat([s[t] for s in states]) for t in taps}

    def _advance(self, store: StateStore, ids: list[int], states: bool) -> Any:
        start = len(store.ids)
        everything = torch.tensor([store.ids + ids], device=self.device)
        carry = {"use_cache": True, **store.carry, "attention_mask": torch.ones_like(everything)}
        # Which of the ids are new: transformers 4 is told by position, 5 by number (and would hand
        # positions on to models that no longer take them).
        if self._counts_new:
            new = {"next_sequence_length": len(ids), "is_first_iteration": start == 0}
        else:
            new = {"cache_position": torch.arange(start, start + len(ids), device=self.device)}
            carry |= new
        given = self.module.prepare_inputs_for_generation(everything, **(carry | new))
        for name in ("logits_to_keep", "num_logits_to_keep"):
            if name in given:
                given[name] = 0  # all rows
        out = self.module(**given, return_dict=True, output_hidden_states=states)
        store.carry = self.module._update_model_kwargs_for_generation(out, carry)
        store.ids.extend(ids)
        return out


def _is_chain(segment: Segment, earlier: int) -> bool:
    """Whether row i sees all `earlier` rows of the transaction and rows 0..i of the segment."""
    a = segment.ancestors
    return a is None or bool((a == np.tri(len(segment), earlier + len(segment), earlier)).all())


def _counts_new(model: Any) -> bool:
    """Whether `prepare_inputs_for_generation` wants the number of new ids. A family's own version
    may hide that behind `**kwargs`, so any version that the class inherits counts."""
    name = "prepare_inputs_for_generation"
    prepared = (vars(c)[name] for c in type(model).__mro__ if name in vars(c))
    return any("next_sequence_length" in inspect.signature(p).parameters for p in prepared)
