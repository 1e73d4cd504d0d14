"""The bodies of `/v1/streams`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from foretell.serve import schema
from foretell.serve.schema import Body, ChatRequest, CompletionRequest, Ids, Message

Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class OpenText(CompletionRequest):
    """A stream that ends in a completion. prompt: its beginning, if there already is one."""

    prompt: str | list[schema.TokenId] | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="What is there already: text or token ids."
    )


class OpenChat(ChatRequest):
    """A stream that ends in a chat completion; what is appended goes on with the last message."""


class Append(Body):
    """More of the prompt: exactly one of the fields."""

    text: str | None = Field(None, description="Text that follows; of the last message, in a chat.")
    token_ids: Ids | None = Field(None, description="Ids that follow.")
    messages: Messages | None = Field(None, description="Messages that follow.")


class Update(Body):
    """Another prompt in place of this one: exactly one of the fields."""

    prompt: str | Ids | None = Field(None, description="The whole prompt, text or token ids.")
    messages: Messages | None = Field(None, description="The whole conversation.")


class Finish(Body):
    """The prompt is complete."""

    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: schema.StreamOptions | None = None
