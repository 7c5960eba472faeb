"""Small tokenizers for the runner's tests, as folders and as GGUF metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner_models import byte_tokens, save_tokenizer

from flashdecpp.loading.gguf_header import Metadata
from flashdecpp.loading.gguf_tokenizer import GGUFTokenizer
from flashdecpp.loading.tokenizer import FolderTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGED = ["▁h", "el", "lo", "▁hel", "▁hello", "▁w", "or"]  # in merge order
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *MERGED, *"▁helowrd,"]
KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(MERGED) + 9)]
SCORES = [0.0] * 259 + [-float(i) for i in range(len(MERGED) + 9)]


def folder_tokenizer(folder: Path, *specials: str, **settings: Any) -> FolderTokenizer:
    """Byte-level (runner_models), with extra special tokens from 259 on. settings: tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": 259 + i, "content": token, **flags} for i, token in enumerate(specials)]
    edit_json(folder / "tokenizer.json", lambda values: values["added_tokens"].extend(added))
    edit_json(folder / "tokenizer_config.json", lambda values: values.update(settings))
    if "chat_template" in settings:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return FolderTokenizer(folder)


def edit_json(path: Path, change: Any) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def gguf_tokenizer(*more: str, kind: int = CONTROL, **values: Any) -> GGUFTokenizer:
    """Byte-level, with extra tokens of the given kind from 259 on.

    values: metadata under "tokenizer.ggml.", with __ for dots; None drops a key.
    """
    tokens = [*byte_tokens(), *more]
    usual = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * 256 + [CONTROL] * 3 + [kind] * len(more),
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return _from_metadata(usual | values)


def spm_tokenizer(*more: str, kind: int = CONTROL, **values: Any) -> GGUFTokenizer:
    """A SentencePiece tokenizer of PIECES."""
    usual = {
        "model": "llama",
        "tokens": [*PIECES, *more],
        "scores": [*SCORES, *[0.0] * len(more)],
        "token_type": [*KINDS, *[kind] * len(more)],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _from_metadata(usual | values)


def _from_metadata(values: dict[str, Any]) -> GGUFTokenizer:
    metadata = Metadata(Path("model.gguf"))
    for name, value in values.items():
        if value is not None:
            prefix = "tokenizer." if name.startswith("chat_template") else "tokenizer.ggml."
            metadata[prefix + name.replace("__", ".")] = value
    return GGUFTokenizer(metadata)


def protobuf(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffers message."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def write_sentencepiece(
    path: Path,
    *,
    pieces: Sequence[str] = PIECES,
    kind: int = 2,
    add_space: int = 1,
    remove_spaces: int = 0,
) -> None:
    """Writes a tokenizer.model of these pieces, with KINDS and SCORES."""
    whole = b"".join(
        protobuf(1, protobuf(1, piece.encode()) + protobuf(2, score) + protobuf(3, its))
        for piece, score, its in zip(pieces, SCORES, KINDS, strict=True)
    )
    whole += protobuf(2, protobuf(3, kind) + protobuf(35, 1))
    whole += protobuf(
        3, protobuf(1, b"identity") + protobuf(2, b"") + protobuf(3, add_space) + protobuf(4, remove_spaces)
    )
    path.write_bytes(whole)
