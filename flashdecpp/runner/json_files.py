"""The JSON files of a model folder."""

from pathlib import Path
from typing import Any

from flashdecpp import _files

from .errors import ModelError


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
