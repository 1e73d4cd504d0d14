"""`foretell lab forward`: what a forward of the target costs by number of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.common import dumps, progress, status
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.core.protocols import TargetModel

app = typer.Typer(add_completion=False)


@app.command()
def forward(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Directory or hub id; else the bundled one.")
    ] = None,
    random_shape: Annotated[
        str | None,
        typer.Option(
            metavar="K=V,...",
            help="A Llama of random weights instead: "
            "hidden=1024,layers=24,heads=16,kv=4,ffn=2816,vocab=32000.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8, int4 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    rows: Annotated[str, typer.Option(help="Row counts.", metavar="N,N,...")] = "1,2,4,8,16,32",
    context: Annotated[int, typer.Option(help="Committed rows behind which they run.")] = 128,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds over all row counts.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Print the median milliseconds of one forward, logits of all rows included.

    Beside it: the bytes that must be read, and the share of the machine's streaming bandwidth
    (measured in the same run) that this is.
    """
    counts = _counts(rows)
    for flag, value in (("context", context), ("repeats", repeats - 1)):
        if value < 0:
            raise InputError(f"--{flag} is too small.")
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} makes no sense: it is at least 1.")
    if model and random_shape:
        raise InputError("--model and --random-shape exclude each other.")
    import torch

    from foretell.lab.forward import bandwidth, measure

    if threads is not None:
        torch.set_num_threads(threads)
    target = _load(model, random_shape, dtype, device, quiet)
    stream = bandwidth() if target.device.type == "cpu" else None
    with progress("forwards", repeats, quiet) as done:
        report = measure(target, counts, context, repeats, done, stream)
    found = {
        "model": target.spec.name,
        "dtype": str(getattr(target, "format", None) or getattr(target, "dtype", "")).removeprefix(
            "torch."
        ),
        "backend": type(target).__name__,
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        **report.to_json(),
    }
    if json:
        print(dumps(found), flush=True)
        return 0
    print(f"{found['model']}, {found['dtype']}, {found['threads']} threads, context {context}")
    for n, row in found["rows"].items():
        share = row["bandwidth_share"]
        tail = "" if share is None else f"  {share:6.1%} of {found['bandwidth_gb_s']:.1f} GB/s"
        print(f"{n:>4} rows {row['median_ms']:9.3f} ms  {row['ratio']:6.3f} x{tail}")
    return 0


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(n) for n in text.split(",")})
    except ValueError:
        raise InputError(f"--rows '{text}' is not a list like 1,2,4,8.") from None
    if not counts or counts[0] < 1:
        raise InputError(f"--rows '{text}': row counts are at least 1.")
    return counts


def _load(
    model: str | None, shape: str | None, dtype: str, device: str, quiet: bool
) -> TargetModel:
    from foretell.lab.forward import parse_shape
    from foretell.models.load import load_model, random_model

    with status("loading", quiet) as say:

        def tell(fraction: float, what: str) -> None:
            say(f"{what} ({fraction:.0%})")

        if shape is not None:
            return random_model(parse_shape(shape), dtype=dtype, device=device, progress=tell)
        return load_model(model, dtype=dtype, device=device, progress=tell)
