"""Method specs and the registry."""

from __future__ import annotations

from importlib import metadata

import pytest

from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.protocols import BuildContext
from foretell.core.registry import Spec
from foretell.drafters.ngram import PromptLookup
from helpers_model import TableModel, pair


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("none", "none", {}),
        (" none ", "none", {}),
        ("a:b=1", "a", {"b": "1"}),
        ("a:b=1,c=x=y", "a", {"b": "1", "c": "x=y"}),
        ("a: b = 1 , c = /some/dir ", "a", {"b": "1", "c": "/some/dir"}),
        ("a:path=C:/x", "a", {"path": "C:/x"}),
        ('{"method": "ngram", "num_speculative_tokens": 3}', "prompt-lookup", {"tokens": 3}),
        (
            {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2},
            "prompt-lookup",
            {"max_ngram": 4, "min_ngram": 2},
        ),
        (
            {"model": "DIR", "num_speculative_tokens": 2},
            "draft-model",
            {"path": "DIR", "tokens": 2},
        ),
        ({"method": "draft_model", "model": "DIR"}, "draft-model", {"path": "DIR"}),
    ],
)
def test_specs_are_read(text, name: str, options: dict) -> None:
    spec = Spec.parse(text)
    assert (spec.name, spec.options) == (name, options)
    assert Spec.parse(spec) is spec
    if isinstance(text, str) and not text.lstrip().startswith("{"):
        assert Spec.parse(str(spec)) == spec


class Sized:
    """Makes its first parameter of the context and a path of another option."""

    from_context = ("vocab", "store")

    def __init__(self, vocab: int, nodes: int = 4, store: list[int] | None = None) -> None:
        self.vocab, self.nodes, self.store = vocab, nodes, store

    @classmethod
    def build(cls, context: BuildContext, path: str = "", store: str = "", **options) -> Sized:
        return cls(context.target.spec.vocab, store=[len(path), len(store)], **options)


class Child(Sized):
    pass


@pytest.mark.parametrize("cls", [Sized, Child])
def test_the_constructors_options_need_not_be_named_twice(monkeypatch, cls) -> None:
    monkeypatch.setattr(registry, "lookup", lambda kind, name: cls)
    context = BuildContext(TableModel(9))
    assert list(registry.parameters(cls)) == ["path", "nodes", "store"]
    made = registry.create("drafter", "x:nodes=7,path=abc", context)
    assert (made.vocab, made.nodes, made.store) == (9, 7, [3, 0])
    assert registry.create("drafter", "x:store=ab", context).store == [0, 2]
    for wrong in ("x:vocab=3", "x:zzz=1", "x:nodes=many"):
        with pytest.raises(InputError):
            registry.create("drafter", wrong, context)


def test_a_list_is_cut_outside_of_brackets() -> None:
    assert registry.split("a(b,c),d", ",") == ["a(b,c)", "d"]
    assert registry.split("a[b,c];{d,e}", ",;", "[]{}") == ["a[b,c]", "{d,e}"]
    after_a = registry.split("a,b,c", ",", cuts=lambda separator, rest: rest.startswith("b"))
    assert after_a == ["a", "b,c"]


@pytest.mark.parametrize("text", ["a:b", "a:=1", "{", '{"tokens": 3}', "{}"])
def test_bad_specs_are_explained(text: str) -> None:
    with pytest.raises(InputError):
        Spec.parse(text)


@pytest.mark.parametrize(
    ("kind", "spec", "match"),
    [
        ("drafter", "promt-lookup", "did you mean 'prompt-lookup'"),
        ("drafter", "zzz", "there are: aded, aggressive, .*, none, prompt-lookup"),
        ("drafter", "", "Unknown drafter"),
        ("verifier", "gredy", "did you mean 'greedy'"),
        ("policy", "fix", "did you mean 'fixed'"),
        ("drafter", "prompt-lookup:token=3", "did you mean 'tokens'"),
        ("drafter", "prompt-lookup:tokens=three", "not a valid int"),
        ("drafter", {"method": "ngram", "num_speculative_tokens": 2.5}, "not a valid int"),
        ("drafter", {"method": "ngram", "num_speculative_tokens": True}, "not a valid int"),
        ("drafter", {"method": "ngram", "num_speculative_tokens": None}, "not a valid int"),
        ("drafter", "none:tokens=3", "takes no options"),
        ("verifier", "greedy:x=1", "takes no options"),
        ("drafter", "prompt-lookup:tokens=0", "at least 1"),
        ("drafter", "prompt-lookup:min_ngram=5", "min_ngram <= max_ngram"),
        ("drafter", "prompt-lookup:span=output", "neither"),
        ("drafter", "draft-model", "needs a smaller checkpoint"),
        ("policy", "confidence:threshold=2", "outside 0..1"),
    ],
)
def test_mistakes_get_one_sentence(kind: str, spec, match: str) -> None:
    with pytest.raises(InputError, match=match) as e:
        registry.create(kind, spec, BuildContext(TableModel()))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("option", ["tokens=0", "branching=0", "tokens=-3"])
def test_draft_model_options_are_checked(option: str) -> None:
    with pytest.raises(InputError, match=">= 1"):
        registry.create("drafter", f"draft-model:{option}", pair()[1])


def test_options_reach_the_method() -> None:
    made = registry.create("drafter", "prompt-lookup:tokens=3,max_ngram=5,span=prompt")
    assert (made.tokens, made.max_ngram, made.prompt_only) == (3, 5, True)
    asked = []
    target, context = pair()
    context.load_model = lambda path: asked.append(path) or target
    made = registry.create("drafter", "draft-model:path=DIR,tokens=7,branching=2", context)
    assert asked == ["DIR"]
    assert (made.tokens, made.branching) == (7, 2)


def test_third_parties_add_methods_by_entry_points(monkeypatch) -> None:
    point = metadata.EntryPoint("mine", f"{__name__}:Mine", "foretell.drafters")
    shadow = metadata.EntryPoint("none", f"{__name__}:Mine", "foretell.drafters")

    def entry_points(group: str):
        return [point, shadow] if group == "foretell.drafters" else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert "mine" in registry.names("drafter")
    assert registry.names("drafter")["none"] == registry.BUILTIN["drafter"]["none"]
    made = registry.create("drafter", "mine:strength=3")
    assert type(made).__name__ == "Mine"
    assert made.strength == 3.0
    assert registry.create("drafter", "mine").strength is None
    assert registry.create("drafter", "mine:strength=none").strength is None
    assert registry.create("drafter", "mine:eager=true").eager is True
    with pytest.raises(InputError, match="bool"):
        registry.create("drafter", "mine:eager=maybe")


class Mine:
    def __init__(self, strength: float | None = None, eager: bool = False) -> None:
        self.strength, self.eager = strength, eager


def test_methods_may_be_given_as_objects() -> None:
    from foretell import LLM

    drafter = PromptLookup()
    assert LLM(TableModel(), draft=drafter).drafter is drafter
