"""The standard streams of the command line: text in, text out, and how a run ends."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch

from flashdecpp._interrupt import raise_again

# Of a model, a prompt or a setting: what a person at a terminal can act on.
UNUSABLE = (ValueError, MemoryError, torch.OutOfMemoryError)

_SURROGATES = re.compile("[\ud800-\udfff]")  # what Python has in place of bytes that are no text


def prepare() -> None:
    """What a terminal can't show is replaced, as is input that is no text: neither ends an answer midway."""
    raise_again()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):  # None where the shell has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Every expected error is a line on stderr and exit status 1; 130 after Ctrl-C, 0 after a closed pipe."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except (*UNUSABLE, OSError, ImportError) as error:
        complain(error)
        sys.exit(1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)


def complain(error: BaseException, advice: str = "") -> None:
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        text = reason if error.filename is None else f"{error.filename}: {reason}"
    else:
        text = str(error) or type(error).__name__
    print(f"flashdecpp: {' '.join(text.splitlines())}{advice}", file=sys.stderr)


def clean(text: str) -> str:
    """An argument of the command line as text: U+FFFD for every byte that is none."""
    return _SURROGATES.sub("\ufffd", text)


def read_text(path: Path | None) -> str:
    """A file's text, or standard input's: UTF-8, with U+FFFD for bytes that are none."""
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
    """What can't be written any more is dropped, so that the interpreter doesn't try again when it ends."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
