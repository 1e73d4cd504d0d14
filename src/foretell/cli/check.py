"""`foretell check`: proof, on the user's own model, that speculation changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli import prompts
from foretell.cli.common import dumps, load_llm, progress
from foretell.cli.config import Config
from foretell.cli.generate import prompt_ids
from foretell.cli.groups import command
from foretell.cli.options import ModelOptions
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.engine.llm import LLM
    from foretell.lab.check.distribution import DistributionResult
    from foretell.lab.check.equality import Comparison
    from foretell.lab.check.run import Report

app = typer.Typer(add_completion=False)


@app.command()
@command
def check(
    model: ModelOptions,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="As --prompt-file; else a built-in list."),
    ] = None,
    prompts_count: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 64,
    seeds: Annotated[int, typer.Option(help="Seeds of the sampled comparison.")] = 2,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled tests.")] = 1.0,
    runs: Annotated[int, typer.Option(help="Draws of the sampled-distribution test.")] = 2000,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    config: Config = None,
) -> int:
    """Prove on your model that speculation changes nothing; exit code 1 if it does.

    Three tests: greedy output equals plain decoding's; sampled output equals it for every seed (if
    the rule promises that); and sampled tokens follow the target's distribution.
    """
    from foretell.core.params import SamplingParams

    for flag, value in (
        ("max-tokens", max_tokens),
        ("seeds", seeds),
        ("prompts-count", prompts_count),
    ):
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value} makes no sense: at least 1.")
    if runs < 100:
        raise InputError(f"--runs {runs} says nothing about a distribution: at least 100.")
    if SamplingParams(temperature=temperature).greedy:
        raise InputError("--temperature 0 is what the greedy test does: give a positive number.")
    model.validate()
    items = prompts.from_file(prompts_file) if prompts_file else None
    llm = load_llm(model, quiet)
    ids = _prompt_ids(llm, items, prompts_count)

    from foretell.lab.check.run import Settings, run_check

    settings = Settings(max_tokens, seeds, temperature, runs, batch=model.batch)
    with ExitStack() as bars:

        def stage(name: str, total: int) -> Callable[[int], None]:
            bars.close()
            return bars.enter_context(progress(name, total, quiet))

        report = run_check(llm, ids, settings, stage)
    if json:
        print(dumps({"model": llm.model.spec.name, **report.to_json()}), flush=True)
    else:
        print("\n".join(describe(report, settings.temperature, llm)), flush=True)
    return 0 if report.passed else 1


def _prompt_ids(llm: LLM, items: list[prompts.Item] | None, count: int | None) -> list[list[int]]:
    if items is None:
        from foretell.lab.check.prompts import PROMPTS

        items = [prompts.one_prompt(text) for text in PROMPTS]
    return [prompt_ids(llm, item, []) for item in items[:count]]


def describe(report: Report, temperature: float, llm: LLM) -> list[str]:
    """The report as lines of text."""

    def name(token: int) -> str:
        return repr(llm.tokenizer.token(token)) if llm.tokenizer else str(token)

    lines = [f"{report.drafter} with {report.verifier}: promises {report.promise} output"]
    lines += _equality("greedy", report.greedy, name)
    if report.replay is not None:
        lines += _equality(f"same seed, temperature {temperature:g}", report.replay, name)
    if report.distribution is not None:
        lines += _distribution(report.distribution)
    lines += [f"{part}: not tested, {reason}" for part, reason in report.skipped.items()]
    ties = report.greedy.near_ties + (report.replay.near_ties if report.replay else 0)
    if not report.passed:
        return [*lines, "FAILED: the output changes"]
    but = f" but {ties} near-tie{'s' * (ties > 1)}, which rounding explains" if ties else ""
    return [*lines, f"PASSED: nothing changed{but}"]


def _equality(title: str, c: Comparison, name: Callable[[int], str]) -> list[str]:
    text = f"{c.identical} of {c.compared} identical ({c.tokens} tokens)"
    if c.divergences:
        margin = max((d.margin for d in c.divergences if d.near_tie), default=0.0)
        ties = f"{c.near_ties} near-ties" + (f" (margin up to {margin:.2g})" if margin else "")
        text += f", {ties}, {c.violations} violations"
    return [f"{title}: {text}", *(f"  {d.sentence(name)}" for d in c.divergences)]


def _distribution(result: DistributionResult) -> list[str]:
    fit = result.fit
    verdict = "follows the target" if fit.passed else "DOES NOT follow the target"
    lines = [
        f"distribution of two tokens (top {result.top_k}): {verdict}; {fit.runs} runs, "
        f"chi-square {fit.statistic:.1f} over {fit.cells} cells, p = {fit.p_value:.3g}",
        f"  distance (total variation) {fit.tv:.4f}, of which chance alone makes about "
        f"{fit.tv_noise:.4f}; a true distance of {fit.tv_detectable:.3f} would be found with "
        f"probability {fit.power:g} at alpha {fit.alpha:g}; more --runs find less",
        f"  {result.drafted} tokens drafted, {result.accepted} accepted in these runs"
        + ("" if result.drafted else ": speculation was not exercised"),
    ]
    if fit.impossible:
        lines.append(f"  {fit.impossible} draws were tokens the target excludes")
    return lines
