"""A process that holds one system and decodes when it is told to.

    python -P worker.py ADAPTER.py

One JSON object a line comes in, one goes out: {"do": name, ...arguments} is answered by {"ok": ...}
or {"error": sentence}. An adapter is a file with a class `System`; its public methods are what can
be asked for (see `peer_transformers.py` for the shortest real one):

    load(config)                     -> facts: {"version": ..., "dtype": ...}; raises when it cannot
    modes(wanted)                    -> {mode: None, or the sentence why it cannot do it}
    run(mode, prompts, max_tokens)   -> what `Steps.result` makes
    fresh()                          optional: forget what was learned from earlier prompts

This file needs the standard library only, so that it runs under any interpreter: a peer may live in
an environment of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

PACKAGE = Path(__file__).resolve().parents[3]  # .../foretell


def provide_package() -> None:
    """Make `import foretell` find the package this file belongs to, and nothing else of its
    surroundings: putting its parent on the path could bring another environment's torch along."""
    if "foretell" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "foretell", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["foretell"] = module
    spec.loader.exec_module(module)


def load_adapter(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("bench_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_adapter"] = module
    spec.loader.exec_module(module)
    return module.System()


def die_with_parent() -> None:
    """A worker that is stopped would outlive a parent that was killed; Linux can end it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it died before we could ask
        os._exit(1)


def reset_peak() -> bool:
    """Begin a new high-water mark of the resident memory, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory() -> dict[str, int]:
    """Bytes: the high-water mark, and what is resident now, anonymous and mapped from files."""
    names = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "mapped"}
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in names:
                found[names[key]] = int(value.split()[0]) * 1024
    return found


def answer(system: Any, request: dict[str, Any]) -> Any:
    do = request.pop("do")
    if do == "memory":
        return memory()
    if do == "reset_peak":
        return reset_peak()
    method = None if do.startswith("_") else getattr(system, do, None)
    if method is None:
        return None  # an optional part that this adapter does without
    return method(**request)


def serve(system: Any, requests: TextIO, replies: TextIO) -> None:
    for line in requests:
        try:
            reply: dict[str, Any] = {"ok": answer(system, json.loads(line))}
        except Exception as error:
            traceback.print_exc()  # to stderr, which the parent keeps
            sentence = " ".join(str(error).split()) or "no message"
            reply = {"error": sentence, "kind": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print what they like; it must not land among the replies
    provide_package()
    serve(load_adapter(sys.argv[1]), sys.stdin, replies)


if __name__ == "__main__":
    main()
