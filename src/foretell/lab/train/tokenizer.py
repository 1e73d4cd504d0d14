"""The tokenizer of a base model: byte-level BPE, its special tokens, its chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from foretell.lab.train.corpora import Corpus

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, *(f"<|reserved_{i}|>" for i in range(5))]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Words take the space before them, digits stand alone (arithmetic), an indent of n spaces is one
# piece of n - 1 spaces and the word after it.
PRE_TOKENIZER = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE_CHARS = 5_000_000  # of every corpus, to learn the pieces from


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of one of SPECIAL_TOKENS."""
    found = tokenizer.token_to_id(token)
    assert found is not None, f"the tokenizer was built without {token}"
    return found


def render_chat(question: str, answer: str) -> str:
    """One exchange, character for character what the chat template makes of it."""
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


def build_tokenizer(corpora: list[Corpus], pieces: int) -> Tokenizer:
    """Byte-level BPE trained on an equal share of every corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample(corpus: Corpus, budget: int = 5_000_000) -> Iterator[str]:
        share = min(1.0, budget / sum(len(s) for d in corpus.train for s in d))
        for document in corpus.train:
            for i, segment in enumerate(document):
                if int(i * share) != int((i + 1) * share) or len(document) == 1:
                    # Special tokens must not teach the trainer pieces like "im_start".
                    yield re.sub(r"<\|\w+\|>", "", segment)

    tokenizer.train_from_iterator((s for c in corpora for s in sample(c)), trainer)
    return tokenizer
