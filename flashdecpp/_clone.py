"""Lets a clone that was not built give way to the package that is installed elsewhere.

Python started in a clone finds the clone's package first. Built there or not, `import flashdecpp` must work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def built_folders(folders: Iterable[str]) -> list[str]:
    """The package's folders for `__path__`: the first built one on sys.path if these were not built."""
    own = list(folders)
    if not any(_is_built(Path(folder)) for folder in own):
        for entry in sys.path:
            folder = Path(entry or ".").resolve() / "flashdecpp"
            if _is_built(folder):
                return [str(folder)]
    return own


def _is_built(folder: Path) -> bool:
    """Whether a package folder holds the CPU op library, and the module _C for this Python."""
    modules = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return (folder / "lib" / "libflashdecpp_cpu.so").exists() and any(module.exists() for module in modules)
