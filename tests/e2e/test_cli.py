"""The whole program: every command, its JSON, its exit codes, and one sentence for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import CONTEXT, TEXT, write_tokenizer, write_weights

from foretell.cli.main import main
from foretell.engine.llm import LLM
from foretell.engine.sequence import TokenEvent

PROGRAM = [sys.executable, "-m", "foretell.cli.main"]
torch.set_num_threads(1)  # the models are tiny
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a drafter beside it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for where, noise in ((folder, 0.0), (folder / "draft", 0.15)):
        where.mkdir()
        write_weights(where, write_tokenizer(where), noise)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The program in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def last_json(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one line, and the sentence names what is wrong."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err, err


# --- starting up


@pytest.mark.parametrize(
    "command", [["-c", "import foretell"], ["-m", "foretell.cli.main", "--help"]]
)
def test_starts_fast_without_torch(command: list[str]) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.4
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", *command], check=True, capture_output=True, text=True
    ).stderr
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in trace.splitlines()}
    assert not loaded & {"torch", "numpy", "rich", "transformers", "tokenizers"}


def test_help_version_and_unknown_words(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("generate", "chat", "methods", "check", "demo", "train"))
    assert run("--version")[1].startswith("foretell 0.")
    refused(run("generat"), "did you mean 'generate'?")
    refused(run("generate", "hello", "--tempature", "1"), "--temperature")
    refused(run("generate", "hello", "--max-tokens", "many"), "--max-tokens")
    code, out, _ = run("generate", "--help")
    assert code == 0
    assert "--repetition-penalty" in out


def test_methods(run: Run) -> None:
    code, out, _ = run("methods", "--json")
    rows = last_json(out)
    assert code == 0
    found = {(r["kind"], r["name"]): r for r in rows}
    assert found["drafter", "draft-model"]["promise"] == "exact"
    assert found["verifier", "rejection"]["promise"] == "lossless"
    assert {"name", "kind", "promise", "paper", "summary"} <= rows[0].keys()
    code, out, _ = run("methods")
    assert code == 0
    assert "prompt-lookup" in out


# --- generate


def test_json_has_the_promised_fields(run: Run, model: Path) -> None:
    code, out, err = run("generate", TEXT, "--model", model, "--max-tokens", 24, "--json")
    assert code == 0, err
    answer = last_json(out)
    assert {"text", "token_ids", "finish_reason", "promise", "usage", "timing", "speculation"} <= (
        answer.keys()
    )
    assert answer["promise"] == "exact"
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) <= 24
    assert {"prefill_s", "decode_s", "tokens_per_s"} <= answer["timing"].keys()
    speculation = answer["speculation"]
    assert speculation["drafter"] == "draft-model"
    assert speculation["verifier"] == "greedy"
    assert len(answer["token_ids"]) == speculation["steps"] + speculation["accepted"]
    assert speculation["acceptance_length"] == pytest.approx(
        1 + speculation["accepted"] / speculation["steps"], abs=1e-3
    )
    assert "tokens/s" in err


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "7"]])
def test_every_drafter_says_what_plain_decoding_says(
    run: Run, model: Path, sampling: list[str]
) -> None:
    answers = []
    for draft in ("none", "prompt-lookup", "draft-model:tokens=3", "draft-model:branching=2"):
        words = ("generate", TEXT, "--model", model, "--draft", draft, "--max-tokens", 32, "--json")
        code, out, err = run(*words, *sampling)
        assert code == 0, err
        answers.append(last_json(out)["token_ids"])
    assert answers.count(answers[0]) == 4


def test_streamed_text_is_the_text(run: Run, model: Path) -> None:
    words = ("generate", TEXT, "--model", model, "--max-tokens", 16)
    text = last_json(run(*words, "--json")[1])["text"]
    code, out, err = run(*words)
    assert (code, out) == (0, text + "\n")
    assert err.count("\n") == 1
    code, out, err = run(*words, "--quiet", "--show")
    assert code == 0
    assert err == ""
    assert "\x1b[3" in out


def test_prompt_files(run: Run, model: Path, tmp_path: Path) -> None:
    lines = [
        {"task_id": "T/0", "prompt": "the quick"},
        {"question_id": 5, "turns": ["hello", "and the world"]},
        {"question": "what says the fox"},
        {"id": "m", "messages": [{"role": "user", "content": "hello"}]},
        {"prompt": [5, 6, 7]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved = tmp_path / "answers.jsonl"
    words = ("generate", "--prompt-file", file, "--model", model, "--max-tokens", 8, "--json")
    code, out, err = run(*words, "--batch", 3, "--out", saved)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a.get("id") for a in answers] == ["T/0", 5, None, "m", None]
    assert len(answers[1]["turns"]) == 2
    assert answers[1]["text"] == answers[1]["turns"][1]["text"]
    assert answers[1]["turns"][0]["token_ids"] == answers[3]["token_ids"]  # the same first turn
    assert saved.read_text() == out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    one_by_one = [json.loads(line) for line in run(*words)[1].splitlines()]
    assert [a["token_ids"] for a in answers] == [a["token_ids"] for a in one_by_one]

    text = tmp_path / "prompt.txt"
    text.write_text("the quick")
    whole = run("generate", "--prompt-file", text, "--model", model, "--max-tokens", 8, "--json")
    assert last_json(whole[1])["token_ids"] == answers[0]["token_ids"]


def test_samples_logprobs_and_config(run: Run, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    settings = {"model": str(model), "max_tokens": 6, "temperature": 0.8, "seed": 3, "batch": 2}
    settings |= {"draft": {"method": "ngram", "num_speculative_tokens": 2}, "logit_bias": {"5": -9}}
    config.write_text(json.dumps(settings))
    words = ("generate", "hello", "--config", config, "--json", "--n", 2, "--logprobs", 3)
    code, out, err = run(*words, "--prompt-logprobs", 1)
    assert code == 0, err
    answer = last_json(out)
    assert answer["speculation"]["drafter"] == "prompt-lookup"
    assert answer["usage"]["completion_tokens"] == 6
    assert len(answer["samples"]) == 2
    assert len(answer["logprobs"]) == 6
    assert len(answer["logprobs"][0]["top"]) == 3
    assert answer["prompt_logprobs"][0] is None
    assert last_json(run(*words, "--max-tokens", 2)[1])["usage"]["completion_tokens"] == 2
    config.write_text('{"max_token": 3}')
    refused(run("generate", "hello", "--config", config), "max_token", "did you mean 'max_tokens'")


# --- chat, check, demo


def test_chat_reads_a_turn_a_line(model: Path) -> None:
    result = subprocess.run(
        [*PROGRAM, "chat", "--model", str(model), "--max-tokens", "8"],
        input="hello\n/system be brief\n\nthe fox\n/reset\nhello\n/exit\nnever\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokens/s") == 3
    assert "Traceback" not in result.stderr


def test_ctrl_c_in_a_chat_stops_the_answer_and_ctrl_d_leaves(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["hello", KeyboardInterrupt(), "/reset", "/nonsense", "hello", EOFError()])
    streams = iter([3, 100])  # the first answer is interrupted at its third token
    real = LLM.stream

    def typed(prompt: str) -> str:
        line = next(said)
        if isinstance(line, BaseException):
            raise line
        return line

    def stream(self: LLM, *words: Any, **more: Any) -> Iterator[TokenEvent]:
        limit = next(streams)
        for count, event in enumerate(real(self, *words, **more)):
            if count == limit:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(LLM, "stream", stream)
    code, out, err = run("chat", "--model", model, "--max-tokens", 8, "--ignore-eos")
    assert code == 0
    assert "(stopped)" in err
    assert "no command '/nonsense'" in err
    assert err.count("tokens/s") == 1
    first, second = out.removesuffix("\n").split("\n", 1)
    assert second.startswith(first)  # the same question again: the same words, now all of them


def test_check_passes_and_reports(run: Run, model: Path) -> None:
    words = ("check", "--model", model, "--prompts-count", 4, "--max-tokens", 12, "--seeds", 1)
    code, out, err = run(*words, "--runs", 500, "--json")
    report = last_json(out)
    assert code == 0, (out, err)
    assert report["passed"] is True
    assert report["greedy"]["identical"] == report["greedy"]["compared"] == 4
    assert report["replay"]["identical"] == 4
    assert report["distribution"]["p_value"] > 1e-4
    assert report["distribution"]["drafted"] > 0
    code, out, err = run(*words, "--runs", 300, "--verify", "rejection", "--draft", "prompt-lookup")
    assert code == 0, (out, err)
    assert "PASSED" in out
    assert "lossless" in out


def test_demo(run: Run, model: Path) -> None:
    words = ("demo", "--model", model, "--max-tokens", 8, "--rounds", 1)
    code, out, err = run(*words)
    assert code == 0, err
    assert re.search(r"identical: (\d+) of \1 tokens", out)
    report = last_json(run(*words, "--json")[1])
    assert report["identical"] is True
    assert report["tokens"] == report["tokens_identical"]
    assert report["speedup"] > 0


# --- bad input


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", ""], ["prompt", "empty"]),
        (["generate"], ["--prompt-file"]),
        (["generate", "a", "--prompt-file", "b"], ["--prompt-file"]),
        (["generate", "--prompt-file", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["generate", "a", "--temperature", "nan"], ["--temperature"]),
        (["generate", "a", "--temperature", "-1"], ["--temperature"]),
        (["generate", "a", "--top-p", "0"], ["--top-p"]),
        (["generate", "a", "--top-k", "-3"], ["--top-k"]),
        (["generate", "a", "--min-p", "inf"], ["--min-p"]),
        (["generate", "a", "--repetition-penalty", "nan"], ["--repetition-penalty"]),
        (["generate", "a", "--max-tokens", "0"], ["--max-tokens"]),
        (["generate", "a", "--seed", "-1"], ["--seed"]),
        (["generate", "a", "--logit-bias", "5"], ["--logit-bias"]),
        (["generate", "a", "--allowed-ids", "x"], ["--allowed-ids"]),
        (["generate", "a", "--draft", "prompt-lokup"], ["did you mean 'prompt-lookup'"]),
        (["generate", "a", "--verify", "typical"], ["typical"]),
        (["generate", "a", "--policy", "fixd"], ["did you mean 'fixed'"]),
        (["generate", "a", "--draft", "draft-model:tokens"], ["key=value"]),
        (["generate", "a", "--dtype", "int3"], ["int3", "int4-g128"]),
        (["generate", "a", "--dtype", "float8"], ["float8"]),
        (["generate", "a", "--batch", "0"], ["--batch"]),
        (["generate", "a", "--system", "b"], ["--chat"]),
        (["generate", "a", "--out", "no/such/folder/x.jsonl"], ["--out"]),
        (["generate", "a", "--out", "/proc/x.jsonl"], ["--out"]),
        (["generate", "a", "--config", "nowhere.json"], ["nowhere.json"]),
        (["generate", "a", "--model", "no/such/model"], ["no/such/model"]),
        (["chat", "--n", "2"], ["--n"]),
        (["check", "--runs", "3"], ["--runs"]),
        (["demo", "--rounds", "0"], ["--rounds"]),
    ],
)
def test_bad_usage_is_one_sentence(run: Run, words: list[str], named: list[str]) -> None:
    refused(run(*words), *named)


def test_bad_prompts_are_named(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for content, named in [
        (b'{"prompt": "a"}\n{"prompt": \n', "ine 2"),
        (b'{"prompt": "a"}\n[1]\n', "ine 2"),
        (b'{"promt": "a"}\n', "ine 1"),
        (b'{"prompt": ""}\n', "empty"),
        (b'{"turns": []}\n', "turns"),
        (b"", "empty"),
        (b'{"prompt": "\xff"}\n', "UTF-8"),
    ]:
        file.write_bytes(content)
        refused(run("generate", "--prompt-file", file), named)
    refused(run("generate", "the " * 2 * CONTEXT, "--model", model), "context", str(CONTEXT))
    refused(run("generate", "a", "--model", model, "--logit-bias", "99999=1"), "99999")
    refused(run("generate", "a", "--model", model, "--kv-rows", "5"), "kv_rows")
    sampled = ("generate", "a", "--model", model, "--temperature", "1")
    refused(run(*sampled, "--verify", "greedy"), "Greedy", "replay")


def test_invalid_utf8_on_stdin_and_in_an_argument(model: Path) -> None:
    for words, data in ((["-"], b"caf\xe9"), ([b"caf\xe9"], b"")):
        result = subprocess.run(
            [*PROGRAM, "generate", *words, "--model", str(model)],
            input=data,
            capture_output=True,
            check=False,
        )
        refused((result.returncode, "", result.stderr.decode()), "UTF-8")


def broken(model: Path, folder: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(model, folder / "broken"))


def test_missing_and_truncated_weights(run: Run, model: Path, tmp_path: Path) -> None:
    copy = broken(model, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run("generate", "a", "--model", copy), "model.safetensors")
    weights.unlink()
    refused(run("generate", "a", "--model", copy), "safetensors")
    (copy / "config.json").write_text("{")
    refused(run("generate", "a", "--model", copy), "config.json")


def test_wrong_tokenizer_and_foreign_drafter(run: Run, model: Path, tmp_path: Path) -> None:
    copy = broken(model, tmp_path)
    write_weights(copy, 100)  # fewer rows than the tokenizer has ids
    refused(run("generate", "a", "--model", copy))
    (copy / "tokenizer.json").write_text("{}")
    refused(run("generate", "a", "--model", copy), "tokenizer")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write_weights(foreign, write_tokenizer(foreign, alphabet="xyz"))
    refused(
        run("generate", "a", "--model", model, "--draft", f"draft-model:path={foreign}"),
        "vocabular",
    )


# --- leaving early


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def test_interrupt_while_decoding_leaves_one_line(model: Path) -> None:
    process = start("generate", "the", "--model", model, "--max-tokens", 400, "--ignore-eos")
    assert process.stdout is not None
    process.stdout.read(1)
    code, err = interrupted(process)
    assert code in (130, 0)  # 0 only if it was done by then
    assert err.strip().splitlines()[-1:] == ["Interrupted."] or code == 0
    assert code == 0 or err.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="watches /proc")
@pytest.mark.parametrize("phase", ["libtorch_cpu", "model.safetensors"])
def test_interrupt_while_loading_leaves_one_line(model: Path, phase: str) -> None:
    """While torch is imported, and once the weights are mapped."""
    process = start("chat", "--model", model)  # it waits for a turn once it has loaded
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while phase not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert interrupted(process) == (130, "Interrupted.\n")


def test_a_closed_pipe_is_quiet(model: Path) -> None:
    process = start("generate", "the", "--model", model, "--max-tokens", 300, "--ignore-eos")
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=30) in (0, 141)
