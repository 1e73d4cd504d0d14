"""When a sequence ends, and the text it has said so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foretell.core.params import SamplingParams


class Finish:
    """Cuts a run of emitted tokens where the sequence ends; called before the rows are committed.

    eos_ids: ids that end it (the token stays in the output); room: most tokens it may emit;
    decoder: incremental detokenizer (`push(id) -> str`, `flush() -> str`), None where no text is
    wanted while decoding - stop strings need one.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_ids: frozenset[int],
        room: int,
        decoder: Any | None,
    ) -> None:
        self.params, self.decoder = params, decoder
        self.stop_ids = (frozenset() if params.ignore_eos else eos_ids) | set(params.stop_token_ids)
        self.room = min(params.max_tokens, room)
        self.count = 0
        self.reason: str | None = None  # "stop" or "length"
        self.text = ""  # everything said, stop strings cut off
        self.held = ""  # a tail that may be the beginning of a stop string

    def take(self, tokens: Sequence[int]) -> list[str]:
        """The text that became certain with each token that is kept: the first so many of
        `tokens`. `reason` is set when the last of them ends the sequence."""
        texts = []
        for token in tokens:
            if self.reason is not None:
                break
            self.count += 1
            texts.append(self._one(token))
        return texts

    def _one(self, token: int) -> str:
        stops = self.params.stop
        if token in self.stop_ids and self.count > self.params.min_tokens:
            self.reason = "stop"
            return self._release(self._flush())
        said = self.decoder.push(token) if self.decoder else ""
        if stops and self.count >= self.params.min_tokens:
            pending = self.held + said
            at, word = first_stop(pending, stops)
            if word:
                self.reason = "stop"
                end = at + len(word) if self.params.include_stop else at
                return self._say(pending[:end])
        if self.count >= self.room:
            self.reason = "length"
            return self._release(said + self._flush())
        return self._release(said, hold=True) if stops else self._say(said)

    def _flush(self) -> str:
        return self.decoder.flush() if self.decoder else ""

    def _release(self, said: str, hold: bool = False) -> str:
        pending = self.held + said
        keep = overlap(pending, self.params.stop) if hold else 0
        self.held = pending[len(pending) - keep :]
        return self._say(pending[: len(pending) - keep])

    def _say(self, text: str) -> str:
        self.text += text
        return text


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str]:
    """Where the earliest stop string begins and which it is; (-1, "") if there is none."""
    found = [(text.find(s), s) for s in stops]
    return min(((i, s) for i, s in found if i >= 0), default=(-1, ""))


def overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for s in stops:
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest
