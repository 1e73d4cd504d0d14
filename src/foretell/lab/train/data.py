"""Text in, rows of token ids out: corpora, the tokenizer, the held-out split, the batches.

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
from typing import TYPE_CHECKING

import numpy as np

from foretell.core.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, *(f"<|reserved_{i}|>" for i in range(5))]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Words take the space before them, digits stand alone (arithmetic), an indent of n spaces is one
# piece of n - 1 spaces and the word after it.
PRE_TOKENIZER = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT_ONE_IN = 50
SEGMENT_CHARS = 8192  # plain text is cut near this length, at a blank line
MAX_CORPUS_CHARS = 24_000_000
FUNCTION_START_SHARE = 0.3
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


def render_chat(question: str, answer: str) -> str:
    """One exchange, character for character what the chat template makes of it."""
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


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


def build_tokenizer(corpora: list[Corpus], pieces: int) -> Tokenizer:
    """Byte-level BPE trained on an equal share (up to 5 million characters) of every corpus."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample(corpus: Corpus, budget: int = 5_000_000) -> Iterator[str]:
        share = min(1.0, budget / sum(len(s) for d in corpus.train for s in d))
        for document in corpus.train:
            for i, segment in enumerate(document):
                if int(i * share) != int((i + 1) * share) or len(document) == 1:
                    # Special tokens must not teach the trainer pieces like "im_start".
                    yield re.sub(r"<\|\w+\|>", "", segment)

    tokenizer.train_from_iterator((s for c in corpora for s in sample(c)), trainer)
    return tokenizer


class TokenStream:
    """Training rows of one corpus, without repetition inside an epoch.

    Every epoch lays the documents out anew (their order, and for code which definitions start a
    document of their own), cuts the line into rows, and deals the rows in a random order. The
    layout depends only on (seed, epoch), so `position` is all a checkpoint needs.
    """

    def __init__(
        self, ids: np.ndarray, ends: np.ndarray, starts: np.ndarray, eot: int, seed: int
    ) -> None:
        self.ids, self.ends = ids, ends  # ids of all segments; where each ends
        self.starts = starts  # bool per segment: 1 opens a document, 0 reads on, 2 may open one
        self.eot, self.seed = eot, seed
        self.position = [0, 0, 0]  # epoch, next row, row length the epoch was cut for
        self._laid_out: tuple[int, int] | None = None

    def _lay_out(self, epoch: int, length: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        opens = (self.starts == 1) | (
            (self.starts == 2) & (rng.random(len(self.starts)) < FUNCTION_START_SHARE)
        )
        firsts = np.flatnonzero(opens)
        lasts = np.append(firsts[1:], len(self.starts))
        begins = np.concatenate(([0], self.ends[:-1]))
        separator = np.array([self.eot], dtype=self.ids.dtype)
        parts = []
        for i in rng.permutation(len(firsts)):
            parts += [separator, self.ids[begins[firsts[i]] : self.ends[lasts[i] - 1]]]
        line = np.concatenate(parts)
        if len(line) < length + 1:
            line = np.tile(line, -(-(length + 1) // len(line)))
        rows = (len(line) - 1) // length
        offset = rng.integers(0, (len(line) - 1) - rows * length + 1)
        self._line, self._offset = line, offset
        self._order = rng.permutation(rows)
        self._laid_out = (epoch, length)

    def take(self, count: int, length: int) -> np.ndarray:
        """The next rows, `[count, length + 1]`: each row's last id is the next row's first."""
        out = np.empty((count, length + 1), dtype=np.int64)
        for i in range(count):
            epoch, row, cut = self.position
            if cut not in (0, length):
                epoch, row = epoch + 1, 0
            if self._laid_out != (epoch, length):
                self._lay_out(epoch, length)
            start = self._offset + self._order[row] * length
            out[i] = self._line[start : start + length + 1]
            row += 1
            self.position = [epoch, row, length]
            if row == len(self._order):
                self.position = [epoch + 1, 0, length]
        return out


@dataclass
class Domain:
    """One corpus ready to train on and to be measured by."""

    name: str
    weight: float
    stream: TokenStream
    held_out: np.ndarray  # ids, every segment behind an end-of-text


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, weight: float, seed: int) -> Domain:
    segments = [segment for document in corpus.train for segment in document]
    starts = np.concatenate(
        [[1] + [2 if corpus.is_code else 0] * (len(document) - 1) for document in corpus.train]
    )
    eot = tokenizer.token_to_id(END_OF_TEXT)
    encoded = [e.ids for e in tokenizer.encode_batch_fast(segments)]
    ids = np.concatenate([np.asarray(e, dtype=np.uint16) for e in encoded])
    ends = np.cumsum([len(e) for e in encoded])
    held_out = [[eot, *e.ids] for e in tokenizer.encode_batch_fast(corpus.held_out)]
    return Domain(
        corpus.name,
        weight,
        TokenStream(ids, ends, starts, eot, seed),
        np.concatenate([np.asarray(e, dtype=np.int64) for e in held_out]),
    )


class Mixture:
    """Batches that hold every domain in its share: each row goes to whoever is owed most."""

    def __init__(self, domains: list[Domain]) -> None:
        self.domains = domains
        total = sum(d.weight for d in domains)
        self.shares = [d.weight / total for d in domains]
        self.credit = [0.0] * len(domains)

    def batch(self, rows: int, length: int) -> np.ndarray:
        """`[rows, length + 1]` token ids."""
        counts = [0] * len(self.domains)
        for _ in range(rows):
            self.credit = [c + s for c, s in zip(self.credit, self.shares, strict=True)]
            chosen = self.credit.index(max(self.credit))
            self.credit[chosen] -= 1
            counts[chosen] += 1
        taken = [d.stream.take(n, length) for d, n in zip(self.domains, counts, strict=True)]
        return np.concatenate(taken)

    def state(self) -> dict:
        return {"credit": self.credit, "positions": [d.stream.position for d in self.domains]}

    def restore(self, state: dict) -> None:
        self.credit = list(state["credit"])
        for domain, position in zip(self.domains, state["positions"], strict=True):
            domain.stream.position = list(position)
