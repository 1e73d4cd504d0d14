"""Text to train on: reading files, cutting documents into segments, holding some of them out.

A corpus is a list of documents; a document is a list of segments that read on from one another
(for Python the blocks between top-level definitions, so that some epochs can start a document at
a function). One segment in fifty is held out, chosen by a hash of its text, so that the split
does not move when corpora are added.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foretell.core.errors import InputError
from foretell.lab.train.tokenizer import render_chat

HELD_OUT_ONE_IN = 50
SEGMENT_CHARS = 8192  # plain text is cut near this length, at a blank line
MAX_CORPUS_CHARS = 24_000_000
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}
TOP_LEVEL_DEFINITION = re.compile(
    r"^(?:@.*\n(?:[ \t)\]}].*\n)*)*(?:async def|def|class) ", re.MULTILINE
)
CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")

Document = list[str]  # segments


def python_sources() -> Iterator[Document]:
    """The Python standard library's own sources, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield split_definitions(text)


def split_definitions(source: str) -> Document:
    """Cut before every top-level definition and the decorators above it."""
    cuts = [0, *(match.start() for match in TOP_LEVEL_DEFINITION.finditer(source)), len(source)]
    return [source[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def split_paragraphs(text: str) -> Document:
    """Cut at the first blank line after every `SEGMENT_CHARS` characters."""
    segments, start = [], 0
    while start < len(text):
        blank = text.find("\n\n", start + SEGMENT_CHARS)
        end = len(text) if blank < 0 else blank + 2
        segments.append(text[start:end])
        start = end
    return segments


def read_jsonl(path: Path, lines: Iterator[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{path}, line {number}: not valid JSON.") from None
        if isinstance(record, dict) and {"question", "answer"} <= record.keys():
            answer = CALCULATOR_NOTE.sub("", str(record["answer"]))
            yield [render_chat(str(record["question"]).strip(), answer.strip())]
        elif isinstance(record, dict) and "text" in record:
            yield [str(record["text"])]
        else:
            raise InputError(
                f"{path}, line {number}: needs the keys 'question' and 'answer', or 'text'."
            )


def read_corpus(path: Path) -> Iterator[Document]:
    """Documents of one file: `.txt` is one document, `.jsonl` is one a line; either may be .gz."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".txt", ".jsonl"):
        raise InputError(f"{path}: a corpus is a .txt, .txt.gz, .jsonl or .jsonl.gz file.")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            if kind == ".jsonl":
                yield from read_jsonl(path, file)
            else:
                yield split_paragraphs(file.read())
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise InputError(f"cannot read the corpus {path}: {error}.") from None


@dataclass(frozen=True)
class Corpus:
    """Named documents, still text."""

    name: str
    is_code: bool
    train: list[Document]
    held_out: list[str]


def split_corpus(name: str, documents: Iterator[Document], is_code: bool = False) -> Corpus:
    """Hold out one segment in fifty and cap the rest, so one large file cannot fill the memory."""
    train, held_out, total = [], [], 0
    for document in documents:
        kept: Document = []
        for segment in document:
            if total > MAX_CORPUS_CHARS:
                break
            total += len(segment)
            digest = hashlib.sha1(segment.encode()).digest()
            (held_out if digest[0] * 256 + digest[1] < 65536 // HELD_OUT_ONE_IN else kept).append(
                segment
            )
        if kept:
            train.append(kept)
    if not train or not held_out:
        raise InputError(f"the corpus {name} is too small to hold anything out; give it more text.")
    return Corpus(name, is_code, train, held_out)
