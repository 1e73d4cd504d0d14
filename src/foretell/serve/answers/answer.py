"""What all answers have in common.

One token is one chunk, whatever the size of the step it came from. A chunk without anything unusual
is put together from two strings made once and the token's text, since at 32 streams a dictionary
and an encoder per token would cost more than the server can spare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar

from foretell.engine.outputs import RequestOutput, SampleOutput
from foretell.engine.sequence import TokenEvent
from foretell.models.text.tokenizer import Tokenizer
from foretell.serve.blocks import BLOCK, Level, metrics, speculation
from foretell.serve.job import Job
from foretell.serve.prepare import Ask
from foretell.serve.schema import Sampling

DONE = "data: [DONE]\n\n"


class Answer:
    """What a body's jobs say, under one id. Choice `prompt * n + sample` is sample `sample` of job
    `prompt`. level: how much is told about speculation."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self,
        body: Sampling,
        ask: Ask,
        jobs: Sequence[Job],
        tokenizer: Tokenizer,
        model: str,
        level: Level = BLOCK,
    ) -> None:
        self.body, self.ask, self.jobs, self.level = body, ask, jobs, level
        self.tokenizer = tokenizer
        self.id = f"{self.prefix}-{jobs[0].id}"
        self.base = {"created": int(jobs[0].created), "model": model}
        self.n = ask.params.n
        self.left = len(jobs) * self.n  # choices that have not finished
        self.counts = [0] * self.left  # tokens of each so far
        options = body.stream_options
        self.usage_last = bool(options and options.include_usage)
        self.usage_always = bool(options and options.continuous_usage_stats) and self.usage_last
        self.wide = bool(
            ask.params.logprobs is not None
            or ask.drop
            or ask.tools
            or self.usage_always
            or body.return_token_ids
            or body.foretell
        )
        head = {"id": self.id, "object": self.chunk_kind, **self.base}
        self._head = f"data: {json.dumps(head)[:-1]}, "
        self._tail = (
            ', "usage": null}\n\n' if self.usage_last and not self.usage_always else "}\n\n"
        )
        self._frames = [self._frame(i) for i in range(self.left)]

    # The whole answer

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for at, output in enumerate(outputs):
            for i, sample in enumerate(output.samples):
                index = at * self.n + i
                self.counts[index] = 0 if self.ask.drop else len(sample.token_ids)
                choice = self._choice(index, at, sample, output)
                choices.append({**choice, **self._own(at, i)})
        answer = {"id": self.id, "object": self.kind, **self.base, "choices": choices}
        return {**answer, "usage": self.usage(), **self._last()}

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(j.prompt_ids) for j in self.jobs)
        cached = sum(min(len(j.prompt_ids), j.stats(0).reused) for j in self.jobs)
        said = sum(self.counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # The stream

    def first(self, at: int) -> Iterator[str]:
        """Chunks before the first token of job `at`."""
        return iter(())

    def chunks(self, at: int, events: Sequence[TokenEvent]) -> Iterator[str]:
        """One chunk for every token of job `at`."""
        for event in events:
            index = at * self.n + event.sample
            self.counts[index] += not self.ask.drop
            if event.finish_reason is None and not self.wide:
                before, after = self._frames[index]
                yield f"{before}{quoted(event.text)}{after}"
                continue
            more: dict[str, Any] = {}
            if event.finish_reason is not None:
                self.left -= 1
                more = {} if self.left or self.usage_last else self._last()
            choice = self._chunk(index, at, event)
            if event.finish_reason is not None:
                choice |= self._own(at, event.sample)
            if self.usage_always:
                more["usage"] = self.usage()
            elif self.usage_last:
                more["usage"] = None
            yield self._spelt([choice], more)

    def last(self) -> Iterator[str]:
        """Chunks after everything."""
        if self.usage_last:
            yield self._spelt([], {"usage": self.usage(), **self._last()})
        yield DONE

    # Parts

    def _spelt(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        rest = json.dumps({"choices": choices, **more}, allow_nan=False)
        return f"{self._head}{rest[1:]}\n\n"

    def _opening(self, at: int, said: Callable[[int], dict[str, Any]]) -> Iterator[str]:
        """A chunk for every choice of job `at`; said: what the one of that index holds."""
        for index in range(at * self.n, (at + 1) * self.n):
            choice = {"index": index, **said(index), "finish_reason": None}
            choice |= self._prompt_ids(self.jobs[at].prompt_ids)
            yield self._spelt([choice], {"usage": None} if self.usage_last else {})

    def _prompt_ids(self, ids: list[int]) -> dict[str, Any]:
        return {"prompt_token_ids": ids} if self.body.return_token_ids else {}

    def _own(self, at: int, sample: int) -> dict[str, Any]:
        """The speculation block of one choice."""
        if not self.level.detailed:
            return {}
        return {"speculation": speculation([self.jobs[at]], [sample], detailed=True)}

    def _last(self) -> dict[str, Any]:
        """What an answer says once, at its end."""
        more: dict[str, Any] = {}
        if self.level.told:
            more["speculation"] = speculation(self.jobs, range(self.n))
        if self.level.vllm:
            single = self.n == 1 and len(self.jobs) == 1
            found = metrics(self.jobs[0], self.level.detailed) if single else None
            more["metrics"] = {"speculative_decoding": found}
        if self.body.foretell:
            more["timing"] = self.jobs[0].stats(0).timing()
        return more

    def _extras(self, event: TokenEvent) -> dict[str, Any]:
        """What a client asked to know about one token."""
        more: dict[str, Any] = {}
        if self.body.return_token_ids:
            more["token_ids"] = [] if self.ask.drop else [event.token]
        if self.body.foretell and not self.ask.drop:
            more["foretell"] = {"token": event.token, "drafted": event.drafted}
        return more

    def _all_extras(self, sample: SampleOutput) -> dict[str, Any]:
        more: dict[str, Any] = {}
        ids = [] if self.ask.drop else sample.token_ids
        if self.body.return_token_ids:
            more["token_ids"] = ids
        if self.body.foretell:
            more["foretell"] = {"tokens": ids, "drafted": sample.drafted[: len(ids)]}
        return more

    def _frame(self, index: int) -> tuple[str, str]:
        """What stands before and after the text in an ordinary chunk of a choice."""
        raise NotImplementedError

    def _chunk(self, index: int, at: int, event: TokenEvent) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(
        self, index: int, at: int, sample: SampleOutput, output: RequestOutput
    ) -> dict[str, Any]:
        raise NotImplementedError
