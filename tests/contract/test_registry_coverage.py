"""Every registered method is covered by the contract, keeps the form, and imports cleanly."""

from __future__ import annotations

import subprocess
import sys

import pytest

import methods
from foretell.core import registry
from foretell.core.protocols import Draw, Needs, Promise

OPTIONAL = "transformers sentencepiece scipy datasets matplotlib optuna fastapi uvicorn llguidance"
METHODS = [(kind, name) for kind in registry.BUILTIN for name in registry.BUILTIN[kind]]


@pytest.mark.parametrize(
    ("kind", "listed"),
    [
        ("drafter", methods.DRAFTERS),
        ("verifier", methods.VERIFIERS),
        ("policy", methods.POLICIES),
        ("tree", methods.TREES),
        ("mode", methods.MODES),
    ],
)
def test_every_registered_method_is_in_the_contract(kind: str, listed: dict) -> None:
    missing = set(registry.BUILTIN[kind]) - set(listed)
    assert not missing, (
        f"The {kind}s {sorted(missing)} are registered but not in tests/contract/methods.py: "
        "add an entry with the settings to test."
    )
    assert not set(listed) - set(registry.BUILTIN[kind])


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_says_what_it_is(kind: str, name: str) -> None:
    method = registry.lookup(kind, name)
    assert method.name == name
    assert method.summary
    assert isinstance(method.paper, str)
    if kind != "policy":
        assert method.promise in Promise
    if kind == "drafter":
        assert isinstance(method.needs, Needs)
    if kind == "verifier":
        assert method.draw in Draw
        assert method.accepts <= {"chain", "tree", "onehot", "q"}


def test_importing_the_methods_needs_no_optional_package() -> None:
    modules = sorted({registry.BUILTIN[k][n].split(":")[0] for k, n in METHODS})
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL.split()!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
