"""`foretell lab verifiers`: what every verification rule accepts, beside the most it could."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.common import dumps, load_llm, progress
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.engine.llm import LLM
    from foretell.lab.verifiers.problems import Row, Settings

app = typer.Typer(add_completion=False)

CHAIN_VOCAB, CHAIN_PATHS = 3, (2, 3)  # the bound over several levels is a linear programme


@app.command()
def verifiers(
    vocab: Annotated[int, typer.Option(help="Tokens of the random distributions.")] = 50,
    k: Annotated[str, typer.Option(metavar="K,K,...", help="Children of the node.")] = "1,2,4",
    temperature: Annotated[
        str, typer.Option(metavar="T,T,...", help="Of target and drafter.")
    ] = "0.6,1,1.5",
    pairs: Annotated[int, typer.Option(help="Random pairs (p, q) a line is the mean of.")] = 20,
    scale: Annotated[float, typer.Option(help="Standard deviation of the logits.")] = 3.0,
    agreement: Annotated[float, typer.Option(help="Correlation of both models' logits.")] = 0.8,
    depth: Annotated[
        int, typer.Option(help="Levels of the comparison of rules for chains; 1 leaves it out.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the random logits.")] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure on real models instead, with these prompts."),
    ] = None,
    prompts_count: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --prompts; else the bundled one.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="DIR", help="The draft model; else the one beside it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --prompts: new tokens a prompt.")] = 32,
    nodes: Annotated[int, typer.Option(help="With --prompts: drafted tokens a step.")] = 6,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Print each rule's acceptance beside the optimal-transport bound for the way it drafts.

    Without --prompts for random distributions, computed; with them for a model and its drafter:
    tokens a step over all prompts, at equal numbers of drafted tokens and at equal depth.
    """
    for flag, value in (
        ("depth", depth),
        ("max-tokens", max_tokens),
        ("nodes", nodes),
        ("prompts-count", prompts_count),
    ):
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value} makes no sense: at least 1.")
    counts = [int(x) for x in _numbers("k", k, int)]
    temperatures = _numbers("temperature", temperature, float)
    if prompts is None and (model or draft):
        raise InputError("--model and --draft need --prompts FILE: without it p and q are random.")

    from foretell.lab.verifiers.problems import Settings

    settings = Settings(vocab, counts, temperatures, pairs, scale, agreement, seed)
    if prompts is not None:
        source = "draft-model" + (f":path={draft}" if draft else "")
        llm, ids = _load(prompts, prompts_count, model, source, device, quiet)
        return _on_models(settings, llm, ids, source, max_tokens, nodes, json, quiet)
    return _on_random(settings, depth, json, quiet)


def _on_random(settings: Settings, depth: int, json: bool, quiet: bool) -> int:
    from foretell.lab.verifiers.problems import depths, levels

    with progress("levels", len(settings.counts) * len(settings.temperatures), quiet) as done:
        rows = levels(settings, done)
    chains: list[dict[str, Any]] = []
    if depth > 1:
        total = settings.pairs * len(settings.temperatures)
        with progress("chains", total, quiet) as done:
            chains = depths(settings, depth, CHAIN_VOCAB, CHAIN_PATHS, done)
    if json:
        print(dumps({"levels": [r.to_json() for r in rows], "chains": chains}), flush=True)
        return 0
    print(f"acceptance of one node, mean of {settings.pairs} pairs, {settings.vocab} tokens")
    print(_table(rows))
    for found in chains:
        print(
            f"\naccepted tokens of {depth} levels, {CHAIN_VOCAB} tokens, "
            f"T={found['temperature']:g} (share of the bound for as many chains)"
        )
        for name in ("rejection", "block", *(f"multipath {n}" for n in CHAIN_PATHS)):
            most = found[f"bound {name.split()[-1] if ' ' in name else 1}"]
            print(f"  {name:14} {found[name]:.4f}  {found[name] / most:7.1%}")
    return 0


def _table(rows: list[Row]) -> str:
    head = (
        f"{'T':>5} {'k':>3}  {'rule':14} {'children':20} {'accepted':>8} {'bound':>7} {'share':>6}"
    )
    lines = [f"{head}  of the best"]
    lines += [
        f"{r.temperature:5g} {r.k:3}  {r.rule:14} {r.drawn:20} {r.accepted:8.4f} {r.bound:7.4f} "
        f"{r.share:6.1%} {r.share_of_best:12.1%}"
        for r in rows
    ]
    return "\n".join(lines)


def _load(
    path: Path, count: int | None, model: str | None, draft: str, device: str, quiet: bool
) -> tuple[LLM, list[list[int]]]:
    from foretell.cli import prompts
    from foretell.cli.generate import prompt_ids
    from foretell.cli.options import ModelOptions

    items = prompts.from_file(path)[:count]
    llm = load_llm(ModelOptions(model=model, draft=draft, device=device), quiet)
    return llm, [prompt_ids(llm, item, []) for item in items]


def _on_models(
    settings: Settings,
    llm: LLM,
    ids: list[list[int]],
    source: str,
    max_tokens: int,
    nodes: int,
    json: bool,
    quiet: bool,
) -> int:
    from foretell.core.params import SamplingParams
    from foretell.lab.verifiers.measure import line_up, measure
    from foretell.lab.verifiers.problems import compare

    results = []
    for temperature in settings.temperatures:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
        found = []
        for label, verify, drafted, most in line_up(source, nodes):
            with progress(f"T={temperature:g} {label}", len(ids), quiet) as done:
                keep = 0 if found else settings.pairs
                found.append((label, measure(llm, ids, params, verify, drafted, most, keep, done)))
        pairs = found[0][1].pairs
        rows = [r for k in settings.counts for r in compare(pairs, k, temperature)]
        results.append((temperature, found, rows))
    if json:
        report = [
            {
                "temperature": t,
                "runs": [{"label": label, **m.to_json()} for label, m in found],
                "levels": [r.to_json() for r in rows],
            }
            for t, found, rows in results
        ]
        print(dumps({"model": llm.model.spec.name, "prompts": len(ids), "results": report}))
        return 0
    for t, found, rows in results:
        print(f"\n{llm.model.spec.name}, {len(ids)} prompts, T={t:g}: tokens a step")
        for label, m in found:
            print(f"  {label:34} {m.per_step:.3f} +- {m.error:.3f}  first accepted {m.first:6.1%}")
        equal = found[0][1].on_equal_drafts
        print(
            f"accepted of the same {equal['drafts']} chains: rejection {equal['rejection']:.4f}, "
            f"block {equal['block']:.4f}, difference {equal['difference']:+.4f} "
            f"+- {equal['standard_error']:.4f}"
        )
        print(f"acceptance of one node, computed from {len(found[0][1].pairs)} of their rows")
        print(_table(rows))
    return 0


def _numbers(flag: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError:
        raise InputError(f"--{flag} '{text}' is not a list of numbers like 1,2,4.") from None
