"""Tokens to text, one after the other, and where a stop string ends it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import BaseTokenizer

BROKEN = "\ufffd"  # what bytes that are no character (yet) are decoded to
CONTEXT = 16  # tokens before the answer that its first token is decoded with
UNFINISHED = 3  # tokens at most that may wait for the rest of their character: it has up to four bytes


class TextStream:
    """Turns tokens into text as they come, never a broken character, and stops at a stop string.

    stop: of several, the one whose end comes first counts, however the text is divided into tokens. A special
        token in a stop string is also found where the text leaves it out.
    skip_special_tokens: the text leaves special tokens out.
    prompt_ids: what comes before. Decoders treat the beginning of a text unlike its middle (SentencePiece's
        drop a space), so that prompt and answer together are the text of all tokens.

    `text` is what push and finish have returned so far; what could be the beginning of a stop string is held
    back until it's known not to be one. The time is linear in the number of tokens.
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
        self._pieces: list[str] = []
        self.matched: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    @property
    def text(self) -> str:
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token: int) -> str:
        """The text that is certain after this token."""
        if token not in self._hidden:
            return self._take(self._decoder.push(token))
        if not self._stops:
            return ""
        return self._take(self._decoder.finish()) + self._take([token])

    def finish(self) -> str:
        """The rest, once no token will follow."""
        rest = self._take(self._decoder.finish())
        held, self._held = self._held, ""
        return rest + self._emit(held)

    def _take(self, symbols: Iterable[str | int]) -> str:
        """Characters, and the ids of special tokens that the text leaves out."""
        if self.stopped:
            return ""
        if not self._stops:
            return self._emit("".join(symbols))
        for symbol in symbols:
            self._held += symbol if isinstance(symbol, str) else ""
            for stop in self._stops:
                if stop.feed(symbol):
                    self.matched = stop.text
                    sure, self._held = self._held[: len(self._held) - stop.characters], ""
                    return self._emit(sure)
        sure = len(self._held) - max(stop.characters for stop in self._stops)
        piece, self._held = self._held[:sure], self._held[sure:]
        return self._emit(piece)

    def _emit(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


class _Decoder:
    """Decodes tokens together with those before them, and waits where a character is incomplete."""

    def __init__(self, tokenizer: "BaseTokenizer", skip: bool, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip
        hidden = tokenizer.special_tokens if skip else {}
        tail = prompt_ids[-4 * CONTEXT :]  # some of which may have no text
        self._before = [token for token in tail if token not in hidden][-CONTEXT:]
        while (known := self._decode(self._before)).startswith(BROKEN):  # begins inside a character
            del self._before[0]
        self._known = known
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        self._waiting.append(token)
        whole = self._decode(self._before + self._waiting)
        if not whole.endswith(BROKEN):
            return self._settle(len(self._waiting), whole)
        return self._settle(1) if len(self._waiting) > UNFINISHED else ""

    def finish(self) -> str:
        return self._settle(len(self._waiting)) if self._waiting else ""

    def _settle(self, count: int, whole: str | None = None) -> str:
        """The text of the oldest `count` tokens that wait. `whole`: with that of the tokens before them."""
        tokens = self._waiting[:count]
        if whole is None:
            whole = self._decode(self._before + tokens)
        if not whole.startswith(self._known):
            # Bytes that are no character spoil those before them in some decoders.
            if count > 1:
                return self._settle(1) + self._settle(count - 1)
            whole = self._known + self._decode(tokens)
        piece = whole[len(self._known) :]
        del self._waiting[:count]
        if piece:
            self._before, self._known = tokens, self._decode(tokens)
        elif not self._known:  # still at the beginning
            self._before = [*self._before, *tokens][-CONTEXT:]
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class _Stop:
    """Finds a stop string in symbols that come one at a time, as Knuth, Morris and Pratt do."""

    def __init__(self, text: str, symbols: Sequence[str | int]) -> None:
        self.text, self._symbols = text, symbols
        self._found = 0  # symbols of the beginning that the newest symbols are
        self._sees_tokens = any(isinstance(symbol, int) for symbol in symbols)
        self._characters = [0, *accumulate(isinstance(symbol, str) for symbol in symbols)]
        # For each length of a beginning, that of the longest shorter beginning with which it ends
        self._shorter = [0, 0]
        for symbol in symbols[1:]:
            self._shorter.append(self._longer(self._shorter[-1], symbol))

    @property
    def characters(self) -> int:
        """How many of the newest characters may belong to the stop string."""
        return self._characters[self._found]

    def feed(self, symbol: str | int) -> bool:
        """Whether the stop string is complete with this symbol."""
        if isinstance(symbol, str) or self._sees_tokens:
            self._found = self._longer(self._found, symbol)
        return self._found == len(self._symbols)

    def _longer(self, found: int, symbol: str | int) -> int:
        while found and self._symbols[found] != symbol:
            found = self._shorter[found]
        return found + (self._symbols[found] == symbol)


def _patterns(text: str, hidden: Mapping[int, str]) -> Iterator[_Stop]:
    """A stop string in characters, and with special tokens in place of their text."""
    yield _Stop(text, text)
    ids = {content: token for token, content in hidden.items() if content and content in text}
    if ids:
        longest_first = sorted(ids, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        yield _Stop(text, [s for part in parts for s in ([ids[part]] if part in ids else part)])
