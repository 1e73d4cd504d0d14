"""Tool calls out of what a model says, and vLLM's speculative config."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.core.errors import InputError
from foretell.core.registry import Spec
from foretell.serve.speculative_config import from_vllm
from foretell.serve.tools import CallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x<y"}}\n</tool_call>'


def parsed(pieces: list[str], single: bool = False) -> tuple[str, list[dict[str, Any]]]:
    parser, said, calls = CallParser(single), "", []
    for piece in pieces:
        text, found = parser.push(piece)
        said += text
        calls += found
    said += parser.flush()
    return said, [{k: v for k, v in c.items() if k != "id"} for c in calls]


def call(index: int, name: str = "f", arguments: str = '{"a": "x<y"}') -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "type": "function", "function": function}


def test_what_is_a_call() -> None:
    assert parsed([f"Let me look.\n{CALL}\n{CALL}\n"]) == ("Let me look.", [call(0), call(1)])
    assert parsed([f"{CALL} done"]) == ("done", [call(0)])
    assert parsed([f"{CALL}{CALL}"], single=True) == ("", [call(0)])
    assert parsed(['<tool_call>{"name": "g"}</tool_call>']) == ("", [call(0, "g", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "no call <tool at all",
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>["f"]</tool_call>',
        "ends early \n <tool_call>{",
        "blank \n at the end \n",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
    ids=range(8),
)
def test_everything_else_stays_text(text: str) -> None:
    assert parsed([text]) == (text, [])


@given(
    parts=st.lists(
        st.sampled_from([CALL, "<tool_call>", "</tool_call>", "<tool", "_call>", "a", " \n", "{"]),
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 200), max_size=10),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_how_the_text_is_cut_changes_nothing(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    at = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in pairwise(at)]
    assert parsed(pieces) == parsed([text]) == parsed(list(text))


# --speculative-config


@pytest.mark.parametrize(
    ("config", "name", "options"),
    [
        (
            {
                "method": "ngram",
                "num_speculative_tokens": 5,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            },
            "prompt-lookup",
            {"tokens": 5, "max_ngram": 4, "min_ngram": 2},
        ),
        (
            {"model": "org/small", "num_speculative_tokens": 3, "draft_tensor_parallel_size": 1},
            "draft-model",
            {"path": "org/small", "tokens": 3},
        ),
        ({"method": "draft_model", "model": "/a,b:c"}, "draft-model", {"path": "/a,b:c"}),
        (
            {
                "method": "suffix",
                "suffix_decoding_max_tree_depth": 24,
                "suffix_decoding_max_spec_factor": 2.0,
                "suffix_decoding_min_token_prob": 0.1,
                "suffix_decoding_max_cached_requests": 0,
            },
            "suffix",
            {"depth": 24, "factor": 2.0, "min_prob": 0.1, "share": "never"},
        ),
    ],
)
def test_vllms_config(config: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    from foretell.core.registry import create

    spec = Spec.parse(from_vllm(json.dumps(config))["draft"])
    assert (spec.name, spec.options) == (name, options)
    if name != "draft-model":
        create("drafter", spec)  # the drafter takes these options


def test_the_rule_of_vllms_config() -> None:
    base = {"method": "ngram", "num_speculative_tokens": 2}
    assert "verify" not in from_vllm(json.dumps({**base, "rejection_sample_method": "standard"}))
    assert from_vllm(json.dumps({**base, "rejection_sample_method": "block"}))["verify"] == "block"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "null"),
        ('{"method": "eagle3", "model": "x"}', "eagle3"),
        ('{"method": ["ngram"]}', "counterpart"),
        ('{"method": "ngram", "prompt_lookup_maxx": 1}', "prompt_lookup_maxx"),
        ('{"method": "ngram", "suffix_decoding_min_token_prob": 1}', "suffix_decoding"),
        ('{"model": "x", "draft_tensor_parallel_size": 2}', "draft_tensor_parallel_size"),
        ('{"model": "x", "num_speculative_tokens_per_batch_size": [[1, 2, 3]]}', "goodput"),
        ('{"model": "x", "rejection_sample_method": "synthetic"}', "synthetic"),
        ('{"method": "ngram", "unknown": {"a": [1]}}', "unknown"),
    ],
)
def test_what_has_no_counterpart_is_refused(config: str, word: str) -> None:
    with pytest.raises(InputError, match="--speculative-config") as error:
        from_vllm(config)
    assert word in str(error.value)
