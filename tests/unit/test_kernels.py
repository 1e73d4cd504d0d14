"""The compiled products: exact integers, one order of summation, and a build that fails cleanly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from foretell import kernels
from foretell.core.errors import InputError
from foretell.core.rng import Purpose, SeqRng
from foretell.core.rows import topk_rows
from foretell.kernels import build
from foretell.kernels.library import Library, Packed

ALL = ("float32", "bfloat16", "int8", "int4")
# (outputs, inputs, int4 group): panels that are not full, inputs that are odd
SHAPES = ((1, 32, 32), (33, 96, 32), (64, 256, 128), (100, 192, 64))
ODD = ((7, 1, 32), (33, 37, 32), (65, 131, 32), (40, 286, 32))


def rows_of(count: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, k, generator=generator)


def packed(lib: Library, format: str, n: int, k: int, group: int, bias: bool = False) -> Packed:
    w = rows_of(n, k, 1)
    return lib.pack(format, w, group=group, bias=rows_of(1, n, 2)[0] if bias else None)


def fits(format: str, k: int, group: int) -> bool:
    return format != "int4" or k % group == 0


CASES = [(f, *s) for f in ALL for s in SHAPES + ODD if fits(f, s[1], s[2])]


# -- the numbers


@pytest.mark.parametrize(("n", "k", "group"), SHAPES + ODD)
def test_int8_is_the_integer_product(libraries: list[Library], n: int, k: int, group: int) -> None:
    for lib in libraries:
        m = packed(lib, "int8", n, k, group)
        w, scale = lib.unpack(m)
        assert scale is not None
        for count in (1, 2, 3, 9, 40):
            x = rows_of(count, k, count)
            r = lib.quantise_rows(x)
            dots = r.q.numpy()[:, :k].astype(np.int64) @ w.numpy().astype(np.int64).T
            factor = r.scale.numpy()[:, None] * scale.numpy()[None]
            expected = dots.astype(np.float32) * factor
            assert np.array_equal(lib.product(m, x).numpy(), expected), lib.isa


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_int4_sums_integers_in_a_group_and_groups_in_order(
    libraries: list[Library], n: int, k: int, group: int
) -> None:
    for lib in libraries:
        m = packed(lib, "int4", n, k, group)
        w, scale = lib.unpack(m)
        assert scale is not None
        for count in (1, 5, 9, 17):
            x = rows_of(count, k, count)
            r = lib.quantise_rows(x)
            total = np.zeros((count, n), np.float32)
            for g in range(k // group):
                part = slice(g * group, g * group + group)
                dots = r.q.numpy()[:, part].astype(np.int64) @ w.numpy()[:, part].T.astype(np.int64)
                wide = dots.astype(np.longdouble) * scale.numpy()[:, g].astype(np.longdouble)
                total = (wide + total).astype(np.float32)  # one rounding: a fused multiply-add
            expected = total * r.scale.numpy()[:, None]
            assert np.array_equal(lib.product(m, x).numpy(), expected), lib.isa


def test_extreme_integers_do_not_saturate(libraries: list[Library]) -> None:
    """All weights at the ends of the range against all activations at theirs."""
    n, k = 64, 256
    for low, high, format in ((-128, 127, "int8"), (-8, 7, "int4")):
        for value in (low, high):
            w = torch.full((n, k), value, dtype=torch.int8)
            w[1::2] = low + high - value
            scale = torch.ones(n, k // 32) if format == "int4" else torch.ones(n)
            for sign in (1.0, -1.0):
                x = torch.full((3, k), 127.0 * sign)
                expected = (x.double() @ w.double().T).float()
                for lib in libraries:
                    m = lib.pack(format, w, scale)
                    assert torch.equal(lib.product(m, x), expected), (lib.isa, format, value)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES + ODD)
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_float_products(libraries: list[Library], format: str, n: int, k: int, group: int) -> None:
    w, x = rows_of(n, k, 1), rows_of(21, k)
    stored = w if format == "float32" else w.bfloat16().float()
    expected = x.double() @ stored.double().T
    bound = 1e-7 * k * (x.abs().double() @ stored.abs().double().T)
    for lib in libraries:
        error = (lib.product(lib.pack(format, w), x) - expected).abs()
        assert bool((error <= bound).all()), lib.isa


def test_instruction_sets_agree_on_integers(libraries: list[Library]) -> None:
    if len(libraries) < 2:
        pytest.skip("only one instruction set here")
    x = rows_of(13, 256)
    for format in ("int8", "int4"):
        m = packed(libraries[0], format, 100, 256, 64, bias=True)
        first = libraries[0].product(m, x)
        for lib in libraries[1:]:
            assert torch.equal(lib.pack(format, rows_of(100, 256, 1), group=64).data, m.data)
            assert torch.equal(lib.product(m, x), first), lib.isa


@pytest.mark.parametrize(("format", "n", "k", "group"), CASES)
def test_a_row_is_the_same_in_any_company(
    libraries: list[Library], format: str, n: int, k: int, group: int
) -> None:
    x = rows_of(140, k)
    for lib in libraries:
        m = packed(lib, format, n, k, group, bias=True)
        alone = torch.cat([lib.product(m, x[i : i + 1], threads=1) for i in range(40)])
        assert torch.equal(lib.product(m, x, threads=2)[:40], alone)
        for count in range(1, 41):
            assert torch.equal(lib.product(m, x[:count]), alone[:count]), (lib.isa, count)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        assert torch.equal(lib.product(m, x[order]), alone[order])


@pytest.mark.parametrize("format", ALL)
def test_panels_bias_and_adding(lib: Library, format: str) -> None:
    m = packed(lib, format, 100, 192, 64)
    bias = rows_of(1, 100, 9)[0]
    x = rows_of(11, 192)
    whole = lib.product(m, x)
    for begin in range(4):
        for end in range(begin + 1, 5):
            part = lib.product(m, x, panels=(begin, end))
            assert torch.equal(part, whole[:, begin * 32 : end * 32])
    biased = Packed(m.format, m.n, m.k, m.group, m.data, bias)
    assert torch.equal(lib.product(biased, x), whole + bias)
    room = torch.full((11, 130), 7.0)
    start = rows_of(11, 100, 5)
    room[:, :100] = start
    lib.product(m, x, add_to=room[:, :100], alpha=0.5)
    assert torch.equal(room[:, :100], start + 0.5 * whole)
    assert bool((room[:, 100:] == 7.0).all()), "wrote beyond the outputs that exist"


def test_quantised_rows(libraries: list[Library]) -> None:
    x = torch.cat([rows_of(6, 131) * 10.0**e for e in (-6, 0, 6)])
    x[2] = 0.0
    for lib in libraries:
        r = lib.quantise_rows(x)
        top = x.abs().amax(1)
        inverse = torch.where(top > 0, 127.0 / top, 0.0)
        assert torch.equal(r.scale, top / 127.0)
        assert torch.equal(r.q[:, :131].float(), (x * inverse[:, None]).round())
        assert bool((r.q[:, 131:] == 0).all())
        assert torch.equal(r.sums, r.q.view(18, -1, 32).sum(2, dtype=torch.int32))


def test_rows_that_are_not_finite_say_so(lib: Library) -> None:
    x = rows_of(3, 64)
    x[0, 5], x[1, 63] = float("nan"), float("inf")
    for format in ALL:
        y = lib.product(packed(lib, format, 33, 64, 32), x)
        assert not bool(torch.isfinite(y[:2]).any()), format
        assert bool(torch.isfinite(y[2]).all())


# -- packing


@pytest.mark.parametrize(("format", "n", "k", "group"), CASES)
def test_packing_there_and_back(lib: Library, format: str, n: int, k: int, group: int) -> None:
    w = rows_of(n, k, 1)
    back, scale = lib.unpack(lib.pack(format, w, group=group))
    if scale is None:
        assert torch.equal(back, w if format == "float32" else w.bfloat16().float())
        return
    again = lib.pack(format, back, scale, group=group)
    assert torch.equal(again.data, lib.pack(format, w, group=group).data)
    if format == "int8":
        assert torch.equal(scale, w.abs().amax(1) / 127)
        assert torch.equal(back.float(), (w / scale[:, None]).round().clamp(-127, 127))
        return
    x = w.view(n, -1, group)
    error = (back.view(n, -1, group) * scale[..., None] - x).square().sum(-1)
    plain = x.abs().amax(-1, keepdim=True) / 7
    assert torch.equal(scale, scale.half().float())
    assert float(error.sum()) < float(((x / plain).round() * plain - x).square().sum())


def test_sources_rows_and_panels(lib: Library) -> None:
    w = rows_of(100, 64, 4)
    for dtype in (torch.bfloat16, torch.float16):
        stored = w.to(dtype)
        for format in ALL:
            same = lib.pack(format, stored.float()).data
            assert torch.equal(lib.pack(format, stored).data, same)
    index = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:70]
    for format in ALL:
        whole = lib.pack(format, w[index].contiguous())
        assert torch.equal(lib.pack(format, w, index=index).data, whole.data)
        out = torch.zeros_like(whole.data)
        assert out.data_ptr() % 64 == 0
        for begin in range(3):
            part = w[index][begin * 32 : begin * 32 + 32].contiguous()
            lib.pack_panels(format, 70, part, None, begin, begin + 1, out, first=begin * 32)
        assert torch.equal(out, whole.data)


def test_bad_packing_is_refused(lib: Library) -> None:
    w = rows_of(8, 48)
    q = torch.full((8, 64), 9, dtype=torch.int8)
    good = torch.ones(8, 2)
    with pytest.raises(InputError, match="group"):
        lib.pack("int4", w)
    with pytest.raises(InputError, match="range"):
        lib.pack("int4", q, good)
    with pytest.raises(InputError, match="float16"):
        lib.pack("int4", q - 5, good * 0.1)
    with pytest.raises(InputError, match="scales"):
        lib.pack("int8", q)
    with pytest.raises(InputError, match="scales for"):
        lib.pack("int8", q, torch.ones(7))
    with pytest.raises(InputError, match="not finite"):
        lib.pack("int8", w * float("inf"))
    with pytest.raises(InputError, match="not handed over"):
        lib.pack("int8", w, index=torch.tensor([8]))
    with pytest.raises(InputError, match="float32 rows"):
        lib.product(lib.pack("int8", w), w.double())


# -- the team of threads


def test_callers_share_one_team(lib: Library) -> None:
    """Several Python threads at once, with teams of different sizes, get what one alone gets."""
    m = packed(lib, "int8", 512, 256, 32)
    x = rows_of(8, 256)
    expected = lib.product(m, x, threads=1)
    wrong: list[int] = []

    def call(threads: int) -> None:
        for _ in range(100):
            if not torch.equal(lib.product(m, x, threads=threads), expected):
                wrong.append(threads)

    callers = [threading.Thread(target=call, args=(t,)) for t in (1, 2, 2, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers), "a caller waits for ever"
    assert not wrong


def test_the_number_of_threads_can_change(lib: Library) -> None:
    try:
        for count in (1, 2, 3, 1):
            lib.set_threads(count)
            assert lib.threads == count
            m = packed(lib, "bfloat16", 512, 64, 32)
            assert lib.product(m, rows_of(2, 64)).shape == (2, 512)
    finally:
        lib.set_threads(0)
    assert 1 <= lib.threads <= lib.cdll.ft_max_threads()


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BEGIN = """
import os, torch
from foretell import kernels
torch.set_num_threads(1)
lib = kernels.load()
m = lib.pack("int8", torch.randn(512, 64))
x = torch.randn(3, 64)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_a_team_of_its_own(lib: Library) -> None:
    code = """
expected = lib.product(m, x, threads=2)
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(lib.product(m, x, threads=2), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(lib.product(m, x, threads=2), expected)
"""
    run(BEGIN + code)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_no_more_threads_than_allowed_processors(lib: Library) -> None:
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before = len(os.listdir("/proc/self/task"))
lib.product(m, x, threads=8)
assert len(os.listdir("/proc/self/task")) == before
assert lib.cdll.ft_max_threads() == 1
"""
    run(
        BEGIN.replace("m = lib", "os.sched_setaffinity(0, os.sched_getaffinity(0))\nm = lib") + code
    )


def test_bandwidth(lib: Library) -> None:
    assert 1e8 < lib.stream_bandwidth(1 << 22, 2) < 1e13


# -- building


# -- sampling


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 1000, 32000])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 1.7])
def test_a_race_is_won_by_the_token_that_plain_sampling_says(
    libraries: list[Library], vocab: int, temperature: float
) -> None:
    """On every instruction set; where it says -1, which is seldom, it said nothing."""
    tries = unsure = 0
    for spread in (0.0, 0.3, 1.0, 3.0, 9.0):
        logits = rows_of(1, vocab, vocab)[0] * spread - 3
        logits[vocab // 2 :: 7] = float("-inf") if spread == 3.0 and vocab > 5 else 0.0
        p = (logits / temperature).softmax(-1)
        for seed in range(40 if vocab < 32000 else 8):
            want = SeqRng(seed).pick(p, 9, Purpose.TARGET)
            for lib in libraries:
                got = lib.race(logits, temperature, SeqRng(seed).key(9, Purpose.TARGET))
                assert got in (want, -1), (lib.isa, spread, seed)
                tries, unsure = tries + 1, unsure + (got < 0)
    assert unsure <= max(2, tries // 100)


def test_a_race_is_not_run_where_rounding_could_decide(lib: Library) -> None:
    """Logits made so that the best two score the same but for the last bits of float32."""
    key = SeqRng(3).key(0, Purpose.TARGET)
    noise = SeqRng(3).race([0], Purpose.TARGET, 200)[0].double()
    apart = torch.full((200,), -5.0, dtype=torch.float64)
    apart[[20, 120]] = 0.0
    logits = (noise.log() + apart).float()
    assert lib.race(logits, 1.0, key) == -1
    logits[120] += 0.001
    assert lib.race(logits, 1.0, key) == 120
    logits[20] += 0.002
    assert lib.race(logits, 1.0, key) == 20
    assert lib.race(logits * 1000, 1000.0, key) == 20
    assert lib.race(logits * 1e6, 1e6, key) == 20
    assert lib.race(logits + 1e5, 1.0, key) == -1  # these are rounded by more than that


def test_a_race_needs_numbers(lib: Library) -> None:
    for wrong in (float("nan"), -float("nan"), float("inf")):
        logits = torch.zeros(100)
        logits[70] = wrong
        assert lib.race(logits, 1.0, 5) == -1
    assert lib.race(torch.full((100,), -float("inf")), 1.0, 5) == -1
    assert lib.race(torch.zeros(100, dtype=torch.float64), 1.0, 5) == -1
    assert lib.race(torch.zeros(200)[::2], 1.0, 5) == -1
    for temperature in (0.0, -1.0, float("nan")):
        assert lib.race(torch.zeros(100), temperature, 5) == -1


# -- ranking


def ranked(x: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest by a stable sort; a NaN is smaller than anything."""
    low = torch.where(x.isnan(), torch.full_like(x, float("-inf")), x)
    by_value = low.sort(dim=-1, descending=True, stable=True).indices
    is_nan = x.gather(-1, by_value).isnan().int()
    order = by_value.gather(-1, is_nan.sort(dim=-1, stable=True).indices)[:, :k]
    return x.gather(-1, order).numpy(), order.numpy()


def hard_rows(vocab: int) -> torch.Tensor:
    """Random, rising, falling, constant, of few values, with infinities, and with NaN."""
    x = rows_of(9, vocab, vocab)
    x[1], x[2], x[3] = torch.arange(vocab), -torch.arange(vocab), 0.5
    x[4:6] = (x[4:6] * 3).round()  # zeros of both signs among them
    x[5, vocab // 2 :] = float("inf")
    x[6, vocab // 3 :] = float("-inf")
    x[7, ::2], x[8] = float("nan"), float("nan")
    x[7, 1::4] = float("-inf")
    return x


@pytest.mark.parametrize("vocab", [1, 7, 16, 255, 256, 257, 1000, 4099, 32000, 65536 + 300])
def test_topk_is_what_a_sort_finds(libraries: list[Library], vocab: int) -> None:
    """On every instruction set: ties to the lower column, rows of all shapes."""
    x = hard_rows(vocab)
    for k in (1, 2, 8, 16, 33, 128):
        k = min(k, vocab)
        values, columns = ranked(x, k)
        for lib in libraries:
            found = lib.topk(x, k)
            assert found is not None
            assert (found[1] == columns).all(), (lib.isa, k)
            assert (found[0].view("i4") == values.view("i4")).all(), (lib.isa, k)
            by_numpy = topk_rows(x, k)
            assert (by_numpy[1] == columns).all()


def test_topk_of_rows_of_a_larger_tensor(libraries: list[Library]) -> None:
    whole = hard_rows(700)
    part = whole[1:8, 13:613]
    want = ranked(part, 8)
    for lib in libraries:
        for at in ([3], [6, 0, 2, 2], [], [*range(7)]):
            got = lib.topk(part, 8, np.array(at, np.int64))
            assert got is not None
            assert (got[1] == want[1][at]).all()
            assert (got[0].view("i4") == want[0][at].view("i4")).all()
            quick = topk_rows(part, 8, np.array(at, np.int64), lib.topk)
            assert (quick[1] == want[1][at]).all()


def test_topk_leaves_to_others_what_it_cannot(lib: Library) -> None:
    x = rows_of(4, 300)
    assert lib.topk(x, 129) is None
    assert lib.topk(x, 301) is None
    assert lib.topk(x, 0) is None
    assert lib.topk(x.double(), 3) is None
    assert lib.topk(x.t(), 3) is None
    for wrong in (4, -1):
        assert lib.topk(x, 3, np.array([0, wrong])) is None
    assert (topk_rows(x, 200, None, lib.topk)[1] == ranked(x, 200)[1]).all()
    assert (topk_rows(x.t(), 3, None, lib.topk)[1] == ranked(x.t().contiguous(), 3)[1]).all()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FORETELL_KERNELS", "auto")
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    return tmp_path


def fake_compiler(folder: Path, body: str) -> str:
    """A compiler that says it is one; `body` is what it does with -c and with -shared."""
    path = folder / "fake-c++"
    path.write_text(
        f'#!/bin/sh\nfor last; do :; done\ncase "$*" in --version) echo fake 1;;\n{body}'
    )
    path.chmod(0o755)
    return str(path)


def test_off_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_KERNELS", "off")
    assert kernels.load() is None
    assert "off" in (kernels.why_not() or "")
    monkeypatch.setenv("FORETELL_KERNELS", "fast")
    with pytest.raises(InputError, match="avx512"):
        kernels.load()


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    assert kernels.load() is None
    assert "no-such-compiler-anywhere" in (kernels.why_not() or "")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.setenv("FORETELL_CACHE", str(empty_cache / "other"))
    assert kernels.load() is None
    assert "install g++" in (kernels.why_not() or "")


@pytest.mark.parametrize("when", ["-c", "-shared"])
def test_a_broken_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    body = (
        f'*{when}*) echo "x.cpp:1: error: out of patience" >&2; exit 1;;\n*) touch "$last";; esac\n'
    )
    monkeypatch.setenv("CXX", fake_compiler(empty_cache, body))
    assert kernels.load() is None
    assert "out of patience" in (kernels.why_not() or "")
    left = [p for p in (empty_cache / "cache").rglob("*") if p.is_file() and p.name != "lock"]
    assert not left, "a failed build leaves something behind"


def test_a_compiler_that_makes_rubbish(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = '*) echo rubbish > "$last";; esac\n'
    monkeypatch.setenv("CXX", fake_compiler(empty_cache, body))
    assert kernels.load() is None
    assert "not load" in (kernels.why_not() or "")


def test_a_cache_that_cannot_be_written(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("FORETELL_CACHE", str(empty_cache / "file"))
    monkeypatch.setenv("CXX", fake_compiler(empty_cache, '*) touch "$last";; esac\n'))
    assert kernels.load() is None
    assert "could not be compiled" in (kernels.why_not() or "")


def test_two_processes_compile_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = empty_cache / "log"
    body = f'*-shared*) echo x >> {log}; sleep 0.5; touch "$last";;\n*) touch "$last";; esac\n'
    monkeypatch.setenv("CXX", fake_compiler(empty_cache, body))
    code = "from foretell.kernels import build; import sys; "
    code += f"print(build.find_or_build('portable', {str(empty_cache / 'both')!r})[0])"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=100)[0] for process in both}
    assert len(paths) == 1
    assert Path(paths.pop().strip()).exists()
    assert log.read_text() == "x\n"


def test_a_prebuilt_library_is_taken_if_it_fits(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    build.PREBUILT.mkdir()
    stale = build.PREBUILT / "portable-0123456789abcdef.so"
    stale.touch()
    assert build.find_or_build("portable", empty_cache)[0] is None
    fresh = build.PREBUILT / f"portable-{build.source_hash('portable')}.so"
    fresh.touch()
    assert build.find_or_build("portable", empty_cache) == (fresh, None)


def test_the_library_serves_without_a_compiler(
    lib: Library, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `python -m foretell.kernels.build --out` makes is found and loads."""
    build.PREBUILT.mkdir()
    (build.PREBUILT / f"{lib.isa}-{build.source_hash(lib.isa)}.so").symlink_to(lib.path)
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    monkeypatch.setenv("FORETELL_KERNELS", lib.isa)
    found = kernels.load()
    assert found is not None
    assert found.path.parent == build.PREBUILT
