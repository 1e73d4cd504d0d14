"""Text to ids and back, for any checkpoint directory. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from foretell.core.errors import InputError
from foretell.models.text import chat as templates
from foretell.models.text import convert
from foretell.models.text.config import NAMED, TextConfig, read_text_config
from foretell.models.text.pieces import Detokenizer
from foretell.models.text.stream import StreamDecoder

# Classes for which add_bos_token / add_eos_token overrule tokenizer.json; add_bos_token's default.
_OVERRULE = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Ids are those transformers gives for the same directory. `decode` differs from it in two ways:
    spaces before punctuation are never "cleaned up", and invalid UTF-8 inside a run of byte tokens
    costs only the invalid bytes (see `text.pieces`).
    """

    def __init__(self, backend: Backend, config: TextConfig | None = None, name: str = "") -> None:
        """backend: a `tokenizers.Tokenizer`; use `load` for a checkpoint directory."""
        self.backend, self.config, self.name = backend, config or TextConfig(), name
        backend.no_truncation()
        backend.no_padding()
        self._add_tokens()
        named = self.config.named
        self.bos_id: int | None = self._id(named.get("bos_token"))
        eos = self._id(named.get("eos_token"))
        # Both count: chat models often end a turn with a token that only one of the files names.
        self.eos_ids: frozenset[int] = frozenset(
            [*self.config.eos_ids, *([] if eos is None else [eos])]
        )
        self.special_ids: frozenset[int] = frozenset(
            i for i, t in backend.get_added_tokens_decoder().items() if t.special
        )
        self.detokenizer = Detokenizer(backend, self.special_ids)
        self._wrap: tuple[list[int], list[int]] | None = None  # ids put around a text
        default = _OVERRULE.get(self.config.tokenizer_class.removesuffix("Fast"))
        if default is not None:
            self._set_wrap(default if self.config.add_bos is None else self.config.add_bos)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load from tokenizer.json, or tokenizer.model, or vocab.json + merges.txt.

        Raises InputError when there is none of them or one is broken.
        """
        folder = Path(folder)
        config = read_text_config(folder)
        if (path := folder / "tokenizer.json").is_file():
            try:
                backend = Backend.from_file(str(path))
            except Exception as e:  # the library raises bare Exceptions
                raise InputError(f"{path} is broken ({e}); copy it again.") from None
            _no_prefix_space(backend, config)
            return cls(backend, config, folder.name)
        bos = False
        if (path := folder / "tokenizer.model").is_file():
            backend, named = convert.from_sentencepiece(path, config)
            bos = convert.begins_with_bos(backend)
        else:
            for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if all((folder / n).is_file() for n in names):
                    vocab, merges = (folder / n for n in names)
                    backend, named = convert.from_gpt2(vocab, merges, config)
                    break
            else:
                what = (
                    "is no directory"
                    if not folder.is_dir()
                    else ("has no tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
                )
                raise InputError(f"{folder} {what}; point at a complete checkpoint.")
        config.named = {**named, **config.named}
        tokenizer = cls(backend, config, folder.name)
        tokenizer._set_wrap(bos if config.add_bos is None else config.add_bos)
        return tokenizer

    def _set_wrap(self, add_bos: bool) -> None:
        eos = self._id(self.config.named.get("eos_token")) if self.config.add_eos else None
        bos = self.bos_id if add_bos else None
        self._wrap = ([] if bos is None else [bos], [] if eos is None else [eos])

    def _add_tokens(self) -> None:
        """Add the tokens that only the configuration names, in the order that gives their ids."""
        config = self.config
        special = [config.named[k] for k in NAMED if k in config.named] + config.extra_special
        known = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        new = []
        for _, arguments in sorted(config.added.items()):
            content = arguments["content"]
            if content not in known:
                flag = bool(arguments.get("special")) or content in special
                new.append(AddedToken(**{**arguments, "special": flag}))
                known.add(content)
        for content in special:
            if content not in known:
                new.append(AddedToken(content, special=True, normalized=False))
                known.add(content)
        for token in new:
            add = self.backend.add_special_tokens if token.special else self.backend.add_tokens
            add([token])

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    # text <-> ids

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; with `add_special` the beginning-of-text id the model expects, if any.

        Special tokens spelt out in the text become their ids. Raises InputError for text that is
        not Unicode (half a surrogate pair).
        """
        own = add_special and self._wrap is None
        try:
            ids = self.backend.encode(text, add_special_tokens=own).ids
        except (TypeError, UnicodeEncodeError):
            raise InputError("The text holds half a surrogate pair; send valid Unicode.") from None
        if add_special and self._wrap is not None:
            head, tail = self._wrap
            return [*head, *ids, *tail]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; ids that name no token (padding of the vocabulary) give nothing."""
        detok, texts = self.detokenizer, []
        state = detok.start()
        for i in ids:
            text, state = detok.step(state, i, skip_special=skip_special)
            texts.append(text)
        return "".join(texts) + detok.finish(state)

    def stream(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """An incremental decoder of what follows `prompt_ids`."""
        return StreamDecoder(self, prompt_ids)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it ("Ġthe", "▁the"); "" for an id without one."""
        return self.backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for in the middle of a text; b"" for an id without one."""
        return self.detokenizer.raw(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token spelt as in the vocabulary, None when there is none."""
        return self._id(token)

    # chat

    @property
    def has_chat_template(self) -> bool:
        return bool(self.config.templates)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, through the model's own chat template.

        messages: {"role": ..., "content": ...}; tools: JSON schemas; variables: what else the
        template reads (enable_thinking, documents, ...).
        Raises InputError when there is no template or it refuses the conversation.
        """
        source = templates.choose(self.config.templates, tools)
        given = {
            **self.config.variables,
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        return templates.render(source, messages, **given)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Ids of a conversation (see `render_chat`). The template writes the beginning-of-text
        token itself where the model wants one, so none is added here."""
        text = self.render_chat(messages, add_generation_prompt, **options)
        return self.encode(text, add_special=False)

    # the vocabulary as a whole

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1. The model's embedding may be longer (padding)."""
        return max(self._vocab.values(), default=-1) + 1

    def check_vocab(self, rows: int) -> None:
        """Raise InputError when a model with `rows` embedding rows lacks ids of the vocabulary."""
        if self.vocab_size > rows:
            raise InputError(
                f"The tokenizer has {self.vocab_size} ids but the model only {rows}; "
                "they do not belong together."
            )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all (id, token) pairs: equal iff the vocabularies are."""
        digest = hashlib.sha256()
        for token, i in sorted(self._vocab.items(), key=lambda pair: (pair[1], pair[0])):
            digest.update(f"{i}\t{len(token)}\t{token}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    def same_vocabulary(self, other: Tokenizer) -> str | None:
        """None when every id that both have names the same token, else one sentence saying why
        not. One vocabulary may go on where the other ends: such ids are simply never drafted."""
        if self.fingerprint == other.fingerprint:
            return None
        mine = {i: t for t, i in self._vocab.items()}
        theirs = {i: t for t, i in other._vocab.items()}
        shared = mine.keys() & theirs.keys()
        differ = [i for i in shared if mine[i] != theirs[i]]
        if not shared:
            return "The two vocabularies share no id."
        if differ:
            i = min(differ)
            return (
                f"The vocabularies differ at {len(differ)} of {len(shared)} shared ids, "
                f"first at {i}: {mine[i]!r} against {theirs[i]!r}."
            )
        return None


def _no_prefix_space(backend: Backend, config: TextConfig) -> None:
    """transformers lets tokenizer_config.json decide about a leading space, whatever
    tokenizer.json says; models are used that way, so follow."""
    before = backend.pre_tokenizer
    if isinstance(before, pre_tokenizers.ByteLevel):
        before.add_prefix_space = bool(config.add_prefix_space)
