"""`foretell train`: recipes that make models and drafters on the user's own machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train models and drafters.", no_args_is_help=True)


@app.callback()
def train() -> None:
    """Train models and drafters."""


@app.command()
def base(
    out: Annotated[Path, typer.Option(help="Folder the finished pair is exported to.")] = Path(
        "foretell-base"
    ),
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints. [default: OUT/.run]")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="More text: .txt or .jsonl (question + answer, or text), .gz allowed. Repeatable. "
            "The Python standard library is there unless --no-stdlib.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", help="Share of a corpus ('python' is the stdlib)."),
    ] = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Licence of a corpus, for the model card."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="cpu (8M + 0.9M) or gpu (30M + 3M). [default: by hardware]")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Time for both networks. [default: 60]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens for both networks, instead of --minutes.")
    ] = None,
    draft_share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Part of the budget for the drafter.")
    ] = 0.28,
    vocab: Annotated[int, typer.Option(help="Pieces of the tokenizer.")] = 4096,
    target_shape: Annotated[
        str, typer.Option(help="Sizes over the preset's, as hidden=256,layers=10,heads=8,...")
    ] = "",
    draft_shape: Annotated[str, typer.Option(help="The same for the drafter.")] = "",
    batch: Annotated[str, typer.Option(help="As batch_tokens=4096,row=512,long_row=2048.")] = "",
    checkpoint_minutes: Annotated[
        float, typer.Option(help="How often to write a checkpoint and measure.")
    ] = 3.0,
    compile: Annotated[
        bool, typer.Option(help="Fuse the training step with torch.compile where it works.")
    ] = True,
    resume: Annotated[
        bool, typer.Option(help="Continue a run that --run-dir holds, or start over.")
    ] = True,
    stdlib: Annotated[
        bool, typer.Option(help="Train on the Python standard library's sources.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
) -> None:
    """Train a small model and its drafter from text; Ctrl-C stops, the same command resumes."""
    from foretell.core.errors import InputError

    if size not in (None, "cpu", "gpu"):
        raise InputError(f"--size is cpu or gpu, not '{size}'.")
    run_dir = run_dir or out / ".run"
    files = named_files(corpus or [])
    shares = {k: to_number(v, float, "--weight") for k, v in pairs(weight or [], "--weight")}
    licences = {"python": "PSF-2.0", **dict(pairs(licence or [], "--licence"))}
    target_sizes = sizes(target_shape, "--target-shape")
    draft_sizes = sizes(draft_shape, "--draft-shape")
    batch_sizes = sizes(batch, "--batch")

    from foretell.lab.train.base import train_base
    from foretell.lab.train.loop import Interrupted
    from foretell.lab.train.settings import BaseSettings, start_over

    settings = BaseSettings(
        out=out,
        run_dir=run_dir,
        corpora=files,
        weights=shares,
        licences=licences,
        size=size,
        minutes=60.0 if minutes is None and tokens is None else minutes,
        tokens=tokens,
        draft_share=draft_share,
        vocab=vocab,
        target_shape=target_sizes,
        draft_shape=draft_sizes,
        batch=batch_sizes,
        checkpoint_minutes=checkpoint_minutes,
        stdlib=stdlib,
        compile=compile,
        seed=seed,
        command=portable_command(sys.argv[1:]),
    )
    if not resume:
        start_over(run_dir)
    try:
        train_base(settings)
    except (Interrupted, KeyboardInterrupt):
        print(
            f"Stopped; the run is kept in {run_dir}: the same command continues it.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def pairs(entries: list[str], flag: str) -> list[tuple[str, str]]:
    """Split `name=value` entries."""
    from foretell.core.errors import InputError

    for entry in entries:
        if "=" not in entry:
            raise InputError(f"{flag} wants NAME=VALUE, not '{entry}'.")
    return [(name, value) for name, _, value in (e.partition("=") for e in entries)]


def to_number(text: str, kind: type, flag: str) -> float:
    from foretell.core.errors import InputError

    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{flag}: '{text}' is not a number.") from None


def sizes(text: str, flag: str) -> dict[str, int]:
    """`hidden=256,layers=10` as numbers."""
    entries = text.split(",") if text else []
    return {name: int(to_number(value, int, flag)) for name, value in pairs(entries, flag)}


def named_files(entries: list[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH`, whose name is the file's without its suffixes."""
    from foretell.core.errors import InputError

    files: dict[str, Path] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals:
            name, path = Path(entry).name.partition(".")[0], entry
        if name in files or name == "python":
            raise InputError(f"two corpora are called '{name}'; name one as NAME=PATH.")
        files[name] = Path(path)
    return files


def portable_command(arguments: list[str]) -> str:
    """The command with folders cut from every path: it goes into a public model card."""

    def without_folder(argument: str) -> str:
        name, equals, value = argument.rpartition("=")
        return name + equals + (Path(value).name if "/" in value else value)

    words = [without_folder(a) if "/" in a else a for a in arguments]
    return "foretell " + shlex.join(words)
