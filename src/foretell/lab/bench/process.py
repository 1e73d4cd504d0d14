"""The parent's side of a worker: start, ask, stop between questions, end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from foretell.core.errors import ForetellError

WORKERS = Path(__file__).parent / "workers"


class WorkerFailed(ForetellError):
    """The worker answered with an error, or answers no more (`dead`)."""

    def __init__(self, sentence: str, dead: bool = False, kind: str = "") -> None:
        super().__init__(sentence)
        self.dead, self.kind = dead, kind


class Worker:
    """A process with one system. Between questions it is stopped (SIGSTOP): threads of OpenMP or
    TBB that spin while they wait for work would slow down whoever is measured next, and telling
    them not to spin would slow down their own system.

    adapter: a file, or the name of one in `workers/`. Use as a context manager.
    """

    def __init__(
        self,
        name: str,
        adapter: str | Path,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        pause: bool = True,
        timeout: float = 3600.0,
    ) -> None:
        self.name, self.pause, self.timeout = name, pause, timeout
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        path = Path(adapter) if str(adapter).endswith(".py") else WORKERS / f"{adapter}.py"
        command = [python or sys.executable, "-P", str(WORKERS / "worker.py"), str(path.resolve())]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env={**os.environ, **(env or {})},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches the parent alone
            )
        except OSError as e:
            self.log.close()
            raise WorkerFailed(f"{command[0]} cannot be started ({e.strerror}).", True) from None
        self.buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer; WorkerFailed says what went wrong."""
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            raise self._dead()
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            reply = json.loads(self._line())
        except (BrokenPipeError, ValueError):
            raise self._dead() from None
        finally:
            if self.pause:
                self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise WorkerFailed(reply["error"], kind=reply.get("kind", ""))
        return reply["ok"]

    def _line(self) -> str:
        """The next line of the worker, or "" when it is gone."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        end = monotonic() + self.timeout
        while b"\n" not in self.buffer:
            if not select.select([fd], [], [], max(0.0, min(5.0, end - monotonic())))[0]:
                if monotonic() >= end:
                    self.close()
                    raise WorkerFailed(f"{self.name} gave no answer for {self.timeout:g} s.", True)
                continue
            part = os.read(fd, 1 << 16)
            if not part:
                return ""
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode("utf-8")

    def _dead(self) -> WorkerFailed:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        tail = self.tail()
        why = f": {tail}" if tail else f" (exit code {self.process.returncode})"
        return WorkerFailed(f"The process of {self.name} ended{why}.", True)

    def tail(self) -> str:
        """The last line it wrote to stderr."""
        with suppress(ValueError, OSError):
            self.log.seek(0)
            lines = [line.strip() for line in self.log.read()[-8000:].splitlines() if line.strip()]
            self.log.seek(0, os.SEEK_END)
            return lines[-1].rstrip(".") if lines else ""
        return ""

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()  # a stopped process dies of this, too
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
