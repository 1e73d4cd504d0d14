"""vLLM's `--speculative-config` in our terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from foretell.core.errors import InputError

_METHODS = {
    "ngram": "prompt-lookup",
    "draft_model": "draft-model",
    "suffix": "suffix",
}
_COMMON = ("method", "model", "num_speculative_tokens", "rejection_sample_method")
_OPTIONS = {  # our drafter -> vLLM's key -> our option
    "prompt-lookup": {"prompt_lookup_max": "max_ngram", "prompt_lookup_min": "min_ngram"},
    "draft-model": {},
    "suffix": {
        "suffix_decoding_max_tree_depth": "depth",
        "suffix_decoding_max_spec_factor": "factor",
        "suffix_decoding_min_token_prob": "min_prob",
    },
}
_HARMLESS: dict[
    str, tuple[Any, ...]
] = {  # keys that say nothing about the output or the speed here
    "draft_tensor_parallel_size": (1,),
    "enforce_eager": (True, False),
    "disable_padded_drafter_batch": (True, False),
    "use_heterogeneous_vocab": (False,),
    "parallel_drafting": (False,),
    "draft_sample_method": ("probabilistic",),
}
_ELSEWHERE = {
    "num_speculative_tokens_per_batch_size": "use --policy goodput, which measures that",
    "enable_adaptive_verification": "use --policy goodput or --policy specdec++",
    "use_heterogeneous_vocab": "the drafter needs the target's own vocabulary",
    "quantization": "use --dtype, which holds for the drafter too",
    "max_model_len": "use --max-model-len",
    "tensor_parallel_size": "there is no tensor parallelism here",
}


def from_vllm(text: str) -> dict[str, str]:
    """--speculative-config -> values for --draft and --verify ("draft" always, "verify" at times).

    InputError for what has no counterpart here: nothing is silently left out.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--speculative-config is not valid JSON ({error}).") from None
    if not isinstance(config, Mapping):
        raise InputError('--speculative-config is a JSON object such as {"method": "ngram"}.')
    given = {k: v for k, v in config.items() if v is not None}
    method = given.get("method", "draft_model" if "model" in given else None)
    name = _METHODS.get(method) if isinstance(method, str) else None
    if name is None:
        known = ", ".join(_METHODS)
        raise InputError(
            f"--speculative-config: the method {json.dumps(method)} has no counterpart here; there "
            f"are {known} - or use --draft, see foretell methods."
        )
    spec: dict[str, Any] = {"method": name}
    tokens = given.get("num_speculative_tokens")
    if tokens is not None:
        spec["tokens"] = tokens
    if name == "draft-model" and "model" in given:
        spec["path"] = given["model"]
    options = _OPTIONS[name]
    for key, value in given.items():
        if key in options:
            spec[options[key]] = value
        elif key == "suffix_decoding_max_cached_requests" and name == "suffix":
            if value == 0:
                spec["share"] = "never"  # otherwise bytes, not requests, bound what is kept
        elif key not in _COMMON and value not in _HARMLESS.get(key, ()):
            why = _ELSEWHERE.get(key, f"'{name}' has no such setting here")
            raise InputError(f"--speculative-config: '{key}' is refused: {why}.")
    made = {"draft": json.dumps(spec)}
    rule = given.get("rejection_sample_method", "standard")
    if rule == "block":
        made["verify"] = "block"
    elif rule not in ("standard", "strict"):
        raise InputError(
            f"--speculative-config: rejection_sample_method {json.dumps(rule)} is refused: use "
            "standard, block, or --verify."
        )
    return made
