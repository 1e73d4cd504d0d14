"""The first setting of every method runs by default; its further ones are slow tests."""

from __future__ import annotations

import pytest

import methods

FURTHER = {
    spec for name, specs in methods.DRAFTERS.items() if name != "draft-model" for spec in specs[1:]
}
FURTHER |= {"draft-model:tokens=1", "draft-model:tokens=2,branching=2"}
FURTHER |= {f"draft-model:{spec}" for specs in methods.TREES.values() for spec in specs[1:]}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("draft") in FURTHER:
            item.add_marker(pytest.mark.slow)
