"""Renders messages to a prompt by a model's chat template, through transformers."""

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import Tokenizer, models

from flashdecpp.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Tool = Mapping[str, Any] | Callable[..., Any]  # a JSON schema, or a function with type hints and a docstring
Result = TypeVar("Result")

RENDER_SECONDS = 5.0  # a thousand times longer than a real model's template needs


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Iterable[Message], tools: Iterable[Tool] | None = None
) -> str:
    """The messages rendered by the tokenizer's chat template, up to the beginning of the answer.

    Templates come with the model and are not trusted: they run in jinja's sandbox for a limited time. Raises
    a ModelError if the template fails, for invalid messages, and for a model without a template.
    """
    messages, tools = check_messages(messages), check_tools(tools)
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template; use generate with a plain prompt")
    try:
        return _within(
            RENDER_SECONDS,
            lambda: tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            ),
        )
    except TimeoutError:
        raise ModelError(
            f"the chat template did not finish within {RENDER_SECONDS:g} seconds; it may loop forever"
        ) from None
    except Exception as error:  # templates may raise anything
        raise ModelError(f"the chat template refuses these messages: {first_line(error)}") from error


def template_renderer(
    template: str | dict[str, str] | None, **special_tokens: str
) -> "PreTrainedTokenizerBase":
    """A transformers tokenizer that only serves render_chat.

    template: one, or several by name ("default", "tool_use"). special_tokens: bos_token and others that
    templates may write.
    """
    from transformers import PreTrainedTokenizerFast  # late: slow to import

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **special_tokens
    )


def check_messages(messages: Iterable[Message]) -> list[Message]:
    """The messages as a list of dicts. A ModelError names the first invalid one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ModelError(f"messages must be a list of messages, got {_kind(messages)}")
    messages = list(messages)
    if not messages:
        raise ModelError("messages must have at least one message, got none")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ModelError(f"{name} must be like {{'role': ..., 'content': ...}}, got {_kind(message)}")
        if not isinstance(message.get("role"), str):
            raise ModelError(f"{name}['role'] must be a string, got {_kind(message.get('role'))}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str | list | tuple):
            raise ModelError(f"{name}['content'] must be a string or a list of parts, got {_kind(content)}")
    return [dict(message) for message in messages]


def check_tools(tools: Iterable[Tool] | None) -> list[Tool] | None:
    """The tools as a list, or None without tools. A ModelError names the first invalid one."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise ModelError(f"tools must be a list of functions or JSON schemas, got {_kind(tools)}")
    tools = list(tools)
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) and not callable(tool):
            raise ModelError(f"tools[{index}] must be a function or a JSON schema, got {_kind(tool)}")
    return [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools] or None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


class _Ended(BaseException):
    """Ends the thread of a template. No `except Exception` on the way catches it."""


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Returns or raises what `call` does, or raises TimeoutError if it takes longer."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="chat template", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also on Ctrl-C
        ended = not thread.is_alive()
        if not ended:
            _end(thread)
    if not ended:
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def _end(thread: threading.Thread) -> None:
    """Raises an exception in a thread, the only way to end one in Python.

    It takes effect between two steps of the template. Repeated because a running finalizer swallows it.
    """
    for _ in range(10):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Ended)
        )
        thread.join(0.1)
        if not thread.is_alive():
            return
