"""`flashdecpp chat`: a conversation at a terminal, or over a pipe with one turn per line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from .answers import print_stats, print_stream
from .terminal import clean, complain, unusable

if TYPE_CHECKING:
    from flashdecpp import LLM, SamplingParams

PROMPT = "> "


def converse(llm: LLM, params: SamplingParams, system: str | None = None) -> None:
    """Answers every turn until the input ends. One that fails is reported on a line and dropped."""
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
        except unusable() as error:
            complain(error, "; /new starts over")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
        print_stats(llm)


def _turns() -> Iterator[str]:
    """Yields the lines of standard input that are not blank."""
    if sys.stdin is None:
        return
    typed = sys.stdin.isatty()
    # With a terminal at both ends Python edits the line itself and draws the prompt on standard output.
    edited = typed and sys.stdout.isatty()
    if edited:
        with suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            if typed and not edited:
                print(PROMPT, end="", file=sys.stderr, flush=True)
            text = clean(input(PROMPT if edited else "")).strip()
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
