"""Reads files that others wrote: their kind and size are checked before they are opened or parsed."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Far above what any model needs. The largest tokenizer.json has 35 MB, and half a million merges as lists.
MAX_JSON_BYTES = 64 << 20
MAX_JSON_CONTAINERS = 1 << 21
MAX_JSON_DEPTH = 64
JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}

# First bytes of files that stand in for the one that was meant.
_STAND_INS = {
    b"version https://git-lfs.github.com/spec/": "is a Git LFS pointer, not the file: run git lfs pull",
    b"<!doctype html": "is a web page, not the file: download it again",
    b"<html": "is a web page, not the file: download it again",
}


def check_file(path: Path, error: type[ValueError]) -> None:
    """Raises `error` unless `path` is a readable regular file with content of its own.

    Pipes and devices are never opened, since that might block forever.
    """
    if "\0" in str(path):
        raise error(f"{str(path)!r} is not a path")
    try:
        mode = path.stat().st_mode
        start = b""
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                start = file.read(64).lower()
    except OSError as problem:
        if path.is_symlink() and not path.exists():
            raise error(f"{path} is a link to a file that isn't there; download it again") from None
        raise error(f"{path} can't be read: {problem.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise error(f"{path} is {kind}, but must be a file")
    for prefix, description in _STAND_INS.items():
        if start.startswith(prefix):
            raise error(f"{path} {description}")


def read_json(path: Path, kind: type, error: type[ValueError]) -> Any:
    """The value in a JSON file, which must be of `kind`: dict, list, ... Raises `error` with one line."""
    try:
        value = parse_json(read_small(path, error))
    except JSONError as problem:
        raise error(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(value, kind):
        raise error(f"{path} must hold {json_kind(kind)}, got {json_kind(type(value))}")
    return value


def check_small(path: Path, error: type[ValueError]) -> None:
    """As check_file, and the file must not exceed MAX_JSON_BYTES."""
    check_file(path, error)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise error(
            f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that a file of its kind may have"
        )


def read_small(path: Path, error: type[ValueError]) -> bytes:
    """The bytes of a file that passes check_small."""
    check_small(path, error)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path} can't be read: {problem.strerror}") from None


class JSONError(ValueError):
    """Bytes that are not JSON, or JSON beyond the limits above."""


def parse_json(text: bytes) -> Any:
    """Parses UTF-8 JSON. Raises JSONError."""
    if text.count(b"[") + text.count(b"{") > MAX_JSON_CONTAINERS:
        raise JSONError(f"more than {MAX_JSON_CONTAINERS} lists and objects")
    too_deep = f"lists and objects within more than {MAX_JSON_DEPTH} others"
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise JSONError(too_deep) from None
    except ValueError as error:
        raise JSONError(str(error)) from None
    level: list[Iterable[Any]] = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
        containers = [item for items in level for item in items if isinstance(item, dict | list)]
        if not containers:
            return value
        level = [item.values() if isinstance(item, dict) else item for item in containers]
    raise JSONError(too_deep)


def json_kind(kind: type) -> str:
    """A Python type as errors name it in JSON's terms."""
    return JSON_KINDS.get(kind, "a number")
