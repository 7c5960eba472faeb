"""The interface of tokenizers, and the tokenizer of a Hugging Face folder."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flashdecpp.errors import ModelError

from .json_files import check_small_files, read_json
from .sentencepiece import check_not_tiktoken
from .templates import Message, Tool, first_line, render_chat
from .text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BaseTokenizer", "FolderTokenizer", "Message", "TextStream", "Tool", "model_error"]

COUNT_CHUNK = 1 << 16  # characters encoded at a time to count the tokens of a long text
MAX_TOKEN_ID = 1 << 24  # beyond every vocabulary
LONG_TOKENS = 8  # characters per token: a text with more of them than the limit allows is counted first


class BaseTokenizer:
    """A tokenizer as the runner uses it.

    eos_ids: tokens that end an answer. special_tokens: id -> text of the tokens that decode leaves out.
    """

    eos_ids: tuple[int, ...] = ()
    special_tokens: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str, add_special_tokens: bool = True, *, limit: int | None = None) -> list[int]:
        """The token ids of a text. Raises a ModelError if it is not valid Unicode.

        A text of far more than `limit` tokens is refused before it costs time and memory; one of slightly
        more is not.
        """
        _check_text(text)
        with model_error("the tokenizer can't encode the text"):
            if limit is not None and len(text) > max(COUNT_CHUNK, LONG_TOKENS * limit):
                self._check_length(text, limit)
            return self._encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens, without special ones unless skip_special_tokens is False."""
        raise NotImplementedError

    def chat_prompt(self, messages: Iterable[Message], tools: Iterable[Tool] | None = None) -> str:
        """The messages in the model's chat format, up to the beginning of its answer.

        tools: functions, or JSON schemas of functions, that the model may call.
        """
        raise NotImplementedError

    def encode_chat(
        self,
        messages: Iterable[Message],
        tools: Iterable[Tool] | None = None,
        *,
        limit: int | None = None,
    ) -> list[int]:
        """The tokens of chat_prompt, whose template writes the special tokens. `limit` as in encode."""
        return self.encode(self.chat_prompt(messages, tools), add_special_tokens=False, limit=limit)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def _check_length(self, text: str, limit: int) -> None:
        """Counts tokens in chunks, which may have more than the whole text: twice the limit is too many."""
        tokens, max_tokens = 0, 2 * limit + len(text) // COUNT_CHUNK + 1
        for start in range(0, len(text), COUNT_CHUNK):
            tokens += len(self._encode(text[start : start + COUNT_CHUNK], False))
            if tokens > max_tokens:
                raise ModelError(
                    f"the prompt of {len(text)} characters has far more tokens than the {limit} that fit"
                )


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ModelError(f"a text to encode must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"the text has U+{ord(text[error.start]):04X} at character {error.start}, a lone surrogate "
            "that is not valid Unicode; decode bytes with errors='replace'"
        ) from None


@contextmanager
def model_error(what: str) -> Iterator[None]:
    """Turns whatever a library raises into a ModelError of one line.

    Panics of the tokenizers library do not derive from Exception.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


class FolderTokenizer(BaseTokenizer):
    """The tokenizer files of a Hugging Face folder, through transformers.

    Code in the folder is never run. As in transformers, an answer ends at the end-of-sequence tokens of
    config.json, generation_config.json and the tokenizer; the chat template is not searched for others.
    """

    VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
    SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

    def __init__(self, folder: Path) -> None:
        names = [name for name in self.VOCABULARIES if (folder / name).exists()]
        if not names:
            raise ModelError(f"{folder} has no tokenizer.json; copy the model's tokenizer files into it")
        check_small_files(folder)
        settings = {name: read_json(folder / name) for name in self.SETTINGS if (folder / name).exists()}
        for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
            if (folder / name).exists():
                _check_ids(folder / name)
        if "tokenizer.json" not in names:
            check_not_tiktoken(folder / "tokenizer.model")
        own_code = "auto_map" in settings.get("tokenizer_config.json", {})
        with model_error(f"the tokenizer in {folder} can't be loaded from {', '.join(names)}"):
            self._tokenizer = _load(folder, own_code)
        eos = self._tokenizer.eos_token_id
        self.eos_ids = () if eos is None else (eos,)
        added = self._tokenizer.added_tokens_decoder.items()
        self.special_tokens = {i: str(token) for i, token in added if token.special}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def chat_prompt(self, messages: Iterable[Message], tools: Iterable[Tool] | None = None) -> str:
        return render_chat(self._tokenizer, messages, tools)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _check_ids(path: Path) -> None:
    """Refuses huge ids: the tokenizers library allocates a table up to the largest and aborts if it cannot.

    Searches for long numbers first, since parsing the file takes several times as long.
    """
    if not re.search(rb'"\s*:\s*\d{8}', path.read_bytes()):
        return
    content = read_json(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else content
    added = content.get("added_tokens")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    largest = max((token for token in ids if isinstance(token, int)), default=0)
    if largest > MAX_TOKEN_ID:
        raise ModelError(f"{path} has a token of the id {largest}; ids must be at most {MAX_TOKEN_ID}")


def _load(folder: Path, own_code: bool) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer. `own_code`: the folder names a class of its own, which tokenizer.json replaces."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # late: slow to import

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception:
        if (folder / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        if own_code:
            raise ModelError(
                f"the tokenizer in {folder} needs code of that folder, which is never run; "
                "save it there as tokenizer.json"
            ) from None
        raise
