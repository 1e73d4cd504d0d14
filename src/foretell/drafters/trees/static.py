"""A tree whose form is given."""

from __future__ import annotations

import json
from pathlib import Path as File

from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, SeqView
from foretell.drafters.trees.growing import Levels
from foretell.drafters.trees.plan import Path
from foretell.drafters.trees.shape import Shape


class Static(Shape):
    """The same tree every step: `paths` names its nodes by ranks.

    paths: a JSON file with lists of ranks (``[[0], [1], [0, 0], [0, 1]]``, the form of Medusa's
    choices), or the same in one word, ranks joined by dots and nodes by slashes:
    ``paths=0/1/0.0/0.1``. Order says what matters most: a smaller budget takes the first nodes.
    Under rejection rank r is the r-th draw without replacement, so a tree may not skip a rank.

    Paper: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
    Heads" (2024). Promise: keeps that of the verifier.
    """

    name = "static"
    paper = "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
    summary = "a tree that you name by the ranks of its nodes"

    def __init__(self, paths: str = "0/1/2/0.0/0.1/1.0/0.0.0/0.0.0.0") -> None:
        self.paths = closed(read_paths(paths))
        self.depth = max(len(p) for p in self.paths)

    def grow(self, view: SeqView, budget: Budget) -> TemplateGrower:
        return TemplateGrower(view, budget, fit(self.paths, budget))


def read_paths(text: str) -> list[Path]:
    """From a file or one word; InputError when it is neither."""
    file = File(text)
    try:
        if text.endswith(".json") or file.is_file():
            paths = [tuple(int(r) for r in p) for p in json.loads(file.read_text("utf-8"))]
        else:
            paths = [tuple(int(r) for r in p.split(".")) for p in text.split("/")]
    except OSError:
        raise InputError(f"tree=static: the file {text} cannot be read.") from None
    except (ValueError, TypeError):
        raise InputError(
            f"tree=static,paths={text}: give a JSON file with lists of ranks, or ranks joined by "
            "dots and nodes by slashes, for example 0/1/0.0/0.1."
        ) from None
    if not paths or not all(paths):
        raise InputError("tree=static needs at least one path, and none of them empty.")
    return paths


def closed(paths: list[Path]) -> list[Path]:
    """The same paths once each, or InputError where a parent or an elder sibling is missing."""
    known = {(), *paths}
    for path in paths:
        *above, rank = path
        needed = [tuple(above), (*above, rank - 1)] if rank > 0 else [tuple(above)]
        missing = next((p for p in needed if p not in known), None)
        if rank < 0 or missing is not None:
            what = "a negative rank" if missing is None else f"{list(missing)} is missing"
            raise InputError(
                f"tree=static: the tree has {list(path)}, but {what}: parents and earlier ranks "
                "must be there too."
            )
    return list(dict.fromkeys(paths))


def fit(paths: list[Path], budget: Budget) -> dict[Path, int]:
    """The first nodes of `paths` that fit: how many children each one has ({} = draft nothing)."""
    if budget.none:
        return {}
    kept: set[Path] = {()}
    waiting = [p for p in paths if len(p) <= budget.depth and max(p) < budget.branching]
    while waiting and len(kept) <= budget.nodes:
        later: list[Path] = []
        for p in waiting:
            *above, rank = p
            ready = tuple(above) in kept and (rank == 0 or (*above, rank - 1) in kept)
            if ready and len(kept) <= budget.nodes:
                kept.add(p)
            else:
                later.append(p)
        waiting = later
    count: dict[Path, int] = {}
    for p in kept - {()}:
        count[p[:-1]] = count.get(p[:-1], 0) + 1
    return count


class TemplateGrower(Levels):
    """children: how many of them each path has."""

    def __init__(self, view: SeqView, budget: Budget, children: dict[Path, int]) -> None:
        super().__init__(view, budget)
        self.children = children
        self.place: dict[int, Path] = {-1: ()}  # node -> its path of ranks
        if not children:
            self.front = []

    def expand(self, logits: Tensor) -> None:
        wanted = [self.children[self.place[n]] for n in self.front]
        fresh: list[int] = []
        for below, k in zip(self.drawn(logits, self.front, max(wanted)), wanted, strict=True):
            above = self.place[below.node]
            nodes = self.add(below, 0, k)
            self.place.update((n, (*above, r)) for r, n in enumerate(nodes))
            fresh += nodes
        self.front = [n for n in fresh if self.place[n] in self.children and self.goes_on(n)]
