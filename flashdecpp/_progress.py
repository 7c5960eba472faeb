"""Progress bars: on stderr if it is a terminal, and in notebooks."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm  # a widget in a notebook that has ipywidgets


def progress_bar(*, total: float, desc: str, unit: str, shown: bool = True, **options: Any) -> tqdm:
    """A bar that disappears when it is closed. Nothing is drawn if stderr is a file or a pipe."""
    disable = None if shown and not in_notebook() else not shown  # None: tqdm asks isatty()
    return tqdm(total=total, desc=desc, unit=unit, file=sys.stderr, leave=False, disable=disable, **options)


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel, whose stderr is shown although it is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
