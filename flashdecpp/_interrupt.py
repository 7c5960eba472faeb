"""Lets Ctrl-C end the command line without a traceback while torch is imported, which takes seconds.

Imported before torch. Has no effect if another program imports the package.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


def is_command_line() -> bool:
    """Whether this is `flashdecpp ...` or `python -m flashdecpp ...` (which imports the package first)."""
    if sys.argv[:1] == ["-m"]:
        return ("-m", "flashdecpp") in itertools.pairwise(sys.orig_argv)
    return any(Path(program).name == "flashdecpp" for program in sys.argv[:1])


def _set(handler: Handler, instead_of: Handler) -> None:
    if signal.getsignal(signal.SIGINT) is instead_of:
        signal.signal(signal.SIGINT, handler)


def raise_again() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, as in any program."""
    _set(signal.default_int_handler, instead_of=signal.SIG_DFL)


if is_command_line():
    _set(signal.SIG_DFL, instead_of=signal.default_int_handler)
