"""The files of a model folder beside its weights: what they are is looked at before a library reads them."""

import os
from pathlib import Path
from typing import Any

from flashdecpp import _files
from flashdecpp.errors import ModelError

# What transformers opens by itself where it is there.
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SMALL_FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
SMALL_FILES += ("chat_template.jinja", "chat_template.json")


def read_json(path: Path, kind: type = dict) -> Any:
    """What the file holds, which must be of `kind`: dict, list, ...

    A ModelError says what else it is: missing, not valid JSON, too deep or too large to be believed, of
    another kind, no file at all (a folder, a pipe), a Git LFS pointer.
    """
    if not path.exists():
        raise ModelError(f"{path.parent} has no {path.name}; a model folder must have one")
    return _files.read_json(path, kind, ModelError)


def check_file(path: Path) -> Path:
    """The path, where it is that of a file that can be read; a ModelError says what it is instead."""
    _files.check_file(path, ModelError)
    return path


def check_small_files(folder: Path) -> None:
    """A ModelError where one of SMALL_FILES is there, but a pipe, a folder, a Git LFS pointer, huge, ..."""
    for name in SMALL_FILES:
        if os.path.lexists(folder / name):
            _files.check_small(folder / name, ModelError)
