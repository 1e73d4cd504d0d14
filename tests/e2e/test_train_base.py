"""`foretell train base` end to end: a run of seconds, stopped, resumed, exported, loaded."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "foretell", "train", "base"]
# One thread: threads of a model this small only wait for one another.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZES = [
    *("--no-stdlib", "--no-compile", "--vocab", "300"),
    *("--target-shape", "hidden=32,layers=2,heads=4,kv_heads=2,ffn=48"),
    *("--draft-shape", "hidden=16,layers=1,heads=2,kv_heads=1,ffn=32"),
    *("--batch", "batch_tokens=256,row=32,long_row=64"),
]
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "README.md",
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    rng = random.Random(0)
    words = ["river", "stone", "walks", "under", "the", "a", "quiet", "bridge", "of", "light"]
    pages = (" ".join(rng.choices(words, k=60)) + ".\n\n" for _ in range(3000))
    (folder / "plain.txt").write_text("".join(pages))
    sums = ((rng.randrange(90), rng.randrange(90)) for _ in range(400))
    lines = (
        {
            "question": f"What is {a} plus {b}?",
            "answer": f"<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
        }
        for a, b in sums
    )
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--corpus", str(folder / "plain.txt"), "--corpus", str(folder / "sums.jsonl")]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=ONE_THREAD
    )


@pytest.fixture(scope="module")
def finished(corpora: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    done = train("--out", str(out), "--tokens", "12000", *SIZES, *corpora)
    assert done.returncode == 0, done.stderr
    return out


def test_exports_both_networks_with_what_was_measured(finished: Path) -> None:
    for folder in (finished, finished / "draft"):
        assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    card = (finished / "README.md").read_text()
    assert "| plain |" in card
    assert "| sums |" in card
    assert str(finished.parent) not in card  # no folders of the machine it was trained on


def test_interrupted_run_resumes_to_the_same_weights(
    finished: Path, corpora: list[str], tmp_path: Path
) -> None:
    arguments = ["--out", str(tmp_path), "--tokens", "12000", *SIZES, *corpora]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--checkpoint-minutes", "0.0001"],
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / ".run" / "target.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "the same command continues it" in " ".join(messages.split())
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "model.safetensors").exists()

    resumed = train(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after" in resumed.stderr
    for name in ("model.safetensors", "draft/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_checkpoint_loads_in_transformers_with_equal_logits(finished: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from foretell.lab.train.network import Llama, LlamaShape

    sizes = {
        finished: LlamaShape(300, hidden=32, layers=2, heads=4, kv_heads=2, ffn=48),
        finished / "draft": LlamaShape(300, hidden=16, layers=1, heads=2, kv_heads=1, ffn=32),
    }
    for folder, shape in sizes.items():
        ours = Llama(shape)
        ours.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_tokenizer_round_trips_and_renders_chat(finished: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    text = 'def f(x):\n    """Return 1234."""\n\treturn  x + 1  # été\n'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    digits = tokenizer.convert_ids_to_tokens(tokenizer("90210").input_ids)
    assert digits == list("90210")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--corpus", "nowhere/missing.txt"], "no corpus file"),
        (["--target-shape", "hidden=30,layers=2,heads=4,kv_heads=2,ffn=48"], "multiple of"),
        (["--target-shape", "width=30"], "unknown size 'width'"),
        (["--weight", "poems=0.5"], "--weight names 'poems'"),
        (["--batch", "row=0"], "--batch"),
        (["--batch", "row=64,long_row=100000"], "--batch"),
        (["--vocab", "100"], "--vocab"),
        (["--corpus", __file__], ".txt"),
        (["--weight", "python=nan"], "--weight"),
        (["--size", "huge"], "--size is cpu or gpu"),
        (["--minutes", "1", "--tokens", "1000"], "either --minutes or --tokens"),
        (["--out", "/proc/nowhere"], "cannot write to"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foretell.cli.main import main

    assert main(["train", "base", "--out", str(tmp_path), *arguments]) == 2
    *progress, message = capsys.readouterr().err.splitlines()
    assert sentence in message
    assert progress in ([], ["reading the corpora"])
