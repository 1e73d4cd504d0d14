"""From a body to what the engine is asked: prompt ids, sampling parameters, wishes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from foretell.core.errors import InputError
from foretell.core.params import SamplingParams, Speculation
from foretell.engine.llm import LLM
from foretell.models.text.tokenizer import Tokenizer
from foretell.serve import schema
from foretell.serve.errors import ApiError, bad_request
from foretell.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Message,
    Sampling,
    TokenizeRequest,
    Tool,
)
from foretell.serve.wishes import sampling_params, wishes

LONG_TEXT = 20_000  # characters from which encoding leaves the event loop
_TAKEN = frozenset({"self", "source", "messages", "tools", "add_generation_prompt"})


@dataclass(frozen=True)
class Ask:
    """One body, understood. prompts: ids of each; logprobs: how many, None = none; echo: the
    prompt's text is part of the answer; drop: the engine generates one token that nobody wants
    (max_tokens 0)."""

    prompts: list[list[int]]
    texts: list[str | None]  # the prompts as they were written, where they were
    params: SamplingParams
    control: Speculation
    timeout: float | None = None
    echo: bool = False
    drop: bool = False
    tools: bool = False  # answers may hold calls in the model's unambiguous format


class Prepare:
    """Turns bodies into `Ask`s for one model. context: most tokens of prompt and answer together;
    names: what the model is called, the first one in answers. Raises ApiError or InputError."""

    def __init__(
        self, llm: LLM, names: Sequence[str], context: int, allow_lossy: bool = False
    ) -> None:
        self.llm, self.names, self.context = llm, list(names), context
        self.allow_lossy = allow_lossy
        tokenizer = llm.tokenizer
        templates = tokenizer.config.templates.values() if tokenizer else ()
        self.calls = any("<tool_call>" in source for source in templates)
        vocab = tokenizer.backend.get_vocab() if tokenizer else {}
        self.longest = max(map(len, vocab), default=1)  # characters of a token

    async def completion(self, body: CompletionRequest, headers: Headers) -> Ask:
        schema.refuse_unsupported(body)
        special = body.add_special_tokens is not False
        given = _prompts(body.prompt)
        prompts = [await self.encode(p, special) for p in given]
        texts = [p if isinstance(p, str) else None for p in given]
        echo = bool(body.echo)
        drop = body.max_tokens == 0
        if drop and not echo:
            raise bad_request("'max_tokens' is at least 1, or 0 with echo.", "max_tokens")
        params = self.completion_params(body, prompts)
        control = self.control(body, headers)
        return Ask(prompts, texts, params, control, body.timeout, echo, drop)

    async def chat(self, body: ChatRequest, headers: Headers) -> Ask:
        schema.refuse_unsupported(body)
        prompt = await self.conversation(body, body.messages)
        params = self.chat_params(body, prompt)
        control = self.control(body, headers)
        return Ask([prompt], [None], params, control, body.timeout, tools=self.parses(body))

    def parses(self, body: ChatRequest) -> bool:
        """Whether calls of tools are looked for in the answer."""
        return bool(tools_of(body)) and self.calls

    def completion_params(
        self, body: CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> SamplingParams:
        """`sampling_params`, with OpenAI's 16 tokens where nothing is said."""
        most = 16 if body.max_tokens is None else body.max_tokens
        echo = bool(body.echo)
        return sampling_params(body, prompts, max(1, most), self.context, body.logprobs, echo)

    def chat_params(self, body: ChatRequest, prompt: Sequence[int]) -> SamplingParams:
        """`sampling_params`, with what the context holds where nothing is said."""
        said = body.max_completion_tokens
        given = body.max_tokens if said is None else said
        most = self.context if given is None else given
        top = (body.top_logprobs or 0) if body.logprobs else None
        return sampling_params(body, [prompt], most, self.context, top)

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served."""
        if name is not None and name not in self.names:
            what = f"The model '{name[:200]}' is not served here: use '{self.names[0]}'."
            raise ApiError(404, what, param="model", code="model_not_found")

    async def encode(self, prompt: str | list[int], special: bool = True) -> list[int]:
        """The ids of a prompt, checked against vocabulary and context."""
        if isinstance(prompt, str):
            ids = await self._ids(self._plausible(prompt), special)
        else:
            ids = self.llm.encode(prompt)
        return self._fits(ids)

    async def conversation(
        self, body: ChatRequest, messages: Sequence[Message], last: bool = True
    ) -> list[int]:
        """The ids of `messages`, by the model's chat template and what the body says of it; last:
        with what makes the model answer, unless the body does without."""
        answer = last and body.add_generation_prompt is not False
        text = self._rendered(messages, tools_of(body), answer, body.chat_template_kwargs)
        return self._fits(await self._ids(self._plausible(text), bool(body.add_special_tokens)))

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        answer: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        variables = dict(variables or {})
        if taken := _TAKEN & variables.keys():
            name = min(taken)
            raise bad_request(
                f"chat_template_kwargs cannot set '{name}': it has a field of its own.",
                "chat_template_kwargs",
            )
        said = [plain(m) for m in messages]
        shown = [t.model_dump(exclude_none=True) for t in tools] if tools else None
        try:
            return self._text().render_chat(said, answer, tools=shown, **variables)
        except InputError:
            raise
        except Exception as error:  # the template is the model's own program, fed by a client
            raise bad_request(
                f"The chat template cannot render this conversation ({type(error).__name__}).",
                "messages",
            ) from None

    async def tokens(self, body: TokenizeRequest) -> list[int]:
        """What /tokenize says; any length."""
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("Send either 'prompt' or 'messages'.", "prompt")
        if body.messages is None:
            return await self._ids(body.prompt or "", body.add_special_tokens is not False)
        text = self._rendered(
            body.messages,
            body.tools,
            body.add_generation_prompt is not False,
            body.chat_template_kwargs,
        )
        return await self._ids(text, bool(body.add_special_tokens))

    def control(self, body: Sampling, headers: Headers) -> Speculation:
        """The body's wishes, the headers' where the body has none."""
        return wishes(body, headers, self.allow_lossy)

    def _text(self) -> Tokenizer:
        if self.llm.tokenizer is None:
            raise InputError("This model was loaded without a tokenizer: send token ids.")
        return self.llm.tokenizer

    async def _ids(self, text: str, special: bool) -> list[int]:
        tokenizer = self._text()
        if len(text) < LONG_TEXT:
            return tokenizer.encode(text, special)
        return await asyncio.to_thread(tokenizer.encode, text, special)

    def _plausible(self, text: str) -> str:
        """Refuse what cannot fit before it is encoded."""
        if len(text) > self.longest * self.context:
            raise _too_long(f"{len(text)} characters", self.context)
        return text

    def _fits(self, ids: list[int]) -> list[int]:
        if not ids:
            raise bad_request("The prompt holds no token at all.", "prompt")
        if len(ids) >= self.context:
            raise _too_long(f"{len(ids)} tokens", self.context)
        return ids


def tools_of(body: ChatRequest) -> Sequence[Tool] | None:
    """The tools that the model is told of."""
    return body.tools if body.tool_choice != "none" else None


def _too_long(what: str, context: int) -> Exception:
    return bad_request(
        f"The prompt has {what} and the context holds {context} tokens, the answer's included: "
        "shorten it.",
        "prompt",
        "context_length_exceeded",
    )


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text in one piece, arguments of calls as objects."""
    said = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        said["content"] = "\n".join(part.text for part in message.content)
    elif message.content is None:
        said["content"] = ""
    for call in said.get("tool_calls") or ():
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                continue
            if isinstance(parsed, dict):
                call["function"]["arguments"] = parsed
    return said
