"""Chat templates: messages to a prompt, rendered by transformers for folders and GGUF files alike."""

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import Tokenizer, models

from flashdecpp.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Tool = Mapping[str, Any] | Callable[..., Any]  # a JSON schema, or a function with type hints and a docstring
Result = TypeVar("Result")

RENDER_SECONDS = 5.0  # a thousand times what a template of a real model takes


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> str:
    """The messages by the tokenizer's chat template, up to where the answer begins.

    A template comes with the model: it runs in jinja's sandbox, and not for long. ModelError for what it
    doesn't do, for messages that are none, and for a model without a template.
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
            f"the chat template is not done after {RENDER_SECONDS:g} seconds; its loops may have no end"
        ) from None
    except Exception as error:  # templates raise what they like
        raise ModelError(f"the chat template refuses these messages: {first_line(error)}") from error


def template_renderer(
    template: str | dict[str, str] | None, **special_tokens: str
) -> "PreTrainedTokenizerBase":
    """A tokenizer of transformers that is good for nothing but render_chat.

    template: one, or several by name ("default", "tool_use"). special_tokens: bos_token and the like, which
    templates may write.
    """
    from transformers import PreTrainedTokenizerFast  # late: it is slow to import

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **special_tokens
    )


def check_messages(messages: Iterable[Message]) -> list[Message]:
    """The messages as a list of dicts; a ModelError names the first that isn't one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ModelError(f"messages must be a list of messages, got {_kind(messages)}")
    messages = list(messages)
    if not messages:
        raise ModelError("messages must have one message or more, got none")
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
    """The tools as a list, None for no tools; a ModelError names the first that isn't one."""
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
    """Ends the thread of a template: no `except Exception` on the way stops it."""


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises; TimeoutError where that takes longer."""
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
    finally:  # an interrupt by the user, too
        ended = not thread.is_alive()
        if not ended:
            _end(thread)
    if not ended:
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def _end(thread: threading.Thread) -> None:
    """Raises an exception in a thread, for Python has no other way to end one.

    It takes effect between two steps of the template. A finalizer that is at work swallows it, hence the
    repetition.
    """
    for _ in range(10):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Ended))
        thread.join(0.1)
        if not thread.is_alive():
            return
