"""The file: 8 bytes magic, 8 bytes length of the JSON header (little endian), the header, then,
aligned to 64 bytes, for every shard its tokens (big endian: byte order is token order) and its
suffix array (uint32). `vocab` separates documents, so it is larger than any token.
"""

from __future__ import annotations

MAGIC = b"FTLSTORE"
VERSION = 1
SORTED = 32  # tokens by which suffixes are in order
ALIGN = 64
