"""`foretell lab methods`: every registered method measured, as the page docs/methods.md."""

from __future__ import annotations

import os
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from foretell.cli.common import check_writable, dumps, note, stage, write_atomically
from foretell.cli.options import check_dtype
from foretell.core.errors import InputError

app = typer.Typer(add_completion=False)


@app.command()
def methods(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Checkpoint or hub id; without it the bundled model."),
    ] = None,
    draft_path: Annotated[
        str | None, typer.Option(help="Draft model; else the one beside the model.", metavar="DIR")
    ] = None,
    workload: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="As in foretell bench.")
    ] = "spec_bench",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the workloads lie. [default: $FORETELL_DATA]"),
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts of each family.")] = 5,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 64,
    repeats: Annotated[int, typer.Option(help="Times every prompt is decoded.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="As everywhere.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Only these (perhaps as KIND/NAME), and none."),
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[KIND/]NAME:K=V,...", help="Options to measure a method with. Repeatable."
        ),
    ] = None,
    store_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Build a datastore of this text for `retrieval`."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page; else it is printed.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Write the table of methods: what each is and needs, its acceptance, speed and memory.

    Drafters, trees and policies greedily, rules at temperature 1, in turns on the same prompts.
    """
    given: dict[str, Any] = dict(locals())
    numbers = {"limit": limit, "repeats": repeats, "threads": threads, "max-tokens": max_tokens - 1}
    for flag, value in numbers.items():
        if value < 1:
            least = 2 if flag == "max-tokens" else 1  # one token has no decoding speed
            raise InputError(f"--{flag} is too small: at least {least}.")
    check_dtype(dtype)
    check_writable(out)
    if store_text is not None and not store_text.is_file():
        raise InputError(f"--store-text {store_text} is no file.")
    from foretell.lab.bench.workloads import load_workloads
    from foretell.lab.methods.catalogue import catalogue

    chosen = [n for n in (only or "").split(",") if n.strip()]
    catalogue(chosen, spec or ())  # unknown names are told before anything is built
    folder = data or (Path(os.environ["FORETELL_DATA"]) if "FORETELL_DATA" in os.environ else None)
    loads = load_workloads([workload], folder, limit)
    # as for every command that decodes; libgomp reads it when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    from foretell.lab.bench.systems import Hooks
    from foretell.lab.methods.page import markdown
    from foretell.lab.methods.run import Settings, measure

    settings = Settings(model, draft_path, dtype, device, threads, max_tokens, repeats)
    with ExitStack() as bars, ExitStack() as files:
        store = None
        if store_text is not None:
            store = Path(files.enter_context(tempfile.TemporaryDirectory())) / "store"
            _build(store_text, store, model, quiet)
        entries = catalogue(chosen, spec or (), store)
        hooks = Hooks(lambda text: note(text, quiet), lambda n, t: stage(bars, n, t, quiet))
        result = measure(entries, loads[0], settings, hooks)
    page = markdown(result, _command(given))
    if out is not None:
        write_atomically(out, page)
        note(f"wrote {out}", quiet)
    if json:
        print(dumps(result), flush=True)
    elif out is None:
        print(page, end="", flush=True)
    return 0


def _build(text: Path, out: Path, model: str | None, quiet: bool) -> None:
    from foretell.cli.datastore import build_datastore

    build_datastore([text], out, model, shard=8_000_000, as_json=False, quiet=quiet)


def _command(given: dict[str, Any]) -> str:
    """What makes this page again. Folders are left out: they are nobody else's."""
    words = ["foretell", "lab", "methods"]
    defaults = {"limit": 5, "max_tokens": 64, "repeats": 3, "threads": 1}
    plain = {"workload": "spec_bench", "dtype": "auto", "device": "auto", **defaults}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("data", "quiet", "json") or value is None or plain.get(name) == value:
            continue
        if name in defaults or name == "out":
            words += [flag, str(value) if name != "out" else _short(value)]
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [flag, _short(one)]
    for name, value in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        words += [] if flag in words else [flag, str(value)]
    return shlex.join(words)


def _short(value: Any) -> str:
    path = Path(str(value))
    return path.name if path.is_absolute() else str(value)
