"""`foretell widen`: a bigger checkpoint that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretell.cli.common import dumps, note
from foretell.cli.common import progress as bar

app = typer.Typer(add_completion=False)


@app.command()
def widen(
    out: Annotated[Path, typer.Option(help="New folder for the widened model.")],
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint directory or hub id; without it the bundled model."),
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="About how many parameters, e.g. 300M.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key/value heads.")] = None,
    ffn: Annotated[int | None, typer.Option(min=1, help="Width of the MLP.")] = None,
    draft_params: Annotated[
        str | None,
        typer.Option(metavar="N", help="Widen the draft beside the model, too; else it is copied."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto = as stored.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option(help="Compare with the original; exit code 1 when it differs.")
    ] = True,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the comparison.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens a prompt.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the numbers that change nothing.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Give a small model the cost of a large one without changing what it says.

    For measuring speed with a model that is at hand: width, heads, MLP and layers are added such
    that the output stays as it is, in any runtime. The result is labelled in its config.json.
    """
    from foretell.lab.widen.shape import Shape, parse_count

    count = None if params is None else parse_count(params)
    draft_count = None if draft_params is None else parse_count(draft_params)
    wish = Shape(hidden or 0, layers or 0, heads or 0, kv_heads or 0, ffn or 0)

    from foretell.lab.widen.run import Settings, plan
    from foretell.lab.widen.run import widen as run
    from foretell.models.load import find_checkpoint

    folder = find_checkpoint(model)
    settings = Settings(count, wish, draft_count, dtype, check, prompts, max_tokens, seed)
    _, words = plan(folder, settings)
    note(words, quiet)
    with bar("widening", 100, quiet) as advance:
        done = 0

        def progress(share: float, what: str) -> None:
            nonlocal done
            advance(round(100 * share) - done)
            done = round(100 * share)

        result = run(folder, out, settings, progress)
    c = result.comparison
    if json:
        from dataclasses import asdict

        record = asdict(result) | {"folder": str(out), "passed": result.passed}
        print(dumps(record), flush=True)
    elif c is not None:
        verdict = "the same tokens" if c.passed else f"{c.different} DIFFERENT"
        print(
            f"{c.tokens} greedy tokens of {c.prompts} prompts: {verdict}; largest logit difference "
            f"{c.logit_difference:.2g} (logits span {c.logit_range:.3g})"
        )
    if not result.passed:
        note("FAILED: the widened model says something else, so it was not kept.")
        return 1
    note(f"{out}: {words}; draft {result.draft}", quiet)
    return 0
