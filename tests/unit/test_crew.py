"""How many threads are called where others keep the processors busy (kernels/crew.h)."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from foretell import kernels
from foretell.kernels import build

MS = 1_000_000
EDGE = """
#include "crew.h"
ft::Crew crew;
extern "C" int size(int threads, int64_t now) { return crew.size(threads, now); }
extern "C" void observe(int64_t took, int64_t waited, int64_t now) {
  crew.observe(took, waited, now);
}
extern "C" int64_t spell() { return crew.spell; }
"""


class Crew:
    """Calls one after another; `now` is in ns."""

    def __init__(self, folder: Path) -> None:
        command = build.compiler()
        if command is None:
            pytest.skip("there is no compiler")
        source, library = folder / "edge.cpp", folder / "edge.so"
        source.write_text(EDGE, "utf-8")
        include = f"-I{Path(kernels.__file__).parent}"
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", include]
        subprocess.run([*command, *options, str(source), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.spell.restype = ctypes.c_int64
        self.now = 0

    def size(self, threads: int = 2) -> int:
        return self.library.size(threads, ctypes.c_int64(self.now))

    def call(self, worked: float, waited: float = 0.0, threads: int = 2) -> int:
        """A call of so many ms; the size of its team."""
        size = self.size(threads)
        took = int((worked + (waited if size > 1 else 0.0)) * MS)
        self.now += took
        if size > 1:
            args = (ctypes.c_int64(n) for n in (took, int(waited * MS), self.now))
            self.library.observe(*args)
        return size


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    return Crew(tmp_path)


def test_all_are_called_on_a_machine_that_is_ours(crew: Crew) -> None:
    assert {crew.call(1.0, 0.3, threads=8) for _ in range(2000)} == {8}


def test_one_hiccup_is_no_reason(crew: Crew) -> None:
    for _ in range(150):
        crew.call(1.0)
    crew.call(1.0, 20.0)
    assert crew.call(1.0) == 2


def test_next_to_no_waiting_is_no_reason_either(crew: Crew) -> None:
    assert crew.call(0.01, 0.5) == 2
    assert crew.call(0.01) == 2


def test_who_waits_longer_than_it_works_goes_on_with_half_and_then_alone(crew: Crew) -> None:
    sizes = [crew.call(1.0, 1.5, threads=8) for _ in range(10)]
    assert sizes[:2] == [8, 4]
    assert sizes[3:] == [1] * 7


def test_after_a_spell_more_are_tried_and_stay_if_it_goes_well(crew: Crew) -> None:
    crew.call(1.0, 50.0)
    start = crew.now
    while crew.call(1.0) == 1:
        pass
    assert 199 * MS <= crew.now - start <= 202 * MS
    assert {crew.call(1.0, 0.1) for _ in range(500)} == {2}


def test_spells_grow_while_the_machine_stays_busy_and_shrink_when_it_does_not(crew: Crew) -> None:
    lost, total = 0.0, 0.0
    for _ in range(20_000):
        size = crew.call(1.0, 5.0)
        lost, total = lost + 5.0 * (size > 1), total + 1.0
    assert crew.library.spell() == 10_000 * MS
    assert lost / total < 0.01, "trying costs next to nothing"
    crew.now += 10_000 * MS
    for _ in range(1000):
        crew.call(1.0)
    assert crew.library.spell() == 200 * MS


def test_what_was_long_ago_does_not_count(crew: Crew) -> None:
    for _ in range(5000):
        crew.call(1.0)
    sizes = [crew.call(1.0, 4.0) for _ in range(120)]
    assert sizes[-1] == 1, "five quiet seconds do not make up for it"


def test_one_thread_stays_one(crew: Crew) -> None:
    assert [crew.size(threads) for threads in (1, 2, 3)] == [1, 2, 3]
