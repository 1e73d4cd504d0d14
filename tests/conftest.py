"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("FORETELL_CACHE_GB", "0")  # tests leave no weights in the user's cache


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with corpora and real tokenizers; tests that need it skip where it is absent.

    FORETELL_DATA names it; without that, `shared/data` beside the checkout.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FORETELL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set FORETELL_DATA")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)
