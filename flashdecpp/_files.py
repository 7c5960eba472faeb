"""Files that others wrote: what they are is looked at before anything waits for them or believes them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

# Far more than any model's. The largest tokenizer.json has 35 MB, and half a million merges that are lists.
MAX_JSON_BYTES = 64 << 20
MAX_JSON_CONTAINERS = 1 << 21
MAX_JSON_DEPTH = 64
JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}

# How files begin that only stand for the one that was meant.
_STAND_INS = {
    b"version https://git-lfs.github.com/spec/": "is a Git LFS pointer, not the file: run git lfs pull",
    b"<!doctype html": "is a web page, not the file: download it again",
    b"<html": "is a web page, not the file: download it again",
}


def check_file(path: Path, error: type[ValueError]) -> None:
    """Raises `error` for what isn't a file that can be read, and for one that only stands for another.

    A pipe or a device is never opened: that might wait forever.
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
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise error(f"{path} is {what}, but must be a file")
    for beginning, what in _STAND_INS.items():
        if start.startswith(beginning):
            raise error(f"{path} {what}")


def read_json(path: Path, kind: type, error: type[ValueError]) -> Any:
    """What a JSON file holds, which must be of `kind`: dict, list, ... Else raises `error`, one line."""
    try:
        value = parse_json(read_small(path, error))
    except JSONError as problem:
        raise error(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(value, kind):
        raise error(f"{path} must hold {json_kind(kind)}, got {json_kind(type(value))}")
    return value


def check_small(path: Path, error: type[ValueError]) -> None:
    """As check_file; and the file must not be larger than any JSON file is."""
    check_file(path, error)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise error(
            f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that a file of its kind may have"
        )


def read_small(path: Path, error: type[ValueError]) -> bytes:
    """The bytes of such a file."""
    check_small(path, error)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path} can't be read: {problem.strerror}") from None


class JSONError(ValueError):
    """Bytes that are no JSON, or JSON of a depth or size that nobody needs."""


def parse_json(text: bytes) -> Any:
    """The value that UTF-8 bytes hold. Raises JSONError."""
    if text.count(b"[") + text.count(b"{") > MAX_JSON_CONTAINERS:
        raise JSONError(f"more than {MAX_JSON_CONTAINERS} lists and objects")
    too_deep = f"lists and objects within more than {MAX_JSON_DEPTH} others"
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise JSONError(too_deep) from None
    except ValueError as error:
        raise JSONError(str(error)) from None
    level = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [item for items in level for item in items if isinstance(item, dict | list)]
        if not level:
            return value
        level = [item.values() if isinstance(item, dict) else item for item in level]
    raise JSONError(too_deep)


def json_kind(kind: type) -> str:
    return JSON_KINDS.get(kind, "a number")
