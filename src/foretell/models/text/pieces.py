"""From ids back to text, one id at a time, as a pure function of a small state.

`Detokenizer.step(state, id) -> (text, state)` is the whole interface: decoding is folding it over
the ids, streaming is keeping the state, looking ahead is not keeping it. The rules are read off the
decoder of the `tokenizers` library:

- byte-level vocabularies (GPT-2, Llama 3, Qwen): tokens are bytes; text appears as soon as it is
  whole UTF-8.
- sentencepiece vocabularies (Llama 2, Gemma, T5): tokens are text; <0xNN> tokens are bytes.
- anything else is decoded by the library itself, over all ids so far.

The text equals the library's, with one exception. When a run of <0xNN> tokens holds both whole
characters and invalid bytes, the library gives up on the run; here, as in sentencepiece itself, the
whole characters stay and each invalid byte becomes one U+FFFD. Otherwise nothing of a run could be
shown before its end, and in Llama 2 even a newline is such a token.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that "surrogateescape" could not decode


class State(NamedTuple):
    """What the next step needs to know of the ids before it."""

    seen: bool = False  # any token at all
    strip: int = 0  # leading characters still to be removed from the text
    pending: bytes = b""  # the beginning of a UTF-8 character, at most 3 bytes
    ids: tuple[int, ...] = ()  # unknown decoders only: everything so far
    text: str = ""  # unknown decoders only: what has been given out


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def byte_level(token: str) -> bytes:
    """The bytes a byte-level token stands for; added tokens stand for themselves."""
    table = byte_alphabet()
    try:
        return bytes([table[c] for c in token])
    except KeyError:
        return token.encode("utf-8", "replace")


class Detokenizer:
    """Detokenises for one tokenizer. Shareable: all that changes is a cache of pieces."""

    def __init__(self, backend: Backend, special: frozenset[int]) -> None:
        self._backend, self._special = backend, special
        self._pieces: dict[int, bytes | str | None] = {}
        decoder = backend.decoder
        rule: dict[str, Any] | None = json.loads(decoder.__getstate__()) if decoder else None
        while rule and rule["type"] == "Sequence" and len(rule["decoders"]) == 1:
            rule = rule["decoders"][0]
        self._strip, self._strip_char, self._fallback = 0, " ", False
        self._replace: list[tuple[str, str]] = []
        self._glue, self._metaspace, self._first_drops = "", "", False
        if rule is None:
            self._kind, self._glue = "pieces", " "
        elif rule["type"] == "ByteLevel":
            self._kind = "bytes"
        elif rule["type"] == "Metaspace":
            self._kind, self._metaspace = "pieces", rule["replacement"]
            self._first_drops = rule.get("prepend_scheme", "always") != "never"
        else:
            rules = rule["decoders"] if rule["type"] == "Sequence" else [rule]
            self._kind = "pieces" if self._read(rules) else "whole"

    def _read(self, rules: list[dict[str, Any]]) -> bool:
        """Take in a list of sentencepiece-like rules; false when it holds anything else."""
        fused = False
        for r in rules:
            early = not self._fallback and not fused
            if r["type"] == "Replace" and "String" in r["pattern"] and early:
                self._replace.append((r["pattern"]["String"], r["content"]))
            elif r["type"] == "ByteFallback" and not fused:
                self._fallback = True
            elif r["type"] == "Fuse":
                fused = True
            elif r["type"] == "Strip" and fused and r["stop"] == 0 and self._strip == 0:
                self._strip, self._strip_char = r["start"], r["content"]
            else:
                return False
        return True

    def start(self, ids: Iterable[int] = (), *, skip_special: bool = True) -> State:
        """The state after `ids`. Reads the beginning and the end of them, not what is between."""
        state, given = State(strip=self._strip), list(ids)
        if self._kind == "whole":
            kept = tuple(i for i in given if not (skip_special and i in self._special))
            return State(ids=kept, text=self._whole(kept).rstrip("\ufffd"))
        at = 0
        while at < len(given) and not (state.seen and state.strip == 0):
            _, state = self.step(state, given[at], skip_special=skip_special)
            at += 1
        for tail in range(len(given) - 1, at - 1, -1):
            if not (skip_special and given[tail] in self._special) and self._anchors(given[tail]):
                at, state = tail, state._replace(pending=b"")
                break
        for i in given[at:]:
            _, state = self.step(state, i, skip_special=skip_special)
        return state

    def _anchors(self, token: int) -> bool:
        """Whether no byte before `token` can be part of a character that ends after it begins:
        it is text, or holds a byte that only begins characters."""
        piece = self._cached(token)
        if isinstance(piece, bytes):
            return any(b & 0xC0 != 0x80 for b in piece)
        return piece is not None

    def step(self, state: State, token: int, *, skip_special: bool = True) -> tuple[str, State]:
        """The text that one more id makes certain, and the state after it."""
        if skip_special and token in self._special:
            return "", state
        if self._kind == "whole":
            ids = (*state.ids, token)
            text = self._whole(ids)
            if text.endswith("\ufffd") or not text.startswith(state.text):
                return "", state._replace(ids=ids)  # not settled yet
            return text[len(state.text) :], State(ids=ids, text=text)
        piece = self._cached(token)
        if piece is None:
            return "", state
        if isinstance(piece, bytes):
            data = state.pending + piece
            errors = "replace" if self._kind == "bytes" else "surrogateescape"
            text, used = codecs.utf_8_decode(data, errors, False)
            pending = data[used:]
            if self._kind != "bytes":
                text = _ESCAPED.sub("\ufffd", text)
        else:
            if self._metaspace and not state.seen and self._first_drops:
                piece = self._token(token).replace(self._metaspace, "")
            elif self._glue and state.seen:
                piece = self._glue + piece
            text, pending = "\ufffd" * len(state.pending) + piece, b""
        strip = state.strip
        while strip and text:
            if text[0] != self._strip_char:
                strip = 0
            else:
                text, strip = text[1:], strip - 1
        return text, State(True, strip, pending)

    def finish(self, state: State) -> str:
        """The text of bytes that will not be completed any more."""
        if self._kind == "whole":
            text = self._whole(state.ids)
            same = 0
            while same < min(len(text), len(state.text)) and text[same] == state.text[same]:
                same += 1
            return text[same:]
        if self._kind == "bytes":  # the beginning of one character
            return "\ufffd" if state.pending else ""
        return "\ufffd" * len(state.pending)

    def raw(self, token: int) -> bytes:
        """The bytes an id stands for in the middle of a text; b"" for an unused id."""
        text = self._token(token)
        if not text:
            return b""
        piece = self._piece(token) if self._kind != "whole" else text
        return piece if isinstance(piece, bytes) else (piece or "").encode("utf-8", "replace")

    def _cached(self, token: int) -> bytes | str | None:
        try:
            return self._pieces[token]
        except KeyError:
            piece = self._pieces[token] = self._piece(token)
            return piece

    def _token(self, token: int) -> str:
        return self._backend.id_to_token(token) or ""

    def _piece(self, token: int) -> bytes | str | None:
        text = self._backend.id_to_token(token)
        if text is None:  # padding rows of the embedding name no token
            return None
        if self._kind == "bytes":
            return byte_level(text)
        for old, new in self._replace:
            text = text.replace(old, new)
        if self._fallback and (m := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(m[1], 16)])
        return text.replace(self._metaspace, " ") if self._metaspace else text

    def _whole(self, ids: tuple[int, ...]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)
