"""The folder in which the package keeps its own files on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FLASHDECPP_CACHE, or ~/.cache/flashdecpp. Raises OSError for a user without a home folder."""
    chosen = os.environ.get("FLASHDECPP_CACHE") or "~/.cache/flashdecpp"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise OSError(f"{chosen} can't be found: there is no home folder; set FLASHDECPP_CACHE") from None
