"""`foretell lab`: measurements for people who choose formats, rules and machines.

A subcommand is one file `cli/lab_NAME.py` with an `app` of one command, and one line in
SUBCOMMANDS. Its module is imported when it is asked for: `foretell lab --help` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from foretell.core.errors import InputError

SUBCOMMANDS = {
    "forward": ("foretell.cli.lab_forward", "what a forward of the target costs by rows"),
    "quality": ("foretell.cli.lab_quality", "what a weight format costs: bits per byte, agreement"),
    "verifiers": ("foretell.cli.lab_verifiers", "what each rule accepts, and the most it could"),
    "methods": ("foretell.cli.lab_methods", "the table of methods: all of them, measured"),
    "cache": ("foretell.cli.lab_cache", "list or clear the cache of packed weights"),
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they run, and whose help needs none of them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in SUBCOMMANDS:
            from foretell.core.registry import suggest

            raise InputError(
                f"There is no command 'lab {cmd_name}': {suggest(cmd_name, SUBCOMMANDS)}"
            )
        command = typer.main.get_command(import_module(SUBCOMMANDS[cmd_name][0]).app)
        command.name = cmd_name
        return command

    def get_help(self, ctx: Any) -> str:
        width = max(map(len, SUBCOMMANDS))
        rows = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in SUBCOMMANDS.items())
        return (
            "Usage: foretell lab COMMAND [OPTIONS]\n\n"
            f"Measurements for people who choose formats, rules and machines.\n\n{rows}\n\n"
            "foretell lab COMMAND --help shows a command's options."
        )

    def format_help(self, ctx: Any, formatter: Any) -> None:
        print(self.get_help(ctx))


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False)


@app.callback()
def lab() -> None:
    """Measurements for people who choose formats, rules and machines."""
