"""Where the package keeps files of its own on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FLASHDECPP_CACHE, else ~/.cache/flashdecpp."""
    chosen = os.environ.get("FLASHDECPP_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "flashdecpp"
