"""Compile the kernels: one shared library per instruction set, once per machine.

    python -m foretell.kernels.build              # compile now, into the cache
    python -m foretell.kernels.build --out DIR    # for a package: no compiler needed later

A library is looked for in `prebuilt/` beside the sources (named after their hash: it is taken only
when it was made of exactly these sources), then in the cache folder (named after sources, compiler
and flags), and is compiled when it is in neither. Compiling writes to a temporary folder and
renames; a lock file lets a second process wait instead of compiling as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from foretell.core.machine import processor_flags
from foretell.core.places import cache_folder

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
CHOICES = ("auto", "off", "avx512", "avx2", "portable")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mprfchw")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
FLAGS = {"avx512": (*_AVX2, *_AVX512), "avx2": _AVX2, "portable": ()}
NEEDS = {  # names in /proc/cpuinfo
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
# No contraction: which products and sums fuse is written in the sources, not chosen by a compiler.
COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"),
)
LINK = ("-shared", "-pthread")
LIMIT = 300  # seconds for one file


def supported() -> tuple[str, ...]:
    """The instruction sets that this processor runs, best first."""
    have = processor_flags()
    return tuple(isa for isa, needs in NEEDS.items() if needs <= have)


def sources() -> list[Path]:
    return sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, g++, clang++ or c++, whichever is there first."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def source_hash(isa: str) -> str:
    """Of the sources, the flags and the kind of machine."""
    digest = hashlib.sha256(repr((isa, FLAGS[isa], COMMON, LINK, platform.machine())).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_or_build(isa: str, folder: str | Path) -> tuple[Path | None, str | None]:
    """(library, None) or (None, why there is none). Compiles when it has to; never raises."""
    try:
        return _find_or_build(isa, Path(folder))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"The CPU kernels could not be compiled ({error})."


def _find_or_build(isa: str, folder: Path) -> tuple[Path | None, str | None]:
    shipped = PREBUILT / f"{isa}-{source_hash(isa)}.so"
    if shipped.exists():
        return shipped, None
    if sys.platform == "win32":
        return None, "The CPU kernels need a POSIX system (threads and futexes)."
    command = compiler()
    if command is None:
        named = os.environ.get("CXX")
        missing = f"CXX names '{named}', which is not there" if named else "there is none"
        return None, f"The CPU kernels need a C++ compiler and {missing}: install g++ or clang++."
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    if version.returncode != 0:
        return None, f"The C++ compiler '{shlex.join(command)}' does not run."
    name = hashlib.sha256((source_hash(isa) + repr(command) + version.stdout).encode())
    home = folder / name.hexdigest()[:24]
    library = home / f"{isa}.so"
    if library.exists():
        return library, None
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / "lock"):
        if not library.exists():  # another process may have made it while we waited
            print("compiling CPU kernels once (about 20 s)", file=sys.stderr, flush=True)
            problem = compile_into(library, isa, command)
            if problem:
                return None, problem
    return library, None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time. A lock dies with its process, so none is ever left behind."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def compile_into(library: Path, isa: str, command: list[str]) -> str | None:
    """Compile and link to `library`, which appears whole or not at all. None, or what failed."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="making-") as scratch:
        units = [path for path in sources() if path.suffix == ".cpp"]
        objects = [Path(scratch, path.stem + ".o") for path in units]

        def one(pair: tuple[Path, Path]) -> str | None:
            flags = [*COMMON, *FLAGS[isa], "-c", str(pair[0]), "-o", str(pair[1])]
            return _run([*command, *flags])

        # The largest first: the last one to start decides when all are done.
        pairs = sorted(zip(units, objects, strict=True), key=lambda p: -p[0].stat().st_size)
        with ThreadPoolExecutor(min(len(pairs), os.cpu_count() or 1)) as pool:
            problems = [problem for problem in pool.map(one, pairs) if problem]
        made = Path(scratch, library.name)
        if not problems:
            link = [*command, *LINK, *map(str, objects), "-o", str(made)]
            problems = [problem for problem in [_run(link)] if problem]
        if problems:
            return f"The CPU kernels do not compile with '{shlex.join(command)}': {problems[0]}"
        made.replace(library)
    return None


def _run(command: list[str]) -> str | None:
    """None, or the first line of what the compiler had to say."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit code {done.returncode}"])[0].strip()


def main() -> int:
    """Compile for this machine's cache, or every instruction set into a folder."""
    import argparse

    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("--out", type=Path, help="folder; default: the cache, for this processor")
    parser.add_argument("--isa", help="comma-separated; default: all of this kind of machine")
    options = parser.parse_args()
    x86 = platform.machine() in ("x86_64", "AMD64")
    wanted = options.isa.split(",") if options.isa else (list(FLAGS) if x86 else ["portable"])
    if unknown := set(wanted) - set(FLAGS):
        parser.error(f"no instruction set {', '.join(sorted(unknown))}: {', '.join(FLAGS)}")
    if options.out is None:
        wanted = [isa for isa in wanted if isa in supported()][:1]
    failed = 0
    for isa in wanted:
        start = time.perf_counter()
        path: Path | None
        if options.out is None:
            path, problem = find_or_build(isa, cache_folder("kernels"))
        else:
            command = compiler()
            path = target = options.out / f"{isa}-{source_hash(isa)}.so"
            problem = compile_into(target, isa, command) if command else "there is no C++ compiler"
        failed += problem is not None
        print(problem or f"{path}  {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
