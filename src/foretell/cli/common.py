"""What several commands do: load a model, show progress, print JSON, write files."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.cli.main import leave_at_once, raise_interrupts
from foretell.cli.options import ModelOptions
from foretell.core.errors import InputError

if TYPE_CHECKING:
    from foretell.engine.llm import LLM

Advance = Callable[[int], None]


def load_llm(options: ModelOptions, quiet: bool = False, **more: Any) -> LLM:
    """Import torch and load the model that the options name. Ctrl-C leaves at once meanwhile."""
    import threading

    options.validate()
    # At a barrier OpenMP's threads spin for milliseconds, which costs a factor of ten and more when
    # another program wants the cores; sleeping at once costs a factor of four when none does.
    # libgomp reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:
        leave_at_once()
    try:
        with _spinner("loading", quiet):
            from foretell.engine.llm import LLM

            return LLM.load(
                options.model,
                draft=options.draft,
                verify=options.verify,
                policy=options.policy,
                allow_lossy=options.allow_lossy,
                dtype=options.dtype,
                device=options.device,
                threads=options.threads or threads_for(options.model),
                deterministic=options.deterministic,
                max_batch=more.pop("max_batch", options.batch),
                kv_rows=options.kv_rows,
                **more,
            )
    finally:
        if main_thread:
            raise_interrupts()


SMALL = 64 << 20  # bytes of weights up to which one thread is about as quick as several


def threads_for(model: str | None) -> int | None:
    """One thread for a model so small that threads mostly wait for each other; None = torch's
    default. Whoever sets OMP_NUM_THREADS knows better."""
    from pathlib import Path

    if "OMP_NUM_THREADS" in os.environ:
        return None
    if model is None:
        from foretell.models.load import bundled_model

        folder = bundled_model()
    else:
        folder = Path(model).expanduser()
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    return 1 if sizes and sum(sizes) <= SMALL else None


@contextmanager
def _spinner(text: str, quiet: bool) -> Iterator[None]:
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def status(text: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr if that is a terminal; yields what changes its text."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as spinner:
        yield lambda text: spinner.update(text)


@contextmanager
def progress(text: str, total: int, quiet: bool = False) -> Iterator[Advance]:
    """A bar on stderr if that is a terminal; yields what moves it on."""
    if quiet or not sys.stderr.isatty():
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda steps: bar.advance(task, steps)


def stage(bars: ExitStack, name: str, total: int, quiet: bool = False) -> Advance:
    """A bar on a terminal, in place of the one that `bars` holds; elsewhere a line on stderr every
    20 seconds. Returns what moves it on."""
    bars.close()
    if quiet or sys.stderr.isatty():
        return bars.enter_context(progress(name, total, quiet))
    begin = last = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= 20:
            left = (now - begin) / done * (total - done)
            note(f"{name}: {done} of {total}, about {left:.0f} s left")
            last = now

    return advance


def dumps(value: Any) -> str:
    """One line of ASCII JSON; numbers that JSON lacks become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def check_writable(path: Path | None) -> None:
    """Say so before decoding when `write_atomically` is going to fail."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"--out {path} is a directory: name a file.")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"--out {path}: there is no directory {folder}.")
    probe = _beside(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputError(f"--out {path} cannot be written ({e.strerror}).") from None


def write_atomically(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    part = _beside(path)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as e:
        raise InputError(f"--out {path} cannot be written ({e.strerror}).") from None
    finally:
        part.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def note(text: str, quiet: bool = False) -> None:
    """One line on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
