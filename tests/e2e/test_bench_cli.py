"""`foretell bench` on a tiny model: files, honesty, resuming, peers in other processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TEXT, write_tokenizer, write_weights

from foretell.cli.main import main

Run = Callable[..., tuple[int, str, str]]
PROGRAM = [sys.executable, "-m", "foretell.cli.main"]

# foretell's own adapter, renamed modes; `liar` changes a token and `slow` sleeps
PEER = """
import sys, time
from foretell.lab.bench.workers.own import System as Own

class System(Own):
    def load(self, config):
        self.kinds = {k: v["mode"] for k, v in config["modes"].items()}
        return super().load({**config, "draft_path": None, "allow_lossy": False, "methods": {
            k: {"draft": "none", "verify": "auto", "policy": "fixed"} for k in config["modes"]}})
    def modes(self, wanted):
        return {m: "it cannot" if self.kinds[m] == "unable" else None for m in wanted}
    def run(self, mode, prompts, max_tokens):
        found = super().run(mode, prompts, max_tokens)
        kind = self.kinds[mode]
        if kind == "liar":
            found["ids"][0][-1] += 1
        if kind == "slow":
            found["seconds"] += found["seconds"] - found["first_s"]
        if kind == "mortal" and max_tokens > 4 and len(prompts[0]) % 2:
            sys.exit("it died")
        return found
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for where, noise in ((folder, 0.0), (folder / "draft", 0.15)):
        where.mkdir()
        write_weights(where, write_tokenizer(where), noise)
    return folder


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "load.jsonl"
    rows: list[Any] = [
        {"id": 1, "family": "talk", "turns": ["hello world", "and again"]},
        {"id": 2, "family": "text", "prompt": TEXT},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], model: Path, load: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:  # fmt: skip
    """The program in this process, small."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))

    def call(*words: object, short: bool = True) -> tuple[int, str, str]:
        few = ["--model", model, "--workload", load, "--max-tokens", 8, "--repeats", 2]
        few += ["--no-memory", "--no-curve"] if short else []
        code = main([str(w) for w in ("bench", *few, *words)])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def lines(path: Path) -> list[Any]:
    return [json.loads(t) for t in path.read_text().splitlines()]


def overall(summary: Any, method: str) -> Any:
    return summary["methods"][method]["by_family"]["overall"]


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(PEER)
    return path


def test_a_whole_run(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    methods = "prompt-lookup,draft-model:tokens=2+name=pair"
    code, text, err = run("--methods", methods, "--out", out, "--json", short=False)
    assert code == 0, err
    found = json.loads(text.splitlines()[-1])
    summary, source = found["summary"], found["provenance"]
    assert list(summary["methods"]) == ["none", "prompt-lookup", "pair"]
    assert summary["families"] == ["talk", "text"]
    for name in summary["methods"]:
        o = overall(summary, name)
        assert o["equal"]["same"] == o["equal"]["compared"] == 6  # 3 prompts, 2 repeats
        assert o["decode_tokens_per_s"] > 0
        assert o["prompts"] == 3
        memory = summary["methods"][name]["memory"]
        assert memory["peak"] >= memory["anonymous"] > 0
    assert overall(summary, "none")["acceptance_length"] == 1
    assert overall(summary, "none")["decode_speedup"]["ratio"] == pytest.approx(1)
    assert overall(summary, "pair")["drafted"] > 0
    assert summary["forward_curve"]["rows"] == [1, 2, 4, 8, 16]
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "records.jsonl", "prompts.jsonl", "summary.json", "summary.md", "report.html",
        "provenance.json",
    }  # fmt: skip
    assert not [n for n in names if n.startswith(".")]
    assert json.loads((out / "provenance.json").read_text()) == source
    for key in ("cpu", "flags", "usable_cores", "memory_bytes", "bandwidth"):
        assert source["machine"][key]
    assert source["settings"]["dtype"] == "float32"
    assert len(source["model"]["sha256"]) == 64
    assert source["workloads"][0]["prompts"] == 2
    assert {"torch", "foretell"} <= source["versions"].keys()
    assert source["environment"]["OMP_NUM_THREADS"] == "1"


def test_methods_take_turns_and_every_place_is_shared(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("--methods", "prompt-lookup", "--out", out)[0] == 0
    records = lines(out / "records.jsonl")
    assert [r["order"] for r in records] == [0, 1] * 6
    assert {r["reused"] for r in records} == {0}  # no prompt found its rows of an earlier call
    places = [(r["method"], r["order"]) for r in records]
    assert {p: places.count(p) for p in places} == dict.fromkeys(
        [("none", 0), ("none", 1), ("prompt-lookup", 0), ("prompt-lookup", 1)], 3
    )
    keys = [r["key"] for r in records]
    assert all(a == b for a, b in zip(keys[::2], keys[1::2], strict=True))
    second = next(p for p in lines(out / "prompts.jsonl") if p["turn"] == 2)
    first = next(p for p in lines(out / "prompts.jsonl") if p["turn"] == 1)
    assert second["ids"][: len(first["ids"])] == first["ids"]  # the conversation goes on


def test_a_peer_that_says_something_else_is_caught(run: Run, tmp_path: Path, peer: Path) -> None:
    code, text, err = run(
        "--methods", "none", "--peers", f"{peer}:plain+liar+slow+unable",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(text.splitlines()[-1])
    summary = found["summary"]
    assert overall(summary, "fake/plain")["equal"]["same"] == 6
    liar = overall(summary, "fake/liar")["equal"]
    assert liar["same"] == 0
    assert {d["at"] for d in liar["different"]} == {7}
    slow = overall(summary, "fake/slow")["decode_speedup"]["ratio"]
    assert slow < 0.8 * overall(summary, "fake/plain")["decode_speedup"]["ratio"]
    assert overall(summary, "none")["decode_over"]["fake/slow"]["ratio"] == pytest.approx(1 / slow)
    assert any("fake/unable: it cannot" in t for t in found["provenance"]["left_out"])


@pytest.mark.slow
def test_a_peer_that_dies_ends_nothing_but_itself(run: Run, tmp_path: Path, peer: Path) -> None:
    code, text, err = run(
        "--methods", "none", "--peers", f"{peer}:mortal", "--out", tmp_path / "run", "--json",
        "--no-chat",
    )  # fmt: skip
    if code == 2:
        pytest.fail(err)
    found = json.loads(text.splitlines()[-1])
    assert found["summary"]["methods"]["fake/mortal"]["failed"] >= 1
    assert any("it died" in t for t in found["provenance"]["warnings"])
    assert overall(found["summary"], "none")["equal"]["compared"] == 6


def test_resume_after_an_interruption(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("--methods", "prompt-lookup", "--out", out)[0] == 0
    whole = lines(out / "records.jsonl")
    code, _, err = run("--methods", "prompt-lookup", "--out", out)
    assert code == 2
    assert "--resume" in err
    text = (out / "records.jsonl").read_text().splitlines()
    (out / "records.jsonl").write_text("\n".join(text[:7]) + "\n" + text[7][:50])
    code, _, err = run("--methods", "prompt-lookup", "--out", out, "--resume", "--seed", 3)
    assert code == 2
    assert "seed" in err
    assert run("--methods", "prompt-lookup", "--out", out, "--resume")[0] == 0
    again = lines(out / "records.jsonl")
    assert again[:7] == whole[:7]
    assert [(r["method"], r["key"], r["repeat"]) for r in again] == [
        (r["method"], r["key"], r["repeat"]) for r in whole
    ]


@pytest.mark.slow
def test_batches_and_sampling(run: Run, tmp_path: Path) -> None:
    words = ("--batch", 2, "--temperature", 1, "--seed", 5, "--ignore-eos")
    code, text, err = run(
        "--methods", "draft-model+verify=replay;draft-model+verify=rejection",
        "--out", tmp_path / "run", "--json", *words,
    )  # fmt: skip
    assert code == 0, err
    methods = json.loads(text.splitlines()[-1])["summary"]["methods"]
    replay = methods["draft-model+verify=replay"]
    assert replay["promise"] == "exact"
    assert replay["by_family"]["overall"]["equal"]["same"] == 6
    assert replay["by_family"]["overall"]["tokens"] == 24
    assert methods["draft-model+verify=rejection"]["promise"] == "lossless"


def test_compare(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("--methods", "none", "--out", one)[0] == 0
    two.mkdir()
    (two / "provenance.json").write_text((one / "provenance.json").read_text())
    records = lines(one / "records.jsonl")
    for folder, factor in ((one, 1), (two, 20)):  # times of this machine would be too noisy
        for r in records:
            r["seconds"] = r["first_s"] + (0.1 + 0.001 * r["repeat"]) * factor
        (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(["bench", "compare", str(one), str(one)]) == 0
    assert "No difference" in capsys.readouterr().out
    assert main(["bench", "compare", str(one), str(two), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["methods"][0]["ratio"] == pytest.approx(1 / 20)
    assert main(["bench", "compare", str(one), str(tmp_path / "no")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workload", "random"], "depends on the text"),
        (["--methods", "prompt-lokup"], "prompt-lookup"),
        (["--methods", "draft-model:tokens=x"], "tokens"),
        (["--peers", "vllm"], "Unknown peer"),
        (["--peers", "llamacpp", "--device", "cuda"], "CPU only"),
        (["--repeats", 0], "--repeats 0"),
        (["--max-tokens", 1], "no decoding speed"),
        (["--max-tokens", 4000], "no room"),
        (["--temperature", -1], "temperature"),
        (["--fit", "squeeze"], "--fit"),
        (["--peer-tokens", "a"], "--peer-tokens"),
        (["--resume"], "--out"),
        (["--model", "/nowhere/at/all"], "no directory"),
        (["--peers", "openvino:plain", "--peer-python", "/nowhere/python"], "/nowhere/python"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, tmp_path: Path, words: list[Any], sentence: str
) -> None:
    out = [] if "--resume" in words else ["--out", tmp_path / "run"]
    code, _, err = run(*out, *words)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_ctrl_c_keeps_the_records_and_ends_every_worker(
    tmp_path: Path, model: Path, load: Path
) -> None:
    out = tmp_path / "run"
    words = ["bench", "--model", model, "--workload", load, "--out", out, "--methods", "none"]
    words += ["--repeats", 100000, "--max-tokens", 8, "--no-memory", "--no-curve"]
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    records = out / "records.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if records.is_file() and records.stat().st_size > 2000:
            break
        time.sleep(0.05)
    children = [int(p.name) for p in Path("/proc").glob("[0-9]*") if _parent(p) == process.pid]
    assert len(children) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    assert not Path(f"/proc/{children[0]}").exists()
    assert all(json.loads(t) for t in records.read_text().splitlines())


def _parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
