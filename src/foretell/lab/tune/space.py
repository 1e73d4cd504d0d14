"""The settings that `foretell tune` tries, written as `foretell bench` writes methods."""

from __future__ import annotations

from foretell.core.registry import Spec, names
from foretell.lab.bench.methods import PLAIN, Method, parse_methods

TABLES = (
    "prompt-lookup:tokens=4",
    "prompt-lookup:tokens=8",
    "prompt-lookup:tokens=15",
    "suffix",
    "blend",
    "token-recycling",
    "stand",
    "bandit",
)
MODEL = (
    "draft-model:tokens=2",
    "draft-model:tokens=3",
    "draft-model:tokens=5",
    "draft-model:tokens=7",
    "draft-model:tokens=11",
    "draft-model:tokens=15",
    "draft-model:tokens=15+policy=confidence",
    "draft-model:tokens=15+policy=goodput",
    "draft-model:tree=dyspec,nodes=7",
    "draft-model:tree=dyspec,nodes=15",
    "draft-model:tree=optimal",
)


def space(draft: bool, branching: bool = True, path: str | None = None) -> list[Method]:
    """Every setting this installation has, plain decoding first.

    draft: whether a draft model is at hand (`path`, or the one beside the target); branching:
    whether the target scores trees.
    """
    wanted = [*TABLES, *(MODEL if draft else ())]
    if not branching:
        wanted = [w for w in wanted if "tree=" not in w]
    if path is not None:
        wanted = [w.replace("draft-model:", f"draft-model:path={path},") for w in wanted]
    return parse_methods([PLAIN, *filter(_known, wanted)])


def _known(text: str) -> bool:
    """Whether all parts are there (a plug-in may be missing)."""
    draft, _, policy = text.partition("+policy=")
    spec = Spec.parse(draft)
    tree = spec.options.get("tree")
    return (
        spec.name in names("drafter")
        and (not policy or Spec.parse(policy).name in names("policy"))
        and (tree is None or tree in names("tree"))
    )
