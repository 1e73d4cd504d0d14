"""What a body asks for besides its prompt: sampling parameters, and speculation."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers

from foretell.core.params import SamplingParams, Speculation
from foretell.core.protocols import Promise
from foretell.serve import schema
from foretell.serve.errors import bad_request
from foretell.serve.schema import Sampling


def sampling_params(
    body: Sampling,
    prompts: Sequence[Sequence[int]],
    most: int,
    context: int,
    logprobs: int | None = None,
    echo: bool = False,
) -> SamplingParams:
    """Sampling parameters; OpenAI's defaults (temperature 1). More tokens than the context
    holds are never generated, so `most` is cut to that."""
    room = context - max(map(len, prompts))
    stop = body.stop or ()
    return SamplingParams(
        max_tokens=min(most, room),
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        typical_p=1.0 if body.typical_p is None else body.typical_p,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(k): v for k, v in (body.logit_bias or {}).items()},
        allowed_token_ids=body.allowed_token_ids,
        bad_words=body.bad_words or (),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=body.stop_token_ids or (),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        seed=None if body.seed is None else body.seed % 2**64,
        n=body.n or 1,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )


def wishes(body: Sampling, headers: Headers, allow_lossy: bool) -> Speculation:
    """The body's wishes, the headers' where the body has none."""
    wish = body.speculation or schema.Control()
    drafter = wish.drafter or headers.get("x-foretell-draft") or None
    most, text = wish.max_draft, headers.get("x-foretell-max-draft")
    if most is None and text:
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise bad_request("X-Foretell-Max-Draft is a number of tokens, 0 = off.")
        most = int(text)
    promise = wish.promise or headers.get("x-foretell-promise") or None
    if wish.off:
        if wish.drafter not in (None, "off"):
            raise bad_request("'speculation' says off and names a drafter.", "speculation")
        drafter = "off"
    if promise == Promise.LOSSY and not allow_lossy:
        raise bad_request(
            "This server allows no lossy methods: ask for exact or lossless.",
            "speculation.promise",
        )
    return Speculation(drafter=drafter, max_draft=most, promise=promise)
