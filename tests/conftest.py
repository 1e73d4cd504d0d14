"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from foretell.kernels.library import Library

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


@pytest.fixture(scope="module")
def lib() -> Library:
    """The compiled kernels of this process; tests of them skip where there are none."""
    from foretell import kernels

    found = kernels.load()
    if found is None:
        pytest.skip(kernels.why_not() or "no kernels")
    return found


@pytest.fixture(scope="module")
def libraries(lib: Library) -> list[Library]:
    """One for every instruction set of this processor."""
    from foretell.core.places import cache_folder
    from foretell.kernels import build
    from foretell.kernels.library import Library

    paths = [build.find_or_build(isa, cache_folder("kernels"))[0] for isa in build.supported()]
    return [Library(path) for path in paths if path is not None]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)
