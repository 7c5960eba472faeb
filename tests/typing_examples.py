"""What a type checker sees of the public API. mypy reads this file (`make lint`); nothing runs it."""

from __future__ import annotations

from typing_extensions import assert_type

from flashdecpp import LLM, Completion


def llm_examples(llm: LLM) -> None:
    assert_type(llm.generate("hello"), list[Completion])
