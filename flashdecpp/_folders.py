"""The folder in which the package keeps its own files on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FLASHDECPP_CACHE, else flashdecpp in $XDG_CACHE_HOME, else ~/.cache/flashdecpp.

    Raises OSError for a user without a home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # as its specification demands
        caches = "~/.cache"
    chosen = os.environ.get("FLASHDECPP_CACHE") or os.path.join(caches, "flashdecpp")
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise OSError(f"{chosen} can't be found: there is no home folder; set FLASHDECPP_CACHE") from None
