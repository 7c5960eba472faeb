"""SentencePiece's byte-pair encoding, as the tokenizers library runs it: ChatGLM2's files and GGUF files."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from flashdecpp.errors import ModelError

from .json_files import check_file

# Kinds of pieces, in SentencePiece's files as in GGUF's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

SPACE = "\u2581"

MAX_BYTES = 64 << 20  # of a file; the largest vocabularies have 5 MB
MAX_WORK = 1 << 27  # characters to compare when merges are looked for; they need up to 1 << 25

# A line of a tiktoken vocabulary: the bytes of a token in base64, and its rank
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in the order of their ids; the higher the score, the earlier two pieces are merged into one."""

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    add_space: bool = True  # before the text

    def tokenizer(self) -> Tokenizer:
        """With CONTROL and UNKNOWN pieces as its special tokens. ModelError where that makes no sense."""
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
        steps = [normalizers.Replace(" ", SPACE)]
        ends = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.add_space:
            steps.insert(0, normalizers.Prepend(SPACE))
            ends.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(ends)
        add_special_tokens(tokenizer, self.pieces, self.kinds)
        return tokenizer


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Makes those tokens special whose kinds say so; user-defined ones are only never split."""
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if token and kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )


def read_vocabulary(path: Path) -> Vocabulary:
    """Of a SentencePiece model file. ModelError for other files, and for what is not byte-pair encoding."""
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
        raise ModelError(f"{path} does not hold byte-pair encoding of plain text, which alone is supported")
    return vocabulary


def check_not_tiktoken(path: Path) -> None:
    """A ModelError for a file of that name in another library's format."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(4096)
    if TIKTOKEN_LINE.match(start):
        raise ModelError(
            f"{path} is not a SentencePiece model but a tiktoken vocabulary, as GLM-4 was first published "
            "with: put the tokenizer.json of the model's newer version (GLM-4's names end in -hf) beside it"
        )


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field of a protocol buffers message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        else:
            raise ValueError(f"field {number} is of the kind {kind}, which these files don't use")
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
