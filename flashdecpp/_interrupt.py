"""Ctrl-C while torch is imported, which takes seconds: it ends the command line without a traceback.

Imported before torch. It changes nothing where another program imports the package.
"""

from __future__ import annotations

import itertools
import signal
import sys
from pathlib import Path


def _is_command_line() -> bool:
    """`flashdecpp ...` or `python -m flashdecpp ...`, whose package comes before its __main__."""
    if sys.argv[:1] == ["-m"]:
        return ("-m", "flashdecpp") in itertools.pairwise(sys.orig_argv)
    return any(Path(program).name == "flashdecpp" for program in sys.argv[:1])


def _set(handler: object, instead_of: object) -> None:
    if signal.getsignal(signal.SIGINT) is instead_of:
        signal.signal(signal.SIGINT, handler)


def raise_again() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as in any program."""
    _set(signal.default_int_handler, instead_of=signal.SIG_DFL)


if _is_command_line():
    _set(signal.SIG_DFL, instead_of=signal.default_int_handler)
