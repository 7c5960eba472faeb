"""The command line, `flashdecpp` or `python -m flashdecpp`."""

from __future__ import annotations

import sys

from flashdecpp._requirements import need


def main() -> None:
    """Runs the command line. An expected error is one line on stderr and exit status 1."""
    try:
        need("the command line")
    except ImportError as error:
        sys.exit(f"flashdecpp: {error}")
    from .app import run

    run()
