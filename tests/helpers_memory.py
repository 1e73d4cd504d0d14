"""What the C library has given out."""

from __future__ import annotations

import ctypes

import pytest

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Info(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


def allocated() -> int:
    """Bytes in use of malloc, by the main thread."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("this C library does not tell")
    mallinfo2.restype = Info
    info = mallinfo2()
    return info.hblkhd + info.uordblks
