"""The shape of the package: imports go down only, and modules hold no mutable state."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import foretell
from foretell.core import registry

ROOT = Path(foretell.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MIDDLE = {"models", "drafters", "verify", "control", "denoise"}
MAY_IMPORT = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    **{m: {"core", "kernels", m} for m in MIDDLE},
    "engine": {"core", "engine"} | MIDDLE,
    "serve": {"core", "engine", "serve"} | MIDDLE,
    "lab": {"core", "kernels", "engine", "lab"} | MIDDLE,
    "cli": {"core", "engine", "serve", "lab", "cli"} | MIDDLE,
    "": {"core", "engine"},  # __init__.py, __main__.py
}
TOP = {"__init__.py": {"core", "engine"}, "__main__.py": {"cli"}}
STATE_ALLOWED: set[str] = set()  # "file.py:name", each with a reason beside it


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield module
            if module == "foretell":
                yield from (f"foretell.{a.name}" for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down_only(path: Path) -> None:
    allowed = TOP.get(path.name, set()) if layer(path) == "" else MAY_IMPORT[layer(path)]
    for module in imported(ast.parse(path.read_text("utf-8"))):
        parts = module.split(".")
        if parts[0] != "foretell" or len(parts) == 1 or not (ROOT / parts[1]).is_dir():
            continue
        assert parts[1] in allowed, f"{name(path)} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_transformers_stays_behind_its_adapter(path: Path) -> None:
    if layer(path) == "lab" or name(path).startswith("models/hf"):
        return
    for module in imported(ast.parse(path.read_text("utf-8"))):
        assert module.split(".")[0] != "transformers", f"{name(path)} imports transformers"


def mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp):
        return True
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func).split(".")[-1]
        return called in {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
    return False


CHANGING = frozenset(
    {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend"}
    | {"insert", "remove", "discard", "sort"}
)


def changed_names() -> frozenset[str]:
    """Names that some statement of the package changes in place."""

    def named(node: ast.expr) -> str:
        return ast.unparse(node).split(".")[-1]

    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign | ast.Delete):
                targets = node.targets
            elif isinstance(node, ast.AugAssign):
                targets = [node.target]
                found.add(named(node.target))
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in CHANGING
            ):
                found.add(named(node.func.value))
            found |= {named(t.value) for t in targets if isinstance(t, ast.Subscript)}
    return frozenset(found)


CHANGED = changed_names()


def is_constant(target: str) -> bool:
    """A table in UPPER CASE that nothing in the package changes."""
    return target == "__all__" or (target.isupper() and target not in CHANGED)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_hold_no_mutable_state(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign):
            pairs = [(ast.unparse(t), node.value) for t in node.targets]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(ast.unparse(node.target), node.value)]
        else:
            continue
        for target, value in pairs:
            if mutable(value) and not is_constant(target):
                assert f"{name(path)}:{target}" in STATE_ALLOWED, (
                    f"{name(path)}: '{target}' is mutable state of the module; make it a tuple, "
                    "frozenset or MappingProxyType, name it as a CONSTANT, or keep it in an object"
                )
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{name(path)} uses 'global'"


@pytest.mark.parametrize("path", sorted((ROOT / "engine").glob("*.py")), ids=name)
def test_the_engine_treats_all_drafters_alike(path: Path) -> None:
    """No `isinstance(x, SomeDrafter)`, and no import of one."""
    classes = {
        target.split(":")[1]
        for kind in ("drafter", "verifier", "policy")
        for target in registry.BUILTIN[kind].values()
    }
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not named & classes, ast.unparse(node)
    modules = set(imported(tree))
    assert not [m for m in modules if m.startswith(("foretell.drafters", "foretell.verify."))]


@pytest.mark.parametrize("code", ["import foretell", "import foretell; foretell.SamplingParams"])
def test_importing_the_package_loads_no_torch(code: str) -> None:
    heavy = {"torch", "numpy", "transformers", "tokenizers"}
    check = f"import sys; heavy = {heavy} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}; assert not heavy, heavy"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
