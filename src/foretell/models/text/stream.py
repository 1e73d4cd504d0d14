"""Text of a growing sequence, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foretell.models.text.tokenizer import Tokenizer


class StreamDecoder:
    """Incremental detokenisation of what follows a prompt.

    All texts of `push` and the final `flush`, joined, are `decode(prompt + ids)` without what
    `decode(prompt)` shows: the space between prompt and output is there, and a character whose
    bytes end in the output appears whole. With an empty prompt they are `decode(ids)`. A push costs
    the same whatever came before it, and so does the prompt.
    """

    __slots__ = ("_detok", "_skip", "_state")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), *, skip_special: bool = True
    ) -> None:
        self._detok, self._skip = tokenizer.detokenizer, skip_special
        self._state = self._detok.start(prompt_ids, skip_special=skip_special)

    def push(self, token: int) -> str:
        """The text that `token` makes certain: "" while a character still lacks bytes."""
        text, self._state = self._detok.step(self._state, token, skip_special=self._skip)
        return text

    def peek(self, ids: Sequence[int]) -> list[str]:
        """The texts that pushing these ids one after another would give; changes nothing."""
        state, texts = self._state, []
        for i in ids:
            text, state = self._detok.step(state, i, skip_special=self._skip)
            texts.append(text)
        return texts

    def flush(self) -> str:
        """End of text: U+FFFD for bytes that never became a character. A second call gives ""."""
        text = self._detok.finish(self._state)
        self._state = self._state._replace(pending=b"", text=self._state.text + text)
        return text

    def copy(self) -> StreamDecoder:
        """An independent decoder at the same place."""
        other = object.__new__(StreamDecoder)
        other._detok, other._skip, other._state = self._detok, self._skip, self._state
        return other
