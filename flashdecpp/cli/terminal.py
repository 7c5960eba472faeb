"""Standard streams and exit status of the command line."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TextIO

_SURROGATES = re.compile("[\ud800-\udfff]")  # how Python decodes bytes that are not UTF-8


def prepare() -> None:
    """Makes the streams replace what they cannot encode or decode, so that no answer ends midway."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):  # None if the shell has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())


def unusable() -> tuple[type[BaseException], ...]:
    """Errors that a person at a terminal can act on: an unusable model, prompt or setting."""
    torch = sys.modules.get("torch")  # only if it is imported can its error have been raised
    return (ValueError, MemoryError) + (() if torch is None else (torch.OutOfMemoryError,))


def _expected() -> tuple[type[BaseException], ...]:
    """Those that one line explains: also a file that cannot be used, or a package that is missing."""
    return (*unusable(), OSError, ImportError)


class _OnlyErrors(io.TextIOBase):
    """Takes the place of stderr with --quiet: drops everything, and keeps the stream for errors."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Shows errors on stderr, and nothing else: no progress bars, statistics or notes."""
    with redirect_stderr(_OnlyErrors(sys.stderr)):
        yield


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns expected errors into one line and exit status 1; 130 after Ctrl-C, 0 after a closed pipe."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except _expected() as error:
        complain(error)
        sys.exit(1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)


def complain(error: BaseException, advice: str = "") -> None:
    """Prints an error as one line on stderr."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        text = reason if error.filename is None else f"{error.filename}: {reason}"
    else:
        text = str(error) or type(error).__name__
    stream = sys.stderr.stream if isinstance(sys.stderr, _OnlyErrors) else sys.stderr
    print(f"flashdecpp: {' '.join(text.splitlines())}{advice}", file=stream, flush=True)


def clean(text: str) -> str:
    """A command-line argument as valid Unicode, with U+FFFD for every undecodable byte."""
    return _SURROGATES.sub("\ufffd", text)


def read_text(path: Path | None) -> str:
    """Reads a file, or standard input, as UTF-8 with U+FFFD for undecodable bytes."""
    if path is not None:
        data = path.read_bytes()
    elif sys.stdin is None:
        raise ValueError("standard input is closed")
    else:
        if sys.stdin.isatty():
            print("Type the prompt, end it with Ctrl-D:", file=sys.stderr)
        data = sys.stdin.buffer.read()
    return data.decode("utf-8-sig", "replace").replace("\r\n", "\n")


def _flush(stream: TextIO) -> None:
    """Drops output that can no longer be written, so that the interpreter does not try again at exit."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
