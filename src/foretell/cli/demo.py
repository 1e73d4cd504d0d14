"""`foretell demo`: plain and speculative decoding of the same prompts, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli import show
from foretell.cli.common import dumps, load_llm, progress
from foretell.cli.config import Config
from foretell.cli.groups import command
from foretell.cli.options import ModelOptions
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.engine.llm import LLM
    from foretell.engine.outputs import RequestOutput

app = typer.Typer(add_completion=False)
QUESTION = "a school problem"  # asked through the chat template where there is one
PROMPTS = {
    "a Python class": (
        'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self):\n'
        "        self.items = []\n\n    def push(self, item):\n"
    ),
    QUESTION: (
        "A gardener plants 6 rows of 14 tulips. Rabbits eat 9 of them, and she sells the "
        "rest for $2 each. How many dollars does she earn?"
    ),
    "a novel": (
        "It was a dark and stormy evening in November, and the old gentleman, who had been sitting "
        "by the fire for more than an hour, rose from his chair and went to the window. "
    ),
}


@dataclass(slots=True)
class Pair:
    """One prompt decoded both ways, several times."""

    name: str
    prompt: str
    plain: list[RequestOutput] = field(default_factory=list)
    fast: list[RequestOutput] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.plain[0].token_ids)

    @property
    def same(self) -> int:
        """Tokens on which every run of both kinds agrees."""
        first, agree = self.plain[0].token_ids, len(self.plain[0].token_ids)
        for other in (*self.plain, *self.fast):
            matches = [a == b for a, b in zip(first, other.token_ids, strict=False)]
            agree = min(agree, matches.index(False) if False in matches else len(matches))
        return agree

    @property
    def identical(self) -> bool:
        return all(o.token_ids == self.plain[0].token_ids for o in (*self.plain, *self.fast))

    @property
    def speeds(self) -> tuple[float, float]:
        """Median tokens per second, plain and speculative."""
        plain = median(o.stats.tokens_per_s for o in self.plain)
        return plain, median(o.stats.tokens_per_s for o in self.fast)

    @property
    def speedup(self) -> float:
        plain, fast = self.speeds
        return fast / plain if plain else 0.0

    def to_json(self) -> dict[str, Any]:
        plain, fast = self.speeds
        return {
            "name": self.name,
            "prompt": self.prompt,
            "text": self.fast[0].text,
            "tokens": self.tokens,
            "identical": self.identical,
            "plain_tokens_per_s": plain,
            "tokens_per_s": fast,
            "speedup": self.speedup,
            "acceptance_length": self.fast[0].stats.acceptance_length,
        }


@app.command()
@command
def demo(
    model: ModelOptions,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 96,
    rounds: Annotated[int, typer.Option(help="Timed runs of each kind; medians count.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed at temperatures above 0.")] = 7,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    config: Config = None,
) -> int:
    """Decode the same prompts plainly and speculatively: same text, tokens per second of both.

    Exit code 1 if anything differs.
    """
    from foretell.core.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if rounds < 1:
        raise InputError(f"--rounds {rounds} makes no sense: at least 1.")
    llm = load_llm(model, quiet)
    with progress("decoding", 2 * len(PROMPTS) * (rounds + 1), quiet) as advance:
        pairs = run(llm, params, rounds, advance)
    promise = str(llm.rules.promise(params))
    identical = all(p.identical for p in pairs)
    if json:
        print(dumps(_summary(llm, pairs, promise)), flush=True)
    else:
        _print(llm, pairs, promise)
    return 0 if identical else 1


def run(
    llm: LLM, params: SamplingParams, rounds: int, advance: Callable[[int], None]
) -> list[Pair]:
    """Plain and speculative by turns, so that a busy machine slows both alike; the first round
    of each prompt warms up and is not kept."""
    plain = llm.with_methods(max_batch=1)
    pairs = [Pair(name, text) for name, text in PROMPTS.items()]
    for pair in pairs:
        prompt: str | list[int] = pair.prompt
        if pair.name == QUESTION and llm.tokenizer and llm.tokenizer.has_chat_template:
            prompt = llm.chat_ids([{"role": "user", "content": pair.prompt}])
        for warm in range(rounds + 1):
            for one, kept in ((plain, pair.plain), (llm, pair.fast)):
                one.engine.scheduler.clear_kept()
                output = one.generate([prompt], params)[0]
                if warm:
                    kept.append(output)
                advance(1)
    return pairs


def _summary(llm: LLM, pairs: list[Pair], promise: str) -> dict[str, Any]:
    plain, fast = (median(p.speeds[k] for p in pairs) for k in (0, 1))
    stats = [p.fast[0].stats for p in pairs]
    return {
        "model": llm.model.spec.name,
        "drafter": llm.drafter.name,
        "verifier": pairs[0].fast[0].verifier,
        "promise": promise,
        "identical": all(p.identical for p in pairs),
        "tokens": sum(p.tokens for p in pairs),
        "tokens_identical": sum(p.same for p in pairs),
        "plain_tokens_per_s": plain,
        "tokens_per_s": fast,
        "speedup": median(p.speedup for p in pairs),
        "acceptance_length": sum(s.emitted for s in stats) / max(1, sum(s.steps for s in stats)),
        "prompts": [p.to_json() for p in pairs],
    }


def _print(llm: LLM, pairs: list[Pair], promise: str) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    fancy = sys.stdout.isatty()
    for pair in pairs:
        plain, fast = pair.speeds
        length = pair.fast[0].stats.acceptance_length
        heads = (f"plain: {plain:.0f} tokens/s", f"{llm.drafter.name}: {fast:.0f} tokens/s")
        gain = f"speed-up x{pair.speedup:.2f}, acceptance length {length:.2f}"
        if not fancy:
            print(f"== {pair.name} ==\n{pair.prompt}")
            for head, output in zip(heads, (pair.plain[0], pair.fast[0]), strict=True):
                print(f"-- {head} --\n{output.text}")
            print(f"-- {gain} --")
            continue
        console.rule(pair.name)
        console.print(Text(pair.prompt, style="dim"))
        painted, fast_run = Text(), pair.fast[0]
        for text, drafted in show.pieces(llm, fast_run.prompt_ids, fast_run.samples[0]):
            painted.append(text, style="green" if drafted else "yellow")
        columns = Table.grid(expand=True, padding=(0, 1))
        columns.add_column(ratio=1)
        columns.add_column(ratio=1)
        columns.add_row(
            Panel(Text(pair.plain[0].text), title=heads[0]),
            Panel(painted, title=heads[1], subtitle=gain),
        )
        console.print(columns)
    total = _summary(llm, pairs, promise)
    if fancy:
        print(show.LEGEND)
    print(
        f"speed-up x{total['speedup']:.2f} (median of {len(pairs)} prompts), "
        f"acceptance length {total['acceptance_length']:.2f}, "
        f"{total['drafter']} with {total['verifier']} ({promise})"
    )
    if total["speedup"] < 1:
        print("Here plain decoding is the faster one: use --draft none.")
    word = "identical" if total["identical"] else "DIFFERENT"
    print(f"{word}: {total['tokens_identical']} of {total['tokens']} tokens")
