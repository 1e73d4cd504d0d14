"""From prompts and parameters to requests, with everything that can be wrong said at once."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from foretell.control.finish import Finish
from foretell.control.processors import Processors
from foretell.core.errors import InputError
from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.protocols import Constraint, ModelSpec, SeqView
from foretell.core.rng import SeqRng, fresh_seed
from foretell.engine.request import Request
from foretell.engine.rules import Rules
from foretell.engine.sequence import Sequence
from foretell.models.text.stream import StreamDecoder
from foretell.models.text.tokenizer import Tokenizer

Prompt = str | Seq[int]


class Inputs:
    """Makes requests for one model, tokenizer and set of rules. Raises InputError."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer | None, rules: Rules) -> None:
        self.spec, self.tokenizer, self.rules = spec, tokenizer, rules
        self._next_id = 0

    @property
    def text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("This model was loaded without a tokenizer: pass token ids.")
        return self.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Prompt -> ids; InputError when it is empty or holds ids the model does not have."""
        if isinstance(prompt, str):
            if not prompt:
                raise InputError("The prompt is empty: give at least one character.")
            return self.text.encode(prompt)
        ids = [int(t) for t in prompt]
        if not ids:
            raise InputError("The prompt is empty: give at least one token id.")
        wrong = next((t for t in ids if not 0 <= t < self.spec.vocab), None)
        if wrong is not None:
            raise InputError(f"Token id {wrong} is outside 0..{self.spec.vocab - 1}.")
        return ids

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        constraint: Callable[[], Constraint] | None = None,
        control: Speculation = NO_WISH,
    ) -> Request:
        """A request with its n sequences, ready for the scheduler."""
        ids = self.encode(prompt)
        spec = self.spec
        if len(ids) >= spec.max_positions:
            raise InputError(
                f"The prompt has {len(ids)} tokens and the model's context is "
                f"{spec.max_positions}: shorten it."
            )
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for t in getattr(params, name) or ():
                if not 0 <= t < spec.vocab:
                    raise InputError(f"{name}: token id {t} is outside 0..{spec.vocab - 1}.")
        rules = self.rules
        rules.check(params, control)
        seed = fresh_seed() if params.seed is None else params.seed
        promise, drafter = rules.promise(params, control), rules.drafter_for(control)
        request = Request(self._next_id, ids, params, seed, promise, drafter, control)
        self._next_id += 1
        for sample in range(params.n):
            request.sequences.append(self._sequence(request, sample, constraint))
        return request

    def _sequence(
        self, request: Request, sample: int, constraint: Callable[[], Constraint] | None
    ) -> Sequence:
        params, tokenizer = request.params, self.tokenizer
        eos = tokenizer.eos_ids if tokenizer else frozenset()
        ends = (frozenset() if params.ignore_eos else eos) | frozenset(params.stop_token_ids)
        tokens = list(request.prompt)
        bad = [self.text.encode(t, add_special=False) for t in _variants(params.bad_words)]
        processors = Processors(params, tokens, len(tokens), ends, bad)
        verifier = self.rules.verifier_for(params, request.control)
        view = SeqView(
            tokens,
            len(tokens),
            params,
            SeqRng(SeqRng(request.seed).fork(sample)),
            self.rules.draw_for(verifier),
            warp=lambda logits, paths: processors.probs(logits, paths, None),
            plain=processors.plain,
            control=request.control,
        )
        room = self.spec.max_positions - len(tokens)
        decoder = StreamDecoder(tokenizer, tokens) if tokenizer else None
        if params.stop:
            _ = self.text  # stop strings need one
        finish = Finish(params, eos, room, decoder)
        made = constraint() if constraint else None
        return Sequence(request.id, sample, params, view, finish, processors, verifier, made)

    def open_prompt(self) -> Sequence:
        """A sequence whose prompt still grows: `Scheduler.grow` reads it, `replace` changes it, and
        the cache that `release` gives may go to a sequence of a request with that prompt."""
        most = self.spec.max_positions
        params, tokens = SamplingParams(max_tokens=most), list[int]()
        processors = Processors(params, tokens, 0)
        finish = Finish(params, frozenset(), most, None)
        view, rule = SeqView(tokens, 0, params, SeqRng(0)), self.rules.greedy
        return Sequence(-1, 0, params, view, finish, processors, rule, open=True)


def _variants(words: Seq[str]) -> list[str]:
    """A word at the beginning of a text and inside one: tokenizers glue the space to the word."""
    return [v for w in words for v in ((w, " " + w) if not w.startswith(" ") else (w,))]
