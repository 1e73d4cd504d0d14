"""From names on a command line to the parts of an `LLM`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.core.protocols import BuildContext, TargetModel
from foretell.models.load import find_checkpoint, load_model
from foretell.models.text.tokenizer import Tokenizer


def load_parts(
    name: str | Path | None,
    *,
    deterministic: bool = False,
    progress: Callable[[float, str], None] | None = None,
    **kind: Any,
) -> BuildContext:
    """Target and tokenizer, and how drafters load models of theirs (each checkpoint once, of the
    same kind, and with the target's vocabulary). kind: dtype, device, backend of `load_model`."""
    folder = find_checkpoint(name)
    target = load_model(folder, progress=progress, deterministic=deterministic, **kind)
    tokenizer = Tokenizer.load(folder)
    tokenizer.check_vocab(target.spec.vocab)
    beside = folder / "draft"
    default = str(beside) if (beside / "config.json").is_file() else None
    drafts: dict[Path, TargetModel] = {}

    def load_draft(name: str) -> TargetModel:
        home = find_checkpoint(name)
        if home in drafts:
            return drafts[home]
        reason = tokenizer.same_vocabulary(Tokenizer.load(home))
        if reason:
            raise InputError(
                f"The draft model {name} does not share the target's vocabulary: {reason} "
                "Choose a drafter with the same tokenizer."
            )
        drafts[home] = load_model(home, **kind)
        return drafts[home]

    return BuildContext(target, tokenizer, load_draft, default)


def default_draft(context: BuildContext) -> str:
    """The drafter for draft="auto": the model beside the target if there is one."""
    if not context.target.spec.caps.rollback:
        return "none"
    return "draft-model" if context.default_draft else "prompt-lookup"
