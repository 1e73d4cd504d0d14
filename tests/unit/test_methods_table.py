"""The generated table of methods: catalogue, weighing, turns, page, and the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from foretell.cli.main import main
from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.registry import BUILTIN
from foretell.lab.bench.methods import PLAIN, Method
from foretell.lab.bench.prompts import Unit
from foretell.lab.bench.systems import Hooks
from foretell.lab.methods import run
from foretell.lab.methods.catalogue import Entry, catalogue, describe
from foretell.lab.methods.page import markdown, table
from foretell.lab.methods.weigh import Weighed, held


class TestCatalogue:
    def test_every_registered_method_is_in_it_with_what_a_list_needs(self) -> None:
        entries = catalogue()
        assert Counter(e.kind for e in entries) >= Counter(
            {kind: len(names) for kind, names in BUILTIN.items()}
        )
        for e in entries:
            assert e.facts["summary"]
            assert e.facts["kind"]
            assert "cannot be" not in e.facts["summary"]
            assert e.facts["promise"] in ("exact", "lossless", "lossy")
            assert isinstance(e.facts["paper"], str)

    def test_a_name_alone_means_all_kinds_and_plain_decoding_is_always_there(self) -> None:
        assert [e.key for e in catalogue(["specinfer"])] == [
            PLAIN,
            "verifier/specinfer",
            "tree/specinfer",
        ]
        assert [e.key for e in catalogue(["tree/specinfer"])] == [PLAIN, "tree/specinfer"]

    @pytest.mark.parametrize("name", ["sufix", "verifier/suffix", ""])
    def test_unknown_names_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match="There is no method"):
            catalogue([name])

    def test_options_reach_the_part_they_are_for(self) -> None:
        specs = [
            "tree/dyspec:nodes=5",
            "policy/fixed:tokens=2",
            "suffix:tokens=3",
            "typical:epsilon=1",
        ]
        found = {e.key: e.method for e in catalogue(specs=specs)}
        assert found["tree/dyspec"] == Method("dyspec:nodes=5", "draft-model:tree=dyspec,nodes=5")
        assert found["policy/fixed"] == Method(
            "fixed:tokens=2", "draft-model:tokens=8", policy="fixed:tokens=2"
        )
        assert found["drafter/suffix"] == Method("suffix:tokens=3", "suffix:tokens=3")
        assert found["verifier/typical"] == Method(
            "typical:epsilon=1", "draft-model", verify="typical:epsilon=1"
        )

    def test_a_spec_for_several_kinds_is_refused(self) -> None:
        with pytest.raises(InputError, match="verifier/specinfer or tree/specinfer"):
            catalogue(specs=["specinfer:widths=2"])

    def test_a_store_is_for_those_that_read_one(self, tmp_path: Path) -> None:
        found = {e.key: e for e in catalogue(store=tmp_path)}
        assert found["drafter/retrieval"].method.draft == f"retrieval:path={tmp_path}"  # type: ignore[union-attr]
        assert str(tmp_path) not in str([e.method for k, e in found.items() if "retr" not in k])

    def test_a_broken_plug_in_is_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        point = SimpleNamespace(name="gone", value="no.such.module:Class")
        monkeypatch.setattr(
            registry.metadata, "entry_points", lambda group: [point] if "draf" in group else []
        )
        row = describe("drafter", "gone")
        assert row["promise"] == "none"
        assert "cannot be loaded" in row["summary"]


def test_an_option_without_a_default_is_asked_for() -> None:
    with pytest.raises(InputError, match="'merge' needs of="):
        registry.create("drafter", "merge:nodes=4", None)


class TestWeigh:
    def test_memory_is_counted_once_however_often_it_is_seen(self) -> None:
        base, array = torch.zeros(1000), np.zeros(500)
        state = {"a": base, "b": base[3:], "c": [array, array[::2]], "again": None}
        state["again"] = state  # type: ignore[assignment]
        assert 8000 <= held(state) < 8000 + 1500

    def test_slots_and_attributes_are_followed(self) -> None:
        class Slotted:
            __slots__ = ("inside",)

        outer, inner = SimpleNamespace(), Slotted()
        inner.inside, outer.it = np.zeros(4000, np.int8), inner
        assert held(outer) > 4000

    def test_mapped_files_are_not_memory(self, tmp_path: Path) -> None:
        mapped = np.memmap(tmp_path / "x", np.int8, "w+", shape=100_000)
        assert held([mapped, mapped[5:]]) < 1000

    def test_what_belongs_to_the_drafter_is_not_the_sequences(self) -> None:
        table_, ended = torch.zeros(10_000), []
        text = list(range(1000, 3000))
        view: Any = SimpleNamespace(tokens=text, cache=[torch.zeros(5000)])
        drafter = SimpleNamespace(table=table_, begin=lambda v: v, end=ended.append, name="d")
        weighed = Weighed(drafter)
        assert weighed.begin(view) is view
        weighed.end([table_, torch.zeros(100), text, view.cache])
        assert 400 <= weighed.bytes < 1500
        assert len(ended) == 1
        assert weighed.name == "d"


SPEED = {PLAIN: 100.0, "drafter/fast": 250.0, "drafter/bad": 1.0}


class Fake:
    """A system whose methods have known speeds; `bad` breaks in the middle, `shy` never starts."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {"temperature": 0.0, "seed": 0}
        self.calls, self.settled, self.seeds, self.repeats = [], [], [], 0
        self.ready = {k: SimpleNamespace(drafter=None) for k in SPEED}

    def modes(self, wanted: list[str]) -> dict[str, str | None]:
        return {w: "It needs a store." if "shy" in w else None for w in wanted}

    def fresh(self) -> None:
        self.repeats += 1

    def run(self, mode: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        if mode == "drafter/bad" and self.repeats:
            raise RuntimeError("boom")
        if self.repeats:
            (self.calls if max_tokens == 11 else self.settled).append(mode)
            self.seeds.append(self.config["seed"])
        ids = list(range(5, 5 + max_tokens))
        seconds = 1 + (max_tokens - 1) / SPEED[mode] * (1 + len(prompts[0]))
        each = 1 if mode == PLAIN else 2
        steps = max_tokens // each
        return {
            "ids": [ids],
            "seconds": seconds,
            "first_s": 1.0,
            "first_tokens": 1,
            "steps": steps,
            "per_position": [steps] * (each - 1),
            "drafted": steps,
        }


def test_turns_figures_and_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "lookup", lambda kind, name: object)
    names = [PLAIN, "fast", "bad", "shy"]
    entries = [Entry({"kind": "drafter", "name": n}, Method(n, n)) for n in names]
    groups = [Unit(str(i), f"family{i % 2}", [[7] * (i + 1)]) for i in range(4)]
    system: Any = Fake()
    settings = run.Settings(max_tokens=11, repeats=2)
    found = run._Pass(system, entries, groups, settings, {"eos": [0]}, Hooks()).measure("x")
    assert set(found) == {PLAIN, "drafter/fast"}
    assert found["drafter/fast"]["overall"]["decode_speedup"]["ratio"] == pytest.approx(2.5)
    assert found["drafter/fast"]["family1"]["acceptance_length"] == pytest.approx(2.0)
    assert found["drafter/fast"]["overall"]["equal"]["same"] == 8
    assert "RuntimeError: boom" in entries[2].reason
    assert "failed on 0" in entries[2].reason
    assert entries[3].reason == "It needs a store."
    assert not entries[1].reason
    assert system.repeats == 2
    assert Counter(system.calls) == {PLAIN: 8, "drafter/fast": 8}
    pairs = [tuple(system.calls[i : i + 2]) for i in range(0, 16, 2)]
    assert system.settled.count("drafter/fast") == 8, "a short call wakes a method up"
    assert set(system.seeds) == {0}
    assert set(pairs) == {(PLAIN, "drafter/fast"), ("drafter/fast", PLAIN)}, "turns rotate"


def test_a_sampled_pass_has_a_seed_for_each_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "lookup", lambda kind, name: object)
    system: Any = Fake()
    system.config["temperature"] = 1.0
    entries = [Entry({"kind": "drafter", "name": "fast"}, Method("fast", "fast"))]
    groups = [Unit("0", "f", [[7]])]
    settings = run.Settings(max_tokens=11, repeats=3)
    found = run._Pass(system, entries, groups, settings, {"eos": [0]}, Hooks()).measure("x")
    assert system.seeds == [0, 0, 1, 1, 2, 2]
    assert found["drafter/fast"]["overall"]["equal"] is None


def figures(length: float, ratio: float) -> dict[str, Any]:
    return {
        "acceptance_length": length,
        "decode_speedup": {"ratio": ratio, "interval": (ratio - 0.1, ratio + 0.1)},
        "equal": {"same": 3, "compared": 4},
    }


def row(kind: str, name: str, **more: Any) -> dict[str, Any]:
    base = {
        "name": name,
        "kind": kind,
        "promise": "exact",
        "paper": "A Paper",
        "summary": "a | b",
        "needs": "",
        "measured_as": {"name": f"{name}:k=1"},
        "reason": None,
        "shared_bytes": None,
        "sequence_bytes": None,
        "by_family": None,
    }
    return base | more


def test_the_page() -> None:
    both = {"overall": figures(2.345, 1.5), "qa": figures(3.0, 2.0)}
    result = {
        "provenance": {
            "started": "2026-01-02 03:04 +0000",
            "commit": "abc",
            "versions": {"foretell": "0.1", "torch": "2.11", "python": "3.12"},
            "machine": {"cpu": "Chip", "usable_cores": 2, "memory_bytes": 2**30, "device": "cpu"},
            "others": {"other": 0.25, "steal": 0.0},
            "settings": {"threads": 1, "dtype": "float32", "max_tokens": 64, "repeats": 3},
            "model": {"name": "base", "sha256": "f" * 64, "widened_from": None},
            "workload": {"name": "spec_bench"},
            "prompts": 30,
            "cut": 2,
            "chat_template": True,
        },
        "families": ["qa", "rag"],
        "methods": [
            row("drafter", "copy", by_family=both, shared_bytes=3 << 20, sequence_bytes=2048),
            row("drafter", "stored", reason="It needs a store."),
            row("verifier", "rule", promise="lossy", by_family=both, needs="hidden states"),
            row("mode", "many"),
        ],
    }
    page = markdown(result, "foretell lab methods --limit 5")
    lines = page.splitlines()
    for text in (
        "--limit 5",
        "Chip, 2 cores, 1 GiB",
        "1 thread, float32",
        "torch 2.11",
        "used 25%",
    ):
        assert text in " ".join(lines)
    assert "| `copy` | a \\| b | exact | 3.0 MiB | 2.0 KiB | A Paper |" in lines
    assert "| `copy:k=1` | 2.35 | x1.50 (1.40 to 1.60) | 3 of 4 | 3.00 x2.00 | - |" in lines
    assert "| `rule` | a \\| b | lossy | hidden states | A Paper |" in lines
    assert "| `rule:k=1` | 2.35 | 3.00 | - |" in lines, "no time at temperature 1"
    assert "- `stored`: It needs a store." in lines
    assert "| `many` | a \\| b | exact | A Paper |" in lines
    for line in lines:
        assert not line.startswith("|") or line.endswith("|")


def test_tables_are_rectangles() -> None:
    text = table(["a", "b"], [["1", "x|y\nz"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | x\\|y z |\n"


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"family": "a", "prompt": "def add(a, b):\n    return a + b\n\ndef sub(a, b):"},
        {"family": "b", "prompt": "one two three one two three one two"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_command(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "methods.md"
    text.write_text("one two three four five. def add(a, b):\n    return a + b\n" * 20)
    only = "prompt-lookup,retrieval,draft-model,rejection,judge,chain,fixed"
    words = ["lab", "methods", "--workload", str(workload), "--only", only, "--limit", "1"]
    words += ["--max-tokens", "6", "--repeats", "1", "--store-text", str(text), "--out", str(out)]
    assert main([*words, "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {f"{r['kind']}/{r['name']}": r for r in result["methods"]}
    assert result["families"] == ["a", "b"]
    assert result["provenance"]["prompts"] == 2
    assert set(rows) == {
        "drafter/none",
        "drafter/prompt-lookup",
        "drafter/draft-model",
        "drafter/retrieval",
        "verifier/rejection",
        "verifier/judge",
        "policy/fixed",
        "tree/chain",
    }
    assert "judge needs a trained head" in rows["verifier/judge"]["reason"]
    for name, r in rows.items():
        if name == "verifier/judge":
            continue
        whole = r["by_family"]["overall"]
        assert whole["acceptance_length"] >= 1
        assert r["reason"] is None
        if r["kind"] == "verifier":
            assert whole["decode_speedup"] is None
            assert whole["equal"] is None
        else:
            assert whole["equal"]["same"] == whole["equal"]["compared"] == 2
    assert rows["drafter/none"]["by_family"]["overall"]["acceptance_length"] == 1
    assert rows["drafter/draft-model"]["needs"] == "a draft model"
    assert rows["drafter/draft-model"]["sequence_bytes"] > 1000, "its KV cache"
    assert rows["drafter/retrieval"]["shared_bytes"] == 0
    page = out.read_text()
    assert "--workload mine.jsonl" in page
    assert str(tmp_path) not in page
    assert "`retrieval:path=" not in page, "a store in a temporary folder has no name to remember"
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"mine.jsonl", "text.txt", "methods.md"}


def test_an_interruption_leaves_nothing(
    workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    out = tmp_path / "methods.md"
    out.write_text("as it was")
    words = ["lab", "methods", "--workload", str(workload), "--out", str(out), "--quiet"]
    assert main(words) == 130
    assert out.read_text() == "as it was"
    assert {p.name for p in tmp_path.iterdir()} == {"mine.jsonl", "methods.md"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "sufix"], "did you mean 'suffix'"),
        (["--max-tokens", "1"], "--max-tokens is too small: at least 2"),
        (["--limit", "0"], "--limit is too small"),
        (["--dtype", "int3"], "--dtype int3 is unknown"),
        (["--store-text", "/no/such/file"], "is no file"),
        (["--out", "/no/such/folder/x.md"], "there is no directory"),
        (["--workload", "random"], "no user will ever see"),
        (["--spec", "suffix:tokens"], "not of the form key=value"),
    ],
)
def test_bad_input_is_explained(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "methods", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_foretell_methods_lists_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["kind"] for r in rows} == set(BUILTIN)
    for r in rows:
        assert {"name", "kind", "promise", "paper", "summary"} <= set(r)
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for table_ in BUILTIN.values() for name in table_), "names are whole"
