"""`foretell lab quality`: what a weight format costs on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.common import dumps, progress
from foretell.cli.options import DTYPES
from foretell.cli.train import named_files
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.lab.quality import Quality

app = typer.Typer(add_completion=False)


@app.command()
def quality(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Checkpoint or hub id; without it the bundled model."),
    ] = None,
    dtypes: Annotated[
        str, typer.Option(metavar="A,B,...", help="Formats to compare with float32.")
    ] = "float32,bfloat16,int8,int4",
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Score this file. Repeatable.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Score what `foretell train base` holds out of this corpus. Repeatable.",
        ),
    ] = None,
    stdlib: Annotated[
        bool | None,
        typer.Option(
            help="Score what is held out of the Python standard library. [default: without --text "
            "and --corpus]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens scored of each text.")] = 4096,
    width: Annotated[int, typer.Option(help="Tokens of context windows.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Print bits per byte of held-out text in each format, and how far it is from float32.

    Agreement is the share of tokens whose most likely id is float32's; KL is the mean of
    KL(float32 || format) in nats a token.
    """
    chosen = list(dict.fromkeys(d.strip() for d in dtypes.split(",") if d.strip()))
    for dtype in chosen:
        if dtype not in DTYPES or dtype == "auto":
            raise InputError(f"--dtypes: '{dtype}' is unknown: use {', '.join(DTYPES[1:])}.")
    for flag, value in (("tokens", tokens), ("width", width), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value} makes no sense: at least 1.")
    files = named_files(corpus or [])
    if not chosen:
        raise InputError("--dtypes names no format: try int8,int4.")
    import torch

    from foretell.lab.quality import held_out, measure, whole
    from foretell.models.load import find_checkpoint

    if threads is not None:
        torch.set_num_threads(threads)
    folder = find_checkpoint(model)
    texts = [whole(path) for path in text or []]
    texts += [held_out(name, path) for name, path in files.items()]
    if stdlib or (stdlib is None and not texts):
        texts.append(held_out("python", None))
    if not texts:
        raise InputError("There is nothing to score: give --text, --corpus or --stdlib.")
    if len({t.name for t in texts}) < len(texts):
        raise InputError("Two texts have the same name: name corpora as NAME=PATH.")
    with ExitStack() as bars:

        def stage(name: str, total: int) -> Callable[[int], None]:
            bars.close()
            return bars.enter_context(progress(name, total, quiet))

        found = measure(
            folder, texts, chosen, tokens=tokens, width=width, device=device, stage=stage
        )
    if json:
        print(dumps({"model": folder.name, "texts": {k: _rows(v) for k, v in found.items()}}))
    else:
        print("\n\n".join(_table(name, rows) for name, rows in found.items()))
    return 0


def _rows(found: list[Quality]) -> list[dict]:
    from dataclasses import asdict

    return [asdict(q) for q in found]


def _table(name: str, found: list[Quality]) -> str:
    lines = [
        f"{name:12} {'bits/byte':>10} {'agreement':>10} {'KL (nats)':>10} {'MB read':>9}  run by"
    ]
    lines += [
        f"{q.dtype:12} {q.bits_per_byte:10.4f} {100 * q.agreement:9.2f}% {q.kl:10.5f} "
        f"{q.weight_mb:9.1f}  {q.runner}"
        for q in found
    ]
    return "\n".join(lines)
