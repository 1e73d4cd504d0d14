"""The training loop shared by every network: schedule, clipping, checkpoints, Ctrl-C, progress.

A run can be stopped at any step and continued as if nothing had happened: the checkpoint holds
weights, optimizer state and data position, and all randomness of the data is keyed by (seed,
epoch), so there is no generator state to lose.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from foretell.lab.train.data import Mixture
from foretell.lab.train.muon import Muon

Loss = Callable[[Tensor], Tensor]  # ids [B, T + 1] -> scalar
WARM_UP, CONSTANT_UNTIL, FINAL_LR = 0.02, 0.3, 0.02
LONG_ROWS_FROM = 0.85  # the last part trains on long rows, so that late positions are known


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the checkpoint is already on disk."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train one network. One of `seconds` and `tokens` is the budget."""

    seconds: float | None
    tokens: int | None
    batch_tokens: int
    row: int  # tokens a row
    long_row: int
    matrix_lr: float  # Muon, hidden matrices
    vector_lr: float  # AdamW, embeddings and norms
    checkpoint_seconds: float = 180.0


def learning_rate(progress: float) -> float:
    """Warm-up, constant, then linear decay; a factor of the peak rate, `progress` in 0..1."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.02)
    if progress < CONSTANT_UNTIL:
        return 1.0
    left = (1.0 - min(progress, 1.0)) / (1.0 - CONSTANT_UNTIL)
    return FINAL_LR + (1.0 - FINAL_LR) * left


def build_optimizers(network: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding (which is the head too) and norms."""
    hidden, rest = [], []
    for name, weight in network.named_parameters():
        (hidden if weight.dim() == 2 and "embed" not in name else rest).append(weight)
    return [
        Muon(hidden, lr=plan.matrix_lr),
        torch.optim.AdamW(rest, lr=plan.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def compiled_if_possible(loss: Loss, example: Tensor, say: Callable[[str], None]) -> Loss:
    """`torch.compile` fuses the elementwise passes (1.3x here) but needs a C++ compiler."""
    try:
        fused = torch.compile(loss, dynamic=False)
        fused(example)
        return fused
    except Exception as error:  # whatever the toolchain throws, eager mode still trains
        say(f"torch.compile is not available ({type(error).__name__}); training uncompiled.")
        return loss


def save_atomically(state: object, path: Path) -> None:
    """A reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def save_text_atomically(text: str, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, to be obeyed between two steps; a second one interrupts."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class Outcome:
    steps: int
    tokens: int
    seconds: float


def train_network(
    network: nn.Module,
    loss: Loss,
    mixture: Mixture,
    plan: Plan,
    checkpoint: Path,
    title: str,
    measure: Callable[[], str],
    compile_loss: bool,
) -> Outcome:
    """Train until the budget is spent; continue from `checkpoint` where there is one."""
    console = Console(stderr=True)
    device = next(network.parameters()).device
    optimizers = build_optimizers(network, plan)
    step, tokens, earlier_seconds = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        mixture.restore(state["mixture"])
        step, tokens, earlier_seconds = state["step"], state["tokens"], state["seconds"]
        console.print(f"{title}: continuing after {tokens:,} tokens")
        if state["done"]:
            return Outcome(step, tokens, earlier_seconds)
    if compile_loss:
        example = torch.zeros(plan.batch_tokens // plan.row, plan.row + 1, dtype=torch.long)
        loss = compiled_if_possible(loss, example.to(device), console.print)
    started = saved_at = time.monotonic()
    tokens_before = tokens

    def save(done: bool) -> None:
        state = {
            "network": network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "mixture": mixture.state(),
            "step": step,
            "tokens": tokens,
            "seconds": earlier_seconds + time.monotonic() - started,
            "done": done,
        }
        save_atomically(state, checkpoint)

    columns = [TextColumn(title), BarColumn(), TextColumn("{task.fields[numbers]}")]
    with (
        stop_requests() as stop,
        Progress(*columns, TimeRemainingColumn(), console=console) as bar,
    ):
        task = bar.add_task(title, total=1.0, numbers="")
        while True:
            seconds = earlier_seconds + time.monotonic() - started
            progress = seconds / plan.seconds if plan.seconds else tokens / (plan.tokens or 1)
            if progress >= 1.0:
                break
            row = plan.long_row if progress >= LONG_ROWS_FROM else plan.row
            batch = torch.from_numpy(mixture.batch(max(1, plan.batch_tokens // row), row))
            factor = learning_rate(progress)
            for optimizer, peak in zip(optimizers, (plan.matrix_lr, plan.vector_lr), strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss(batch.to(device))
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += batch[:, 1:].numel()
            now = time.monotonic()
            speed = (tokens - tokens_before) / (now - started)
            bits = value.item() / math.log(2)
            numbers = f"{tokens:,} tokens  {bits:.3f} bits/token  {speed:,.0f} tok/s"
            bar.update(task, completed=progress, numbers=numbers)
            if stop:
                save(done=False)
                raise Interrupted
            if now - saved_at > plan.checkpoint_seconds:
                save(done=False)
                bar.console.print(f"{title}: step {step}  {numbers}  {measure()}")
                saved_at = time.monotonic()
    save(done=True)
    console.print(f"{title}: step {step}, {tokens:,} tokens  {measure()}")
    return Outcome(step, tokens, earlier_seconds + time.monotonic() - started)
