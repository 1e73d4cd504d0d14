"""The settings that `foretell tune` tries, as drafter specs with an optional policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foretell.core.registry import Spec, names

PLAIN = "none"


@dataclass(frozen=True, slots=True)
class Setting:
    """A drafter and an effort policy. Written `draft` or `draft + policy`."""

    draft: str
    policy: str = "fixed"

    def __str__(self) -> str:
        return self.draft if self.policy == "fixed" else f"{self.draft} + {self.policy}"

    @classmethod
    def parse(cls, text: str) -> Setting:
        draft, _, policy = text.partition(" + ")
        return cls(draft.strip(), policy.strip() or "fixed")


TABLES = (
    "prompt-lookup:tokens=4",
    "prompt-lookup:tokens=8",
    "prompt-lookup:tokens=15",
    "suffix",
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
    "draft-model:tokens=15 + confidence",
    "draft-model:tokens=15 + goodput",
    "draft-model:tree=dyspec,nodes=7",
    "draft-model:tree=dyspec,nodes=15",
    "draft-model:tree=optimal",
)


def space(draft: bool, branching: bool = True, path: str | None = None) -> list[str]:
    """Every setting this installation has, plain decoding first.

    draft: whether a draft model is at hand (`path`, or the one beside the target); branching:
    whether the target scores trees.
    """
    wanted = [*TABLES, *(MODEL if draft else ())]
    if not branching:
        wanted = [w for w in wanted if "tree=" not in w]
    return [PLAIN, *(_with_path(w, path) for w in wanted if _known(w))]


def _known(text: str) -> bool:
    setting = Setting.parse(text)
    tree = Spec.parse(setting.draft).options.get("tree")
    return (
        Spec.parse(setting.draft).name in names("drafter")
        and Spec.parse(setting.policy).name in names("policy")
        and (tree is None or tree in names("tree"))
    )


def _with_path(text: str, path: str | None) -> str:
    setting = Setting.parse(text)
    spec = Spec.parse(setting.draft)
    if path is None or spec.name != "draft-model":
        return text
    with_path = Spec(spec.name, {"path": path, **spec.options})
    return str(Setting(str(with_path), setting.policy))


def check(settings: Iterable[str]) -> list[str]:
    """Parse what a user listed; InputError names an unknown method."""
    from foretell.core.registry import lookup

    found = []
    for text in settings:
        setting = Setting.parse(text)
        lookup("drafter", Spec.parse(setting.draft).name)
        lookup("policy", Spec.parse(setting.policy).name)
        found.append(str(setting))
    return found
