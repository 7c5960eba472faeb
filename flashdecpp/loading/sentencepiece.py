"""SentencePiece byte-pair encoding through the tokenizers library, for ChatGLM2 and GGUF files."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from flashdecpp.errors import ModelError

from .json_files import check_file

# Kinds of pieces in SentencePiece and GGUF files
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

SPACE = "\u2581"

MAX_BYTES = 64 << 20  # of a file; the largest vocabularies have 5 MB
MAX_WORK = 1 << 27  # characters compared to find the merges; real vocabularies need up to 1 << 25

# A line of a tiktoken vocabulary: the bytes of a token in base64, and its rank
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in the order of their ids. Those with higher scores are merged first."""

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    add_space: bool = True  # at the beginning of a text

    def tokenizer(self) -> Tokenizer:
        """A tokenizer whose special tokens are the CONTROL and UNKNOWN pieces. ModelError for huge pieces."""
        if sum(len(piece) ** 2 for piece in self.pieces) > MAX_WORK:
            raise ModelError("the SentencePiece vocabulary has pieces that are far too long for one")
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        merges = []
        for piece, score, kind in zip(self.pieces, self.scores, self.kinds, strict=True):
            if kind == NORMAL:
                halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
                merges += [(-score, ids[a], ids[b]) for a, b in halves if a in ids and b in ids]
        pairs = [(self.pieces[a], self.pieces[b]) for _, a, b in sorted(merges)]
        unknown = next((p for p, kind in zip(self.pieces, self.kinds, strict=True) if kind == UNKNOWN), None)
        tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        steps: list[Any] = [normalizers.Replace(" ", SPACE)]
        ends = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.add_space:
            steps.insert(0, normalizers.Prepend(SPACE))
            ends.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(ends)
        add_special_tokens(tokenizer, self.pieces, self.kinds)
        return tokenizer


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Adds CONTROL and UNKNOWN tokens as special ones, and USER_DEFINED ones so that they are never split."""
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if token and kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )


def read_vocabulary(path: Path) -> Vocabulary:
    """Reads a SentencePiece model file. ModelError for others and for anything but byte-pair encoding."""
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path} is not a SentencePiece model: it has more than {MAX_BYTES} bytes")
    check_not_tiktoken(path)
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        training = dict(_fields(next(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(next(value for number, value in fields if number == 3)))
        vocabulary = Vocabulary(
            [piece[1].decode() for piece in pieces],
            [float(piece.get(2, 0.0)) for piece in pieces],
            [int(piece.get(3, NORMAL)) for piece in pieces],
            add_space=bool(normalizer.get(3, 1)),
        )
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, StopIteration, struct.error):
        raise ModelError(f"{path} is not a SentencePiece model") from None
    if training.get(3) != 2 or normalizer.get(2) or normalizer.get(4, 1):
        raise ModelError(
            f"{path} is not byte-pair encoding of plain text, the only supported SentencePiece model"
        )
    return vocabulary


def check_not_tiktoken(path: Path) -> None:
    """Raises a ModelError for a tiktoken vocabulary, which GLM-4 stored under the same name."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(4096)
    if TIKTOKEN_LINE.match(start):
        raise ModelError(
            f"{path} is not a SentencePiece model but a tiktoken vocabulary, as GLM-4 was first released: "
            "add the tokenizer.json of the model's newer release (for GLM-4, names that end in -hf)"
        )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value (int, float or bytes) of each field of a protocol buffers message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        value: int | float | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        else:
            raise ValueError(f"field {number} has the wire type {kind}, which these files don't use")
        yield number, value
    if at != len(message):
        raise ValueError("truncated")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
