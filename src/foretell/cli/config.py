"""`--config FILE`: defaults of options from a file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from foretell.cli.options import ModelOptions, SamplingOptions
from foretell.core.errors import InputError
from foretell.core.registry import suggest


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this call."""
    if path is None or context.resilient_parsing:
        return path
    try:
        values = json.loads(path.read_bytes())
    except OSError as e:
        raise InputError(f"The config file {path} cannot be read ({e.strerror}).") from None
    except ValueError as e:
        raise InputError(f"The config file {path} is no JSON ({e}).") from None
    if not isinstance(values, dict):
        raise InputError(f"The config file {path} holds no JSON object.")
    here = {p.name for p in context.command.params}
    shared = {f.name for group in (ModelOptions, SamplingOptions) for f in fields(group)}
    known = (here | shared) - {"config", "help"}
    values.pop("tuned", None)  # what `foretell tune` measured, for people
    defaults = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise InputError(f"{path}: there is no option '{key}', {suggest(name, known)}")
        if value is not None and name in here:  # another command's options are for that command
            defaults[name] = _words(name, value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _words(name: str, value: Any) -> Any:
    """JSON -> what would stand on the command line."""
    if name == "logit_bias" and isinstance(value, dict):
        return [f"{k}={v}" for k, v in value.items()]
    if name == "allowed_ids" and isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, list):
        return [_words("", v) for v in value]
    if isinstance(value, bool):
        return value
    return json.dumps(value) if isinstance(value, dict) else str(value)


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON object of option defaults.",
        is_eager=True,
        callback=_read_config,
    ),
]
