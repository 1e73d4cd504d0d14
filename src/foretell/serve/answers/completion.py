"""Text completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from foretell.engine.outputs import RequestOutput, SampleOutput
from foretell.engine.sequence import TokenEvent
from foretell.serve.answers.answer import Answer
from foretell.serve.blocks import Ruler, logprobs
from foretell.serve.schema import CompletionRequest


class Completion(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    body: CompletionRequest

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rulers = []
        if self.ask.params.logprobs is not None:
            for at, job in enumerate(self.jobs):
                start = len(self._prompt_text(at)) if self.ask.echo else 0
                for _ in range(self.n):
                    self.rulers.append(Ruler(self.tokenizer.stream(job.prompt_ids), start))

    def _frame(self, index: int) -> tuple[str, str]:
        end = f', "logprobs": null, "finish_reason": null}}]{self._tail}'
        return f'{self._head}"choices": [{{"index": {index}, "text": ', end

    def first(self, at: int) -> Iterator[str]:
        if not self.ask.echo:
            return
        text = self._prompt_text(at)
        yield from self._opening(
            at,
            lambda index: {"text": text, "logprobs": self._logprobs(index, [], [], prompt=True)},
        )

    def _chunk(self, index: int, at: int, event: TokenEvent) -> dict[str, Any]:
        shown = not self.ask.drop
        text = event.text if shown else ""
        entries = [event.logprob] if shown else []
        found = self._logprobs(index, [event.token], entries)
        return {
            "index": index,
            "text": text,
            "logprobs": found,
            "finish_reason": event.finish_reason,
            **self._extras(event),
        }

    def _choice(
        self, index: int, at: int, sample: SampleOutput, output: RequestOutput
    ) -> dict[str, Any]:
        before = self._prompt_text(at) if self.ask.echo else ""
        text, entries = sample.text, sample.logprobs or []
        if self.ask.drop:
            text, entries = "", []
        found = self._logprobs(index, sample.token_ids, entries, prompt=self.ask.echo)
        return {
            "index": index,
            "text": before + text,
            "logprobs": found,
            "finish_reason": sample.finish_reason,
            **self._all_extras(sample),
            **self._prompt_ids(output.prompt_ids),
        }

    def _prompt_text(self, at: int) -> str:
        given = self.ask.texts[at]
        return self.tokenizer.decode(self.jobs[at].prompt_ids) if given is None else given

    def _logprobs(
        self, index: int, tokens: Sequence[int], entries: Sequence[Any], prompt: bool = False
    ) -> dict[str, Any] | None:
        """The block over the prompt's tokens, if asked for, and those of `entries`."""
        if self.ask.params.logprobs is None:
            return None
        spell = bool(self.body.return_tokens_as_token_ids)
        found = logprobs(self.tokenizer, tokens, entries, self.rulers[index], spell)
        if prompt:
            job, start = self.jobs[index // self.n], Ruler(self.tokenizer.stream())
            front = logprobs(self.tokenizer, job.prompt_ids, job.prompt_logprobs, start, spell)
            found = {k: front[k] + found[k] for k in found}
        return found
