"""The `foretell` program: finds the command, runs it, and turns whatever happens into an exit code.

Only the standard library is imported here, and a command's module only when it is asked for, so
that `foretell --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

from foretell import __version__
from foretell.core.errors import ForetellError, InputError

COMMANDS = {
    "generate": "continue a prompt, a file of prompts, or standard input",
    "chat": "talk to a model, with streamed answers",
    "serve": "an OpenAI-compatible server, with a page to try it",
    "methods": "list every drafter, verification rule and length policy",
    "check": "prove on your model that speculation changes nothing",
    "demo": "plain and speculative decoding side by side",
    "tune": "find the fastest setting for a model, a machine and a workload",
    "bench": "methods and other systems side by side, on real prompts",
    "train": "train models and drafters (`foretell train base`)",
    "widen": "give a small model the cost of a large one, same output",
    "export": "write a model for llama.cpp (GGUF) or OpenVINO",
    "build-datastore": "turn text into a datastore that the retrieval drafter reads",
    "lab": "measure weight formats, rules and machines (`foretell lab quality`)",
}
MODULES = {"build-datastore": "datastore"}  # commands whose module is called otherwise
OK, FAILED, USAGE, INTERNAL, INTERRUPTED, PIPE = 0, 1, 2, 3, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code. argv: the words after the program's name."""
    before = signal.getsignal(signal.SIGINT)
    leave_at_once()
    try:
        return _guarded(sys.argv[1:] if argv is None else argv)
    finally:
        if argv is None:
            leave_at_once()  # nothing is left to tidy up, so shutting down is not interrupted
        else:
            signal.signal(signal.SIGINT, before)


def leave_at_once() -> None:
    """Until further notice Ctrl-C ends the process on the spot, with one line. For phases in which
    an exception could surface anywhere (importing torch, reading weights) and nothing is written.
    """
    signal.signal(signal.SIGINT, _leave)


def raise_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, Python's default."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar may have hidden it
    os.write(2, cursor + b"Interrupted.\n")
    os._exit(INTERRUPTED)


def _guarded(argv: list[str]) -> int:
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _say("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        _forget_output()
        return PIPE
    except ForetellError as error:
        _traceback()
        return _say(f"error: {error}", USAGE)
    except OSError as error:
        _traceback()
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"error: {where}{error.strerror or error}.", USAGE)
    except Exception as error:
        _traceback()
        if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
            return _say("error: Out of memory: use a smaller model, --batch or --kv-rows.", USAGE)
        return _say(
            f"error: foretell failed unexpectedly ({type(error).__name__}: {error}); "
            "FORETELL_DEBUG=1 shows where. Please report it.",
            INTERNAL,
        )


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return OK if argv else USAGE
    if argv[0] == "--version":
        print(f"foretell {__version__}")
        return OK
    name, *rest = argv
    if name.startswith("-"):
        raise InputError(f"There is no option '{name}' before a command: see foretell --help.")
    if name not in COMMANDS:
        from foretell.core.registry import suggest

        raise InputError(f"There is no command '{name}': {suggest(name, COMMANDS)}")
    import typer

    module = import_module(f"foretell.cli.{MODULES.get(name, name)}")
    command: Any = typer.main.get_command(module.app)
    raise_interrupts()
    try:
        with command.make_context(f"foretell {name}", rest) as context:
            result = command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of typer's usage errors
            raise
        return _usage(name, error)
    return result if isinstance(result, int) else OK


def _usage(name: str, error: Any) -> int:
    if type(error).__name__.startswith("NoArgsIsHelp"):
        print(error.format_message())
        return USAGE
    sentence = error.format_message().strip()
    end = "" if sentence.endswith((".", "?")) else "."
    path = getattr(getattr(error, "ctx", None), "command_path", f"foretell {name}")
    return _say(f"error: {sentence}{end} See {path} --help.", USAGE)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "foretell: language models answer faster and say exactly the same.\n\n"
        "Usage: foretell COMMAND [OPTIONS]\n\n"
        f"Commands:\n{rows}\n\n"
        "Options:\n"
        "  --help     this page; foretell COMMAND --help shows a command's options\n"
        "  --version  the version\n\n"
        "Without --model the small model that ships with foretell is used: try foretell demo."
    )


def _say(sentence: str, code: int) -> int:
    """One line on stderr, whatever the message holds."""
    print(" ".join(sentence.split()), file=sys.stderr)
    return code


def _traceback() -> None:
    if os.environ.get("FORETELL_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()


def _forget_output() -> None:
    """Nobody reads stdout any more: keep the interpreter from complaining when it flushes it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
