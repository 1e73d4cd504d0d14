"""What the small JSON files around a tokenizer say: special tokens, templates, end-of-text ids."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError

# In the order in which transformers appends tokens that the vocabulary lacks: ids depend on it.
NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(slots=True)
class TextConfig:
    """The facts of tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    generation_config.json, config.json and the template files, whichever exist."""

    tokenizer_class: str = ""
    named: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", ...
    extra_special: list[str] = field(default_factory=list)  # additional_special_tokens
    added: dict[int, dict[str, Any]] = field(default_factory=dict)  # id -> AddedToken arguments
    templates: dict[str, str] = field(default_factory=dict)  # name -> Jinja source
    eos_ids: list[int] = field(default_factory=list)
    add_bos: bool | None = None  # None = not stated
    add_eos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool = True
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json as it stands

    @property
    def variables(self) -> dict[str, Any]:
        """What chat templates may read: bos_token, eos_token, ..."""
        extra = {"additional_special_tokens": self.extra_special} if self.extra_special else {}
        return {**self.named, **extra}


def read_json(path: Path) -> Any:
    """The parsed file, None when there is none. Raises InputError when it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as e:
        raise InputError(f"{path} cannot be read as JSON ({e}); restore or remove it.") from None


def _dict(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; restore or remove it.")
    return value


def token_text(value: Any) -> str | None:
    """A special token is written as a string, as {"content": ...}, or not at all."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added(config: dict[str, Any], folder: Path) -> dict[int, dict[str, Any]]:
    known = ("single_word", "lstrip", "rstrip", "normalized", "special")
    table = config.get("added_tokens_decoder")
    if isinstance(table, dict):
        try:
            return {
                int(i): {
                    "content": str(t["content"]),
                    **{k: bool(t[k]) for k in known if k in t},
                }
                for i, t in table.items()
            }
        except (KeyError, TypeError, ValueError):
            path = folder / "tokenizer_config.json"
            raise InputError(f"{path}: added_tokens_decoder is not a table of tokens.") from None
    legacy = _dict(folder / "added_tokens.json")
    return {i: {"content": t} for t, i in legacy.items() if isinstance(i, int)}


def _templates(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """All named templates; files of their own win over the one inside tokenizer_config.json."""
    found: dict[str, str] = {}

    def take(value: Any) -> None:
        if isinstance(value, str):
            found["default"] = value
        elif isinstance(value, list):
            for entry in value:
                if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                    found[str(entry.get("name", "default"))] = entry["template"]
        elif isinstance(value, dict):
            found.update({k: v for k, v in value.items() if isinstance(v, str)})

    take(config.get("chat_template"))
    take(_dict(folder / "chat_template.json").get("chat_template"))
    files = [folder / "chat_template.jinja"]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as e:
            raise InputError(f"{path} cannot be read ({e}); restore or remove it.") from None
        found["default" if path.parent == folder else path.stem] = text
    return found


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def read_text_config(folder: Path) -> TextConfig:
    """Read whatever is there; every file is optional. Raises InputError for a broken one."""
    config = _dict(folder / "tokenizer_config.json")
    generation = _dict(folder / "generation_config.json")
    model = _dict(folder / "config.json")
    special = dict(config)
    if "added_tokens_decoder" not in config:
        # Older checkpoints: the map is the newer word. Newer ones repeat it, sometimes stale.
        special.update(_dict(folder / "special_tokens_map.json"))
    named = {k: t for k in NAMED if (t := token_text(special.get(k)))}
    extra = special.get("additional_special_tokens") or special.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    nested = model.get("text_config") if isinstance(model.get("text_config"), dict) else {}
    eos = (
        _ids(generation.get("eos_token_id"))
        or _ids(model.get("eos_token_id"))
        or _ids((nested or {}).get("eos_token_id"))
    )
    return TextConfig(
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        named=named,
        extra_special=[t for v in extra if (t := token_text(v))],
        added=_added(config, folder),
        templates=_templates(config, folder),
        eos_ids=eos,
        add_bos=_flag(config.get("add_bos_token")),
        add_eos=_flag(config.get("add_eos_token")),
        add_prefix_space=_flag(config.get("add_prefix_space")),
        legacy=config.get("legacy") is not False,
        generation=generation,
    )
