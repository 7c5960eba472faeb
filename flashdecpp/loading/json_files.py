"""The small files of a model folder, checked before a library reads them."""

import os
from pathlib import Path
from typing import Any

from flashdecpp import _files
from flashdecpp.errors import ModelError

# Files that transformers opens by itself if they exist.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def read_json(path: Path, kind: type = dict) -> Any:
    """The value in a JSON file, which must be of `kind` (dict, list, ...).

    Raises a ModelError if the file is missing, not a regular file, a Git LFS pointer, not valid JSON, far too
    deep or large, or holds a value of another kind.
    """
    if not path.exists():
        raise ModelError(f"{path.parent} has no {path.name}; a model folder must have one")
    return _files.read_json(path, kind, ModelError)


def check_file(path: Path) -> Path:
    """Returns the path of a readable file. Raises a ModelError that says what it is instead."""
    _files.check_file(path, ModelError)
    return path


def check_small_files(folder: Path) -> None:
    """Raises a ModelError for one of SMALL_FILES that is a pipe, a folder, a Git LFS pointer, huge, ..."""
    for name in SMALL_FILES:
        if os.path.lexists(folder / name):
            _files.check_small(folder / name, ModelError)
