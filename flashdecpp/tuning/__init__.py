"""Selects the implementation of linear(impl="auto"): the paper's heuristic dataflow (section 5).

Two inflection points per device, dtype and weight shape [N, K] tell which implementation is fastest for M
rows of x. `table` stores them and `tuner` measures them. On import the package installs all tables it finds
in the op libraries: those in tables/ next to this file, overridden by those in tables/ of the cache folder
($FLASHDECPP_CACHE, else ~/.cache/flashdecpp), which `flashdecpp tune` writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashdecpp import _C
from flashdecpp._folders import cache_folder
from flashdecpp._library import LinearRow, gpu_library, install_linear_table

from .device import device_name
from .table import Table, TableError

__all__ = ["Table", "TableError", "TableSet", "find_tables", "install", "user_folder"]


@dataclass(frozen=True)
class TableSet:
    """One table per device with the files it was read from, and the problems of unusable files."""

    tables: dict[str, Table] = field(default_factory=dict)  # by device name
    files: dict[str, list[Path]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def shipped_folder() -> Path:
    return Path(__file__).parent / "tables"


def user_folder() -> Path:
    return cache_folder() / "tables"


def _folders() -> list[Path]:
    try:
        return [shipped_folder(), user_folder()]
    except OSError:  # no home folder, so no tables of the user
        return [shipped_folder()]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.json"))
    except OSError:  # the home folder of another user: as good as none
        return []


def find_tables(folders: Sequence[Path] | None = None) -> TableSet:
    """Reads every table in the folders. Profiles of a later folder replace those of an earlier one."""
    found = TableSet()
    for folder in _folders() if folders is None else folders:
        for path in _files(folder):
            try:
                table = Table.load(path)
                known = found.tables.get(table.device)
                found.tables[table.device] = known.merged(table) if known else table
                found.files.setdefault(table.device, []).append(path)
            except TableError as error:
                found.problems.append(str(error))
    return found


def install() -> None:
    """Installs the tables in the op libraries. Warns of unusable files: the default rule applies."""
    found = find_tables()
    for problem in found.problems:
        warnings.warn(f"flashdecpp: {problem}. Until then linear uses its default rule", stacklevel=2)
    for table in found.tables.values():
        if table.kind == "cuda" and gpu_library().loaded:
            install_linear_table(gpu_library().name, table.device, rows(table))
        elif table.kind == "cpu" and table.device == device_name(torch.device("cpu")):
            install_linear_table("cpu", "cpu", rows(table))


def rows(table: Table) -> list[LinearRow]:
    """The table in the op libraries' format."""
    return [(int(getattr(_C.DType, p.dtype)), p.n, p.k, p.m1, p.m2, p.m[-1]) for p in table.profiles]
