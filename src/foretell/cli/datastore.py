"""`foretell build-datastore`: text -> tokens and their suffix array, for the retrieval drafter."""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.common import check_writable, dumps, note, progress
from foretell.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from foretell.drafters.tables.datastore.writer import StoreWriter
    from foretell.models.text.tokenizer import Tokenizer

app = typer.Typer(add_completion=False)
PIECE = 1 << 16  # characters tokenised at once; pieces end where a line does
FIELDS = ("text", "question", "prompt", "instruction", "input", "completion", "output", "answer")


@app.command()
def build_datastore(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="Text files (a document each) or JSON lines with text, prompt, completion, "
            "question, answer or messages (a document a line); .gz allowed.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The datastore to write.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="M", help="Whose tokenizer; without it the bundled model's."),
    ] = None,
    shard: Annotated[
        int, typer.Option(help="Tokens sorted at once; memory is about 45 bytes for each.")
    ] = 8_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Build a datastore from text: --draft retrieval:path=OUT then copies from it.

    The store fits models with the same tokenizer only. Ctrl-C leaves an existing OUT as it was.
    """
    if shard < 1000:
        raise InputError(f"--shard {shard} is too small: at least 1000.")
    check_writable(out)
    sizes = [_size(path) for path in inputs]
    if out.exists() and any(path.samefile(out) for path in inputs):
        raise InputError(f"--out {out} is one of the inputs: name another file.")

    from foretell.drafters.tables.datastore.writer import StoreWriter
    from foretell.models.load import find_checkpoint
    from foretell.models.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(find_checkpoint(model))
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "model": tokenizer.name,
        "sources": [path.name for path in inputs][:100],
    }
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    begin = time.perf_counter()
    try:
        with part.open("wb") as file:
            writer = StoreWriter(file, tokenizer.vocab_size, facts)
            tokens, documents = _fill(writer, inputs, sum(sizes), tokenizer, shard, quiet)
            if not tokens:
                raise InputError("The inputs hold no text: there is nothing to build from.")
            writer.finish()
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    seconds = time.perf_counter() - begin
    result = {
        "out": str(out),
        "tokens": tokens,
        "documents": documents,
        "shards": len(writer.shards),
        "bytes": out.stat().st_size,
        "seconds": round(seconds, 2),
    }
    if as_json:
        print(dumps(result))
    else:
        note(
            f"{out}: {tokens:,} tokens of {documents:,} documents, {result['bytes'] / 1e6:.1f} MB, "
            f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s).",
            quiet,
        )


def _fill(
    writer: StoreWriter,
    inputs: list[Path],
    size: int,
    tokenizer: Tokenizer,
    shard: int,
    quiet: bool,
) -> tuple[int, int]:
    """Tokenise and sort, shard by shard; (tokens, documents)."""
    import numpy as np

    held: list[np.ndarray] = []
    count = tokens = documents = 0

    def flush() -> None:
        nonlocal held, count
        whole = np.concatenate(held)
        held, count = [], 0
        done = 0
        with progress("sorting", len(whole), quiet) as advance:

            def tell(sorted_now: int) -> None:
                nonlocal done
                advance(max(0, sorted_now - done))
                done = max(done, sorted_now)

            writer.add(whole, tell)

    separator = np.array([writer.vocab], np.uint32)
    with progress("tokenising", size, quiet) as advance:
        for document in _documents(inputs):
            any_text = False
            for piece in _pieces(document):
                ids = np.array(tokenizer.encode(piece, add_special=False), np.uint32)
                advance(len(piece.encode("utf-8", "replace")))
                any_text = any_text or len(ids) > 0
                while len(ids):
                    room = shard - count - 1  # one for the separator
                    held.append(ids[:room])
                    count += len(held[-1])
                    tokens += len(held[-1])
                    ids = ids[room:]
                    if count >= shard - 1:
                        held.append(separator)
                        flush()
            if any_text:
                documents += 1
                held.append(separator)
                count += 1
            if count >= shard - 1:
                flush()
    if count > 1:
        flush()
    return tokens, documents


def _size(path: Path) -> int:
    """Bytes of text in a file, as far as can be said without reading it."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a directory: name its files.")
        size = path.stat().st_size
    except OSError as e:
        raise InputError(f"The input {path} cannot be read ({e.strerror}).") from None
    return 3 * size if path.suffix == ".gz" else size


def _documents(inputs: list[Path]) -> Iterator[Iterator[str]]:
    """Every document as an iterator over its lines."""
    for path in inputs:
        names = [s for s in path.suffixes if s != ".gz"]
        if names and names[-1] in (".jsonl", ".ndjson"):
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    text = _text(line, f"line {number} of {path}")
                    yield iter(text.splitlines(keepends=True))
        else:
            yield _lines(path)


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield from file
    except UnicodeDecodeError:
        raise InputError(f"The input {path} is not valid UTF-8: convert it first.") from None
    except (OSError, EOFError, zlib.error) as e:  # the last two: a damaged .gz
        raise InputError(f"The input {path} cannot be read ({e}).") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined to pieces of about PIECE characters."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _text(line: str, where: str) -> str:
    """The text of a JSON line."""
    try:
        entry: Any = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where[0].upper()}{where[1:]} is no JSON ({e}).") from None
    if isinstance(entry, str):
        return entry
    parts: list[Any] = []
    if isinstance(entry, dict):
        parts = [entry[k] for k in FIELDS if isinstance(entry.get(k), str)]
        for message in entry.get("messages") or entry.get("turns") or []:
            parts.append(message.get("content") if isinstance(message, dict) else message)
    parts = [p for p in parts if isinstance(p, str) and p]
    if not parts:
        raise InputError(
            f"{where[0].upper()}{where[1:]} has no text: give it one of {', '.join(FIELDS)} "
            "or messages."
        )
    return "\n".join(parts)
