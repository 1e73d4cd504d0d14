"""Builds a `tokenizers` tokenizer from the files of checkpoints that ship no tokenizer.json.

Known: sentencepiece models (BPE and unigram), GPT-2 style vocabulary + merges, and Llama 3's
tiktoken file. Each conversion gives the same ids as the original program.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from foretell.core.errors import InputError
from foretell.models.text import sentencepiece as sp
from foretell.models.text.config import TextConfig, read_json
from foretell.models.text.pieces import byte_alphabet

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_LLAMA3_RANKS = 128000  # the file does not name its word pattern; this size is Llama 3's alone
_GPT2_LIKE = ("GPT2", "CodeGen", "Roberta", "Bart", "OPT", "Qwen2", "GPTNeoX", "")

Built = tuple[Backend, dict[str, str]]  # the tokenizer, and its default named tokens


def from_sentencepiece(path: Path, config: TextConfig) -> Built:
    """Convert `tokenizer.model`. Raises InputError when it is neither BPE nor unigram."""
    data = path.read_bytes()
    if b"\n" in data[:400] and data[:400].split(b"\n")[0].endswith(b" 0"):
        return from_tiktoken(path, data)
    try:
        model = sp.parse(data)
    except ValueError as e:
        raise InputError(f"{path} is {e}; copy it from the checkpoint again.") from None
    vocab = [(text, score) for text, score, _ in model.pieces]
    unk = model.pieces[model.unk_id][0] if 0 <= model.unk_id < len(vocab) else None
    if model.model_type == sp.BPE:
        table = {text: i for i, (text, _) in enumerate(vocab)}
        merges = _merges_by_score(vocab, table)
        core = models.BPE(
            table, merges, unk_token=unk, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    elif model.model_type == sp.UNIGRAM:
        core = models.Unigram(vocab, model.unk_id, model.byte_fallback)
    else:
        raise InputError(f"{path} is a word or character model; only BPE and unigram are known.")
    backend = Backend(core)
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == sp.CONTROL)
            for text, _, kind in model.pieces
            if kind in (sp.CONTROL, sp.USER_DEFINED)
        ]
    )
    prefix = model.add_dummy_prefix and config.add_prefix_space is not False
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        # Spaces only: newlines stay. (Here ^ and $ would mean the ends of every line.)
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if config.legacy:  # every stretch between added tokens begins with a space
        steps += [normalizers.Prepend("▁")] if prefix else []
        steps.append(normalizers.Replace(" ", "▁"))
    else:  # only the beginning of the text does
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            "▁", "first" if prefix else "never", split=False
        )
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    ends: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    named = {}
    ids = (("bos_token", model.bos_id), ("eos_token", model.eos_id), ("unk_token", model.unk_id))
    for name, i in ids:
        if 0 <= i < len(vocab):
            named[name] = vocab[i][0]
    return backend, named


def _splits(
    parts: Iterable[tuple[str, float]], rank: dict[str, int]
) -> Iterable[tuple[float, str, str]]:
    """(value, left, right) for every way to merge two tokens into a third; within a token the
    pair of the lowest ids first."""
    for text, value in parts:
        local = [
            (text[:i], text[i:])
            for i in range(1, len(text))
            if text[:i] in rank and text[i:] in rank
        ]
        local.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        for left, right in local:
            yield value, left, right


def _merges_by_score(vocab: list[tuple[str, float]], rank: dict[str, int]) -> list[tuple[str, str]]:
    """Sentencepiece merges whichever pair has the best score: a merge list ordered by score."""
    found = sorted(_splits(vocab, rank), key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def from_gpt2(vocab_path: Path, merges_path: Path, config: TextConfig) -> Built:
    """Convert a byte-level vocabulary and merge list (vocab.json + merges.txt)."""
    family = config.tokenizer_class.removesuffix("Fast").removesuffix("Tokenizer")
    if family not in _GPT2_LIKE:
        raise InputError(
            f"{vocab_path.parent} has no tokenizer.json, and how a {config.tokenizer_class} splits "
            "words is unknown; save a tokenizer.json with transformers (AutoTokenizer)."
        )
    vocab = read_json(vocab_path)
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise InputError(f"{vocab_path} is no table of token ids; copy it again.")
    merges: list[tuple[str, str]] = []
    for line in merges_path.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            merges.append((left, right))
    backend = Backend(_bpe(vocab, merges, vocab_path))
    space = bool(config.add_prefix_space)
    if family == "Qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _words(_QWEN2_WORDS, space)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    if family in ("Roberta", "Bart"):
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        named = {"eos_token": end} if family == "Qwen2" else {"bos_token": end, "eos_token": end}
    return backend, {k: v for k, v in named.items() if v in vocab or v in _contents(config)}


def _contents(config: TextConfig) -> set[str]:
    return {t["content"] for t in config.added.values()}


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], path: Path) -> models.BPE:
    try:
        return models.BPE(vocab, merges, fuse_unk=False)
    except Exception as e:  # the library raises bare Exceptions
        raise InputError(f"{path} and its merges do not fit together ({e}).") from None


def _words(pattern: str, space: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
        ]
    )


def from_tiktoken(path: Path, data: bytes) -> Built:
    """Convert Llama 3's original tokenizer.model: one "base64 rank" a line."""
    alphabet = {b: c for c, b in byte_alphabet().items()}
    rank: dict[str, int] = {}
    try:
        for line in data.splitlines():
            token, number = line.split()
            text = "".join(alphabet[b] for b in base64.b64decode(token, validate=True))
            rank[text] = int(number)
    except (ValueError, binascii.Error):
        raise InputError(
            f"{path} is no tiktoken file; copy it from the checkpoint again."
        ) from None
    if len(rank) != _LLAMA3_RANKS:
        raise InputError(
            f"{path} is a tiktoken file of an unknown model, and such files do not say how words "
            "are split; save a tokenizer.json with transformers (AutoTokenizer)."
        )
    merges = [(left, right) for _, left, right in _splits(rank.items(), rank)]
    core = _bpe(rank, merges, path)
    core.ignore_merges = True  # tiktoken takes a whole word that is a token before any merge
    backend = Backend(core)
    backend.pre_tokenizer = _words(_LLAMA3_WORDS, False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in _llama3_special()])
    return backend, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def _llama3_special() -> list[str]:
    """The 256 names that Llama 3 appends to its ranks."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(251))
    head = ["<|begin_of_text|>", "<|end_of_text|>", *(next(reserved) for _ in range(4))]
    turn = ["<|start_header_id|>", "<|end_header_id|>", next(reserved), "<|eot_id|>"]
    return [*head, *turn, *reserved]


def begins_with_bos(backend: Backend) -> bool:
    """Whether texts begin with the beginning-of-text id where no file says so: BPE sentencepiece
    models and Llama 3 do, unigram ones (T5) do not."""
    return isinstance(backend.model, models.BPE)
