"""Sampling processors: raw logits -> the distribution that plain decoding would sample from.

One function of (logits, committed text, drafted path) serves plain decoding and every node of a
tree, so speculation sees the same distributions. The order is that of `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.control.filters import NEG, filter_logits
from foretell.core.errors import InputError
from foretell.core.params import SamplingParams


class Processors:
    """The processors of one sequence.

    tokens: the sequence's committed ids (a live list, read at every call); stop_ids: ids that
    min_tokens forbids; bad_words: token sequences.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokens: list[int],
        prompt_len: int,
        stop_ids: frozenset[int] = frozenset(),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        self.params, self.tokens, self.prompt_len = params, tokens, prompt_len
        self.stop_ids = sorted(stop_ids)
        self.bad_words = [tuple(w) for w in bad_words if w]
        p = params
        self.counts: dict[int, int] = {}  # output token -> times, up to index `counted`
        self.counted = prompt_len
        self.prompt_ids = set(tokens[:prompt_len]) if p.repetition_penalty != 1 else set()
        self.penalised = (
            p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        )
        self.adjusts = bool(
            self.penalised
            or p.logit_bias
            or p.allowed_token_ids is not None
            or self.bad_words
            or (p.min_tokens and self.stop_ids)
        )
        self.filters = p.top_k > 0 or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1

    @property
    def plain(self) -> bool:
        """Nothing but temperature: the order of the logits is that of the probabilities."""
        return not self.adjusts and not self.filters

    def adjust(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """Everything before temperature; [k, V] -> [k, V] (a copy where anything changes)."""
        if not self.adjusts:
            return logits
        p, raw = self.params, logits
        logits = logits.clone()
        if self.penalised:
            self._penalise(raw, logits, paths)
        for token, bias in p.logit_bias.items():
            logits[:, token] += bias
        if p.allowed_token_ids is not None:
            allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            allowed[list(p.allowed_token_ids)] = True
            logits.masked_fill_(~allowed, NEG)
        for row, path in enumerate(paths):
            banned = self._banned(path)
            if banned:
                logits[row, banned] = NEG
        return logits

    def legal(self, logits: Tensor, paths: Sequence[Sequence[int]], mask: Tensor | None) -> Tensor:
        """`adjust`, then what a constraint allows; InputError where nothing is left to say."""
        logits = self.adjust(logits, paths)
        if mask is not None:
            logits = logits.masked_fill(~mask, NEG)
        if (self.adjusts or mask is not None) and bool((logits == NEG).all(-1).any()):
            raise InputError(
                "Nothing is left to say: allowed_token_ids, logit_bias, bad_words, min_tokens and "
                "the constraint together forbid every token."
            )
        return logits

    def probs(self, logits: Tensor, paths: Sequence[Sequence[int]], mask: Tensor | None) -> Tensor:
        """[k, V] raw logits -> [k, V] float32 distributions; greedy parameters leave temperature
        at 1. mask [k, V] bool: what a constraint allows."""
        logits = self.legal(logits, paths, mask)
        temperature = self.params.temperature
        if temperature not in (0, 1):
            if temperature < 0.01:  # the quotients of raw logits could overflow
                logits = logits - logits.amax(-1, keepdim=True)
            logits = logits / max(temperature, 1e-30)
        if self.filters:
            logits = filter_logits(logits, self.params)
        return logits.softmax(-1, dtype=torch.float32)

    def _penalise(self, raw: Tensor, logits: Tensor, paths: Sequence[Sequence[int]]) -> None:
        for token in self.tokens[self.counted :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self.counted = len(self.tokens)
        ids = list(self.counts.keys() | self.prompt_ids)
        if ids:
            times = [self.counts.get(t, 0) for t in ids]
            logits[:, ids] = self._penalty(raw[:, ids], times)
        for row, path in enumerate(paths):  # the few tokens whose counts the path changes
            if path:
                extra = list(dict.fromkeys(path))
                times = [self.counts.get(t, 0) + list(path).count(t) for t in extra]
                logits[row, extra] = self._penalty(raw[row, extra], times)

    def _penalty(self, raw: Tensor, times: list[int]) -> Tensor:
        """raw [.., m] logits of m tokens seen before; times: occurrences in the output."""
        p = self.params
        count = torch.tensor(times, dtype=raw.dtype, device=raw.device)
        r = p.repetition_penalty
        scaled = torch.where(raw > 0, raw / r, raw * r) if r != 1 else raw
        present = (count > 0).to(raw.dtype)
        return scaled - p.frequency_penalty * count - p.presence_penalty * present

    def _banned(self, path: Sequence[int]) -> list[int]:
        banned: list[int] = []
        if len(self.tokens) - self.prompt_len + len(path) < self.params.min_tokens:
            banned += self.stop_ids
        for word in self.bad_words:
            n = len(word) - 1
            tail = (*self.tokens[max(0, len(self.tokens) - n) :], *path) if n else ()
            if n == 0 or tuple(tail[-n:]) == word[:-1]:
                banned.append(word[-1])
        return banned
