"""Chat templates: Jinja sources that ship with a checkpoint, rendered in a sandbox.

The environment is the one such templates are written for (whitespace rules, helpers, tags), so a
prompt comes out character for character as other runtimes make it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from foretell.core.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters; the models were trained without that.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@cache
def _environment() -> Environment:
    from jinja2 import ext, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(ext.Extension):
        """{% generation %} marks what the assistant said, for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 reads a plain set)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def choose(templates: Mapping[str, str], tools: Sequence[Any] | None) -> str:
    """The source to use: "tool_use" when there are tools, else "default", else the only one.

    Raises InputError when there is no such template.
    """
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if len(templates) == 1:
        return next(iter(templates.values()))
    if not templates:
        raise InputError(
            "This model has no chat template; pass a plain prompt, or put a chat_template.jinja "
            "beside its tokenizer."
        )
    raise InputError(f"None of the chat templates ({', '.join(templates)}) is called default.")


def render(source: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The prompt text of a conversation.

    messages: {"role": ..., "content": ...} each. variables: what the template may read besides
    (add_generation_prompt, bos_token, tools, ...).
    Raises InputError with the template's own words when it refuses the conversation.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        return _compiled(source).render(messages=list(messages), **variables)
    except TemplateSyntaxError as e:
        raise InputError(f"The chat template is broken at line {e.lineno}: {e.message}.") from None
    except TemplateError as e:
        raise InputError(f"The chat template refuses this conversation: {e}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as e:
        raise InputError(
            f"The chat template cannot render this conversation ({e}); "
            "are the messages objects with a role and a content?"
        ) from None
