"""`foretell chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli import prompts, show
from foretell.cli.common import load_llm, note
from foretell.cli.config import Config
from foretell.cli.groups import command
from foretell.cli.options import ModelOptions, SamplingOptions
from foretell.core.errors import InputError
from foretell.core.registry import suggest

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.engine.llm import LLM

app = typer.Typer(add_completion=False)
COMMANDS = {
    "/exit": "leave (or Ctrl-D)",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message and forget the conversation",
    "/help": "this list; Ctrl-C stops an answer",
}


class Conversation:
    """Messages so far. The next turn's prompt begins with this turn's, so the engine's prefix
    reuse computes only what is new."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.messages: list[prompts.Message] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if not self.system else [{"role": "system", "content": self.system}]

    def answer(self, said: str, colour: bool, quiet: bool) -> None:
        """Stream the answer to `said`; Ctrl-C keeps what has been said so far. When the turn
        cannot be decoded (InputError) the conversation stays as it was."""
        asked = [*self.messages, {"role": "user", "content": said}]
        ids = self.llm.chat_ids(asked)
        text, output, begin, stopped = "", None, perf_counter(), False
        try:
            for event in self.llm.stream(ids, self.params):
                text += event.text
                output = event.output
                _write(show.paint(event.text, event.drafted) if colour else event.text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            if text or stopped or output is not None:
                _write("\n")
        self.messages = [*asked, {"role": "assistant", "content": text}]
        if stopped:
            note("(stopped)", quiet)
        elif output is not None:
            note(show.summary([output], perf_counter() - begin), quiet)


@app.command()
@command
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    show_origin: Annotated[
        bool, typer.Option("--show", help=f"Colour tokens by origin ({show.LEGEND}).")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No summary after an answer.")
    ] = False,
    config: Config = None,
) -> None:
    """Talk to a model. When standard input is no terminal, every line of it is one turn."""
    params = sampling.params()
    if params.n != 1:
        raise InputError("--n makes no sense in a conversation: leave it out.")
    llm = load_llm(model, quiet)
    talk = Conversation(llm, params, system)
    llm.chat_ids([*talk.messages, {"role": "user", "content": "."}])  # is there a template at all?
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (line editing and history for input())

        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", quiet)
    while True:
        try:
            line = _read(terminal)
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\n(Ctrl-D or /exit leaves)")
            continue
        if line is None or line == "/exit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                _obey(talk, line)
            else:
                talk.answer(line, show_origin, quiet)
        except InputError as error:
            if not terminal:
                raise
            note(f"error: {error}")


def _read(terminal: bool) -> str | None:
    """The next turn without the blanks around it; None at the end of input."""
    try:
        if terminal:
            return input("> ").strip()
        line = sys.stdin.buffer.readline()
    except EOFError:
        note("")
        return None
    if not line:
        return None
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise InputError("Standard input is not valid UTF-8: convert it first.") from None


def _obey(talk: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/help":
        for command_, text in COMMANDS.items():
            note(f"{command_:14}{text}")
    elif name == "/reset":
        talk.reset()
    elif name == "/system":
        talk.system = rest.strip() or None
        talk.reset()
    else:
        known = [c.split()[0] for c in COMMANDS]
        raise InputError(f"There is no command '{name}': {suggest(name, known)}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
