"""The bodies that clients send: OpenAI's fields, vLLM's sampling fields, and our own.

Types are strict ("5" is no number) and null always means "as if left out". A field that nobody here
knows is ignored, as OpenAI and vLLM do; one that is known, would change the answer and cannot be
honoured is refused with a sentence (`refuse_unsupported`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from foretell.serve.errors import ApiError, bad_request

MAX_SAMPLES = 128  # n
MAX_PROMPTS = 256  # prompts of one body
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Whole = Annotated[int, Field(ge=0, le=2**53)]  # a count; JavaScript's largest integer
Word = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    """Strict, finite numbers, unknown fields kept aside."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Control(BaseModel):
    """What this request wants of speculation; the headers X-Foretell-Draft, X-Foretell-Max-Draft
    and X-Foretell-Promise say the same where this field does not."""

    model_config = ConfigDict(strict=True, extra="forbid")

    drafter: str | None = Field(default=None, description="A drafter the server offers, or off.")
    max_draft: Whole | None = Field(
        default=None, description="Most drafted tokens a step; 0 = off."
    )
    promise: Literal["exact", "lossless", "lossy"] | None = Field(
        default=None, description="The weakest promise that is accepted."
    )
    off: bool | None = Field(default=None, description="true: draft nothing.")


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Usage so far in every chunk.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]


class Sampling(Body):
    """What completions and chat completions share."""

    model: str | None = Field(None, description="One of /v1/models; left out: the first.")
    temperature: Annotated[float, Field(ge=0)] | None = Field(None, description="1; 0 = greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = Field(None, description="Answers.")
    stop: Word | Annotated[list[Word], Field(max_length=32)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(
        None,
        description="Same seed, same answer; sample i of n is that of foretell's LLM.generate.",
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=300),
        ]
        | None
    ) = Field(None, description="Token id -> what is added to its logit.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="Only {type: text}.")
    user: str | None = Field(None, description="Ignored.")

    # vLLM's fields
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="0 or -1 = off."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Whole | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    bad_words: Annotated[list[Word], Field(max_length=64)] | None = None
    allowed_token_ids: Ids | None = None
    return_token_ids: bool | None = Field(None, description="Add token_ids to the answer.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the prompt gets a beginning-of-text token."
    )

    # our own
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    speculation: Control | None = None
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Seconds this request may take; never more than the server's."
    )
    foretell: bool | None = Field(
        None, description="Add to every choice where its tokens came from (ids, drafted or not)."
    )


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, several, token ids, or several lists of them.")
    max_tokens: Whole | None = Field(None, description="16; 0 only with echo.")
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    suffix: str | None = Field(None, description="Refused unless empty.")
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = Field(
        None, description="Refused unless it is n."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description="In logprobs, spell tokens as token_id:ID."
    )


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Body):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None


class Message(Body):
    """One message. Further fields (name, tool_call_id, reasoning_content, ...) go to the chat
    template as they are."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedTool(Body):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=128)]


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Whole | None = Field(None, description="What fits the context.")
    max_completion_tokens: Whole | None = Field(None, description="The same; it wins.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = Field(None, description="Shown to the chat template.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="none or auto; a forced call would need grammar support."
    )
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking."
    )
    add_generation_prompt: bool | None = None


class TokenizeRequest(Body):
    """Of a text (prompt) or of a conversation (messages)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = Field(None, description="true for a prompt, else false.")
    add_generation_prompt: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


_GRAMMAR = "it needs grammar-constrained decoding, which this server does not have"
_UNSUPPORTED = (  # field, values that ask for nothing, why it is refused
    ("use_beam_search", (False,), "there is no beam search"),
    ("length_penalty", (1, 1.0), "there is no beam search"),
    ("guided_json", (), _GRAMMAR),
    ("guided_regex", (), _GRAMMAR),
    ("guided_choice", (), _GRAMMAR),
    ("guided_grammar", (), _GRAMMAR),
    ("structured_outputs", (), _GRAMMAR),
    ("functions", ([],), "it is the old spelling of 'tools': use that"),
    ("function_call", ("none",), "it is the old spelling of 'tool_choice': use that"),
    ("chat_template", ("",), "the model's own chat template is used"),
    ("continue_final_message", (False,), "the last message cannot be continued"),
    ("skip_special_tokens", (True,), "special tokens are never shown; see return_token_ids"),
    ("truncate_prompt_tokens", (), "prompts are never cut: shorten it"),
    ("prompt_logprobs", (), "use /v1/completions with echo and logprobs"),
    ("prompt_embeds", (), "a prompt is text or token ids"),
    ("audio", (), "this server answers with text only"),
    ("modalities", (["text"],), "this server answers with text only"),
    ("logits_processors", ([],), "code from a request is never run"),
    ("thinking_token_budget", (), "there is no such limit: use max_tokens"),
    ("web_search_options", (), "this server searches nothing"),
)


def refuse_unsupported(body: Sampling) -> None:
    """Raise ApiError for a field that asks for what is not there."""
    extra = body.model_extra or {}
    if extra:
        for name, harmless, why in _UNSUPPORTED:
            value = extra.get(name)
            if value is not None and not any(value is h or value == h for h in harmless):
                raise _refusal(name, why)
    if body.response_format is not None and body.response_format.type != "text":
        raise _refusal(f"response_format {body.response_format.type}", _GRAMMAR, "response_format")
    if isinstance(body, CompletionRequest):
        if body.suffix:
            raise _refusal("suffix", "this model does not fill gaps: put all of it in the prompt")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise _refusal("best_of", "all n answers are given back: leave it out, or equal to n")
    if isinstance(body, ChatRequest):
        forced = isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required"
        if forced:
            raise _refusal("A forced tool_choice", _GRAMMAR, "tool_choice")
        if body.top_logprobs and not body.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("'stream_options' needs 'stream': true.", "stream_options")


def _refusal(what: str, why: str, param: str | None = None) -> ApiError:
    return bad_request(f"{what} is refused: {why}.", param or what, "unsupported")
