"""`foretell serve` before it serves: flags, sentences, sockets, what is offered."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foretell.cli.main import main
from foretell.cli.serve_options import ServeOptions
from foretell.core.errors import InputError
from foretell.serve.build import ServeConfig, build, load, own_name
from foretell.serve.server import bind, url
from helpers_serve import tiny_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m") / "tiny")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port"),
        (["--port", "-1"], "--port"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--max-body", "0"], "--max-body"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--grace", "-1"], "--grace"),
        (["--replicas", "0"], "--replicas"),
        (["--dtype", "int3"], "--dtype"),
        (["--draft", "nonsense"], "nonsense"),
        (["--offer", "nonsense"], "nonsense"),
        (["--policy", "nonsense"], "nonsense"),
        (["--api-key", ""], "--api-key"),
        (["--served-model-name", " "], "--served-model-name"),
        (["--cors-origin", ""], "--cors-origin"),
        (["--per-request-spec-decode-metrics", "loud"], "summary"),
        (["--speculative-config", "{"], "--speculative-config"),
        (["--speculative-config", '{"method": "mtp"}'], "mtp"),
        (["--speculative-config", '{"method": "ngram"}', "--draft", "suffix"], "not both"),
        (["--max-model-len", "1"], "--max-model-len"),
        (["--max-model-len", "100000"], "--max-model-len"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_flags_are_one_sentence(run: Run, model: Path, words: list[str], said: str) -> None:
    code, out, err = run("serve", "--model", model, "--port", "0", *words)
    assert code == 2, (code, out, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_what_tune_wrote_are_defaults(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    tuned = {"draft": "suffix:tokens=4", "batch": 4, "temperature": 0.5, "policy": "fixed"}
    file.write_text(json.dumps({**tuned, "tuned": {"speed": 3}}))
    code, _, err = run("serve", "--model", model, "--config", file, "--port", "-1")
    assert (code, "--port" in err) == (2, True)  # everything but the port was fine
    file.write_text(json.dumps({"draft": "nonsense"}))
    code, _, err = run("serve", "--model", model, "--config", file, "--port", "0")
    assert (code, "nonsense" in err) == (2, True)


def test_a_port_that_is_taken(run: Run, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--model", model, "--port", port)
    assert code == 2
    assert f"127.0.0.1:{port} cannot be used" in err


def test_the_port_is_free_again_at_once() -> None:
    """A connection of the old server may linger; a new one starts all the same."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    first.listen()
    client = socket.create_connection(("127.0.0.1", port))
    first.setblocking(True)
    accepted, _ = first.accept()
    accepted.close()  # the server's side closes first: TIME_WAIT is here
    first.close()
    client.close()
    second = bind("127.0.0.1", port)
    second.listen()
    second.close()


def test_addresses() -> None:
    for host, start in (("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")):
        made = bind(host, 0)
        assert url(made).startswith(start)
        made.close()
    with pytest.raises(InputError):
        bind("203.0.113.7", 0)  # not an address of this machine
    with pytest.raises(InputError):
        bind("a" * 300, 0)


def test_connections_whose_client_is_gone_do_not_stay() -> None:
    made = bind("127.0.0.1", 0)
    assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
    made.close()


def test_keys_come_from_flags_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_API_KEY", "env1, env2,,flag")
    config = ServeOptions(api_key=["flag", "other"]).config()
    assert config.api_keys == ("flag", "other", "env1", "env2")
    assert "env1" not in repr(config)
    monkeypatch.delenv("FORETELL_API_KEY")
    assert ServeOptions().config().api_keys == ()


def test_options_are_plain_data() -> None:
    config = ServeOptions(served_model_name=["a", "b"], offer=["suffix"]).config()
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.served_names == ("a", "b")
    assert config.policy == "goodput"


def test_a_model_is_never_called_by_its_path(model: Path) -> None:
    llm = load(ServeConfig(model=str(model), draft="none"))
    assert own_name(ServeConfig(model=str(model)), llm) == "tiny"
    assert own_name(ServeConfig(model=str(model) + "/"), llm) == "tiny"
    assert own_name(ServeConfig(model="org/name"), llm) == "org/name"
    assert own_name(ServeConfig(), llm) == "foretell-base"


def test_what_requests_may_choose(model: Path) -> None:
    service, _ = build({"model": str(model), "policy": "fixed", "nobody": "cares"})
    assert service.offers == ["prompt-lookup", "suffix", "off"]
    config = ServeConfig(
        model=str(model), draft="suffix:tokens=4,factor=2", offer=("prompt-lookup:min_ngram=1",)
    )
    service, _ = build(config)
    assert service.offers == ["suffix", "prompt-lookup", "off"]
    service, _ = build(ServeConfig(model=str(model), draft="suffix"))
    assert service.offers == ["suffix", "off"]


def test_a_missing_extra_is_one_sentence(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "fastapi" else real(n, *a)
    )
    code, _, err = run("serve", "--model", model, "--port", "0")
    assert code == 2
    assert "foretell[serve]" in err


def test_help_loads_nothing_heavy() -> None:
    check = (
        "import sys\nfrom foretell.cli.main import main\nmain(['serve', '--help'])\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--speculative-config" in done.stdout
