"""`flashdecpp chat`: turns of a person at a terminal, or lines of a pipe, and a model's answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from .answers import print_stats, print_stream
from .terminal import UNUSABLE, clean, complain

if TYPE_CHECKING:
    from flashdecpp import LLM, SamplingParams

SIGN = "> "


def converse(llm: LLM, params: SamplingParams, system: str | None = None) -> None:
    """Answers every turn until the input ends. A turn that can't be answered is a line, and forgotten."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = opening
    print(
        f"{llm.name} on {llm.device}. Ctrl-C ends an answer, Ctrl-D the conversation, /new forgets it.",
        file=sys.stderr,
    )
    for text in _turns():
        if text == "/new":
            messages = opening
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            answer, _ = print_stream(llm.chat(asked, params, stream=True))
        except UNUSABLE as error:
            complain(error, "; /new starts over")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
        print_stats(llm)


def _turns() -> Iterator[str]:
    """What is typed, line by line, without blank ones."""
    if sys.stdin is None:
        return
    typed = sys.stdin.isatty()
    # Line editing, where Python knows that both are a terminal, draws the sign itself, on standard output.
    edited = typed and sys.stdout.isatty()
    if edited:
        with suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            if typed and not edited:
                print(SIGN, end="", file=sys.stderr, flush=True)
            text = clean(input(SIGN if edited else "")).strip()
        except EOFError:
            if typed:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            print(file=sys.stderr)
            continue
        if text:
            yield text
