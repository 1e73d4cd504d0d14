"""Reads a sentencepiece `tokenizer.model` without the sentencepiece package.

The file is one protocol-buffer message of which eight fields matter; the wire format is a list of
(field number, value) pairs, so a reader fits in a few lines.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2


@dataclass(slots=True)
class SentencePieceModel:
    """The parts of a `ModelProto` that decide how text becomes ids; defaults are the format's."""

    pieces: list[tuple[str, float, int]]  # text, score, type; the index is the id
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    charsmap: bytes = b""  # compiled Unicode normalisation
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, integer or bytes) of a message; fixed-width values come as bytes.

    Raises ValueError or IndexError when `data` is no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or number == 0 or at + size > len(data):
            raise ValueError("not a protocol buffer")
        yield number, data[at : at + size]
        at += size


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def parse(data: bytes) -> SentencePieceModel:
    """Parse the bytes of a model file. Raises ValueError when they are something else."""
    model = SentencePieceModel([])
    trainer = {3: "model_type", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id"}
    normalizer = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}
    try:
        for number, value in _fields(data):
            if not isinstance(value, bytes):
                continue
            if number == 1:
                model.pieces.append(_piece(value))
            for field, names in ((2, trainer), (3, normalizer)):
                if number != field:
                    continue
                for inner, v in _fields(value):
                    if name := names.get(inner):
                        kind = type(getattr(model, name))
                        setattr(model, name, kind(_signed(v) if isinstance(v, int) else v))
    except (IndexError, UnicodeDecodeError, struct.error) as e:
        raise ValueError(f"not a sentencepiece model ({e})") from None
    if not model.pieces:
        raise ValueError("not a sentencepiece model (it holds no pieces)")
    return model
