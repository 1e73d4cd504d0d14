"""foretell: language models answer faster and say exactly the same.

Importing the package is cheap: torch is loaded when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.engine.llm import LLM, load

_PUBLIC = {
    "LLM": "foretell.engine.llm",
    "load": "foretell.engine.llm",
    "SamplingParams": "foretell.core.params",
    "InputError": "foretell.core.errors",
    "ForetellError": "foretell.core.errors",
}
__all__ = ["LLM", "SamplingParams", "load"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foretell' has no attribute '{name}'")
