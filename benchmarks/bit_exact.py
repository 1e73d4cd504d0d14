"""Random cases of `tests/helpers_bitexact.py`: how many rows differ from plain decoding in any bit.

python benchmarks/bit_exact.py --cases 10000
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers_bitexact import KINDS, differences, random_model


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--cases", type=int, default=10000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--per-model", type=int, default=25, help="cases of each random model")
    o = p.parse_args()
    found = dict.fromkeys(KINDS, 0)
    cases = dict.fromkeys(KINDS, 0)
    start, done = time.perf_counter(), 0
    while done < o.cases:
        r = random.Random(f"{o.seed} {done}")
        kind = KINDS[done // o.per_model % len(KINDS)]
        model = random_model(r, kind)
        for _ in range(min(o.per_model, o.cases - done)):
            wrong = differences(model, r, lambda r=r: r.choice([1, 2]))
            found[kind] += wrong
            cases[kind] += 1
            done += 1
            if wrong:
                print(f"case {done}: {wrong} rows differ ({kind}): {model.arch}", file=sys.stderr)
        if sys.stderr.isatty():
            print(f"\r{done}/{o.cases}", end="", file=sys.stderr)
    for kind in KINDS:
        print(f"{str(kind).removeprefix('torch.'):>9}: {cases[kind]} cases, {found[kind]} differ")
    total = sum(found.values())
    print(f"{done} cases, {total} rows that differ, {time.perf_counter() - start:.0f} s")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
