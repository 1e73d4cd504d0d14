"""Time to first token when the context arrives in pieces: sent whole at the end, or as a stream.

    python benchmarks/streaming_input.py [--model M] [--pieces 8] [--tokens 1500] [--gap 0.1]

Starts `foretell serve` as a process and talks to it over HTTP, as a retrieval pipeline would: a
piece every `gap` seconds. The clock starts when the last piece is there and stops at the first
token. Three ways take turns, each with a prompt of its own that nothing has read before:

- whole: the pieces are collected and sent at once when the last one is there;
- append: `/v1/streams`, every piece is sent when it is there;
- update: the same, but at half time the last two pieces are replaced (a better document was found).

The answers of a stream and of the same prompt sent at once afterwards must be equal, token for
token, else this fails; so it does when append or update is less than 2 times as fast as whole.
The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

TEXT = (
    "river stone window paper garden winter letter bridge silver market summer captain morning "
    "number people water because another against country between following question surface "
    "question history several evening machine office engine valley shoulder village interest"
)
WORDS = TEXT.split()
FORM = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
LEAST = 2.0  # what a stream must bring


def pieces_of(count: int, words: int, rng: random.Random) -> list[str]:
    """Pieces of a text that begins like no other."""
    return [
        f"Document {rng.randrange(10**9)}. " + " ".join(rng.choices(WORDS, k=words)) + ". "
        for _ in range(count)
    ]


@contextmanager
def server(options: argparse.Namespace) -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "foretell", "serve", "--port", str(port)]
    for flag in ("model", "draft", "threads"):
        value = getattr(options, flag)
        command += [] if value is None else [f"--{flag}", str(value)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while True:
                if process.poll() is not None:
                    raise SystemExit(process.stderr.read() if process.stderr else "no server")
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[float, list[int]]:
    """(when the first token came, its ids)"""
    first, ids = 0.0, []
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        response.read() if response.status_code != 200 else None
        assert response.status_code == 200, response.text
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                ids += [t for c in choices for t in c.get("token_ids", ())]
                first = first or (time.perf_counter() if ids else 0.0)
    return first, ids


def whole(client: httpx.Client, pieces: list[str], gap: float) -> tuple[float, list[int]]:
    time.sleep(gap * (len(pieces) - 1))  # the others came meanwhile
    start = time.perf_counter()
    first, ids = answer(client, "/v1/completions", {**FORM, "prompt": "".join(pieces)})
    return first - start, ids


def streamed(
    client: httpx.Client, pieces: list[str], gap: float, corrected: bool
) -> tuple[float, list[int]]:
    name = client.post("/v1/streams", json=FORM).raise_for_status().json()["id"]
    path, half = f"/v1/streams/{name}", len(pieces) // 2
    for i, piece in enumerate(pieces[:-1]):
        if corrected and i == half:  # what came last was not what it should have been
            stale = "".join(pieces[: half - 2]) + " ".join(reversed(WORDS)) * 3
            client.put(path, json={"prompt": stale}).raise_for_status()
            time.sleep(gap)
            client.put(path, json={"prompt": "".join(pieces[: i + 1])}).raise_for_status()
        else:
            client.post(f"{path}/append", json={"text": piece}).raise_for_status()
        time.sleep(gap)
    start = time.perf_counter()
    client.post(f"{path}/append", json={"text": pieces[-1]}).raise_for_status()
    first, ids = answer(client, f"{path}/finish", {})
    return first - start, ids


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="checkpoint; without it the bundled one")
    parser.add_argument("--draft", help="drafter; without it the server's default")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1500, help="of the whole prompt, about")
    parser.add_argument("--gap", type=float, default=0.1, help="seconds between two pieces")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.pieces < 4:
        parser.error("--pieces is at least 4: two of them are replaced")
    rng = random.Random(os.getpid())
    times: dict[str, list[float]] = {"whole": [], "append": [], "update": []}
    equal, length, pieces = True, 0, [""]
    with server(options) as client:
        sample = pieces_of(1, 200, rng)[0]
        count = client.post("/tokenize", json={"prompt": sample}).raise_for_status().json()["count"]
        words = max(1, int(200 * options.tokens / options.pieces / count))
        for turn in range(options.rounds + 1):  # the first one warms up
            for way in times:
                pieces = pieces_of(options.pieces, words, rng)
                if way == "whole":
                    took, ids = whole(client, pieces, options.gap)
                else:
                    took, ids = streamed(client, pieces, options.gap, way == "update")
                    _, again = answer(
                        client, "/v1/completions", {**FORM, "prompt": "".join(pieces)}
                    )
                    equal &= ids == again and len(ids) == FORM["max_tokens"]
                if turn:
                    times[way].append(took)
        asked = {"prompt": "".join(pieces)}
        length = client.post("/tokenize", json=asked).raise_for_status().json()["count"]
    median = {way: statistics.median(found) for way, found in times.items()}
    print(f"{length} prompt tokens in {options.pieces} pieces, one every {options.gap:g} s")
    for way, found in times.items():
        ratio = median["whole"] / median[way]
        spread = f"{1000 * min(found):.1f} .. {1000 * max(found):.1f}"
        print(
            f"  {way:7} {1000 * median[way]:8.1f} ms to the first token ({spread}), {ratio:.2f} x"
        )
    print(f"  answers {'equal' if equal else 'DIFFER'}")
    ratios = {way: round(median["whole"] / median[way], 3) for way in ("append", "update")}
    result = {"prompt_tokens": length, "seconds": median, "times_faster": ratios, "equal": equal}
    print(json.dumps(result))
    return 0 if equal and min(ratios.values()) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
