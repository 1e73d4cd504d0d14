"""`foretell export`: the same weights as a file or folder that another runtime reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from foretell.cli.common import dumps, note
from foretell.cli.common import progress as bar
from foretell.core.errors import InputError

app = typer.Typer(add_completion=False)
_DEFAULTS = {"gguf": "f16", "openvino": "int8"}


@app.command()
def export(
    to: Annotated[str, typer.Option(help="gguf (llama.cpp) or openvino (OpenVINO GenAI).")],
    out: Annotated[Path, typer.Option(help="The .gguf file, or a new folder for OpenVINO.")],
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint directory or hub id; without it the bundled model."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="gguf: f32, f16, bf16, q8_0, q4_0, q4_K_S, q4_K_M, q5_K_M, q6_K, q3_K_M [f16]; "
            "openvino: f32, f16, int8, int8_asym, int4, int4_128, int4_asym [int8]."
        ),
    ] = None,
    draft: Annotated[
        bool, typer.Option(help="Write the draft beside the model, too: OUT-draft.gguf, OUT/draft.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Write a model for another runtime, with the same weights and token ids."""
    if to not in _DEFAULTS:
        raise InputError(f"--to {to} is unknown: choose gguf or openvino.")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {out.parent}.")
    if to == "gguf" and out.is_dir():
        raise InputError(f"--out {out} is a directory: name a file such as {out / 'model.gguf'}.")
    dtype = dtype or _DEFAULTS[to]

    from foretell.lab.export.gguf import export_gguf
    from foretell.lab.export.openvino import export_openvino
    from foretell.models.load import find_checkpoint

    write: Callable[..., Path] = {"gguf": export_gguf, "openvino": export_openvino}[to]
    folder = find_checkpoint(model)
    jobs = {"model": (folder, out)}
    if draft and (folder / "draft" / "config.json").is_file():
        beside = out / "draft" if to == "openvino" else out.with_name(f"{out.stem}-draft.gguf")
        jobs["draft"] = (folder / "draft", beside)
    with bar("exporting", 100 * len(jobs), quiet) as advance:
        for source, target in jobs.values():
            done = 0

            def progress(share: float, what: str) -> None:
                nonlocal done
                advance(round(100 * share) - done)
                done = round(100 * share)

            write(source, target, dtype, progress)
    written = {name: str(target) for name, (_, target) in jobs.items()}
    if json:
        print(dumps({"to": to, "dtype": dtype, **written}), flush=True)
    else:
        note("\n".join(f"{path} ({dtype})" for path in written.values()), quiet)
    return 0
