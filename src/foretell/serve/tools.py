"""Tool calls in what a model says, where its format leaves no doubt.

One format is read: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, which the templates
of Qwen, Hermes and others teach. Text that does not hold exactly that stays text.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from foretell.control.finish import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class CallParser:
    """Splits a growing text into what is said and what is called.

    `push(text)` and the final `flush()` return (text that is certain, calls that are complete).
    The texts, joined, do not depend on how the answer was cut into pieces. White space around calls
    is dropped. single: only the first call counts; later ones are left out.
    """

    single: bool = False
    count: int = 0
    _held: str = field(default="", init=False)
    _open: int = field(default=-1, init=False)  # where <tool_call> begins in what is held
    _scanned: int = field(default=0, init=False)  # no </tool_call> ends before
    _called: bool = field(default=False, init=False)  # nothing said since the last call

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        self._held += text
        said, calls = "", []
        while True:
            if self._open < 0:
                if self._called:
                    self._held = self._held.lstrip()
                at = self._held.find(OPEN)
                if at < 0:
                    at = len(self._held) - overlap(self._held, (OPEN,))
                sure = len(self._held[:at].rstrip())  # blanks may precede a call
                said += self._say(sure)
                at -= sure
                if not self._held.startswith(OPEN, at):
                    return said, calls
                self._open, self._scanned = at, at + len(OPEN)
            end = self._held.find(CLOSE, self._scanned)
            if end < 0:
                self._scanned = max(self._scanned, len(self._held) - len(CLOSE))
                return said, calls
            call = self._parse(self._held[self._open + len(OPEN) : end])
            self._open = -1
            if call is None:
                said += self._say(end + len(CLOSE))
                continue
            self._held = self._held[end + len(CLOSE) :]
            self._called = True
            if not (self.single and self.count):
                calls.append({"index": self.count, **call})
                self.count += 1

    def flush(self) -> str:
        """The end: what was held back is text after all."""
        if self._called and self._open < 0:
            self._held = self._held.lstrip()
        return self._say(len(self._held))

    def _say(self, count: int) -> str:
        """The first `count` characters held are text."""
        text, self._held = self._held[:count], self._held[count:]
        self._called = self._called and not text
        return text

    @staticmethod
    def _parse(block: str) -> dict[str, Any] | None:
        try:
            call = json.loads(block)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
