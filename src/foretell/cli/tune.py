"""`foretell tune`: find the fastest exact setting for a model, a machine and a workload."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.common import check_writable, dumps, load_llm, status, write_atomically
from foretell.cli.groups import command
from foretell.cli.options import ModelOptions
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.engine.llm import LLM
    from foretell.lab.tune.run import Tuned

app = typer.Typer(add_completion=False)


@app.command()
@command
def tune(
    model: ModelOptions,
    workload: Annotated[
        str | None,
        typer.Option(help="spec_bench, gsm8k, ... or a JSON-lines file; else built-in prompts."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where workload files lie; else $FORETELL_DATA.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the config here.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Try these instead of the usual ones, as in `foretell bench`."),
    ] = None,
    draft_path: Annotated[
        str | None, typer.Option(help="A draft model; else the one beside the target.")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Try these, too (each changes what the model says).")
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts of the workload at most.")] = 24,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 64,
    budget: Annotated[float, typer.Option(help="Seconds, for each dtype.")] = 300.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Race drafters, trees, draft lengths and thread counts; write the winner as a config.

    Every setting decodes the same prompts greedily and must say what plain decoding says. Losers
    leave early. The answer may be: do not speculate. Every command takes it with --config.
    """
    if limit < 2 or max_tokens < 8 or budget <= 0:
        raise InputError("--limit is at least 2, --max-tokens at least 8, --budget above 0.")
    check_writable(out)
    found: list[Tuned] = []
    for dtype in (dtypes or model.dtype).split(","):
        one = replace(model, dtype=dtype.strip(), draft="none")
        found.append(
            _one(one, workload, data, methods, draft_path, limit, max_tokens, budget, quiet)
        )
    best = max(found, key=lambda t: t.report["tokens_per_s"])
    config = best.config()
    if len(found) > 1:
        config["tuned"]["dtypes"] = {
            t.dtype: {"tokens_per_s": t.report["tokens_per_s"], "draft": t.method.name}
            for t in found
        }
    text = dumps(config)
    if out is not None:
        write_atomically(out, text + "\n")
    print(text if json else "\n".join(_describe(best, out)), flush=True)
    return 0


def _one(
    model: ModelOptions,
    workload: str | None,
    data: Path | None,
    methods: list[str] | None,
    draft_path: str | None,
    limit: int,
    max_tokens: int,
    budget: float,
    quiet: bool,
) -> Tuned:
    llm = load_llm(model, quiet)
    from foretell.core.params import SamplingParams
    from foretell.lab.bench.methods import parse_methods
    from foretell.lab.tune import space
    from foretell.lab.tune.run import Tuner, thread_choices

    wanted = (
        parse_methods(methods)
        if methods
        else space.space(
            bool(draft_path or llm.context.default_draft), llm.model.spec.caps.tree, draft_path
        )
    )
    prompts = _prompts(llm, workload, data, limit, max_tokens)
    with status("tuning", quiet) as say:
        tuner = Tuner(
            llm,
            prompts,
            SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            wanted,
            model.dtype,
            budget,
            model.batch,
            say,
        )
        result = tuner.go([model.threads] if model.threads else thread_choices())
    plain = result.report["plain"]["tokens_per_s"] or 0.0
    result.report["tokens_per_s"] = round(plain * result.speedup, 2)
    return result


def _prompts(
    llm: LLM, workload: str | None, data: Path | None, limit: int, max_tokens: int
) -> list[list[int]]:
    from foretell.lab.tune.prompts import builtin_prompts, workload_prompts

    if workload is None:
        return builtin_prompts(llm, limit)
    if data is None and os.environ.get("FORETELL_DATA"):
        data = Path(os.environ["FORETELL_DATA"])
    return workload_prompts(llm, workload.split(","), data, limit, max_tokens)


def _describe(best: Tuned, out: Path | None) -> list[str]:
    report = best.report
    lines = [f"{'setting':44} {'speed-up':>9} {'range':>13} {'tokens/step':>11}  left because"]
    for row in report["tried"]:
        if "speedup" not in row:
            lines.append(f"{row['setting']:44} {'-':>9} {'':>13} {'':>11}  {row['rejected']}")
            continue
        spread = f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
        lines.append(
            f"{row['setting']:44} {row['speedup']:>9.2f} {spread:>13} "
            f"{row['acceptance_length'] or 0:>11.2f}  {row['rejected'] or ''}"
        )
    for row in report["threads"]:
        lines.append(
            f"{row['threads']} threads: {row['ms_1']:.2f} ms a forward of one row, "
            f"{row['ms_8']:.2f} of eight"
        )
    choice = best.method.name if report["speculate"] else "do not speculate"
    lines.append(f"{choice}: {report['why']} ({report['prompts']} prompts)")
    if out is not None:
        lines.append(f"Written to {out}: use it with --config {out}")
    return lines
