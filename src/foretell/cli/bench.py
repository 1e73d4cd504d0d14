"""`foretell bench`: methods and other systems side by side, and `bench compare` of two runs."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from foretell.cli.common import dumps, note, stage, threads_for
from foretell.cli.config import Config
from foretell.core.errors import InputError

app = typer.Typer(add_completion=False)
DEFAULT_MAX_TOKENS = 128


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id; else the bundled model.", metavar="M")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE,...",
            help="spec_bench, mt_bench, humaneval, gsm8k, math500, or JSON lines with prompt, "
            "turns, messages or question.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC;SPEC;...",
            help="draft[+verify=RULE][+policy=POLICY][+name=TEXT], e.g. "
            "'draft-model:tokens=4+policy=confidence'; or @FILE of JSON lines. Repeatable. Plain "
            "decoding is always measured.",
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="One more method, spelled as elsewhere.", metavar="SPEC")
    ] = None,
    verify: Annotated[str, typer.Option(help="Its rule.", metavar="NAME")] = "auto",
    policy: Annotated[str, typer.Option(help="Its length policy.", metavar="SPEC")] = "fixed",
    peers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:MODE+MODE],...",
            help="transformers, llamacpp, openvino (modes plain, lookup, draft), or an adapter "
            "file. Same weights, prompts, threads and dtype class.",
        ),
    ] = None,
    peer_python: Annotated[
        str | None, typer.Option(help="Interpreter that has the peers.", metavar="PATH")
    ] = None,
    peer_tokens: Annotated[
        str,
        typer.Option(
            help="Drafted tokens to try in peers; else their own default.", metavar="N,..."
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the workloads lie. [default: $FORETELL_DATA]"),
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Only this family of prompts. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts of each family.", metavar="N")] = None,
    fit: Annotated[
        str, typer.Option(help="Prompts longer than the context: skip, or cut their middle.")
    ] = "skip",
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Do not use the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = DEFAULT_MAX_TOKENS,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Decode all of them, whatever the text says.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Times every prompt is decoded.")] = 3,
    batch: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="As everywhere; peers get the same class.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, of the peers, too. [default: by model size]")
    ] = None,
    draft_path: Annotated[
        str | None, typer.Option(help="Draft model; else the one beside the model.", metavar="DIR")
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Allow methods that change the text.")
    ] = False,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Skip the separate memory measurement.")
    ] = False,
    no_curve: Annotated[
        bool, typer.Option("--no-curve", help="Skip timing forwards by number of rows.")
    ] = False,
    export_dir: Annotated[
        Path | None, typer.Option(help="Where peers' files are kept.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="[default: bench-DATE-TIME]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    config: Config = None,
) -> int | None:
    """Measure decoding methods and other systems on the same prompts, in turns.

    `foretell bench compare A B` tells whether two runs differ beyond noise.
    """
    if context.invoked_subcommand is not None:
        return None
    from foretell.core.params import SamplingParams
    from foretell.lab.bench.methods import Method, parse_methods, parse_peers
    from foretell.lab.bench.workloads import load_workloads

    numbers = {"limit": limit, "repeats": repeats, "batch": batch, "threads": threads}
    for flag, value in (numbers | {"max-tokens": max_tokens}).items():
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value} makes no sense: at least 1.")
    SamplingParams(temperature=temperature, seed=seed)
    if fit not in ("skip", "cut"):
        raise InputError(f"--fit {fit} is unknown: use skip or cut.")
    if max_tokens < 2:
        raise InputError("--max-tokens 1 has no decoding speed: at least 2.")
    if resume and out is None:
        raise InputError("--resume needs --out: the folder of the run to go on with.")
    if device.startswith("cuda") and any("llamacpp" in p or "openvino" in p for p in peers or []):
        raise InputError("The peers llamacpp and openvino run on the CPU only: add --device cpu.")
    wanted = parse_methods(methods or ([] if draft else ["auto"]))
    if draft:
        extra = Method.make(draft, verify, policy)
        wanted += [] if extra in wanted else [extra]
    modes = parse_peers(peers or [], _lengths(peer_tokens))
    names = [n for text in workload or [] for n in text.split(",")]
    if not names:
        raise InputError("Say what to measure on: --workload spec_bench, or a JSON-lines file.")
    folder = data or (Path(os.environ["FORETELL_DATA"]) if "FORETELL_DATA" in os.environ else None)
    loads = load_workloads(names, folder, limit, family or ())
    out = out or Path(time.strftime("bench-%Y%m%d-%H%M%S"))
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder.")

    from foretell.core.places import cache_folder
    from foretell.lab.bench import report
    from foretell.lab.bench.machine import usable_cores
    from foretell.lab.bench.run import Bench
    from foretell.lab.bench.systems import Hooks, Settings

    settings = Settings(
        methods=wanted,
        peers=modes,
        model=model,
        draft_path=draft_path,
        max_tokens=max_tokens,
        repeats=repeats,
        batch=batch,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        threads=threads or threads_for(model) or _omp_threads() or usable_cores(),
        ignore_eos=ignore_eos,
        allow_lossy=allow_lossy,
        chat=not no_chat,
        cut=fit == "cut",
        peer_python=peer_python,
        memory=not no_memory,
        curve=not no_curve,
    )
    with ExitStack() as bars:
        hooks = Hooks(lambda text: note(text, quiet), lambda n, t: stage(bars, n, t, quiet))
        run = Bench(settings, loads, out, resume, hooks, export_dir or cache_folder("bench"))
        try:
            summary, source = run.measure()
        except KeyboardInterrupt:
            bars.close()
            note(f"Interrupted: what was measured is kept in {out}; --resume goes on.")
            raise
    if json:
        print(dumps({"out": str(out), "summary": summary, "provenance": source}), flush=True)
    else:
        print(report.terminal(summary, source), flush=True)
    note(f"records, summary, plots and provenance are in {out}", quiet)
    return 0


def _omp_threads() -> int | None:
    """What OMP_NUM_THREADS asks for, as in every other command."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(text) if text.isdigit() and int(text) else None


def _lengths(text: str) -> list[int]:
    try:
        found = [int(n) for n in text.split(",") if n.strip()]
    except ValueError:
        raise InputError(f"--peer-tokens '{text}' is not a list of numbers like 3,5.") from None
    if any(n < 1 for n in found):
        raise InputError("--peer-tokens: at least 1.")
    return found


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run.")],
    b: Annotated[Path, typer.Argument(help="Folder of another.")],
    smallest: Annotated[
        float, typer.Option(help="Relative change below which nothing is said to differ.")
    ] = 0.02,
    relative: Annotated[
        bool,
        typer.Option("--relative", help="Compare speed-ups over each run's own plain decoding."),
    ] = False,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Compare whole calls, prefill included.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
) -> int:
    """Tell whether B differs from A beyond noise: exit code 0 if no method does, 1 if one does."""
    from foretell.lab.bench.compare import Run
    from foretell.lab.bench.compare import compare as compare_runs

    if not 0 <= smallest < 1:
        raise InputError(f"--smallest {smallest} makes no sense: it lies in [0, 1).")
    found = compare_runs(Run.read(a), Run.read(b), smallest, relative, end_to_end)
    if json:
        print(dumps(found.to_json()), flush=True)
        return int(found.differs)
    for text in found.notes:
        note(f"note: {text}")
    lines: list[Any] = [d.sentence() for d in found.differences]
    lines.append("DIFFERENT beyond noise" if found.differs else "No difference beyond noise")
    print("\n".join(lines), flush=True)
    return int(found.differs)
