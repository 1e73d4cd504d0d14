"""`foretell generate`: continue prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli import prompts, show
from foretell.cli.common import check_writable, dumps, load_llm, note, progress, write_atomically
from foretell.cli.config import Config
from foretell.cli.groups import command
from foretell.cli.options import ModelOptions, SamplingOptions
from foretell.cli.prompts import Item
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.engine.llm import LLM
    from foretell.engine.outputs import RequestOutput
    from foretell.engine.sequence import TokenEvent

app = typer.Typer(add_completion=False)
Outputs = list[list["RequestOutput"]]  # per item, per turn


@app.command()
@command
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines with prompt, turns, messages or question; or a text file, which is "
            "one prompt.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says: use the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message of conversations.", metavar="TEXT")
    ] = None,
    show_origin: Annotated[
        bool, typer.Option("--show", help=f"Colour tokens by origin ({show.LEGEND}).")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt, the last lines.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the JSON lines to this file.")
    ] = None,
    suggestions: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="K continuations of each prompt from one forward a token (superposed decoding, "
            "lossy; of the sampling options only --max-tokens applies).",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No summary and no progress on stderr.")
    ] = False,
    config: Config = None,
) -> None:
    """Continue a prompt, a file of prompts, or standard input."""
    params = sampling.params()
    model.validate()
    items = [prompts.as_chat(i, chat, system) for i in _items(prompt, prompt_file)]
    check_writable(out)
    llm = load_llm(model, quiet)
    if suggestions is not None:
        _suggest(llm, items, suggestions, params.max_tokens, json, out)
        return
    begin = perf_counter()
    if not json and len(items) == 1 and items[0].rounds == 1 and params.n == 1:
        outputs: Outputs = [[_stream(llm, items[0], params, show_origin)]]
    else:
        total = sum(i.rounds for i in items) * params.n

        def print_item(number: int, turns: list[RequestOutput]) -> None:
            if json:
                print(dumps(_object(items[number], turns)), flush=True)
            else:
                _print_texts(llm, number + 1, items[number], turns, show_origin)

        with progress("decoding", total, quiet) as advance:
            outputs = decode(llm, items, params, advance, print_item)
    if out is not None:
        lines = [dumps(_object(i, o)) for i, o in zip(items, outputs, strict=True)]
        write_atomically(out, "\n".join(lines) + "\n")
    note(show.summary([o for turns in outputs for o in turns], perf_counter() - begin), quiet)


def decode(
    llm: LLM,
    items: list[Item],
    params: SamplingParams,
    advance: Callable[[int], None],
    done: Callable[[int, list[RequestOutput]], None],
) -> Outputs:
    """Decode every item, turn by turn; one turn of all items goes to the engine together.

    done(number, turns) is called in the order of the items, as soon as an item and all before it
    are complete, so that nothing finished is lost when a later one fails.
    """

    def on_event(event: TokenEvent) -> None:
        if event.finish_reason is not None:
            advance(1)

    outputs: Outputs = [[] for _ in items]
    told = 0
    for turn in range(max(i.rounds for i in items)):
        going = [k for k, item in enumerate(items) if turn < item.rounds]
        ids = [prompt_ids(llm, items[k], [o.text for o in outputs[k]]) for k in going]
        for at, output in llm.as_completed(ids, params, on_event=on_event):
            outputs[going[at]].append(output)
            while told < len(items) and len(outputs[told]) == items[told].rounds:
                done(told, outputs[told])
                told += 1
    return outputs


def _suggest(
    llm: LLM, items: list[Item], k: int, max_tokens: int, json: bool, out: Path | None
) -> None:
    """Print k suggestions for every item, of several turns for the first one."""
    lines = []
    for number, item in enumerate(items, 1):
        found = llm.suggest(prompt_ids(llm, item, []), k, max_tokens)
        named = {} if item.id is None else {"id": item.id}
        lines.append(dumps({**named, **found.to_json()}))
        if json:
            print(lines[-1], flush=True)
            continue
        for at, suggestion in enumerate(found.suggestions, 1):
            note(f"-- prompt {number if item.id is None else item.id}, suggestion {at} --")
            print(suggestion.text, flush=True)
    if out is not None:
        write_atomically(out, "\n".join(lines) + "\n")


def prompt_ids(llm: LLM, item: Item, answers: list[str]) -> list[int]:
    """The ids of the item's next turn, after the `answers` to the earlier ones."""
    if item.raw is not None:
        ids = llm.encode(item.raw)
    else:
        messages = list(item.messages)
        for said, answer in zip(item.turns, answers, strict=False):
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answer})
        if item.turns:
            messages.append({"role": "user", "content": item.turns[len(answers)]})
        ids = llm.chat_ids(messages)
    if len(ids) >= llm.model.spec.max_positions:
        raise InputError(
            f"{item.where[:1].upper()}{item.where[1:]} has {len(ids)} tokens and the model's "
            f"context is {llm.model.spec.max_positions}: shorten it."
        )
    return ids


def _items(prompt: str | None, prompt_file: Path | None) -> list[Item]:
    if (prompt is None) == (prompt_file is None):
        raise InputError("Give a prompt, --prompt-file FILE, or - to read standard input.")
    if prompt_file is not None:
        return prompts.from_file(prompt_file)
    if prompt == "-":
        return [prompts.from_stdin()]
    return [prompts.one_prompt(prompt or "")]


def _stream(llm: LLM, item: Item, params: SamplingParams, colour: bool) -> RequestOutput:
    """Print tokens as they come."""
    output = None
    try:
        for event in llm.stream(prompt_ids(llm, item, []), params):
            text = show.paint(event.text, event.drafted) if colour else event.text
            sys.stdout.write(text)
            sys.stdout.flush()
            output = event.output
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    assert output is not None, "a stream ends with its output"
    return output


def _print_texts(
    llm: LLM, number: int, item: Item, turns: list[RequestOutput], colour: bool
) -> None:
    """An item's texts, each under a heading (on stderr, so that stdout holds texts only)."""
    for turn, output in enumerate(turns, 1):
        for k, sample in enumerate(output.samples, 1):
            parts = [f"prompt {item.id if item.id is not None else number}"]
            parts += [f"turn {turn}"] * (len(turns) > 1)
            parts += [f"sample {k}"] * (len(output.samples) > 1)
            note(f"-- {', '.join(parts)} --")
            text = sample.text
            if colour:
                told = show.pieces(llm, output.prompt_ids, sample)
                text = "".join(show.paint(t, drafted) for t, drafted in told)
            print(text, flush=True)


def _object(item: Item, turns: list[RequestOutput]) -> dict[str, Any]:
    """What --json prints for an item: its last turn, and all of them when there are several."""
    objects = [t.to_json() for t in turns]
    result = dict(objects[-1])
    if item.id is not None:
        result = {"id": item.id, **result}
    if len(objects) > 1:
        result["turns"] = objects
    return result
