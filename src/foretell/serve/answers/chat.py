"""Chat completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from foretell.engine.outputs import RequestOutput, SampleOutput
from foretell.engine.sequence import TokenEvent
from foretell.serve.answers.answer import Answer
from foretell.serve.blocks import chat_logprobs
from foretell.serve.schema import ChatRequest
from foretell.serve.tools import CallParser


class Chat(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatRequest

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.parsers = [self._parser() for _ in self.counts]

    def _parser(self) -> CallParser:
        return CallParser(single=self.body.parallel_tool_calls is False)

    def _frame(self, index: int) -> tuple[str, str]:
        end = f'}}, "logprobs": null, "finish_reason": null}}]{self._tail}'
        return f'{self._head}"choices": [{{"index": {index}, "delta": {{"content": ', end

    def first(self, at: int) -> Iterator[str]:
        delta = {"role": "assistant", "content": ""}
        return self._opening(at, lambda index: {"delta": delta, "logprobs": None})

    def _chunk(self, index: int, at: int, event: TokenEvent) -> dict[str, Any]:
        text, reason = event.text, event.finish_reason
        delta: dict[str, Any] = {"content": text}
        if self.ask.tools:
            parser = self.parsers[index]
            text, calls = parser.push(text)
            if reason is not None:
                text += parser.flush()
                reason = "tool_calls" if parser.count and reason == "stop" else reason
            delta = {"content": text, **({"tool_calls": calls} if calls else {})}
        found = None
        if event.logprob is not None:
            found = chat_logprobs(self.tokenizer, [event.token], [event.logprob])
        return {
            "index": index,
            "delta": delta,
            "logprobs": found,
            "finish_reason": reason,
            **self._extras(event),
        }

    def _choice(
        self, index: int, at: int, sample: SampleOutput, output: RequestOutput
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None}
        reason = sample.finish_reason
        if self.ask.tools:
            parser = self._parser()
            text, calls = parser.push(sample.text)
            text += parser.flush()
            message["content"] = text if text or not calls else None
            if calls:
                reason = "tool_calls" if reason == "stop" else reason
                message["tool_calls"] = [
                    {k: v for k, v in call.items() if k != "index"} for call in calls
                ]
        found = None
        if sample.logprobs is not None:
            found = chat_logprobs(self.tokenizer, sample.token_ids, sample.logprobs)
        return {
            "index": index,
            "message": message,
            "logprobs": found,
            "finish_reason": reason,
            **self._all_extras(sample),
            **self._prompt_ids(output.prompt_ids),
        }
