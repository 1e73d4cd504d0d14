"""The Python API: load a model, generate, stream, chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from foretell.core import registry
from foretell.core.errors import ForetellError, InputError
from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.places import cache_folder
from foretell.core.protocols import (
    BuildContext,
    Constraint,
    Drafter,
    LengthPolicy,
    TargetModel,
    Verifier,
)
from foretell.core.registry import Spec
from foretell.engine.cost import MeasuredCost
from foretell.engine.inputs import Inputs, Prompt
from foretell.engine.loading import default_draft, load_parts
from foretell.engine.loop import Engine
from foretell.engine.memory import default_rows
from foretell.engine.outputs import RequestOutput
from foretell.engine.pipelined import PipelinedEngine
from foretell.engine.request import Request
from foretell.engine.rules import Rules
from foretell.engine.scheduler import Scheduler
from foretell.engine.sequence import TokenEvent
from foretell.engine.superposed import Suggestions, Superposed
from foretell.models.text.tokenizer import Tokenizer

Message = Mapping[str, str]
MethodSpec = str | Mapping[str, Any] | Spec


def load(model: str | os.PathLike[str] | None = None, **options: Any) -> LLM:
    """Load a model: a checkpoint directory, a hub id, or (by default) the bundled one.

    options: see `LLM.load`.
    """
    return LLM.load(model, **options)


class LLM:
    """A target model with a drafter, a verification rule and a length policy.

    draft / verify / policy: method specs (``name:key=value,...``). draft="auto" is the drafter that
    ships beside the target if there is one, else prompt-lookup; verify="auto" is exact: `greedy` at
    temperature 0, `replay` above. max_batch: most sequences decoded at once; kv_rows: rows of the
    KV cache over all sequences (default: as many as max_batch full contexts need, at most half of
    the free memory); step_rows: most prompt rows of one step. Lossy methods are refused unless
    allow_lossy. Not thread-safe.
    """

    def __init__(
        self,
        model: TargetModel,
        tokenizer: Tokenizer | None = None,
        *,
        draft: MethodSpec | Drafter = "none",
        verify: MethodSpec | Verifier = "auto",
        policy: MethodSpec | LengthPolicy = "fixed",
        max_batch: int = 16,
        kv_rows: int | None = None,
        step_rows: int = 512,
        allow_lossy: bool = False,
        context: BuildContext | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("step_rows", step_rows)):
            if value < 1:
                raise InputError(f"{name}={value} makes no sense: it is at least 1.")
        if kv_rows is not None and kv_rows < 1:
            raise InputError(f"kv_rows={kv_rows} makes no sense: it is at least 1.")
        self.model, self.tokenizer = model, tokenizer
        self.context = context = context or BuildContext(model, tokenizer)
        if context.cost is None:
            context.cost = MeasuredCost(model, cache_folder("cost"))
        self.drafter: Drafter = _make("drafter", draft, context)
        self.policy: LengthPolicy = _make("policy", policy, context)
        auto = isinstance(verify, str) and verify == "auto"
        rule = _make("verifier", "replay" if auto else verify, context)
        exact = rule if rule.name == "replay" else _make("verifier", "replay", context)
        greedy = _make("verifier", "greedy", context)
        self.rules = Rules(self.drafter, rule, greedy, exact, allow_lossy)
        self.inputs = Inputs(model.spec, tokenizer, self.rules)
        scheduler = Scheduler(
            kv_rows or default_rows(model, max_batch),
            max_batch,
            step_rows,
            model.new_cache,
            reuse=model.spec.caps.rollback,
            ahead=None if model.device.type == "cpu" else 256,  # a CPU takes pages when written
        )
        kind = PipelinedEngine if getattr(self.policy, "pipelined", False) else Engine
        self.engine = kind(model, self.drafter, self.policy, scheduler, context.cost)
        self._requests: dict[int, Request] = {}

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        draft: MethodSpec = "auto",
        dtype: str = "auto",
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        deterministic: bool = False,
        progress: Callable[[float, str], None] | None = None,
        **options: Any,
    ) -> LLM:
        """Load target, tokenizer and drafter. Raises InputError with one sentence when the model,
        a method or an option is unknown or unusable.

        dtype: auto, float32, bfloat16, int8, int4, int4-g64, int4-g128; device: auto, cpu, cuda,
        cuda:N; backend: auto, native, hf (transformers); threads: torch's CPU threads;
        deterministic: refuse a target whose logits depend in their last bits on the batch;
        progress(fraction, what) is called while weights are read.
        """
        if threads is not None:
            if threads < 1:
                raise InputError(f"threads={threads} makes no sense: it is at least 1.")
            torch.set_num_threads(threads)
        kind: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend}
        name = None if model is None else str(model)
        context = load_parts(name, deterministic=deterministic, progress=progress, **kind)
        if isinstance(draft, str) and draft == "auto":
            draft = default_draft(context)
        return cls(context.target, context.tokenizer, draft=draft, context=context, **options)

    def with_methods(
        self,
        draft: MethodSpec | Drafter = "none",
        verify: MethodSpec | Verifier = "auto",
        policy: MethodSpec | LengthPolicy = "fixed",
        **options: Any,
    ) -> LLM:
        """Another engine over the same loaded models (comparisons, tuning)."""
        parts: dict[str, Any] = {"draft": draft, "verify": verify, "policy": policy}
        return LLM(self.model, self.tokenizer, context=self.context, **parts, **options)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        on_event: Callable[[TokenEvent], None] | None = None,
        constraint: Callable[[], Constraint] | None = None,
        speculation: Speculation = NO_WISH,
        **overrides: Any,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many; outputs come in the order of the prompts.

        A prompt is a string or a list of token ids; speculation: what the requests want of it.
        Keyword overrides are SamplingParams fields.
        """
        outputs = dict(
            self.as_completed(
                prompts,
                params,
                on_event=on_event,
                constraint=constraint,
                speculation=speculation,
                **overrides,
            )
        )
        return [outputs[i] for i in range(len(outputs))]

    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        on_event: Callable[[TokenEvent], None] | None = None,
        constraint: Callable[[], Constraint] | None = None,
        speculation: Speculation = NO_WISH,
        **overrides: Any,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`, but yields (index of the prompt, output) as each one is done."""
        params = _params(params, overrides)
        requests = [self.inputs.request(p, params, constraint, speculation) for p in _many(prompts)]
        index = {r.id: i for i, r in enumerate(requests)}
        left = [len(r.sequences) for r in requests]
        for event in self._run(requests):
            if on_event is not None:
                on_event(event)
            if event.finish_reason is not None:
                i = index[event.request]
                left[i] -= 1
                if not left[i]:
                    yield i, requests[i].output()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        constraint: Callable[[], Constraint] | None = None,
        speculation: Speculation = NO_WISH,
        **overrides: Any,
    ) -> Iterator[TokenEvent]:
        """One event per token, whatever the size of the step it came from; the last event of the
        request carries its RequestOutput in ``event.output``."""
        request = self.inputs.request(prompt, _params(params, overrides), constraint, speculation)
        left = len(request.sequences)
        for event in self._run([request]):
            left -= event.finish_reason is not None
            if not left and event.finish_reason is not None:
                event.output = request.output()
            yield event

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **overrides: Any
    ) -> RequestOutput:
        """Answer a conversation of ``{"role": .., "content": ..}`` messages."""
        return self.generate([self.chat_ids(messages)], params, **overrides)[0]

    def suggest(self, prompt: Prompt, k: int = 3, max_tokens: int = 16) -> Suggestions:
        """k continuations of a prompt from one forward a token (superposed decoding; lossy): for
        suggestions to choose from. k = 1 is greedy decoding. No other parameter applies."""
        tokenizer = self.tokenizer
        ends = tokenizer.eos_ids if tokenizer else frozenset()
        text = tokenizer.decode if tokenizer else lambda ids: ""
        return Superposed(k, max_tokens)(self.model, self.encode(prompt), ends, text)

    def encode(self, prompt: Prompt) -> list[int]:
        """Prompt -> ids; InputError when it is empty or holds ids the model does not have."""
        return self.inputs.encode(prompt)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt ids of a conversation, by the model's chat template."""
        return self.inputs.text.chat(list(messages))

    def _run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        """Drive the engine until `requests` are done; unfinished ones are dropped on the way out
        (an exception, Ctrl-C, a closed generator)."""
        scheduler = self.engine.scheduler
        mine = [s for r in requests for s in r.sequences]
        try:
            for request in requests:
                for seq in request.sequences:
                    scheduler.add(seq)
                self._requests[request.id] = request
            while any(s.finish.reason is None for s in mine) or any(r.inbox for r in requests):
                for request in requests:
                    while request.inbox:
                        yield request.inbox.popleft()
                if all(s.finish.reason is not None for s in mine):
                    continue
                events = self.engine.step()
                if not events and not self.engine.moved:
                    raise ForetellError("The scheduler found nothing to run; please report this.")
                for event in events:
                    self._requests[event.request].inbox.append(event)
        finally:
            for seq in mine:
                if seq.finish.reason is None:
                    scheduler.retire(seq)
            for request in requests:
                self._requests.pop(request.id, None)


def _make(kind: str, what: Any, context: BuildContext) -> Any:
    if isinstance(what, str | Mapping | Spec):
        return registry.create(kind, what, context)
    return what


def _many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params(params: SamplingParams | None, overrides: dict[str, Any]) -> SamplingParams:
    known = SamplingParams.__dataclass_fields__
    for key in overrides:
        if key not in known:
            raise InputError(f"There is no parameter '{key}': {registry.suggest(key, known)}")
    return replace(params or SamplingParams(), **overrides)
