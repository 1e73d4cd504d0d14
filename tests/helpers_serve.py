"""A tiny model behind the real server, on a free port of this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from foretell.engine.llm import LLM
from foretell.models.native.arch import Arch
from foretell.models.native.weights import write_random_checkpoint
from foretell.serve.app import make_app
from foretell.serve.server import Server, bind, url
from foretell.serve.service import Service
from foretell.serve.terms import Limits

TEMPLATE = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ mood or '' }}"
)
CONTEXT = 256


def tiny_model(folder: Path, chat: bool = True) -> Path:
    """A random Llama over bytes (and a few longer tokens), whose samples are any bytes at all."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"th": 256, "the": 257, "Ġa": 258}
    backend = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": "<|end|>"}
    if chat:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    arch = Arch.llama(260, 32, 2, 4, 2, 64, tied=True, max_positions=CONTEXT)
    write_random_checkpoint(folder, arch, torch.float32, gain=1.2)
    return folder


def tiny_llm(folder: Path, draft: str = "prompt-lookup:min_ngram=1", **options: Any) -> LLM:
    return LLM.load(tiny_model(folder), draft=draft, **{"max_batch": 8, **options})


def make(llm: LLM, limits: Limits | None = None, **options: Any) -> tuple[Service, FastAPI]:
    service = Service(llm, limits or Limits())
    return service, make_app(service, **{"names": ["tiny", "alias"], **options})


@contextmanager
def running(service: Service, app: FastAPI) -> Iterator[str]:
    """The app behind uvicorn in a thread of this process; yields its URL."""
    made = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(app, service, 5.0, ready=ready.set, say=lambda text: None)
    thread = threading.Thread(target=lambda: server.run(sockets=[made]), daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    try:
        yield url(made)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of an event stream, whose framing is checked to the letter."""
    blocks = response.text.split("\n\n")
    assert blocks[-1] == "", "the stream ends with an empty line"
    assert blocks[-2] == "data: [DONE]"
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks[:-1])
    return [json.loads(b.removeprefix("data: ")) for b in blocks[:-2]]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that another thread is about to do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
