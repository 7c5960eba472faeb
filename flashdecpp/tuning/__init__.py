"""The switch of linear(impl="auto"), the paper's third idea (FlashDecoding++ section 5, heuristic dataflow).

For every device, dtype and shape [N, K] of a weight two inflection points say which implementation is the
fastest for M rows of x. `table` keeps them, `tuner` measures them. On import the package hands those that it
finds to the op libraries: tables/ in this folder, which come with the package, then tables/ in the cache
folder ($FLASHDECPP_CACHE, else ~/.cache/flashdecpp), where `flashdecpp tune` writes and which win.
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

__all__ = ["Found", "Table", "TableError", "find_tables", "install", "user_folder"]


@dataclass(frozen=True)
class Found:
    """The tables that there are, one a device, with the files that each came from; and files that are bad."""

    tables: dict[str, Table] = field(default_factory=dict)  # by the device's name
    files: dict[str, list[Path]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def shipped_folder() -> Path:
    return Path(__file__).parent / "tables"


def user_folder() -> Path:
    return cache_folder() / "tables"


def _folders() -> list[Path]:
    try:
        return [shipped_folder(), user_folder()]
    except OSError:  # no home: no tables of the user's
        return [shipped_folder()]


def find_tables(folders: Sequence[Path] | None = None) -> Found:
    """Every table in the folders, a later folder's profiles before an earlier one's."""
    found = Found()
    for folder in _folders() if folders is None else folders:
        for path in sorted(folder.glob("*.json")):
            try:
                table = Table.load(path)
                known = found.tables.get(table.device)
                found.tables[table.device] = known.merged(table) if known else table
                found.files.setdefault(table.device, []).append(path)
            except TableError as error:
                found.problems.append(str(error))
    return found


def install() -> None:
    """Hands the tables to the op libraries. A bad file is a warning: without it the default rule holds."""
    found = find_tables()
    for problem in found.problems:
        warnings.warn(f"flashdecpp: {problem}. Until then linear goes by its default rule", stacklevel=2)
    for table in found.tables.values():
        if table.kind == "cuda" and gpu_library().loaded:
            install_linear_table(gpu_library().name, table.device, rows(table))
        elif table.kind == "cpu" and table.device == device_name(torch.device("cpu")):
            install_linear_table("cpu", "cpu", rows(table))


def rows(table: Table) -> list[LinearRow]:
    """The table as the op libraries take it."""
    return [(int(getattr(_C.DType, p.dtype)), p.n, p.k, p.m1, p.m2, p.m[-1]) for p in table.profiles]
