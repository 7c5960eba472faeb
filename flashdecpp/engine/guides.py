"""Masks of the tokens that may come next, written on the host between two steps: grammars and bad words.

A grammar library's matcher becomes a guide in a few lines. With llguidance:

    from llguidance import LLMatcher
    from llguidance.torch import fill_next_token_bitmask

    class Grammar:
        def __init__(self, tokenizer, grammar):
            self.matcher = LLMatcher(tokenizer, grammar)

        def fill(self, mask):
            fill_next_token_bitmask(self.matcher, mask.unsqueeze(0))

        def accept(self, token):
            self.matcher.consume_token(token)

    # once per model, with as many tokens as the model has logits; hf_tokenizer is a transformers tokenizer
    tokenizer = llguidance.hf.from_tokenizer(hf_tokenizer, n_vocab=llm.config.vocab)
    grammar = LLMatcher.grammar_from_json_schema(schema)
    params = SamplingParams(guide=lambda: Grammar(tokenizer, grammar))

With xgrammar, `fill` is `matcher.fill_next_token_bitmask(mask.unsqueeze(0))` and `accept` is
`matcher.accept_token(token)`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from flashdecpp.errors import ModelError
from flashdecpp.loading.tokenizer import BaseTokenizer

ALL = -1  # int32 word of a mask that allows all its 32 tokens


@runtime_checkable
class Guide(Protocol):
    """Decides which tokens of an answer may come next. It holds state, so every answer has its own."""

    def fill(self, mask: torch.Tensor) -> None:
        """Writes the mask of the next token: bit i % 32 of word i // 32 allows token i.

        mask: int32 [ceil(vocab / 32)] on the CPU, contiguous, with all bits set. End-of-sequence tokens are
        treated like others: the answer may end if their bits are set.
        """

    def accept(self, token: int) -> None:
        """Records the chosen token. Not called for a token that ends the answer."""


GuideFactory = Callable[[], Guide]


class BadWords:
    """Excludes the last token of each word once the answer ends with the word's other tokens."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._words = [(tuple(word[:-1]), word[-1]) for word in words]
        self._longest = max(len(start) for start, _ in self._words)
        self._newest: tuple[int, ...] = ()

    def fill(self, mask: torch.Tensor) -> None:
        for start, last in self._words:
            if not start or self._newest[-len(start) :] == start:
                mask[last // 32] &= ~_bit(last)

    def accept(self, token: int) -> None:
        self._newest = (*self._newest, token)[-self._longest :] if self._longest else ()


def spellings(words: Sequence[str], tokenizer: BaseTokenizer) -> list[list[int]]:
    """The tokens of each word, as it is and after a space."""
    texts = [text for word in words for text in (word, " " + word.lstrip())]
    ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return [list(word) for word in dict.fromkeys(ids) if word]


def mask_words(vocab: int) -> int:
    """The length of a mask."""
    return -(-vocab // 32)


def fill_mask(guides: Sequence[Guide], mask: torch.Tensor) -> None:
    """Writes the tokens that all guides allow into mask, int32 [mask_words(vocab)] on the CPU."""
    mask.fill_(ALL)
    guides[0].fill(mask)
    for guide in guides[1:]:
        other = torch.full_like(mask, ALL)
        guide.fill(other)
        mask &= other


def new_guide(factory: GuideFactory) -> Guide:
    """Calls the user's factory and checks its result."""
    guide = factory()
    if not isinstance(guide, Guide):
        raise ModelError(f"guide must return an object with fill and accept, got {type(guide).__name__}")
    return guide


def _bit(token: int) -> int:
    """The bit of a token in its word, as an int32."""
    bit = 1 << token % 32
    return bit - (1 << 32) if bit >= 1 << 31 else bit
