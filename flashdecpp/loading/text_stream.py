"""Decodes a stream of tokens and finds the stop string that ends it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import BaseTokenizer

BROKEN = "\ufffd"  # decoded from bytes that are not (yet) a character
CONTEXT = 16  # prompt tokens that the first token is decoded with
UNFINISHED = 3  # maximum tokens waiting for the rest of a character, which has up to four bytes


class TextStream:
    """Turns tokens into text as they arrive, in whole characters, and stops at a stop string.

    stop: the first to be completed ends the text, wherever the token boundaries are. A special token in a
        stop string is found even if the text leaves it out.
    skip_special_tokens: the text leaves special tokens out.
    prompt_ids: the preceding tokens. Decoders treat the beginning of a text differently (SentencePiece drops
        a space), so without them prompt and answer would not concatenate to the text of all tokens.

    `text` is everything that push and finish have returned. Text that may begin a stop string is held back
    until that is decided. The time is linear in the number of tokens.
    """

    def __init__(
        self,
        tokenizer: "BaseTokenizer",
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._decoder = _Decoder(tokenizer, skip_special_tokens, prompt_ids)
        self._hidden = tokenizer.special_tokens if skip_special_tokens else {}
        self._stops = [pattern for text in stop for pattern in _patterns(text, self._hidden)]
        self._held = ""
        self._chunks: list[str] = []
        self.matched: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    @property
    def text(self) -> str:
        self._chunks = ["".join(self._chunks)]
        return self._chunks[0]

    def push(self, token: int) -> str:
        """The text that is final once this token has arrived."""
        if token not in self._hidden:
            return self._append(self._decoder.push(token))
        if not self._stops:
            return ""
        return self._append(self._decoder.finish()) + self._append([token])

    def finish(self) -> str:
        """The remaining text, after the last token."""
        rest = self._append(self._decoder.finish())
        held, self._held = self._held, ""
        return rest + self._emit(held)

    def _append(self, symbols: str | list[int]) -> str:
        """Appends characters, or the ids of special tokens that the text leaves out."""
        if self.stopped:
            return ""
        if isinstance(symbols, str) and not self._stops:
            return self._emit(symbols)
        for symbol in symbols:
            self._held += symbol if isinstance(symbol, str) else ""
            for stop in self._stops:
                if stop.feed(symbol):
                    self.matched = stop.text
                    final, self._held = self._held[: len(self._held) - stop.characters], ""
                    return self._emit(final)
        end = len(self._held) - max(stop.characters for stop in self._stops)
        final, self._held = self._held[:end], self._held[end:]
        return self._emit(final)

    def _emit(self, chunk: str) -> str:
        self._chunks.append(chunk)
        return chunk


class _Decoder:
    """Decodes tokens together with the preceding ones and waits for incomplete characters."""

    def __init__(self, tokenizer: "BaseTokenizer", skip: bool, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip
        hidden = tokenizer.special_tokens if skip else {}
        tail = prompt_ids[-4 * CONTEXT :]  # some may have no text
        self._context = [token for token in tail if token not in hidden][-CONTEXT:]
        while (known := self._decode(self._context)).startswith(BROKEN):  # begins inside a character
            del self._context[0]
        self._known = known  # the text of the context
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        self._waiting.append(token)
        whole = self._decode(self._context + self._waiting)
        if not whole.endswith(BROKEN):
            return self._settle(len(self._waiting), whole)
        return self._settle(1) if len(self._waiting) > UNFINISHED else ""

    def finish(self) -> str:
        return self._settle(len(self._waiting)) if self._waiting else ""

    def _settle(self, count: int, whole: str | None = None) -> str:
        """The text of the oldest `count` waiting tokens. `whole`: that text preceded by the context's."""
        tokens = self._waiting[:count]
        if whole is None:
            whole = self._decode(self._context + tokens)
        if not whole.startswith(self._known):
            # In some decoders, bytes that are not a character also break the preceding ones.
            if count > 1:
                return self._settle(1) + self._settle(count - 1)
            whole = self._known + self._decode(tokens)
        text = whole[len(self._known) :]
        del self._waiting[:count]
        if text:
            self._context, self._known = tokens, self._decode(tokens)
        elif not self._known:  # still at the beginning
            self._context = [*self._context, *tokens][-CONTEXT:]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class _Stop:
    """Finds a stop string in a stream of symbols by the algorithm of Knuth, Morris and Pratt."""

    def __init__(self, text: str, symbols: Sequence[str | int]) -> None:
        self.text, self._symbols = text, symbols
        self._found = 0  # length of the prefix that the newest symbols match
        self._sees_tokens = any(isinstance(symbol, int) for symbol in symbols)
        self._characters = [0, *accumulate(isinstance(symbol, str) for symbol in symbols)]
        # By the length of a prefix: the length of its longest proper suffix that is also a prefix
        self._shorter = [0, 0]
        for symbol in symbols[1:]:
            self._shorter.append(self._longer(self._shorter[-1], symbol))

    @property
    def characters(self) -> int:
        """The number of newest characters that may belong to the stop string."""
        return self._characters[self._found]

    def feed(self, symbol: str | int) -> bool:
        """Whether this symbol completes the stop string."""
        if isinstance(symbol, str) or self._sees_tokens:
            self._found = self._longer(self._found, symbol)
        return self._found == len(self._symbols)

    def _longer(self, found: int, symbol: str | int) -> int:
        while found and self._symbols[found] != symbol:
            found = self._shorter[found]
        return found + (self._symbols[found] == symbol)


def _patterns(text: str, hidden: Mapping[int, str]) -> Iterator[_Stop]:
    """Matchers of a stop string in characters and, if it contains special tokens, with these as symbols."""
    yield _Stop(text, text)
    ids = {content: token for token, content in hidden.items() if content and content in text}
    if ids:
        longest_first = sorted(ids, key=len, reverse=True)
        split = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        yield _Stop(text, [symbol for word in split for symbol in ([ids[word]] if word in ids else word)])
