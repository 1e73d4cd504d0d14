"""How decoded tokens look on a terminal, and the line that sums a run up."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foretell.engine.llm import LLM
    from foretell.engine.outputs import RequestOutput, SampleOutput

DRAFTED, TARGET, END = "\x1b[32m", "\x1b[33m", "\x1b[0m"
LEGEND = "green: drafted and accepted; yellow: the target's own"


def colours() -> bool:
    """Asked for with --show, so also into a pipe; NO_COLOR is the way to refuse."""
    return not os.environ.get("NO_COLOR")


def paint(text: str, drafted: bool) -> str:
    """`text` in the colour of its origin; colours end before a line does."""
    if not text or not colours():
        return text
    colour = DRAFTED if drafted else TARGET
    return "\n".join(f"{colour}{part}{END}" if part else "" for part in text.split("\n"))


def pieces(llm: LLM, prompt_ids: Sequence[int], sample: SampleOutput) -> list[tuple[str, bool]]:
    """The text each token made certain, and whether the token was drafted."""
    if llm.tokenizer is None:
        return [(sample.text, False)]
    stream = llm.tokenizer.stream(prompt_ids)
    said = [stream.push(t) for t in sample.token_ids]
    said.append(stream.flush())
    left, result = len(sample.text), []  # a stop string may have cut the text
    for text, drafted in zip(said, [*sample.drafted, False], strict=False):
        result.append((text[:left], drafted))
        left -= len(result[-1][0])
    return result


def summary(outputs: Iterable[RequestOutput], wall: float) -> str:
    """Tokens, speed, acceptance and promise of a run, on one line."""
    outputs = list(outputs)
    stats = [s.stats for o in outputs for s in o.samples]
    tokens = sum(len(s.token_ids) for o in outputs for s in o.samples)
    steps, emitted = sum(s.steps for s in stats), sum(s.emitted for s in stats)
    alone = len(stats) == 1 and stats[0].tokens_per_s > 0
    speed = stats[0].tokens_per_s if alone else tokens / wall if wall > 0 else 0.0
    first = outputs[0]
    return (
        f"{tokens} token{'s' * (tokens != 1)} in {wall:.2f} s, {speed:.1f} tokens/s, "
        f"acceptance length {emitted / steps if steps else 0:.2f} "
        f"({first.promise}: {first.drafter}, {first.verifier})"
    )
