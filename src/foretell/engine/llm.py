"""The Python API: load a model, generate, stream, chat."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foretell.control.finish import Finish
from foretell.control.processors import Processors
from foretell.core import registry
from foretell.core.errors import ForetellError, InputError
from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.places import cache_folder
from foretell.core.protocols import (
    BuildContext,
    Constraint,
    Drafter,
    Draw,
    LengthPolicy,
    Promise,
    SeqView,
    TargetModel,
    Verifier,
)
from foretell.core.registry import Spec
from foretell.core.rng import SeqRng, fresh_seed
from foretell.engine.cost import MeasuredCost
from foretell.engine.loop import Engine
from foretell.engine.memory import free_memory
from foretell.engine.outputs import RequestOutput, SampleOutput
from foretell.engine.pipelined import PipelinedEngine
from foretell.engine.scheduler import Scheduler
from foretell.engine.sequence import Sequence as EngineSequence
from foretell.engine.sequence import TokenEvent
from foretell.engine.superposed import Suggestions, Superposed
from foretell.models.load import find_checkpoint, load_model
from foretell.models.text.stream import StreamDecoder
from foretell.models.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, str]
MethodSpec = str | Mapping[str, Any] | Spec

_DRAWN = {
    Draw.IID: "siblings that were drawn independently",
    Draw.TOP_ONE: "the most probable siblings and one draw",
    Draw.PATHS: "independently drawn chains of one length",
}


def bundled_model() -> Path:
    """The checkpoint directory that ships in the package."""
    return Path(__file__).parent.parent / "assets" / "base"


def load(model: str | os.PathLike[str] | None = None, **options: Any) -> LLM:
    """Load a model: a checkpoint directory, a hub id, or (by default) the bundled one.

    options: see `LLM.load`.
    """
    return LLM.load(model, **options)


@dataclass(slots=True)
class Request:
    """A prompt and the sequences of its n samples."""

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    control: Speculation = NO_WISH
    sequences: list[EngineSequence] = field(default_factory=list)
    inbox: deque[TokenEvent] = field(default_factory=deque)


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
        self._greedy: Verifier = registry.create("verifier", "greedy")
        auto = isinstance(verify, str) and verify == "auto"
        self._sampled: Verifier = _make("verifier", "replay" if auto else verify, context)
        self.allow_lossy = allow_lossy
        self._check(allow_lossy)
        replay = self._sampled.name == "replay"
        self._exact = self._sampled if replay else _make("verifier", "replay", context)
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
        self._next_id = 0

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
        folder = find_checkpoint(bundled_model() if model is None else str(model))
        kind: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend}
        target = load_model(folder, progress=progress, deterministic=deterministic, **kind)
        tokenizer = Tokenizer.load(folder)
        tokenizer.check_vocab(target.spec.vocab)
        beside = folder / "draft"
        default = str(beside) if (beside / "config.json").is_file() else None

        drafts: dict[Path, TargetModel] = {}

        def load_draft(name: str) -> TargetModel:
            home = find_checkpoint(name)
            if home in drafts:
                return drafts[home]
            reason = tokenizer.same_vocabulary(Tokenizer.load(home))
            if reason:
                raise InputError(
                    f"The draft model {name} does not share the target's vocabulary: {reason} "
                    "Choose a drafter with the same tokenizer."
                )
            drafts[home] = load_model(home, **kind)
            return drafts[home]

        if isinstance(draft, str) and draft == "auto":
            draft = "draft-model" if default else "prompt-lookup"
            if not target.spec.caps.rollback:
                draft = "none"
        context = BuildContext(target, tokenizer, load_draft, default)
        return cls(target, tokenizer, draft=draft, context=context, **options)

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

    def _check(self, allow_lossy: bool) -> None:
        for method in (self._sampled, self.drafter):
            if method.promise is Promise.LOSSY and not allow_lossy:
                raise InputError(
                    f"'{method.name}' changes what the model says (lossy): "
                    "pass allow_lossy / --allow-lossy if that is what you want."
                )
        why = self._mismatch(self._sampled)
        if why is not None:
            raise InputError(why)

    def _mismatch(self, verifier: Verifier) -> str | None:
        """Why a rule cannot verify what the drafter drafts, or None."""
        rule, drafter = f"'{verifier.name}'", f"'{self.drafter.name}'"
        missing = self.drafter.shapes - verifier.accepts
        if "tree" in missing or "chain" in missing or "onehot" in missing:
            return (
                f"{rule} cannot verify what {drafter} drafts "
                f"({', '.join(sorted(missing))}): choose another pair."
            )
        if self.drafter.shapes >= {"tree", "q"} and not self._draws(verifier):
            return (
                f"{rule} is a rule for {_DRAWN[verifier.draw]}, which "
                f"{drafter} cannot draw: on its trees it would be biased, or no better "
                "than verify=rejection; use that, or draft a chain."
            )
        drawn = verifier.draw if self._draws(verifier) else Draw.SAMPLE
        why = getattr(self.drafter, "unsound", {}).get(drawn)
        return None if why is None else f"{rule} would be biased on what {drafter} drafts: {why}"

    def _draws(self, verifier: Verifier) -> bool:
        """Whether the drafter can draw the way the rule wants it."""
        usual = (Draw.TOP, Draw.NOISE, Draw.SAMPLE)
        return verifier.draw in (*usual, *getattr(self.drafter, "draws", ()))

    def verifier_for(self, params: SamplingParams, control: Speculation = NO_WISH) -> Verifier:
        """The configured rule; at temperature 0, where every lossless rule is the greedy walk, that
        walk; and an exact rule where a request wants more than the configured one promises."""
        order = list(Promise)
        needed = order[-1] if control.promise is None else Promise(control.promise)
        strong = order.index(self._sampled.promise) <= order.index(needed)
        if params.greedy and (self._sampled.promise is not Promise.LOSSY or not strong):
            return self._greedy
        if not strong:
            why = None if control.off else self._mismatch(self._exact)
            if why is not None:
                raise InputError(f"promise={needed} cannot be kept here: {why}")
            return self._exact
        if self._sampled.name == "greedy":
            raise InputError(
                "Greedy verification needs temperature 0: use verify=replay (exact) or "
                "verify=rejection (lossless) to sample."
            )
        return self._sampled

    def promise(self, params: SamplingParams, control: Speculation = NO_WISH) -> Promise:
        """The weaker of what the drafter and the verification rule promise."""
        order = list(Promise)
        rule = self.verifier_for(params, control).promise
        return rule if control.off else max(self.drafter.promise, rule, key=order.index)

    @property
    def offers(self) -> list[str]:
        """Names of the drafters a request may choose from, the default first."""
        return list(getattr(self.drafter, "offers", (self.drafter.name,)))

    def drafter_for(self, control: Speculation) -> str:
        """The name of the drafter that drafts for a request; "off" where nothing may."""
        if control.off:
            return "off"
        return control.drafter or self.offers[0]

    def _check_control(self, params: SamplingParams, control: Speculation) -> None:
        """InputError when a request's wishes cannot be met here."""
        if control.drafter not in (None, "off", *self.offers):
            hint = registry.suggest(str(control.drafter), [*self.offers, "off"])
            raise InputError(f"There is no drafter '{control.drafter}' here: {hint}")
        if control.promise == Promise.LOSSY and not self.allow_lossy:
            raise InputError(
                "promise=lossy is not allowed here (--allow-lossy): choose exact or lossless."
            )
        order = list(Promise)
        if control.promise is not None:
            got = self.promise(params, control)
            if order.index(got) > order.index(Promise(control.promise)):
                raise InputError(
                    f"promise={control.promise} cannot be kept: '{self.drafter_for(control)}' is "
                    f"{got}; choose another drafter, or 'off'."
                )

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
        requests = [self.request(p, params, constraint, speculation) for p in self._many(prompts)]
        index = {r.id: i for i, r in enumerate(requests)}
        left = [len(r.sequences) for r in requests]
        for event in self._run(requests):
            if on_event is not None:
                on_event(event)
            if event.finish_reason is not None:
                i = index[event.request]
                left[i] -= 1
                if not left[i]:
                    yield i, self.output_of(requests[i])

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
        request = self.request(prompt, _params(params, overrides), constraint, speculation)
        left = len(request.sequences)
        for event in self._run([request]):
            left -= event.finish_reason is not None
            if not left and event.finish_reason is not None:
                event.output = self.output_of(request)
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

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt ids of a conversation, by the model's chat template."""
        return self._text().chat(list(messages))

    def encode(self, prompt: Prompt) -> list[int]:
        """Prompt -> ids; InputError when it is empty or holds ids the model does not have."""
        if isinstance(prompt, str):
            if not prompt:
                raise InputError("The prompt is empty: give at least one character.")
            return self._text().encode(prompt)
        ids = [int(t) for t in prompt]
        if not ids:
            raise InputError("The prompt is empty: give at least one token id.")
        wrong = next((t for t in ids if not 0 <= t < self.model.spec.vocab), None)
        if wrong is not None:
            raise InputError(f"Token id {wrong} is outside 0..{self.model.spec.vocab - 1}.")
        return ids

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("This model was loaded without a tokenizer: pass token ids.")
        return self.tokenizer

    def _many(self, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            return [prompts]  # type: ignore[list-item]
        return list(prompts)  # type: ignore[arg-type]

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        constraint: Callable[[], Constraint] | None,
        control: Speculation = NO_WISH,
    ) -> Request:
        ids = self.encode(prompt)
        spec = self.model.spec
        if len(ids) >= spec.max_positions:
            raise InputError(
                f"The prompt has {len(ids)} tokens and the model's context is "
                f"{spec.max_positions}: shorten it."
            )
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for t in getattr(params, name) or ():
                if not 0 <= t < spec.vocab:
                    raise InputError(f"{name}: token id {t} is outside 0..{spec.vocab - 1}.")
        self._check_control(params, control)
        seed = fresh_seed() if params.seed is None else params.seed
        request = Request(self._next_id, ids, params, seed, control)
        self._next_id += 1
        for sample in range(params.n):
            request.sequences.append(self._sequence(request, sample, constraint))
        return request

    def _sequence(
        self, request: Request, sample: int, constraint: Callable[[], Constraint] | None
    ) -> EngineSequence:
        params, tokenizer = request.params, self.tokenizer
        eos = tokenizer.eos_ids if tokenizer else frozenset()
        ends = (frozenset() if params.ignore_eos else eos) | frozenset(params.stop_token_ids)
        tokens = list(request.prompt)
        bad = [self._text().encode(t, add_special=False) for t in _variants(params.bad_words)]
        processors = Processors(params, tokens, len(tokens), ends, bad)
        verifier = self.verifier_for(params, request.control)
        view = SeqView(
            tokens,
            len(tokens),
            params,
            SeqRng(SeqRng(request.seed).fork(sample)),
            verifier.draw if self._draws(verifier) else Draw.SAMPLE,
            warp=lambda logits, paths: processors.probs(logits, paths, None),
            plain=processors.plain,
            control=request.control,
        )
        room = self.model.spec.max_positions - len(tokens)
        decoder = StreamDecoder(tokenizer, tokens) if tokenizer else None
        if params.stop:
            self._text()
        finish = Finish(params, eos, room, decoder)
        made = constraint() if constraint else None
        return EngineSequence(request.id, sample, params, view, finish, processors, verifier, made)

    def open_prompt(self) -> EngineSequence:
        """A sequence whose prompt still grows: `Scheduler.grow` reads it, `replace` changes it, and
        the cache that `release` gives may go to a sequence of a request with that prompt."""
        most = self.model.spec.max_positions
        params, tokens = SamplingParams(max_tokens=most), list[int]()
        processors = Processors(params, tokens, 0)
        finish = Finish(params, frozenset(), most, None)
        view = SeqView(tokens, 0, params, SeqRng(0))
        return EngineSequence(-1, 0, params, view, finish, processors, self._greedy, open=True)

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

    def speculation_of(self, request: Request, sample: int = 0) -> dict[str, Any]:
        """What speculation did for a sample, so far; "why_off" says why nothing was drafted."""
        seq, control = request.sequences[sample], request.control
        result = seq.stats.speculation(self.drafter_for(control), seq.verifier.name)
        promise = str(self.promise(request.params, control))
        return {**result, "promise": promise, "why_off": seq.stats.why_off}

    def output_of(self, request: Request) -> RequestOutput:
        first = request.sequences[0]
        return RequestOutput(
            prompt_ids=request.prompt,
            samples=[
                SampleOutput(
                    text=s.finish.text,
                    token_ids=s.output,
                    finish_reason=s.finish.reason or "length",
                    seed=s.view.rng.seed,
                    drafted=s.drafted,
                    stats=s.stats,
                    logprobs=s.logprobs if request.params.logprobs is not None else None,
                )
                for s in request.sequences
            ],
            prompt_logprobs=first.prompt_logprobs or None,
            promise=str(self.promise(request.params, request.control)),
            drafter=self.drafter_for(request.control),
            verifier=first.verifier.name,
        )


def default_rows(model: TargetModel, max_batch: int) -> int:
    """KV rows that `max_batch` full contexts need, at most what half of the free memory holds."""
    rows = max_batch * model.spec.max_positions
    if not model.spec.row_bytes:
        return rows
    free = free_memory(model.device)
    return max(1024, min(rows, free // 2 // model.spec.row_bytes))


def _make(kind: str, what: Any, context: BuildContext) -> Any:
    if isinstance(what, str | Mapping | Spec):
        return registry.create(kind, what, context)
    return what


def _params(params: SamplingParams | None, overrides: dict[str, Any]) -> SamplingParams:
    from dataclasses import replace

    known = SamplingParams.__dataclass_fields__
    for key in overrides:
        if key not in known:
            raise InputError(f"There is no parameter '{key}': {registry.suggest(key, known)}")
    return replace(params or SamplingParams(), **overrides)


def _variants(words: Sequence[str]) -> list[str]:
    """A word at the beginning of a text and inside one: tokenizers glue the space to the word."""
    return [v for w in words for v in ((w, " " + w) if not w.startswith(" ") else (w,))]
