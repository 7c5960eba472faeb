"""Text to token ids and back: what the runner asks of a tokenizer, and that of a Hugging Face folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
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

COUNTED = 1 << 16  # characters of a text that are encoded at once only to be counted
MAX_TOKEN_ID = 1 << 24  # beyond every vocabulary
DENSE = 8  # characters of a token: text of more for each token that fits is counted first


class BaseTokenizer:
    """What the runner asks of a tokenizer.

    eos_ids: the tokens that end an answer. special_tokens: the text of those that decode leaves out, by id.
    """

    eos_ids: tuple[int, ...] = ()
    special_tokens: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str, add_special_tokens: bool = True, *, limit: int | None = None) -> list[int]:
        """The text's token ids. ModelError for what is no text.

        A text that is far beyond `limit` tokens is a ModelError, too, before it takes the time and memory;
        one that is a little beyond is not.
        """
        _check_text(text)
        with model_error("the tokenizer can't encode the text"):
            if limit is not None and len(text) > max(COUNTED, DENSE * limit):
                self._check_length(text, limit)
            return self._encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text, special tokens left out unless skip_special_tokens is False."""
        raise NotImplementedError

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> str:
        """The messages in the model's chat format, up to where its answer begins.

        tools: functions, or JSON schemas of functions, that the model may ask for.
        """
        raise NotImplementedError

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        limit: int | None = None,
    ) -> list[int]:
        """The tokens of chat_prompt, whose template writes special tokens itself; `limit` as for encode."""
        return self.encode(self.chat_prompt(messages, tools), add_special_tokens=False, limit=limit)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def _check_length(self, text: str, limit: int) -> None:
        """Counts piece by piece. Divided text may have more tokens: twice the limit is too many."""
        tokens, most = 0, 2 * limit + len(text) // COUNTED + 1
        for start in range(0, len(text), COUNTED):
            tokens += len(self._encode(text[start : start + COUNTED], False))
            if tokens > most:
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
            f"the text has U+{ord(text[error.start]):04X} at character {error.start}, which is half a "
            "character and no Unicode text; decode bytes with errors='replace'"
        ) from None


@contextmanager
def model_error(what: str) -> Iterator[None]:
    """Makes a ModelError of one line of whatever a library raises here.

    The tokenizers library's own panics are no Exceptions.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


class FolderTokenizer(BaseTokenizer):
    """The tokenizer files of a Hugging Face folder, through transformers.

    Code that lies in the folder is never run, and nobody is asked whether it may. An answer ends where
    transformers would end it: at the tokens of config.json and generation_config.json, and at the tokenizer's
    own end-of-sequence; the chat template isn't searched for others.
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
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> str:
        return render_chat(self._tokenizer, messages, tools)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _check_ids(path: Path) -> None:
    """The tokenizers library keeps a table as long as the largest token id, and ends the process without it.

    A search for long numbers comes first, since parsing the file takes several times as long.
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
    """own_code: the folder names a class of its own. tokenizer.json says the same without it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # late: slow to import

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception:
        if (folder / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        if own_code:
            raise ModelError(
                f"the tokenizer in {folder} is code of that folder, which is never run; "
                "save it there as tokenizer.json"
            ) from None
        raise
